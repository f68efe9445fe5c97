"""What the quick start shows in the end: lines for the terminal, and report.html as one file that loads nothing."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

MAIN = "nDCG@10"
MEASURES = {MAIN: "nDCG@10", "RR@10": "MRR@10", "R@100": "Recall@100"}
HEADLINE = {"bm25": "BM25", "dense": "dense", "LENS": "LENS", "LENS + dense": "LENS + dense"}
STEPS = {
    "setup": "install",
    "data": "data",
    "cluster": "cluster the vocabulary",
    "mine": "mine hard negatives",
    "score": "teacher scores",
    "train": "train",
    "evaluate": "evaluate",
    "answer": "search and explain",
}
HUES = 8


def label(system: str) -> str:
    """The name of a system as people know it."""
    return HEADLINE.get(system, system.replace("bm25", "BM25"))


def p_value(p: float | None) -> str:
    """A p value for people."""
    return "" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def differences(content: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(system, other, comparison) on the main measure: LENS against the baselines, the sum against its parts."""
    wanted = [("LENS", "bm25"), ("LENS", "dense"), ("LENS + dense", "LENS"), ("LENS + dense", "dense")]
    found = {(row["system"], row["other"]): row for row in content["comparisons"] if row["measure"] == MAIN}
    return [(label(one), label(two), found[one, two]) for one, two in wanted if (one, two) in found]


def tokens(match: Mapping[str, Any], count: int) -> str:
    """The first few tokens of a matched cluster."""
    return " · ".join(match["tokens"][:count]) or f"cluster {match['cluster']}"


def outcome(content: Mapping[str, Any], width: int = 88) -> str:
    """The results and the answers as lines of text."""
    counts = content["counts"]
    queries, passages = counts["heldout_queries"], counts["heldout_passages"]
    lines = ["", f"{MAIN} on {queries:,} held-out queries, {passages:,} passages", ""]
    systems = {name: content["metrics"][name][MAIN] for name in HEADLINE if name in content["metrics"]}
    longest = max(systems.values(), default=0) or 1
    for name, value in systems.items():
        lines.append(f"  {label(name):<13} {value:.3f}  {'█' * round(40 * value / longest)}")
    lines.append("")
    for one, two, row in differences(content):
        lines.append(f"  {f'{one} against {two}':<27} {row['difference']:+.3f}  {p_value(row['p'])}")
    for entry in content["answers"]:
        lines += ["", f"? {shorten(entry['question'], width - 2)}"]
        for place, hit in enumerate(entry["hits"], 1):
            lines.append(f"  {place}. {hit['score']:.2f}  {hit['id']}{'  (relevant)' if hit['relevant'] else ''}")
            if place == 1:
                lines.append(f"           {shorten(hit['text'], width - 11)}")
                lines += [f"           {m['share']:5.1%}  {tokens(m, 4)}" for m in hit["matches"][:4]]
    return "\n".join([*lines, ""])


def shorten(text: str, width: int) -> str:
    """A text on one line, cut at a word to a width in characters."""
    return textwrap.shorten(text, width, placeholder=" …")


def bar(share: float, text: str, kind: str = "") -> str:
    """One horizontal bar with its figure."""
    return f'<div class="bar {kind}"><i style="width:{100 * share:.1f}%"></i><span>{escape(text)}</span></div>'


def metrics_section(content: Mapping[str, Any]) -> str:
    """Bars of the headline systems, the differences with their significance, and the table of all systems."""
    metrics = content["metrics"]
    top = max((metrics[name][MAIN] for name in metrics), default=0) or 1
    bars = "".join(
        f"<dt>{escape(label(name))}</dt><dd>"
        f"{bar(0.86 * metrics[name][MAIN] / top, f'{metrics[name][MAIN]:.3f}', 'lens' if 'LENS' in name else '')}</dd>"
        for name in HEADLINE
        if name in metrics
    )
    lines = ""
    for one, two, row in differences(content):
        interval = "" if row["low"] is None else f", 95% interval {row['low']:+.3f} to {row['high']:+.3f}"
        significant = row["p"] is not None and row["p"] < 0.05
        word = (
            "no clear difference from" if not significant else "better than" if row["difference"] > 0 else "worse than"
        )
        lines += (
            f"<li><b>{escape(one)}</b> {word} <b>{escape(two)}</b>: {row['difference']:+.3f}"
            f"<small>{interval}, {p_value(row['p'])}</small></li>"
        )
    head = "".join(f"<th>{name}</th>" for name in MEASURES.values())
    best = {measure: max(facts[measure] for facts in metrics.values()) for measure in MEASURES}
    rows = ""
    for name, facts in metrics.items():
        cells = "".join(
            f"<td{' class=best' if facts[measure] == best[measure] else ''}>{facts[measure]:.3f}</td>"
            for measure in MEASURES
        )
        rows += f"<tr><th>{escape(label(name))}</th>{cells}</tr>"
    return (
        f"<dl class=bars>{bars}</dl><ul class=plain>{lines}</ul><details><summary>All systems and measures</summary>"
        f"<div class=wide><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def answers_section(answers: Sequence[Mapping[str, Any]]) -> str:
    """One card per question: its hits, each with a bar of the matched clusters and their tokens."""
    cards = ""
    for entry in answers:
        hues: dict[int, int] = {}  # cluster -> colour, the same in all hits of a question
        hits = ""
        for place, hit in enumerate(entry["hits"], 1):
            for match in hit["matches"]:
                hues.setdefault(match["cluster"], len(hues) % HUES)
            listed = sum(match["share"] for match in hit["matches"]) or 1.0
            parts = "".join(
                f'<i class="h{hues[m["cluster"]]}" style="width:{100 * m["share"] / listed:.2f}%" '
                f'title="{escape(tokens(m, 6))}: {m["share"]:.1%}"></i>'
                for m in hit["matches"]
            )
            chips = "".join(
                f'<li><i class="h{hues[m["cluster"]]}"></i>{escape(tokens(m, 4))} <b>{m["share"]:.1%}</b></li>'
                for m in hit["matches"]
            )
            if hit["other_clusters"]:
                chips += f"<li>{hit['other_clusters']:,} other clusters <b>{max(0.0, 1 - listed):.1%}</b></li>"
            mark = "<em>relevant</em>" if hit["relevant"] else ""
            hits += (
                f"<article><h4><span>{place}</span><code>{escape(hit['id'])}</code>{mark}"
                f"<b>{hit['score']:.3f}</b></h4><p>{escape(shorten(hit['text'], 280))}</p>"
                f"<div class=shares>{parts}</div><ul class=chips>{chips}</ul></article>"
            )
        cards += f"<section class=card><h3>{escape(entry['question'])}</h3>{hits}</section>"
    return cards


def steps_section(content: Mapping[str, Any]) -> str:
    """Bars of the seconds of every step, with its peak memory where it was measured."""
    longest = max(content["seconds"].values(), default=0) or 1
    rows = ""
    for name, seconds in content["seconds"].items():
        memory = content["peak_rss_mb_by_step"].get(name)
        figure = f"{seconds:,.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
        figure += f" · {memory / 1000:.1f} GB" if memory else ""
        rows += f"<dt>{escape(STEPS.get(name, name))}</dt><dd>{bar(0.7 * seconds / longest, figure)}</dd>"
    total = sum(content["seconds"].values())
    return (
        f"<p>{total / 60:.1f} minutes in all; at most {content['peak_rss_mb'] / 1000:.1f} GB of memory.</p>"
        f"<dl class=bars>{rows}</dl>"
    )


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of training_log.jsonl; empty when there is none, without the lines that are no rows."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int | float):
            rows.append(row)
    return rows


def curve(rows: Sequence[Mapping[str, float]], name: str, title: str) -> str:
    """An SVG of one column of the training log over the steps: raw and as a moving average; "" when not logged."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    if len(points) < 2:
        return ""
    width, height, left, bottom = 300, 150, 38, 20
    steps, values = [float(x) for x, _ in points], [float(y) for _, y in points]
    window = max(1, len(values) // 25)
    means = [
        sum(values[max(0, i - window) : i + 1]) / len(values[max(0, i - window) : i + 1]) for i in range(len(values))
    ]
    low, high = min(0.0, *values), sorted(values)[min(len(values) - 1, int(0.995 * len(values)))]
    span, reach = (high - low) or 1.0, (steps[-1] - steps[0]) or 1.0

    def path(ys: Sequence[float]) -> str:
        places = (
            f"{left + (width - left - 8) * (x - steps[0]) / reach:.1f},"
            f"{max(4.0, (height - bottom) - (height - bottom - 8) * (y - low) / span):.1f}"
            for x, y in zip(steps, ys, strict=True)
        )
        return "M" + "L".join(places)

    grid = ""
    for part in (0.0, 0.5, 1.0):
        y = (height - bottom) - (height - bottom - 8) * part
        grid += f'<path class=grid d="M{left},{y:.1f}H{width - 8}"/>'
        grid += f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{low + span * part:.2f}</text>'
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{grid}'
        f'<path class=raw d="{path(values)}"/><path class=mean d="{path(means)}"/>'
        f'<text x="{left}" y="{height - 5}">step {steps[0]:,.0f}</text>'
        f'<text x="{width - 8}" y="{height - 5}" text-anchor="end">{steps[-1]:,.0f}</text></svg>'
        f"<figcaption>{escape(title)}: {means[0]:.3f} → {means[-1]:.3f}</figcaption></figure>"
    )


def page(content: Mapping[str, Any], rows: Sequence[Mapping[str, float]], links: Mapping[str, str]) -> str:
    """The whole page; `rows` is the training log, `links` maps titles to addresses relative to the page."""
    counts, machine = content["counts"], content["machine"]
    curves = "".join(
        curve(rows, *column)
        for column in (("loss", "loss"), ("contrastive", "contrastive part"), ("kd", "distillation part"))
    )
    facts = {
        "Data": f"{content['data']['source']}; held out: {content['data']['held_out']}",
        "Training": f"{counts['train_queries']:,} queries, {counts['train_passages']:,} passages",
        "Backbone": f"{content['backbone']}, {content['clusters']:,} token clusters",
        "Machine": f"{machine['system']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}",
        "Versions": ", ".join(f"{name} {version}" for name, version in content["versions"].items()),
    }
    anchors = "".join(f'<a href="{escape(address)}">{escape(title)} →</a>' for title, address in links.items())
    table = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    training = f"<h2>Training</h2><div class=plots>{curves}</div>" if curves else ""
    queries, passages = counts["heldout_queries"], counts["heldout_passages"]
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>LENS quick start</title>"
        f'<meta name=viewport content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<header><h1>LENS quick start</h1><p>A lexical embedder, trained here on {escape(content['data']['source'])}: "
        f"every one of its dimensions is a cluster of tokens that you can read.</p><nav>{anchors}</nav></header>"
        f"<h2>How well does it retrieve?</h2><p>{MAIN} on {queries:,} held-out queries over {passages:,} passages.</p>"
        f"{metrics_section(content)}<h2>What does it find, and why?</h2><p>A score is a sum over the token clusters "
        f"that question and passage share. Each bar divides what the foremost of them add; the figures are their "
        f"parts of the whole score.</p>{answers_section(content['answers'])}{training}"
        f"<h2>Time and memory</h2>{steps_section(content)}<h2>Details</h2><dl class=facts>{table}</dl></body></html>\n"
    )


def write_page(output: Path, content: Mapping[str, Any]) -> None:
    """Writes report.html into the quick start's folder, from report.json's content and the training log."""
    known = {"Browse the clusters": "clusters/clusters.html", "Evaluation in detail": "eval/report.html"}
    links = {title: address for title, address in known.items() if (output / address).is_file()}
    temporary = output / ".report.html.new"
    text = page(content, read_log(output / "model" / "training_log.jsonl"), links)
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, output / "report.html")


STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #dde2e9; --page: #fbfcfd; --card: #fff;
  --lens: #2f6fde; --other: #a9b4c4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a4b5; --line: #303844; --page: #12161c;
  --card: #191f27; --lens: #6ea2ff; --other: #56627a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 56rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .3rem; }
h3 { font-size: 1.05rem; margin: 0 0 .8rem; } p { color: var(--soft); margin: 0 0 .8rem; }
nav { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; } a { color: var(--lens); text-decoration: none; }
a:hover { text-decoration: underline; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: .45rem .9rem; margin: 0; align-items: center; }
.bars dd { margin: 0; min-width: 0; }
.bar { display: flex; align-items: center; gap: .5rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar i { height: 1.05rem; min-width: 2px; border-radius: 3px; background: var(--other); }
.bar.lens i { background: var(--lens); }
.bar span { font-size: .9rem; }
.plain { list-style: none; padding: 0; margin: 1rem 0; } .plain li { margin: .2rem 0; } small { color: var(--soft); }
details { margin-top: .6rem; } summary { cursor: pointer; color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: .4rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; white-space: nowrap; font-weight: 400; }
th:first-child { text-align: left; } tbody tr > * { border-top: 1px solid var(--line); } .best { font-weight: 700; }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; }
.card { margin: 0 0 1rem; }
article + article { margin-top: 1rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h4 { display: flex; flex-wrap: wrap; gap: .2rem .6rem; align-items: baseline; margin: 0; font-size: .95rem; }
h4 span { color: var(--soft); } h4 > b { margin-left: auto; font-variant-numeric: tabular-nums; }
h4 code { overflow-wrap: anywhere; min-width: 0; } h4 em { color: var(--lens); font-size: .85rem; font-style: normal; }
article p { font-size: .88rem; margin: .2rem 0 .5rem; overflow-wrap: anywhere; }
.shares { display: flex; gap: 2px; height: .8rem; border-radius: 4px; overflow: hidden; }
.shares i { min-width: 1px; }
.chips { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem .9rem; padding: 0; margin: .45rem 0 0;
  font-size: .82rem; color: var(--soft); } .chips b { color: var(--ink); font-weight: 600; }
.chips li { overflow-wrap: anywhere; } .chips i { display: inline-block; width: .65rem; height: .65rem;
  border-radius: 2px; margin-right: .35rem; }
.shares .h0, .chips .h0 { background: #2f6fde; } .shares .h1, .chips .h1 { background: #e07b39; }
.shares .h2, .chips .h2 { background: #2a9d76; } .shares .h3, .chips .h3 { background: #b455c9; }
.shares .h4, .chips .h4 { background: #d9a514; } .shares .h5, .chips .h5 { background: #d64f6c; }
.shares .h6, .chips .h6 { background: #3aa6c9; } .shares .h7, .chips .h7 { background: #8a7d5a; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 1rem; }
figure { margin: 0; } svg { display: block; width: 100%; height: auto; } svg path { fill: none; }
svg text { font-size: 11px; fill: var(--soft); } .grid { stroke: var(--line); }
.raw { stroke: var(--other); stroke-width: 1; } .mean { stroke: var(--lens); stroke-width: 2; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: .4rem; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: 0; font-size: .9rem; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
"""

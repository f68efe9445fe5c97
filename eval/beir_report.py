"""The results of `eval/run.py --beir` for people: report.md, and report.html as one file with its plots inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.metrics import MEASURES, interval
from eval.page import INK, LENS, LINE, OTHER, Table, canvas, figure, fold, number, p_value, page, svg
from eval.plots import win_loss

MAIN = MEASURES[0]
LABELS = {
    "nDCG@10": "nDCG@10",
    "RR@10": "MRR@10",
    "R@100": "Recall@100",
    "seconds": "seconds",
    "dimensions": "dimensions",
    "active_per_query": "active, query",
    "active_per_document": "active, document",
}
METHOD = (
    "Every system scores all documents, exactly; equal scores are ordered by position in the corpus, and a document "
    "that shares nothing with the query (BM25 or LENS score 0) is not retrieved.",
    "Queries without a relevant document are left out. nDCG has linear gains; a document is relevant for MRR and "
    "Recall from a judgement of 1.",
    "A fusion sums the scores of its parts over all documents: cosines as they are, BM25 divided by its maximum over "
    "the documents for that query.",
    "Δ is the mean over queries of the first system less the second, with its 95% percentile bootstrap interval; p is "
    "the two-sided paired randomisation test (sign flips), p (Holm) the same corrected for the comparisons of the data "
    "set on that measure, p (t) the paired t-test.",
    "Seconds are encoding or indexing, scoring and ranking on the machine named below; a fusion's include its "
    "parts'. Active: mean non-zero dimensions.",
)


@dataclass(frozen=True)
class Details:
    """What the page shows of one data set beyond results.json: query ids, texts, and system -> measure -> values."""

    queries: Sequence[str]
    texts: Sequence[str]
    values: Mapping[str, Mapping[str, NDArray[np.float64]]]


def systems_table(systems: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Quality and cost of every system, the best value of each measure stressed."""
    rows = []
    for name, facts in systems.items():
        sizes = [number(facts["dimensions"], 0), number(facts["active_per_query"], 1)]
        measured = [number(facts[measure]) for measure in MEASURES]
        rows.append([name, *measured, number(facts["seconds"], 1), *sizes, number(facts["active_per_document"], 1)])
    best = {
        (row, column)
        for column in range(1, len(MEASURES) + 1)
        for row in range(len(rows))
        if rows[row][column] == max(cells[column] for cells in rows)
    }
    return Table(["system", *LABELS.values()], rows, frozenset(best))


def comparisons_table(comparisons: Sequence[Mapping[str, Any]], measure: str) -> Table:
    """Differences on one measure with intervals, p values and counts of queries won, tied and lost."""
    rows = [
        [
            f"{row['system']} vs. {row['other']}",
            f"{row['difference']:+.3f}",
            "–" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}",
            *(p_value(row[key]) for key in ("p", "p_holm", "p_t")),
            f"{row['wins']} / {row['ties']} / {row['losses']}",
        ]
        for row in comparisons
        if row["measure"] == measure
    ]
    return Table([LABELS[measure], "Δ", "95% interval", "p", "p (Holm)", "p (t)", "won / tied / lost"], rows)


def overview_table(datasets: Mapping[str, Any]) -> Table:
    """The main measure of every system on every data set, and its mean."""
    names = list(next(iter(datasets.values()))["systems"])
    values = [[dataset["systems"][name][MAIN] for name in names] for dataset in datasets.values()]
    values.append([float(mean) for mean in np.mean(values, axis=0)])
    rows = [[label, *(number(value) for value in row)] for label, row in zip([*datasets, "mean"], values, strict=True)]
    best = {(i, j) for i, row in enumerate(rows) for j in range(1, len(row)) if row[j] == max(row[1:])}
    return Table([f"data set ({MAIN})", *names], rows, frozenset(best))


def extremes(details: Details, system: str, other: str, count: int = 10) -> list[tuple[str, Table]]:
    """The queries that gain and that lose most by `system` against `other`, as captioned tables."""
    mine, theirs = details.values[system][MAIN], details.values[other][MAIN]
    order = np.argsort(mine - theirs, kind="stable")
    tables = []
    for caption, rows in (
        (f"Queries where {system} gains most on {other}", [row for row in order[::-1] if mine[row] > theirs[row]]),
        (f"Queries where {system} loses most to {other}", [row for row in order if mine[row] < theirs[row]]),
    ):
        cells = []
        for row in rows[:count]:
            text = " ".join(details.texts[row].split())
            shown = text if len(text) <= 160 else text[:159] + "…"
            cells.append([shown, details.queries[row], number(mine[row]), number(theirs[row])])
        tables.append((caption, Table(["query", "id", system, other], cells)))
    return tables


def reference(details: Details, first: str) -> str | None:
    """The system that the listings compare with: dense where there is one, else the next; None when alone."""
    others = [name for name in details.values if name != first]
    return "dense" if "dense" in others else next(iter(others), None)


def markdown(results: Mapping[str, Any]) -> str:
    """The content of results.json as a markdown report."""
    parts = ["# Retrieval evaluation"]
    if len(results["datasets"]) > 1:
        parts += [overview_table(results["datasets"]).markdown()]
    for name, dataset in results["datasets"].items():
        parts += [f"## {name}", counts(dataset), systems_table(dataset["systems"]).markdown()]
        for measure in MEASURES if dataset["comparisons"] else ():
            parts += [comparisons_table(dataset["comparisons"], measure).markdown()]
    parts += ["## How this was measured", "\n".join(f"- {line}" for line in [*METHOD, *settings(results)])]
    return "\n\n".join(parts) + "\n"


def counts(dataset: Mapping[str, Any]) -> str:
    """One line about a data set: its size and what was left out."""
    line = f"{dataset['queries']:,} queries, {dataset['documents']:,} documents"
    if dataset["queries_without_relevant"]:
        line += f"; {dataset['queries_without_relevant']:,} queries without a relevant document left out"
    return ". ".join([line, *dataset["warnings"]])


def settings(results: Mapping[str, Any]) -> list[str]:
    """The settings, versions and machine as lines."""
    return [
        f"{title}: " + ", ".join(f"{key} {value}" for key, value in results[title.lower()].items() if value is not None)
        for title in ("Config", "Versions", "Machine")
    ]


def html(results: Mapping[str, Any], details: Mapping[str, Details]) -> str:
    """The report as one HTML page that loads nothing: tables, plots as SVG, and the best and worst queries."""
    parts: list[str] = []
    if len(results["datasets"]) > 1:
        parts += [overview_table(results["datasets"]).html()]
    for name, dataset in results["datasets"].items():
        detail = details[name]
        first = next(iter(detail.values))
        parts += [f"<h2>{escape(name)}</h2><p>{escape(counts(dataset))}</p>", systems_table(dataset["systems"]).html()]
        parts += [figure(bars(detail.values, first), f"{MAIN} on {name}, with 95% bootstrap intervals over queries")]
        if dataset["comparisons"]:
            tables = {measure: comparisons_table(dataset["comparisons"], measure).html() for measure in MEASURES}
            parts += ["<h3>Paired differences</h3>", tables.pop(MAIN)]
            parts += [fold(f"The same on {LABELS[measure]}", table) for measure, table in tables.items()]
        plain = [name for name, facts in dataset["systems"].items() if not facts["parts"] and name != first]
        parts += ["<div class=plots>"]
        parts += [
            figure(
                win_loss(detail.values[first][MAIN] - detail.values[other][MAIN]),
                f"{first} vs. {other}: {MAIN} query by query",
            )
            for other in plain
        ]
        parts += ["</div>"]
        other = reference(detail, first)
        for caption, table in extremes(detail, first, other) if other else ():
            parts += [fold(caption, table.html())]
    lines = "".join(f"<li>{escape(line)}</li>" for line in [*METHOD, *settings(results)])
    parts += [f"<h2>How this was measured</h2><ul>{lines}</ul>"]
    return page("Retrieval evaluation", parts)


def bars(values: Mapping[str, Mapping[str, NDArray[np.float64]]], first: str) -> str:
    """SVG: the mean of the main measure of every system with its 95% interval; `first` is stressed."""
    axes = canvas(0.36 * len(values) + 0.5)
    for place, (name, measured) in enumerate(values.items()):
        mean, (low, high) = float(measured[MAIN].mean()), interval(measured[MAIN])
        axes.barh(place, mean, color=LENS if name == first else OTHER, height=0.66)
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=INK, linewidth=1.4)
        axes.text(max(mean, high or 0) + 0.008, place, f"{mean:.3f}", va="center", color=INK)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlim(0, min(1.12, axes.get_xlim()[1] * 1.1))
    axes.grid(axis="x", color=LINE)
    return svg(axes)

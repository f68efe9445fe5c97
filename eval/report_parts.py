"""The parts of the report of runs: its figures -> tables, plots and sentences, in markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval import plots
from eval.page import Document, Table, number, p_value
from eval.run_folders import Runs
from eval.significance import SAME, Units

TYPES = {
    "Retrieval": "Retr", "Reranking": "Rerank", "Clustering": "Clust", "PairClassification": "Pair",
    "Classification": "Class", "STS": "STS", "Summarization": "Summ",
}  # fmt: skip
"""Types of tasks in the order of the published tables, and what they call them."""
BY_QUERY = ("Retrieval", "Reranking")
LEVEL = 0.05
SHOWN = 3
"""Explained losses to one system that the markdown shows; the page shows all."""
CLUSTERS = 8
"""Matched clusters of a document that are shown."""
METHOD = (
    "Scores are the tasks' main measures × 100; a mean stands only where every task of it has a score. The best of a "
    "row or column is stressed, published rows aside.",
    "Δ is the first system less the other. Its 95% interval is the percentile bootstrap over the task's units "
    "(queries, texts, pairs, or what a clustering is repeated on), drawn with replacement within each split and subset "
    "and the same for both systems.",
    "Units of a clustering are fixed sets of different texts in mteb's first tasks (v1), and random draws from the "
    "same texts in its later ones (v2) and in local folders: of draws, the interval is about these alone, not about "
    "other texts.",
    "Units of a classification are texts, each with the share of mteb's experiments (10) that class it rightly: how "
    "the score varies with the samples that classifiers are trained on is not in the interval.",
    "Where the score of pairs is that of a system's best similarity (max_ap), this similarity, chosen on all pairs, is "
    "held fixed in the resamples.",
    "p is the two-sided paired randomisation test: each unit's two values are swapped or not. Measures that have no "
    "value for a unit alone (Spearman's correlation, average precision) are computed anew for each resample, after the "
    "values of both systems became ranks within the task, since their scales differ; these measures depend on ranks "
    "alone, so nothing is lost.",
    "p (Holm) is corrected over the tasks of the two systems; for the mean over tasks, over the pairs of systems. ▲ "
    f"and ▼ mark tasks on which a system is better or worse than the one it is tested against at {LEVEL} after that.",
    "The interval of a mean resamples the units within every task, so it is about these tasks, not about others.",
    "Seconds are the whole evaluation's; those of a hybrid, which fuses what its members found, are theirs and its "
    "own. Of a search that went on after it was killed only the time since counts.",
)


def percent(value: float | None) -> str:
    """A score in 0..1 as a cell, times 100."""
    return number(None if value is None else 100 * value, 2)


def best_of(values: Sequence[Sequence[float | None]], by_row: bool) -> set[tuple[int, int]]:
    """The places of the greatest values of each row, or of each column, where there are two or more."""
    found = set()
    lines = values if by_row else list(zip(*values, strict=True))
    for i, line in enumerate(lines):
        held = [value for value in line if value is not None]
        if len(held) > 1:
            found |= {(i, j) if by_row else (j, i) for j, value in enumerate(line) if value == max(held)}
    return found


def show_overview(document: Document, content: Mapping[str, Any]) -> None:
    """Means by type of every system, and beside them the published ones where they are of the same tasks."""
    counts, systems = content["overview"]["tasks"], content["overview"]["systems"]
    header = ["system", *(f"{TYPES.get(kind, 'Avg' if kind == 'all' else kind)} ({n})" for kind, n in counts.items())]
    values = [list(row.values()) for row in systems.values()]
    rows = [[name, *map(percent, row)] for name, row in zip(systems, values, strict=True)]
    best = frozenset((row, column + 1) for row, column in best_of(values, by_row=False))
    published = content.get("published")
    kinds = published["comparable"] if published else []
    for name, row in published["systems"].items() if kinds else ():
        cells = [number(row[kind], 2) if kind in kinds else "–" for kind in counts]
        rows.append([f"{name} (published)", *cells])
    document.heading("Means by type of task")
    document.table(Table(header, rows, best))
    if published is None or "all" in kinds:
        return
    where = f"the {len(published['tasks'])} tasks of {published['benchmark']} ({published['source']})"
    if kinds:
        names = ", ".join(TYPES[kind] for kind in kinds)
        document.text(f"Published figures stand beside ours only under {names}, whose tasks are the same.")
    other = "the other columns are" if kinds else "they are"
    document.text(f"The published means below are over {where}: {other} of other tasks, and not comparable with ours.")
    columns = [*TYPES, "all"]
    head = [f"{TYPES.get(kind, 'Avg')} ({published['counts'][kind]})" for kind in columns]
    rows = [[name, *(number(row[kind], 2) for kind in columns)] for name, row in published["systems"].items()]
    document.table(Table(["published", *head], rows))


def show_tasks(document: Document, content: Mapping[str, Any]) -> None:
    """Every score, the best of each task stressed, significant differences marked."""
    names = list(content["scores"])
    marks: dict[tuple[str, str], str] = {}
    for row in content["comparisons"]:
        forward = content["against"] is not None  # the mark is of the system that is tested against another
        for task, test in row["tasks"].items():
            if test.get("p_holm") is not None and test["p_holm"] < LEVEL and test["difference"]:
                better = (test["difference"] > 0) == forward
                marks[task, row["system" if forward else "other"]] = " ▲" if better else " ▼"
    values = [[content["scores"][name].get(task) for name in names] for task in content["tasks"]]
    rows = [
        [
            *(task, facts["type"], facts["measure"]),
            *(percent(value) + marks.get((task, name), "") for name, value in zip(names, row, strict=True)),
        ]
        for (task, facts), row in zip(content["tasks"].items(), values, strict=True)
    ]
    document.heading("Scores by task")
    best = frozenset((row, column + 3) for row, column in best_of(values, by_row=True))
    document.table(Table(["task", "type", "measure", *names], rows, best))
    if marks:
        other = content["against"] or names[0]
        document.text(f"▲ better, ▼ worse than {other}: p < {LEVEL} after Holm's correction over the tasks.")


def show_comparisons(document: Document, content: Mapping[str, Any]) -> None:
    """The mean differences of all pairs, then those of each pair by task, with a plot."""
    document.heading("Paired differences")
    rows = []
    for row in content["comparisons"]:
        tests = [test for test in row["tasks"].values() if test.get("p_holm") is not None]
        found = [test["difference"] for test in tests if test["p_holm"] < LEVEL]
        mean = row["mean"] or {}
        rows.append([
            f"{row['system']} vs. {row['other']}",
            *(f"{len(tests)} of {len(row['tasks'])}", signed(mean.get("difference")), span(mean)),
            *(p_value(mean.get("p")), p_value(mean.get("p_holm")), f"{row['wins']} / {row['ties']} / {row['losses']}"),
            f"{sum(one > 0 for one in found)} / {sum(one < 0 for one in found)}",
        ])  # fmt: skip
    if not rows:
        document.text("There is one system alone, so nothing is compared.")
        return
    head = ["mean over tasks", "tasks tested", "Δ × 100", "95% interval", "p", "p (Holm)", "tasks won / tied / lost"]
    document.table(Table([*head, "significantly won / lost"], rows))
    for row in content["comparisons"]:
        cells, plotted = [], []
        for task, test in row["tasks"].items():
            counts = [test.get(key) for key in ("wins", "ties", "losses")]
            cells.append([
                task,
                *(number(test.get("units"), 0), signed(test["difference"]), span(test)),
                *(p_value(test.get("p")), p_value(test.get("p_holm"))),
                "–" if None in counts else " / ".join(f"{count:,}" for count in counts),
            ])  # fmt: skip
            if test.get("low") is not None:
                plotted.append(interval_row(task, test))
        plot = []
        if plotted and row["mean"] is not None:
            caption = f"{row['system']} vs. {row['other']}: difference by task with its 95% interval"
            plot = [(plots.differences([*plotted, interval_row("mean", row["mean"])]), caption)]
        if cells:
            head = ["task", "units", "Δ × 100", "95% interval", "p", "p (Holm)"]
            table = Table([*head, "units won / tied / lost"], cells)
            document.folded(f"{row['system']} vs. {row['other']}, by task", table, plot)


def signed(value: float | None) -> str:
    """A difference in 0..1 as a cell, times 100."""
    return "–" if value is None else f"{100 * value:+.2f}"


def span(test: Mapping[str, Any]) -> str:
    """The interval of a test as a cell."""
    return "–" if test.get("low") is None else f"{signed(test['low'])} to {signed(test['high'])}"


def interval_row(name: str, test: Mapping[str, Any]) -> tuple[str, float, float, float, bool]:
    """A row of `plots.differences`."""
    figures = [100 * test[key] for key in ("difference", "low", "high")]
    return name, figures[0], figures[1], figures[2], test["p_holm"] < LEVEL


def show_queries(
    document: Document, runs: Runs, units: Mapping[str, Mapping[str, Units]], pairs: Sequence[tuple[str, str]]
) -> None:
    """Queries won and lost on tasks of search, with plots, and the worst losses with what matched."""
    document.heading("Query by query")
    rows, folds = [], []
    for one, other in pairs:
        drawn = []
        for task in (name for name, facts in runs.tasks.items() if facts.type in BY_QUERY):
            mine, theirs = units[one].get(task), units[other].get(task)
            if mine is None or theirs is None or mine.kind != "mean" or not mine.paired_with(theirs):
                continue
            sides = zip(mine.parts, theirs.parts, strict=True)
            gains = np.concatenate([part.values - counter.values for part, counter in sides])
            gains[abs(gains) <= SAME] = 0
            counts = [f"{int(found.sum()):,}" for found in (gains > 0, gains == 0, gains < 0)]
            rows.append([f"{one} vs. {other}", task, f"{len(gains):,}", *counts])
            drawn.append((plots.win_loss(gains), f"{task}: {one} vs. {other}, {runs.tasks[task].measure} by query"))
        if drawn:
            folds.append((f"{one} vs. {other}, {len(drawn)} plots", drawn))
    if rows:
        document.table(Table(["systems", "task", "queries", "won", "tied", "lost"], rows))
    else:
        document.text("There are no two systems with values by query on a task of search.")
    for caption, drawn in folds:
        document.plots(drawn, caption)
    for name, system in runs.systems.items():
        for other, entries in system.explained.items():
            if entries:
                document.heading(f"Where {name} loses most to {other}", 3)
            worst = sorted(entries, key=lambda entry: entry["value"] - entry["other_value"])
            for place, entry in enumerate(worst):
                caption = f"{entry['task']}, “{shortened(entry['text'])}” ({entry['query']}): "
                caption += f"{percent(entry['value'])} against {percent(entry['other_value'])}"
                document.folded(caption, explanation(entry), short=place >= SHOWN)


def shortened(text: str, length: int = 300) -> str:
    """A text in one line, cut to a length."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def explanation(entry: Mapping[str, Any]) -> Table:
    """The relevant document of a lost query beside the one that was wrongly first: scores, texts, matched clusters."""
    documents = [entry["relevant"], entry["found"]]
    titles = [
        f"{what}: {document['document']}" if document else what
        for what, document in zip(("relevant", "wrongly first"), documents, strict=True)
    ]
    rows = [
        ["score", *(number(document and document["score"], 4) for document in documents)],
        ["text", *(shortened(document["text"]) if document else "–" for document in documents)],
        ["matched", *(matched(document["matches"]) if document else "–" for document in documents)],
    ]
    return Table(["", *titles], rows, prose=True)


def matched(matches: Sequence[Sequence[Any]]) -> str:
    """The clusters that matched, each with its tokens and its share of the score."""
    shown = [f"{' '.join(map(str, tokens)) or cluster} {share:.3f}" for cluster, tokens, share in matches[:CLUSTERS]]
    rest = len(matches) - len(shown)
    return "; ".join(shown) + (f"; {rest} more" if rest else "") or "nothing"


def show_costs(document: Document, content: Mapping[str, Any], runs: Runs) -> None:
    """What the systems cost beside their mean score, as a table and plots."""
    document.heading("Cost beside quality")
    shared, systems = content["costs"]["tasks"], content["costs"]["systems"]
    if not systems:
        document.text("There are no costs in the runs, or no task on which all systems have a score.")
        return
    count = f"{len(shared)} tasks" if len(shared) > 3 else " and ".join(shared)
    document.text(f"Over {count}, on which all systems have a score.")
    digits = {"texts_per_second": 1, "seconds": 1, "dimensions": 0, "active": 1, "bytes_per_document": 0}
    rows = [
        [name, percent(row["score"]), *(number(row[key], places) for key, places in digits.items())]
        for name, row in systems.items()
    ]
    labels = ["texts per second", "seconds", "dimensions", "active per document", "bytes per document"]
    document.table(Table(["system", "mean score", *labels], rows))
    stressed = [name for name, system in runs.systems.items() if system.role == "model"]
    drawn = []
    for key in ("bytes_per_document", "texts_per_second"):
        label = labels[list(digits).index(key)]
        points = {name: (row[key], 100 * row["score"]) for name, row in systems.items() if row[key]}
        if len(points) > 1:
            drawn.append((plots.trade_off(points, stressed, label), f"Mean score against {label}"))
    if drawn:
        document.plots(drawn)


def show_method(document: Document, content: Mapping[str, Any]) -> None:
    """What failed, what the runs lack, and how it was measured."""
    for title, key in (("Failed", "failures"), ("Left out", "notes")):
        if content[key]:
            document.heading(title)
            document.items(content[key])
    document.heading("How this was measured")
    drawn = f"{content['resamples']:,} resamples of each kind a test, seed {content['seed']}."
    document.items([*METHOD, drawn, f"Runs: {', '.join(content['runs'])}"])

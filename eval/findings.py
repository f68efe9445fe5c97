"""Scores of an analysis's points -> differences with intervals, sentences that say what they show, tables and plots."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from eval.benchmark import means
from eval.metrics import interval
from eval.page import INK, LENS, LINE, LOSS, OTHER, Table, canvas, svg
from eval.usefulness import ORDERS

LOSS_LIMIT = 0.01
"""The loss, as a score from 0 to 1, that the sentences say is excluded or not."""
STYLE = """<style>svg { --ink: #1d2430; --line: #dde2e9; --lens: #2f6fde; --other: #8793a5; --loss: #d9743a;
  font-family: system-ui, sans-serif; } @media (prefers-color-scheme: dark) { svg { --ink: #e4e8ee; --line: #303844;
  --lens: #6ea2ff; --other: #7b879b; --loss: #e58a52; } }</style>"""
"""The colours of a plot that stands by itself."""
NOTHING = "No task has a score at every point, so nothing can be said."
INTERVALS = (
    "Scores are the tasks' main measures times 100; a mean gives every task the same weight. Differences are paired by "
    "task, and their intervals 95% percentile bootstrap intervals over tasks: they tell how far a mean would move with "
    "other tasks of these kinds, not with other queries of the same tasks. They are not "
    "widened for the number of points."
)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its 95% interval, which is None where there are fewer than two."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        shown = f"{100 * self.mean:+.2f} points"
        if self.low is None or self.high is None:
            return f"{shown}, no interval over one task"
        return f"{shown}, 95% interval {100 * self.low:+.2f} to {100 * self.high:+.2f}"

    @property
    def told(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def harmless(self) -> bool:
        """Whether the interval leaves out a loss of more than LOSS_LIMIT."""
        return self.low is not None and self.low >= -LOSS_LIMIT


def mean_difference(values_a: Sequence[float], values_b: Sequence[float]) -> Difference:
    """The mean of a - b over tasks, with its 95% percentile bootstrap interval over tasks (scipy.stats.bootstrap)."""
    differences = np.asarray(values_a, dtype=np.float64) - np.asarray(values_b, dtype=np.float64)
    return Difference(float(differences.mean()), *interval(differences))


@dataclass(frozen=True)
class Findings:
    """Scores of `points`, name -> facts, on `tasks`, name -> type and measure; the first point is what the others are
    compared with. Means and differences are over the tasks that have a score at every point."""

    tasks: Mapping[str, Mapping[str, str]]
    points: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, Mapping[str, float]]

    @cached_property
    def compared(self) -> list[str]:
        """The tasks that have a score at every point."""
        return [task for task in self.tasks if all(task in self.scores.get(name, {}) for name in self.points)]

    @property
    def first(self) -> str:
        """The point that the others are compared with."""
        return next(iter(self.points))

    def mean(self, name: str) -> float:
        """Mean score of a point over the tasks compared."""
        return fmean(self.scores[name][task] for task in self.compared)

    def difference(self, name: str, other: str | None = None) -> Difference:
        """A point against another, by default the first."""
        pair = (self.scores[point] for point in (name, other or self.first))
        return mean_difference(*([scores[task] for task in self.compared] for scores in pair))

    def rows(self) -> list[dict[str, Any]]:
        """What results.json says of every point."""
        return [
            {
                "name": name,
                **facts,
                "scores": dict(self.scores.get(name, {})),
                "means": means(self.tasks, self.scores.get(name, {})),
                "mean_of_compared": self.mean(name) if self.compared else None,
                "difference": asdict(self.difference(name)) if self.compared and name != self.first else None,
            }
            for name, facts in self.points.items()
        ]

    def best(self, names: Sequence[str]) -> str:
        """The point of the highest mean, of equals the first."""
        return max(names, key=self.mean)

    def overview(self, labels: Mapping[str, str]) -> Table:
        """Every point's facts under `labels`, field -> heading, its means by type and its difference."""
        kinds = [*dict.fromkeys(facts["type"] for facts in self.tasks.values()), "all"]
        cells = []
        for row in self.rows():
            facts = [_cell(row.get(field)) for field in labels]
            scores = ["–" if row["means"][kind] is None else f"{100 * row['means'][kind]:.2f}" for kind in kinds]
            found = row["difference"]
            shown = "–" if found is None else f"{100 * found['mean']:+.2f}"
            within = "–" if found is None or found["low"] is None else (
                f"{100 * found['low']:+.2f} to {100 * found['high']:+.2f}"
            )  # fmt: skip
            cells.append([row["name"], *facts, *scores, shown, within])
        return Table(["point", *labels.values(), *kinds, f"Δ to {self.first}", "95% interval"], cells)

    def by_task(self) -> Table:
        """Every task's score at every point."""
        rows = []
        for task, facts in sorted(self.tasks.items(), key=lambda item: (item[1]["type"], item[0])):
            found = [self.scores.get(name, {}).get(task) for name in self.points]
            rows.append([task, facts["measure"], *("–" if one is None else f"{100 * one:.2f}" for one in found)])
        return Table(["task", "measure", *self.points], rows)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:,.1f}" if isinstance(value, float) and value >= 10 else f"{value}"


def pruning_sentences(found: Findings, model: str, dimensions: int, active: float, dead: int) -> list[str]:
    """What pruning shows; `active` is the mean number of non-zero values of a text, `dead` of dimensions never so."""
    if not found.compared:
        return [NOTHING]
    whole = found.first
    said = [
        f"{model} as it is has a mean score of {100 * found.mean(whole):.2f} over {_tasks(found)}; a text has "
        f"{active:,.0f} non-zero values of {dimensions:,} on average, and {dead:,} dimensions have none in any text of "
        "the sample."
    ]
    for method in ("top", *ORDERS):
        names = [name for name, facts in found.points.items() if facts["method"] == method]
        if names:
            said.append(_limit(found, names, method, active, dimensions))
    for one, other in (("mean square", "random"), ("variance", "random"), ("variance", "mean square")):
        said += _orders(found, one, other)
    return said


def _tasks(found: Findings) -> str:
    count, left = len(found.compared), len(found.tasks) - len(found.compared)
    return f"{count} task{'s' * (count != 1)}" + (f" ({left} without all scores left out)" if left else "")


def _limit(found: Findings, names: Sequence[str], method: str, active: float, dimensions: int) -> str:
    """The hardest pruning of a method that is known to lose no more than LOSS_LIMIT."""
    facts = found.points
    hardest = sorted(names, key=lambda name: facts[name]["top_n"] if method == "top" else -facts[name]["dropped"])
    safe = next((name for name in hardest if found.difference(name).harmless), None)
    name = safe or hardest[-1]
    if method == "top":
        does = f"Keeping the {facts[name]['top_n']:,} largest of on average {active:,.0f} values of a text"
    else:
        how = "at random" if method == "random" else f"of least {method}"
        count = dimensions - facts[name]["dimensions"]
        does = f"Dropping {facts[name]['dropped']:.0%} of the dimensions ({count:,} of {dimensions:,}) {how}"
    mean = found.mean(found.first)
    kept = f"keeps {found.mean(name) / mean:.1%} of the mean score ({found.difference(name)})" if mean else "keeps 0"
    if found.difference(name).low is None:
        return f"{does} {kept}: one task tells nothing of others."
    loss = f"a loss of more than {100 * LOSS_LIMIT:g} point"
    if safe is None:
        return f"{does} {kept}; at no point of this curve (of {len(names)}) does the interval exclude {loss}."
    return f"{does} {kept}: the hardest pruning of this curve ({len(names)} points) whose interval excludes {loss}."


def _orders(found: Findings, one: str, other: str) -> list[str]:
    """Two orders of dropping at the largest share, which tells them apart most."""
    named = {
        (facts["method"], facts["dropped"]): name
        for name, facts in found.points.items()
        if facts["method"] in (one, other)
    }
    shares = [share for method, share in named if method == one and (other, share) in named]
    if not shares:
        return []
    share = max(shares)
    difference = found.difference(named[one, share], named[other, share])
    if difference.low is None:
        return []
    shown = f"With {share:.0%} dropped, dropping by {one} and by {other} order"
    if not difference.told:
        return [f"{shown} cannot be told apart ({difference})."]
    return [f"{shown} differ: {one} scores {'higher' if difference.mean > 0 else 'lower'} ({difference})."]


def variants_sentences(found: Findings, axis: str) -> list[str]:
    """What models side by side show; `axis` is "dimensions" or "none"."""
    if not found.compared:
        return [NOTHING]
    names, first = list(found.points), found.first
    best = found.best(names)
    others = names[1:]
    said = [f"Of {len(names)} models the highest mean over {_tasks(found)} is {100 * found.mean(best):.2f}, of {best}."]
    if axis == "dimensions":
        by_size = sorted(names, key=lambda name: found.points[name]["dimensions"])
        sizes = {name: f"K = {found.points[name]['dimensions']:,}" for name in names}
        small, large = by_size[0], by_size[-1]
        said.append(f"From {sizes[small]} to {sizes[large]} the mean changes by {found.difference(large, small)}.")
        safe = next((name for name in by_size[:-1] if found.difference(name, large).harmless), None)
        loss = f"a loss of more than {100 * LOSS_LIMIT:g} point against {sizes[large]}"
        if safe is None:
            said.append(f"For no smaller K does the interval exclude {loss}.")
        else:
            shown = f"{sizes[safe]} ({found.difference(safe, large)})"
            said.append(f"The smallest K whose interval excludes {loss} is {shown}.")
        return said
    for name in others:
        difference = found.difference(name)
        fields = [
            f"{field} {facts} instead of {found.points[first][field]}"
            for field, facts in found.points[name].items()
            if facts != found.points[first][field] and field in ("dimensions", "pooling", "attention", "head")
        ]
        apart = f"{'above' if difference.mean > 0 else 'below'} {first}"
        verdict = apart if difference.told else f"not to be told apart from {first}"
        said.append(f"{name} ({', '.join(fields) or 'the same in what the table names'}) is {verdict}: {difference}.")
    return said


def hybrid_sentences(found: Findings, weight: float, chosen: str, dev: int) -> list[str]:
    """What LENS + dense shows; `chosen` is the point of weight `weight`, chosen on `dev` tasks' dev splits."""
    if not found.compared:
        return [NOTHING]
    names = list(found.points)
    dense, lens = (next(name for name in names if found.points[name]["weight"] == end) for end in (0, 1))
    how = f"chosen on the dev splits of {dev} task{'s' * (dev != 1)}" if dev else "given beforehand, not tuned"
    said = [
        f"LENS + dense with weight {weight:g} of LENS, {how}, has a mean score of {100 * found.mean(chosen):.2f} over "
        f"{_tasks(found)}; LENS alone has {100 * found.mean(lens):.2f}, dense alone {100 * found.mean(dense):.2f}."
    ]
    for label, name in (("LENS", lens), ("dense", dense)):
        difference = found.difference(chosen, name)
        if name == chosen:
            said.append(f"The weight {weight:g} is that of {label} alone, which nothing was gained on.")
        elif difference.told:
            said.append(f"It is {'better' if difference.mean > 0 else 'worse'} than {label} alone: {difference}.")
        else:
            said.append(f"It cannot be told apart from {label} alone: {difference}.")
    best = found.best(names)
    said.append(
        f"The best weight on these tasks themselves, which is not to be known beforehand, would be "
        f"{found.points[best]['weight']:g} with {100 * found.mean(best):.2f}."
    )
    return said


def standing(axes: Any) -> str:
    """A plot in the colours of the page as an SVG file of its own."""
    return re.sub(r"(<svg [^>]*>)", lambda found: found[1] + STYLE, svg(axes), count=1)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    level: float | None = None,
    mark: float | None = None,
    logarithmic: bool = False,
) -> str:
    """SVG: mean score against a figure, a line for each name; a `level` to compare with, a `mark` at the choice."""
    axes = canvas(3.2)
    styles = zip((LENS, LOSS, INK, OTHER), ("-", "--", "-.", ":"), strict=True)
    for (name, points), (colour, style) in zip(lines.items(), styles, strict=False):
        across, up = zip(*sorted(points), strict=True)
        axes.plot(across, [100 * value for value in up], color=colour, linestyle=style, marker=".", label=name)
    if level is not None:
        axes.axhline(100 * level, color=INK, linewidth=0.8, label="as it is")
    if mark is not None:
        axes.axvline(mark, color=INK, linewidth=0.8, linestyle=":", label="chosen")
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel("mean score", color=INK)
    axes.grid(color=LINE)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return standing(axes)


def bars(found: Findings) -> str:
    """SVG: the mean score of every point, with the interval of its difference to the first."""
    axes = canvas(0.36 * len(found.points) + 0.5)
    for place, name in enumerate(found.points):
        mean = 100 * found.mean(name)
        axes.barh(place, mean, color=LENS if name == found.first else OTHER, height=0.66)
        shown = f"{mean:.2f}"
        if name != found.first:
            difference, base = found.difference(name), found.mean(found.first)
            shown += f" ({100 * difference.mean:+.2f})"
            if difference.low is not None and difference.high is not None:
                ends = [100 * (base + difference.low), 100 * (base + difference.high)]
                axes.plot(ends, [place, place], color=INK, linewidth=1.4)
                mean = max(mean, *ends)
        axes.text(mean + 0.8, place, shown, va="center", color=INK)
    axes.set_yticks(range(len(found.points)), list(found.points))
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] * 1.25)
    axes.grid(axis="x", color=LINE)
    return standing(axes)

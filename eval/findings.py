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
from eval.metrics import interval, randomisation_test
from eval.page import INK, LENS, LINE, LOSS, OTHER, Table, canvas, literal, svg
from eval.plots import plain
from eval.usefulness import ORDERS

LOSS_LIMIT = 0.01
"""The loss, as a score from 0 to 1, that the sentences say is excluded or not."""
LEVEL = 0.05
LEAST = 6
"""Tasks that a sentence about a difference needs: of five all signs agree by chance in 6% of cases."""
STYLE = """<style>svg { --ink: #1d2430; --line: #dde2e9; --lens: #2f6fde; --other: #8793a5; --loss: #d9743a;
  font-family: system-ui, sans-serif; } @media (prefers-color-scheme: dark) { svg { --ink: #e4e8ee; --line: #303844;
  --lens: #6ea2ff; --other: #7b879b; --loss: #e58a52; } }</style>"""
"""The colours of a plot that stands by itself."""
NOTHING = "No task has a score at every point, so nothing can be said."
INTERVALS = (
    "Scores are the tasks' main measures times 100; a mean gives every task the same weight. Differences are paired by "
    "task, and their intervals 95% percentile bootstrap intervals over tasks: they tell how far a mean would move with "
    "other tasks of these kinds, not with other queries of the same tasks; over few tasks they are too narrow. "
    "Sentences therefore rest on a randomisation test: each task's difference has its sign flipped or not (all ways "
    f"are counted where they are few). Two points differ where p < {LEVEL}, two-sided; a loss of more than "
    f"{100 * LOSS_LIMIT:g} point is excluded where p < {LEVEL}, one-sided, for the differences with "
    f"{100 * LOSS_LIMIT:g} point added. With fewer than {LEAST} tasks nothing is told. Neither intervals nor p are "
    "corrected for the number of points."
)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences over `tasks` tasks with its 95% interval, which is None where there are fewer than
    two. `p`, two-sided, is of no difference, `p_loss`, one-sided, of a loss of LOSS_LIMIT or more; both are None with
    fewer than LEAST tasks."""

    mean: float
    low: float | None
    high: float | None
    tasks: int
    p: float | None
    p_loss: float | None

    def __str__(self) -> str:
        shown = f"{100 * self.mean:+.2f} points"
        if self.low is None or self.high is None:
            return f"{shown}, no interval over one task"
        return f"{shown}, 95% interval {100 * self.low:+.2f} to {100 * self.high:+.2f}"

    @property
    def few(self) -> bool:
        """Whether there are too few tasks to tell anything."""
        return self.p is None

    @property
    def told(self) -> bool:
        """Whether there is a difference."""
        return self.p is not None and self.p < LEVEL

    @property
    def harmless(self) -> bool:
        """Whether a loss of LOSS_LIMIT or more is excluded."""
        return self.p_loss is not None and self.p_loss < LEVEL


def mean_difference(values_a: Sequence[float], values_b: Sequence[float]) -> Difference:
    """The mean of a - b over tasks, with its 95% percentile bootstrap interval over tasks (scipy.stats.bootstrap) and
    its randomisation tests (`eval.metrics.randomisation_test`)."""
    differences = np.asarray(values_a, dtype=np.float64) - np.asarray(values_b, dtype=np.float64)
    p, p_loss = None, None
    if len(differences) >= LEAST:
        p = randomisation_test(differences)
        above = (differences + LOSS_LIMIT).round(12)  # a loss of LOSS_LIMIT itself is no gain by rounding
        half = randomisation_test(above) / 2  # flipped signs are spread evenly around 0
        p_loss = half if above.mean() > 0 else 1 - half
    return Difference(float(differences.mean()), *interval(differences), len(differences), p, p_loss)


def shown_name(name: str) -> str:
    """A name that was given, as it stands in sentences: no markdown comes of it."""
    return re.sub(r"(?<=[^\W_])\\_(?=[^\W_])", "_", literal(name))  # within a word an underscore means nothing


def _few(difference: Difference) -> str:
    if difference.tasks == 1:
        return "one task tells nothing of others"
    return f"{difference.tasks} tasks are too few to tell (at least {LEAST} are needed)"


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
        f"{shown_name(model)} as it is has a mean score of {100 * found.mean(whole):.2f} over {_tasks(found)}; a "
        f"text has {active:,.0f} non-zero values of {dimensions:,} on average, and {dead:,} dimensions have none in "
        "any text of the sample."
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
    if found.difference(name).few:
        return f"{does} {kept}: {_few(found.difference(name))}."
    loss = f"a loss of more than {100 * LOSS_LIMIT:g} point"
    if safe is None:
        return f"{does} {kept}; at no point of this curve (of {len(names)}) is {loss} excluded."
    return f"{does} {kept}: the hardest pruning of this curve ({len(names)} points) for which {loss} is excluded."


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
    if difference.tasks == 1:
        return []
    if difference.few:
        return [f"With {share:.0%} dropped, dropping by {one} against {other}: {_few(difference)} ({difference})."]
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
    highest = f"{100 * found.mean(best):.2f}, of {shown_name(best)}"
    said = [f"Of {len(names)} models the highest mean over {_tasks(found)} is {highest}."]
    if axis == "dimensions":
        by_size = sorted(names, key=lambda name: found.points[name]["dimensions"])
        sizes = {name: f"K = {found.points[name]['dimensions']:,}" for name in names}
        small, large = by_size[0], by_size[-1]
        said.append(f"From {sizes[small]} to {sizes[large]} the mean changes by {found.difference(large, small)}.")
        safe = next((name for name in by_size[:-1] if found.difference(name, large).harmless), None)
        loss = f"a loss of more than {100 * LOSS_LIMIT:g} point against {sizes[large]}"
        difference = found.difference(small, large)
        if difference.few:
            said.append(f"Which smaller K excludes {loss} cannot be said: {_few(difference)}.")
        elif safe is None:
            said.append(f"For no smaller K is {loss} excluded.")
        else:
            shown = f"{sizes[safe]} ({found.difference(safe, large)})"
            said.append(f"The smallest K for which {loss} is excluded is {shown}.")
        return said
    for name in others:
        difference = found.difference(name)
        fields = [
            f"{field} {facts} instead of {found.points[first][field]}"
            for field, facts in found.points[name].items()
            if facts != found.points[first][field] and field in ("dimensions", "pooling", "attention", "head")
        ]
        apart = f"{'above' if difference.mean > 0 else 'below'} {shown_name(first)}"
        if not difference.told:
            apart = f"not to be told apart from {shown_name(first)}"
        why = f" ({_few(difference)})" if difference.few else ""
        unlike = ", ".join(fields) or "the same in what the table names"
        said.append(f"{shown_name(name)} ({unlike}) is {apart}{why}: {difference}.")
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
            why = f" ({_few(difference)})" if difference.few else ""
            said.append(f"It cannot be told apart from {label} alone{why}: {difference}.")
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
    axes.set_yticks(range(len(found.points)), [plain(name) for name in found.points])
    axes.invert_yaxis()
    axes.set_xlim(0, axes.get_xlim()[1] * 1.25)
    axes.grid(axis="x", color=LINE)
    return standing(axes)

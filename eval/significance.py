"""Whether two systems differ on a task, and on the mean over tasks: paired bootstrap and randomisation over its units.

A unit is what a task's score is made of: a query, a text, a pair of texts. A task may have several parts (splits and
subsets), each with its own statistic, and its score is their mean. Means, Spearman's correlation and average precision
all take weights of the units, so that one function gives the score of a bootstrap sample (weights: how often a unit was
drawn) and of a sample of the randomisation test (weights 1 and 0: whose value of a unit was taken).

Legend: n units, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from eval.metrics import holm, randomisation_test

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Weights of the units (B, n) -> the statistic of each of the weighted samples (B,)."""
Sampler = Callable[[np.random.Generator, int], tuple[Array, Array]]
"""Draws B differences of a bootstrap and B of the randomisation test, each (B,)."""

KINDS = ("mean", "spearman", "ap")
"""The statistic of a part: the mean of values, their rank correlation with gold, the average precision of gold."""
BLOCK = 1 << 20
"""Weights that are held at a time."""
SAME = 1e-12
"""Differences of scores below this are rounding."""
FEW = 16
"""Units for each distinct difference from which on counts of the differences are drawn, not units: that is faster."""


@dataclass(frozen=True)
class Part:
    """One split and subset of a task: `values` (n,) of a system, `gold` (n,) of the data for rank statistics."""

    split: str
    subset: str
    names: tuple[str, ...]
    values: Array
    gold: Array | None


@dataclass(frozen=True)
class Units:
    """What a system's score on a task is made of."""

    kind: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """The number of units in all parts."""
        return sum(len(part.names) for part in self.parts)

    @property
    def score(self) -> float:
        """The mean of the parts' statistics."""
        found = [statistic(self.kind, part.values, part.gold)(np.ones((1, len(part.names)))) for part in self.parts]
        return float(np.mean(found))

    def paired_with(self, other: Units) -> bool:
        """Whether both are of the same units, in the same order, with the same gold."""
        return self.kind == other.kind and len(self.parts) == len(other.parts) and all(
            (mine.split, mine.subset, mine.names) == (theirs.split, theirs.subset, theirs.names)
            and (mine.gold is None) == (theirs.gold is None)
            and (mine.gold is None or np.array_equal(mine.gold, theirs.gold))
            for mine, theirs in zip(self.parts, other.parts, strict=True)
        )  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """One system less another on one task: the difference of scores, and that of B resamples of each kind (B,).

    `p` is None with fewer than two units, as are the resamples then worthless; `wins`, `ties` and `losses` count units
    and are None where a unit alone has no score (rank statistics).
    """

    difference: float
    bootstrap: Array
    null: Array
    p: float | None
    units: int
    wins: int | None
    ties: int | None
    losses: int | None


@dataclass(frozen=True)
class TaskTest:
    """The difference on a task with its 95% interval, its p value and that after Holm's correction over the tasks."""

    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    units: int
    wins: int | None
    ties: int | None
    losses: int | None


@dataclass(frozen=True)
class MeanTest:
    """The difference of the means over `tasks` tasks, with its 95% interval and p value."""

    tasks: int
    difference: float
    low: float
    high: float
    p: float


def statistic(kind: str, values: Array, gold: Array | None) -> Statistic:
    """The statistic of a part as a function of weights, for values (n,) and gold (n,).

    With whole numbers as weights it is that of the sample in which each unit is repeated so often: the mean,
    `scipy.stats.spearmanr` (ties get their mean rank) or `sklearn.metrics.average_precision_score` (equal values are
    one threshold). A sample without its statistic (a constant for Spearman, no positive for average precision) is NaN.
    Raises ValueError for an unknown kind.
    """
    if kind == "mean":
        return lambda weights: weights @ values / weights.sum(axis=1)
    if kind == "spearman" and gold is not None:
        mine, theirs = _weighted_ranks(values), _weighted_ranks(gold)
        return lambda weights: _correlation(weights, mine(weights), theirs(weights))
    if kind == "ap" and gold is not None:
        return _average_precision(values, gold)
    raise ValueError(f"statistic {kind!r} is unknown, or lacks its gold values; there are {', '.join(KINDS)}")


def _weighted_ranks(values: Array) -> Statistic:
    """Weights (B, n) -> the mean rank (B, n) of each unit among the repeated ones."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    below, through = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")

    def ranks(weights: Array) -> Array:
        sums = np.zeros((len(weights), len(values) + 1))
        np.cumsum(np.take(weights, order, axis=1), axis=1, out=sums[:, 1:])
        return (np.take(sums, below, axis=1) + np.take(sums, through, axis=1) + 1) / 2

    return ranks


def _correlation(weights: Array, first: Array, second: Array) -> Array:
    """Pearson's correlation (B,) of two variables (B, n), weighted (B, n)."""
    total = weights.sum(axis=1, keepdims=True)
    first = first - (weights * first).sum(axis=1, keepdims=True) / total
    second = second - (weights * second).sum(axis=1, keepdims=True) / total
    weighted = weights * first
    shared = np.einsum("ij,ij->i", weighted, second)
    spread = np.einsum("ij,ij->i", weighted, first) * np.einsum("ij,ij->i", weights * second, second)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = np.where(spread > SAME, shared / np.sqrt(spread), np.nan)
    return found


def _average_precision(values: Array, gold: Array) -> Statistic:
    order = np.argsort(-values, kind="stable")
    positive = gold[order] > 0
    ends = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)  # the last unit of each threshold

    def precision(weights: Array) -> Array:
        ordered = np.take(weights, order, axis=1)
        retrieved = np.cumsum(ordered, axis=1)[:, ends]
        right = np.cumsum(ordered * positive, axis=1)[:, ends]
        gained = np.diff(right, axis=1, prepend=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Array = np.where(gained > 0, gained * right / retrieved, 0).sum(axis=1) / right[:, -1]
        return found

    return precision


def draw(mine: Units, theirs: Units, resamples: int, seed: int | list[int]) -> Drawn:
    """Resamples the difference of two systems on a task.

    Bootstrap: units drawn with replacement within each part, the same for both systems. Randomisation: each unit's two
    values are swapped or not. For rank statistics the values become ranks within each system first, since similarities
    of two systems differ in scale; the statistics stay what they are. Where there are no more than `resamples` ways to
    swap, a mean's p counts them all (`eval.metrics.randomisation_test`). Of a mean only the units' differences count:
    where few of them are distinct, such as those of shares of ten experiments, it is drawn how often each occurs
    (multinomial counts; binomial ones of the swaps), which has exactly the distribution of drawing units.

    Sources: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; Smucker, Allan and Carterette,
    CIKM 2007, for the randomisation test. Raises ValueError when the two are not of the same units.
    """
    if not mine.paired_with(theirs):
        raise ValueError("the two systems were measured on different units")
    rng = np.random.default_rng(seed)
    bootstrap, null, shares = np.zeros(resamples), np.zeros(resamples), []
    difference = 0.0
    for one, other in zip(mine.parts, theirs.parts, strict=True):
        values = [one.values, other.values] if mine.kind == "mean" else [rankdata(p.values) for p in (one, other)]
        once = np.ones((1, len(one.names)))
        alone = [float(statistic(mine.kind, column, one.gold)(once)[0]) for column in values]
        difference += (alone[0] - alone[1]) / len(mine.parts)
        shares.append((values[0] - values[1]) / len(one.names))
        width, sampler = _sampler(mine.kind, values[0], values[1], one.gold)
        for start in range(0, resamples, step := max(1, BLOCK // width)):
            rows = slice(start, min(start + step, resamples))
            drawn, swapped = sampler(rng, rows.stop - start)
            bootstrap[rows] += drawn / len(mine.parts)
            null[rows] += swapped / len(mine.parts)
    counts: tuple[int | None, ...] = (None, None, None)
    if mine.kind == "mean":
        gains = np.concatenate(shares)
        counts = int((gains > SAME).sum()), int((abs(gains) <= SAME).sum()), int((gains < -SAME).sum())
    p = None
    if mine.size > 1:
        exact = mine.kind == "mean" and 2**mine.size <= resamples
        p = randomisation_test(gains * mine.size / len(mine.parts), resamples) if exact else tail(difference, null)
    return Drawn(difference, bootstrap, null, p, mine.size, *counts)


def _sampler(kind: str, mine: Array, theirs: Array, gold: Array | None) -> tuple[int, Sampler]:
    """How a part of two systems' values (n,) is resampled, and how many figures a resample takes meanwhile."""
    n, gains = len(mine), mine - theirs
    distinct, counts = np.unique(gains.round(12), return_counts=True)  # 0.3 - 0.1 and 0.2 differ by rounding

    def counted(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
        kept = rng.binomial(counts, 0.5, (size, len(counts)))
        return rng.multinomial(n, counts / n, size) @ distinct / n, (2 * kept - counts) @ distinct / n

    if kind == "mean" and FEW * len(distinct) <= n:
        return len(distinct), counted
    alone = [statistic(kind, column, gold) for column in (mine, theirs)]
    both = statistic(kind, np.concatenate([mine, theirs]), None if gold is None else np.concatenate([gold, gold]))

    def unit_by_unit(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
        kept = rng.integers(0, 2, (size, n), dtype=np.int8).astype(np.float64)
        if kind == "mean":
            return weights @ gains / n, (2 * kept - 1) @ gains / n
        sides = both(np.hstack([kept, 1 - kept])) - both(np.hstack([1 - kept, kept]))
        return alone[0](weights) - alone[1](weights), sides

    return n, unit_by_unit


def tail(difference: float, null: Array) -> float:
    """Two-sided p: the share of randomised differences (B,) at least as large, the one that was found among them."""
    return float((1 + (abs(null) >= abs(difference) - SAME).sum()) / (1 + len(null)))


def bounds(bootstrap: Array) -> tuple[float, float]:
    """The 95% percentile interval of bootstrap samples (B,); those without a value are left out."""
    low, high = np.nanpercentile(bootstrap, [2.5, 97.5])
    return float(low), float(high)


def compare_tasks(
    mine: Mapping[str, Units], theirs: Mapping[str, Units], resamples: int = 2000, seed: int = 0
) -> tuple[dict[str, TaskTest], MeanTest | None]:
    """Tests of one system less another on the tasks (names -> units) that both have, and on the mean over them.

    p values of the tasks are corrected by Holm's method over these tasks. The mean's interval resamples the units
    within every task, so it is about these tasks and no others. It is None without a task that has two units.
    """
    tasks = [task for task in mine if task in theirs]
    drawn = {task: draw(mine[task], theirs[task], resamples, [seed, row]) for row, task in enumerate(tasks)}
    tested = [task for task in tasks if drawn[task].p is not None]
    corrected = dict(zip(tested, holm([p for task in tested if (p := drawn[task].p) is not None]), strict=True))
    found = {}
    for task, one in drawn.items():
        low, high = bounds(one.bootstrap) if one.p is not None else (None, None)
        counts = one.units, one.wins, one.ties, one.losses
        found[task] = TaskTest(one.difference, low, high, one.p, corrected.get(task), *counts)
    if not tested:
        return found, None
    difference = float(np.mean([drawn[task].difference for task in tested]))
    low, high = bounds(np.mean([drawn[task].bootstrap for task in tested], axis=0))
    p = tail(difference, np.mean([drawn[task].null for task in tested], axis=0))
    return found, MeanTest(len(tested), difference, low, high, p)

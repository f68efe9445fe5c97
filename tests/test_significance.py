"""Paired tests on tasks of all kinds against loops, scipy and scikit-learn, and what they must say of known cases."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from scipy.stats import ks_2samp, rankdata, spearmanr
from sklearn.metrics import average_precision_score

from eval.metrics import holm, randomisation_test
from eval.significance import KINDS, Array, Part, Units, _sampler, bounds, compare_tasks, draw, statistic, tail


def made(kind: str, n: int, seed: int) -> tuple[Array, Array, Array | None]:
    """Values of two systems, the first the better one, and gold; with ties in all of them."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 2 if kind == "ap" else 6, n).astype(float)
    noise = rng.normal(size=(2, n))
    first, second = (np.round(gold + scale * row, 1) for scale, row in zip((1.0, 3.0), noise, strict=True))
    return first, 7 * second - 3, None if kind == "mean" else gold


def units(kind: str, *columns: tuple[Array, Array | None]) -> Units:
    parts = [
        Part("test", f"s{number}", tuple(map(str, range(len(values)))), values, gold)
        for number, (values, gold) in enumerate(columns)
    ]
    return Units(kind, tuple(parts))


def reference(kind: str, values: Array, gold: Array | None) -> float:
    if kind == "mean":
        return float(values.mean())
    return float(spearmanr(values, gold)[0] if kind == "spearman" else average_precision_score(gold, values))


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_statistics_are_those_of_repeated_units(kind: str) -> None:
    rng = np.random.default_rng(1)
    for seed in range(5):
        values, _, gold = made(kind, 40, seed)
        weights = rng.multinomial(40, np.full(40, 1 / 40), size=20).astype(float)
        found = statistic(kind, values, gold)(weights)
        for row, score in zip(weights.astype(int), found, strict=True):
            again = np.repeat(values, row), None if gold is None else np.repeat(gold, row)
            assert score == pytest.approx(reference(kind, *again), abs=1e-12)
        assert units(kind, (values, gold)).score == pytest.approx(reference(kind, values, gold), abs=1e-12)


def test_samples_without_their_statistic_are_left_out() -> None:
    gold = np.array([1.0, 0, 0, 0])
    found = statistic("ap", np.arange(4.0), gold)(np.array([[0.0, 2, 1, 1], [1, 1, 1, 1]]))
    assert np.isnan(found[0])
    assert found[1] == 0.25
    assert np.isnan(statistic("spearman", np.arange(4.0), gold)(np.array([[0.0, 2, 1, 1]])))
    assert bounds(np.array([np.nan, 0.5, 0.5])) == (0.5, 0.5)
    assert bounds(np.arange(1001.0)) == (25, 975)
    with pytest.raises(ValueError, match="'median' is unknown"):
        statistic("median", gold, gold)
    with pytest.raises(ValueError, match="lacks its gold"):
        statistic("ap", gold, None)


@pytest.mark.parametrize("kind", KINDS)
def test_resamples_follow_the_distribution_of_naive_loops(kind: str) -> None:
    first, second, gold = made(kind, 60, 3)
    found = draw(units(kind, (first, gold)), units(kind, (second, gold)), 2000, 0)
    if kind != "mean":  # as documented: ranks, so that values of the two systems can be swapped
        first, second = rankdata(first), rankdata(second)
    rng = np.random.default_rng(9)
    bootstrap, null = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2000):
            rows = rng.integers(0, 60, 60)
            picked = None if gold is None else gold[rows]
            bootstrap.append(reference(kind, first[rows], picked) - reference(kind, second[rows], picked))
            swap = rng.random(60) < 0.5
            mine, theirs = np.where(swap, second, first), np.where(swap, first, second)
            null.append(reference(kind, mine, gold) - reference(kind, theirs, gold))
    assert found.difference == pytest.approx(reference(kind, first, gold) - reference(kind, second, gold), abs=1e-12)
    for ours, naive in ((found.bootstrap, bootstrap), (found.null, null)):
        spread = np.std(naive)
        assert np.mean(ours) == pytest.approx(np.mean(naive), abs=0.12 * spread)
        assert np.std(ours) == pytest.approx(spread, rel=0.1)
        near = np.percentile(naive, [2.5, 97.5])
        assert np.percentile(ours, [2.5, 97.5]) == pytest.approx(near, abs=0.25 * spread)


def test_counts_of_few_distinct_differences_are_as_units_drawn() -> None:
    rng = np.random.default_rng(2)
    first, second = (rng.integers(0, 11, 400) / 10 for _ in range(2))  # shares of ten experiments
    other, apart = rng.random(40), rng.random(40)
    mine, theirs = units("mean", (first, None), (other, None)), units("mean", (second, None), (apart, None))
    found = draw(mine, theirs, 20_000, 0)
    assert _sampler("mean", first, second, None)[0] <= 21  # differences, not units
    assert _sampler("mean", other, apart, None)[0] == 40
    parts = [first - second, other - apart]
    bootstrap, null = np.zeros(20_000), np.zeros(20_000)
    for gains in parts:
        bootstrap += gains[rng.integers(0, len(gains), (20_000, len(gains)))].mean(1) / 2
        null += (gains * rng.choice([-1, 1], (20_000, len(gains)))).mean(1) / 2
    assert found.difference == pytest.approx(np.mean([gains.mean() for gains in parts]))
    assert ks_2samp(found.bootstrap, bootstrap).pvalue > 0.01
    assert ks_2samp(found.null, null).pvalue > 0.01
    assert found.p == pytest.approx((abs(null) >= abs(found.difference)).mean(), abs=0.02)


def test_a_huge_task_of_shares_takes_no_draw_of_its_units(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 11, 400_000) / 10 for _ in range(2))
    drawn: list[int] = []

    class Counting(np.random.Generator):
        def integers(self, *given: Any, **options: Any) -> Any:
            drawn.append(1)
            return super().integers(*given, **options)

    monkeypatch.setattr("numpy.random.default_rng", lambda seed: Counting(np.random.PCG64(seed)))
    found = draw(units("mean", (first, None)), units("mean", (second, None)), 2000, 0)
    assert not drawn
    assert np.std(found.bootstrap) == pytest.approx(np.std(first - second) / np.sqrt(400_000), rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_identical_systems_do_not_differ(kind: str) -> None:
    values, _, gold = made(kind, 50, 0)
    one = units(kind, (values, gold))
    scaled = units(kind, (values * 3 + 1, gold)) if kind != "mean" else one  # ranks are all that counts
    tests, mean = compare_tasks({"task": one}, {"task": scaled}, 500)
    test = tests["task"]
    assert (test.difference, test.low, test.high, test.p, test.p_holm) == (0, 0, 0, 1, 1)
    assert (test.wins, test.ties, test.losses) == ((0, 50, 0) if kind == "mean" else (None, None, None))
    assert mean is not None
    assert (mean.difference, mean.low, mean.high, mean.p) == (0, 0, 0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clearly_better_system_is_significant(kind: str) -> None:
    first, second, gold = made(kind, 300, 5)
    if kind == "mean":
        first = second + 0.1
    tests, mean = compare_tasks({"t": units(kind, (first, gold))}, {"t": units(kind, (second, gold))}, 999)
    test = tests["t"]
    assert test.p == pytest.approx(0.001)
    assert test.low is not None
    assert 0 < test.low <= test.difference + 1e-9
    assert mean is not None
    assert mean.p == pytest.approx(0.001)
    turned, _ = compare_tasks({"t": units(kind, (second, gold))}, {"t": units(kind, (first, gold))}, 999)
    assert turned["t"].difference == pytest.approx(-test.difference)
    assert turned["t"].p == test.p
    assert (turned["t"].wins, turned["t"].losses) == (test.losses, test.wins)


def test_p_of_systems_that_do_not_differ_is_rarely_small() -> None:
    rng = np.random.default_rng(4)
    inside, small = 0, 0
    for seed in range(200):
        values = rng.normal(size=(2, 40))
        found = draw(units("mean", (values[0], None)), units("mean", (values[1], None)), 300, seed)
        low, high = bounds(found.bootstrap)
        inside += low <= 0 <= high
        small += found.p is not None and found.p < 0.05
    assert 0.88 <= inside / 200 <= 0.99
    assert small / 200 <= 0.09


def test_the_score_is_the_mean_of_its_parts() -> None:
    first, second, _ = made("mean", 12, 0)
    third = np.array([4.0, 8.0])
    mine, theirs = (units("mean", (a, None), (b, None)) for a, b in ((first, third), (second, third - [1, 3])))
    assert mine.score == pytest.approx((first.mean() + 6) / 2)
    found = draw(mine, theirs, 1000, 0)
    assert found.difference == pytest.approx((first.mean() - second.mean() + 2) / 2)
    assert found.units == 14
    assert np.mean(found.bootstrap) == pytest.approx(found.difference, abs=0.1 * np.std(found.bootstrap))
    # every sign flipped, each part by itself
    gains = np.concatenate([(first - second) / 12, [1 / 2, 3 / 2]])
    assert np.std(found.null) == pytest.approx(np.sqrt((gains**2).sum()) / 2, rel=0.1)


def test_few_units_are_enumerated() -> None:
    gains = np.array([0.3, 0.1, 0.2, -0.05, 0.4])
    zero = np.zeros(5)
    found = draw(units("mean", (gains, None)), units("mean", (zero, None)), 2000, 0)
    assert found.p == randomisation_test(gains, 2000)
    assert found.p == 4 / 32  # all signs as they are, and with -0.05 turned too; both ways
    assert (found.wins, found.ties, found.losses) == (4, 0, 1)
    alone = units("mean", (gains[:1], None))
    tests, mean = compare_tasks({"t": alone}, {"t": units("mean", (zero[:1], None))}, 200)
    assert (tests["t"].difference, tests["t"].p, tests["t"].low, mean) == (0.3, None, None, None)


def test_tail_counts_the_difference_itself() -> None:
    assert tail(0.5, np.array([0.5, -0.5, 0.4, -0.6])) == 4 / 5
    assert tail(1.0, np.zeros(99)) == 1 / 100


def test_holm_goes_over_the_tasks_and_the_mean_over_all() -> None:
    rng = np.random.default_rng(0)
    mine, theirs = {}, {}
    for task, gain in (("a", 0.0), ("b", 0.25), ("c", 0.4), ("d", 1.0)):
        values = rng.normal(size=60)
        mine[task], theirs[task] = units("mean", (values + gain, None)), units("mean", (rng.normal(size=60), None))
    theirs.pop("a")
    tests, mean = compare_tasks(mine, theirs, 1000, 7)
    assert list(tests) == ["b", "c", "d"]
    p = sorted(test.p for test in tests.values() if test.p is not None)
    by_hand = [min(1, 3 * p[0]), 0.0, 0.0]
    by_hand[1] = max(by_hand[0], min(1, 2 * p[1]))
    by_hand[2] = max(by_hand[1], p[2])
    assert sorted(test.p_holm for test in tests.values() if test.p_holm is not None) == pytest.approx(by_hand)
    assert holm(p) == pytest.approx(by_hand)
    assert mean is not None
    assert mean.tasks == 3
    assert mean.difference == pytest.approx(np.mean([mine[task].score - theirs[task].score for task in "bcd"]))
    assert mean.low < mean.difference < mean.high
    assert mean.high - mean.low < np.mean([test.high - test.low for test in tests.values() if test.high and test.low])
    assert compare_tasks(mine, theirs, 1000, 7) == (tests, mean)
    assert compare_tasks(mine, theirs, 1000, 8) != (tests, mean)


def test_the_mean_takes_all_tasks_each_resampled_by_itself() -> None:
    rng = np.random.default_rng(3)
    one, other = (units("mean", (rng.normal(size=80) + gain, None)) for gain in (0.3, 0))
    tests, mean = compare_tasks({"a": one, "b": one}, {"a": other, "b": other}, 2000)
    assert mean is not None
    widths = [test.high - test.low for test in tests.values() if test.high and test.low]
    assert mean.high - mean.low == pytest.approx(np.mean(widths) / np.sqrt(2), rel=0.1)
    # a task without any difference adds none by chance either
    tests, mean = compare_tasks({"a": one, "b": one}, {"a": one, "b": other}, 2000)
    assert mean is not None
    assert tests["b"].p is not None
    assert 0.001 < tests["b"].p < 0.5
    assert mean.p == tests["b"].p
    assert mean.difference == pytest.approx(tests["b"].difference / 2)


def test_other_units_are_refused() -> None:
    values, _, gold = made("spearman", 10, 0)
    one = units("spearman", (values, gold))
    assert gold is not None
    for other in (
        units("spearman", (values, gold + 1)),
        units("spearman", (values[:9], gold[:9])),
        units("mean", (values, None)),
        units("spearman", (values, gold), (values, gold)),
    ):
        assert not one.paired_with(other)
        with pytest.raises(ValueError, match="different units"):
            draw(one, other, 100, 0)

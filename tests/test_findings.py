"""What the sentences of an analysis say of made scores, and the tests and intervals that they rest on."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from eval import findings
from eval.findings import Findings, mean_difference


def made(scores: dict[str, list[float]], **facts: list[Any]) -> Findings:
    """Findings of made scores, one for each of the points."""
    tasks = {f"t{i}": {"type": "STS", "measure": "m"} for i in range(len(next(iter(scores.values()))))}
    described = {name: {field: values[i] for field, values in facts.items()} for i, name in enumerate(scores)}
    return Findings(tasks, described, {name: dict(zip(tasks, row, strict=True)) for name, row in scores.items()})


def test_sentences_of_pruning_name_the_hardest_harmless_point() -> None:
    whole = [0.5, 0.6, 0.7, 0.8, 0.4, 0.6]
    lost = {"top 8": 0.05, "top 16": 0.008, "top 32": 0.001}
    scores = {"unpruned": whole, **{name: [value - loss for value in whole] for name, loss in lost.items()}}
    facts = {"method": ["none", "top", "top", "top"], "top_n": [None, 8, 16, 32]}
    told = findings.pruning_sentences(made(scores, **facts), "M", 4000, 812.0, 3)
    assert told[1] == (
        "Keeping the 16 largest of on average 812 values of a text keeps 98.7% of the mean score (-0.80 points, 95% "
        "interval -0.80 to -0.80): the hardest pruning of this curve (3 points) for which a loss of more than 1 point "
        "is excluded."
    )
    scores = {"unpruned": whole, "top 8": [value - 0.05 for value in whole]}
    (_, told) = findings.pruning_sentences(made(scores, method=["none", "top"], top_n=[None, 8]), "M", 10, 9.0, 0)
    assert "at no point of this curve (of 1) is a loss of more than 1 point excluded" in told
    scores = {"unpruned": whole, "a": [0.5] * 6, "b": [0.4] * 6}
    facts = {"method": ["none", "variance", "random"], "dropped": [0, 0.5, 0.5], "dimensions": [10, 5, 5]}
    told = findings.pruning_sentences(made(scores, **facts), "M", 10, 9.0, 0)
    assert told[-1].startswith(
        "With 50% dropped, dropping by variance and by random order differ: variance scores higher"
    )
    assert findings.pruning_sentences(Findings({"t": {"type": "STS"}}, {"a": {}}, {}), "M", 1, 1.0, 0) == [
        findings.NOTHING
    ]


def test_sentences_say_where_nothing_can_be_told() -> None:
    first, second = [0.5, 0.6, 0.7, 0.8, 0.5, 0.6], [0.6, 0.5, 0.8, 0.69, 0.4, 0.7]
    facts = {
        "dimensions": [8, 16],
        "pooling": ["max", "sum"],
        "attention": ["bidirectional"] * 2,
        "head": ["clusters"] * 2,
    }
    told = findings.variants_sentences(made({"a": first, "b": second}, **facts), "none")
    assert "b (dimensions 16 instead of 8, pooling sum instead of max) is not to be told apart from a: " in told[1]
    told = findings.variants_sentences(made({"a": first, "b": first}, **facts), "dimensions")
    assert "smallest K for which a loss of more than 1 point against K = 16 is excluded is K = 8 (+0.00" in told[2]
    worse = [value - 0.1 for value in first]
    assert "For no smaller K" in findings.variants_sentences(made({"a": worse, "b": first}, **facts), "dimensions")[2]
    joined = made({"dense": first, "both": [value + 0.1 for value in first], "LENS": second}, weight=[0, 0.5, 1])
    told = findings.hybrid_sentences(joined, 0.5, "both", 0)
    assert told[1].startswith("It cannot be told apart from LENS alone")
    assert told[2].startswith("It is better than dense alone: +10.00 points")


def test_the_interval_is_a_paired_bootstrap_over_tasks() -> None:
    rng = np.random.default_rng(0)
    one = rng.random(40)
    two = one - 0.02 + rng.normal(scale=0.05, size=40)
    found = mean_difference(one, two)
    draws = np.random.default_rng(1).integers(0, 40, (20_000, 40))
    low, high = np.percentile((one - two)[draws].mean(1), [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-3)
    assert mean_difference([0.5], [0.4]).low is None


def test_a_difference_is_told_by_chance_in_no_more_than_5_percent() -> None:
    rng = np.random.default_rng(0)
    for tasks in (2, 3, 6, 9):
        noise = rng.normal(scale=0.02, size=(150, tasks))
        found = [mean_difference(row, np.zeros(tasks)) for row in noise]
        lost = [mean_difference(row - findings.LOSS_LIMIT, np.zeros(tasks)) for row in noise]
        assert sum(one.told for one in found) <= 13, tasks  # of 150: exceeded by chance once in 50 at 5%
        assert sum(one.harmless for one in lost) <= 13, tasks
        assert all(one.low is not None for one in found)


def test_differences_by_hand() -> None:
    gains = np.array([0.02, 0.03, 0.01, 0.05, 0.04, 0.02])
    found = mean_difference(gains, np.zeros(6))
    assert (found.tasks, found.p, found.p_loss) == (6, 2 / 64, 1 / 64)
    assert (found.told, found.harmless) == (True, True)
    mixed = np.array([0.02, -0.005, 0.01, 0.015, -0.002, 0.02])  # not told apart, no loss of 1 point either
    found = mean_difference(mixed, np.zeros(6))
    signs = np.array(list(itertools.product((1, -1), repeat=6)))
    means = signs @ (mixed + findings.LOSS_LIMIT) / 6
    assert found.p_loss == (means >= (mixed + findings.LOSS_LIMIT).mean() - 1e-12).mean()
    assert (found.told, found.harmless) == (False, True)
    worse = mean_difference(-gains, np.zeros(6))
    assert (worse.told, worse.harmless) == (True, False)
    assert worse.p_loss is not None
    assert worse.p_loss > 0.9
    edge = mean_difference([0.49, 0.79, 0.39, 0.69, 0.19, 0.09], [0.5, 0.8, 0.4, 0.7, 0.2, 0.1])
    assert not edge.harmless  # a loss of 1 point, and rounding
    few = mean_difference(gains[:5], np.zeros(5))
    assert (few.p, few.p_loss, few.few, few.told, few.harmless) == (None, None, True, False, False)


def test_five_tasks_are_too_few_to_tell() -> None:
    first = [0.5, 0.6, 0.7, 0.8, 0.4]
    better = [value + 0.1 for value in first]
    few = "5 tasks are too few to tell (at least 6 are needed)"
    facts = {"method": ["none", "top", "variance", "random"], "top_n": [None, 8, None, None]}
    facts |= {"dropped": [0, 0, 0.5, 0.5], "dimensions": [10, 10, 5, 5]}
    scores = {"unpruned": first, "top 8": first, "a": better, "b": first}
    told = findings.pruning_sentences(made(scores, **facts), "M", 10, 9.0, 0)
    assert len(told) == 5
    assert all(f"{few}" in sentence for sentence in told[1:])
    facts = {"dimensions": [8, 16], "pooling": ["max"] * 2, "attention": ["causal"] * 2, "head": ["clusters"] * 2}
    found = made({"a": first, "b": better}, **facts)
    assert (
        f"is not to be told apart from a ({few}): +10.00 points, 95% interval"
        in (findings.variants_sentences(found, "none")[1])
    )
    assert few in findings.variants_sentences(found, "dimensions")[2]
    joined = made({"dense": first, "both": better, "LENS": first}, weight=[0, 0.5, 1])
    told = findings.hybrid_sentences(joined, 0.5, "both", 0)
    assert told[1].startswith(f"It cannot be told apart from LENS alone ({few}): +10.00 points")


def test_given_names_are_neither_mathematics_nor_markdown() -> None:
    names = ["a$x", "b$x_$y", "<b>*c*|[d](e)", "my_model_2"]
    facts = {"dimensions": [8] * 4, "pooling": ["max"] * 4, "attention": ["causal"] * 4, "head": ["clusters"] * 4}
    found = made({name: [0.5 + 0.1 * i] * 6 for i, name in enumerate(names)}, **facts)
    text = "".join(ET.fromstring(findings.bars(found)).itertext())
    assert all(name in text for name in names)
    told = findings.variants_sentences(found, "none")
    assert told[0].endswith("of my_model_2.")
    assert told[1].startswith("b\\$x\\_\\$y (the same in what the table names) is above a\\$x: ")
    assert told[2].startswith("\\<b\\>\\*c\\*\\|\\[d\\](e) (")
    facts = {"method": ["none", "top"], "top_n": [None, 8]}
    told = findings.pruning_sentences(made({"unpruned": [0.5], "top 8": [0.5]}, **facts), "*m*", 10, 9.0, 0)
    assert told[0].startswith("\\*m\\* as it is has")

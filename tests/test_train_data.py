"""Training files, the schedule, and batches for any number of ranks."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import SENTENCES, row, write_rows

import lens
from lens.text import TextProcessor
from train.data import Batches, Example, choose
from train.sampler import Schedule
from train.sources import read_examples


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(query=" "), "`query` must be a text that is not empty"),
        (row(pos=[]), "`pos` must hold at least one text"),
        (row(pos="p"), "`pos` must be a list of texts"),
        (row(neg=[None]), "`neg` must be a list of texts"),
        (row(neg=["n", " "]), "`neg` holds an empty text"),
        (row(query="\ud800"), "lone surrogate"),
        (row(neg=[]), "`neg` is empty but group_size=3"),
        (row(neg_scores=[1.0]), "`neg_scores` must be null or 2 finite numbers"),
        (row(pos_scores=[float("nan")]), "`pos_scores` must be null or 1 finite numbers"),
        (row(type="retreival"), "`type` must be one of"),
        (row(prompt=3), "`prompt` must be a text or null"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, bad, message):
    path = write_rows(tmp_path / "d.jsonl", row(), bad)
    with pytest.raises(ValueError, match=message) as caught:
        read_examples(path, group_size=3)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_examples(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no examples"):
        read_examples(tmp_path / "empty.jsonl")
    mixed = write_rows(tmp_path / "mixed.jsonl", row(), row(type="symmetric_class"))
    with pytest.raises(ValueError, match="mixes types"):
        read_examples(mixed)


def test_choice_of_passages():
    example = Example("q", ["p1", "p2"], ["n1", "n2", "n3"], [1.0, 2.0], [3.0, 4.0, 5.0], None, "retrieval")
    group = choose(example, 3, random.Random(0))
    scores = {"p1": 1.0, "p2": 2.0, "n1": 3.0, "n2": 4.0, "n3": 5.0}
    assert group.passages[0] in ("p1", "p2")
    assert len(set(group.passages[1:])) == 2
    assert group.scores == [scores[passage] for passage in group.passages]
    for seed in range(50):  # 7 negatives of 3: the pool holds each three times
        few = choose(example, 8, random.Random(seed)).passages[1:]
        assert len(few) == 7
        assert max(few.count(name) for name in ("n1", "n2", "n3")) <= 3
    only = Example("q", ["p"], ["n1", "n2"], None, None, None, "only_1neg")
    assert len(choose(only, 8, random.Random(0)).passages) == 2
    assert choose(only, 8, random.Random(0)).scores is None


def test_schedule_is_a_pure_function_of_the_step():
    one, other = Schedule([10, 7], 3, 5, 40), Schedule([10, 7], 3, 5, 40)
    forwards = [one.batch(step) for step in range(40)]
    assert [other.batch(step) for step in reversed(range(40))] == forwards[::-1]
    assert one.steps_per_epoch == 3 + 2
    for epoch in range(8):
        batches = forwards[epoch * 5 : epoch * 5 + 5]
        for source, size in ((0, 10), (1, 7)):
            seen = [i for s, indices in batches if s == source for i in indices]
            assert len(seen) == len(set(seen)) == size // 3 * 3  # nothing twice in an epoch, whole batches only
    assert forwards[:5] != forwards[5:10]
    assert [Schedule([10, 7], 3, 6, 40).batch(step) for step in range(40)] != forwards
    with pytest.raises(ValueError, match="has 2 examples, fewer than batch_size=3"):
        Schedule([10, 2], 3, 5, 1)
    with pytest.raises(IndexError):
        one.batch(40)


def test_global_batch_is_the_same_for_any_number_of_ranks(bert, bert_clusters):
    model = lens.LENS.build(bert, bert_clusters)
    text = TextProcessor(model.tokenizer, model.config)
    source = [Example(f"{s} {i}", [s], SENTENCES, [1.0], [0.5] * 7, None, "retrieval")
              for i in range(3) for s in SENTENCES]  # fmt: skip
    schedule = Schedule([len(source)], 8, 0, 5)

    def ids(world_size):
        shares = [Batches([source], schedule, text, 3, True, rank, world_size)[2] for rank in range(world_size)]
        rows = []
        for share in shares:
            queries = share["queries"]
            rows += [
                tuple(i for i, m in zip(r.tolist(), k.tolist(), strict=True) if m)
                for r, k in zip(queries["input_ids"], queries["attention_mask"], strict=True)
            ]
        return rows, torch.cat([share["teacher"] for share in shares])

    (rows, teacher), (rows4, teacher4) = ids(1), ids(4)
    assert rows == rows4
    assert torch.equal(teacher, teacher4)
    with pytest.raises(ValueError, match="multiple of the 3 ranks"):
        Batches([source], schedule, text, 3, True, 0, 3)


def test_a_missing_score_switches_distillation_off_for_its_batch_only(bert, bert_clusters):
    model = lens.LENS.build(bert, bert_clusters)
    text = TextProcessor(model.tokenizer, model.config)
    source = [Example(f"q {i}", ["p"], ["n"], None if i == 0 else [1.0], [0.5], None, "retrieval") for i in range(8)]
    schedule = Schedule([8], 4, 0, 2)
    batches = [
        [Batches([source], schedule, text, 2, True, rank, 2)[step]["teacher"] for rank in (0, 1)] for step in (0, 1)
    ]
    gap = next(step for step in (0, 1) if 0 in schedule.batch(step)[1])
    assert batches[gap] == [None, None]  # on every rank, also the one whose share has no gap
    assert all(teacher.shape == (2, 2) for teacher in batches[1 - gap])

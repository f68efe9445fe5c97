"""Training files, the schedule, and batches for any number of ranks."""

from __future__ import annotations

import dataclasses
import pickle
import random

import pytest
import torch
from conftest import SENTENCES, row, write_rows
from torch.utils.data import DataLoader

import lens
from lens.text import TextProcessor
from train.config import Recipe
from train.data import Batches, Example, choose
from train.sampler import Schedule
from train.sources import make_schedule, read_examples, read_sources


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


SIZES, SIZE_OF, WEIGHTS = [30, 17, 64], [4, 8, 16], [1.0, 2.5, 0.5]


@pytest.mark.parametrize("blocks", [None, [None, [[5, 5, 2], [5]], [[4] * 16]]], ids=["mapped", "streamed"])
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_and_batch_sizes_of_data_sets(blocks, seed):
    make = lambda: Schedule(SIZES, SIZE_OF, seed, 60, WEIGHTS, blocks)  # noqa: E731
    schedule = make()
    counts = [30 // 4, int(2.5 * 17) // 8, 32 // 16]  # weight x size, cut off to whole batches
    assert schedule.steps_per_epoch == sum(counts) == 14
    batches = [schedule.batch(step) for step in range(60)]
    order = list(range(60))
    random.Random(seed).shuffle(order)
    again, fresh = make(), make()
    assert {step: again.batch(step) for step in order} == dict(enumerate(batches))
    assert [fresh.batch(step) for step in range(23, 60)] == batches[23:]  # as a resumed run asks
    for epoch in range(4):
        served = batches[epoch * 14 : epoch * 14 + 14]
        for source, (size, batch) in enumerate(zip(SIZES, SIZE_OF, strict=True)):
            mine = [indices for s, indices in served if s == source]
            assert len(mine) == counts[source]
            assert all(len(set(indices)) == batch and max(indices) < size for indices in mine)
            seen = [i for indices in mine for i in indices]
            assert max(map(seen.count, seen)) <= -(-len(seen) // (size // batch * batch))
    samples = [{i for s, indices in batches[e * 14 : e * 14 + 14] if s == 2 for i in indices} for e in range(4)]
    assert [len(sample) for sample in samples] == [32] * 4  # half of it, and another half in another epoch
    assert samples[0] != samples[1]


def test_a_weight_that_leaves_less_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="small gives 3 of its 10 examples with weight 0.3, fewer than batch_size=4"):
        Schedule([20, 10], 4, 0, 1, [1, 0.3], names=["large", "small"])


def test_streamed_rows_are_shuffled_by_file_and_within_blocks():
    files = [[5, 5, 2], [5], [], [5, 1]]
    schedule = Schedule([23], 1, 3, 46, blocks=[files])
    starts = {0: [0, 5, 10], 1: [12], 3: [17, 22]}
    orders = []
    for epoch in (0, 1):
        rows = [schedule.batch(epoch * 23 + k)[1][0] for k in range(23)]
        assert sorted(rows) == list(range(23))
        blocks = [block for file, firsts in starts.items() for block in zip(firsts, files[file], strict=True)]
        read, place = [], 0
        while place < 23:  # whole blocks, one after the other
            start, count = next((s, c) for s, c in blocks if s <= rows[place] < s + c)
            assert set(rows[place : place + count]) == set(range(start, start + count))
            read.append(start)
            place += count
        for firsts in starts.values():  # a file from front to back, without another one in between
            assert read[read.index(firsts[0]) :][: len(firsts)] == firsts
        orders.append(rows)
    assert orders[0] != orders[1]


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


def mixed(tmp_path):
    """A recipe of three data sets that train in different ways."""
    scored = {"pos_scores": [1.0], "neg_scores": [0.1, 0.2]}
    kinds = {"retrieval": scored, "symmetric_class": {}, "only_1neg": {}}
    paths = []
    for number, (kind, more) in enumerate(kinds.items()):
        rows = [row(query=f"{SENTENCES[i % 7]} {kind} {i}", type=kind, prompt="find", **more) for i in range(24)]
        paths.append(str(write_rows(tmp_path / f"{number}.jsonl", *rows)))
    return Recipe(
        base="b", output="o", data=tuple(paths), group_size=3, batch_size=8, data_weights=(1, 0.5, 2), seed=3,
        type_group_size={"symmetric_class": 2}, type_batch_size={"symmetric_class": 4}, warmup_steps=0,
    )  # fmt: skip


def flat(batch):
    """A batch's tensors and texts' tokens as one list, padding left out."""
    rows = []
    for part in ("queries", "passages"):
        ids, mask = batch[part]["input_ids"], batch[part]["attention_mask"].bool()
        rows.append([line[kept].tolist() for line, kept in zip(ids, mask, strict=True)])
    teacher = None if batch["teacher"] is None else batch["teacher"].tolist()
    return [*rows, teacher, batch["in_batch"], batch["keys"][1].tolist()]


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_are_the_same_for_any_workers_ranks_and_start(streaming, bert, bert_clusters, tmp_path):
    model = lens.LENS.build(bert, bert_clusters)
    text = TextProcessor(model.tokenizer, model.config)
    recipe = dataclasses.replace(mixed(tmp_path), streaming=streaming, shuffle_buffer=10)

    def batches(rank=0, world_size=1):
        sources = read_sources(recipe)
        schedule = make_schedule(recipe, sources)
        assert schedule.steps_per_epoch == 3 + 3 + 6
        group_size_of = recipe.group_size_of
        return Batches(sources, schedule, text, 3, True, rank, world_size, group_size_of=group_size_of)

    whole = [flat(batches()[step]) for step in range(12)]
    shapes = {(len(queries), len(passages)) for queries, passages, *_ in whole}
    assert shapes == {(8, 24), (4, 8), (8, 16)}  # retrieval, class, one negative
    assert flat(pickle.loads(pickle.dumps(batches()))[7]) == whole[7]  # as workers that do not fork get it
    for workers in (1, 2):
        data = batches()
        data[7]  # the parent has read, as a run that checks its data does
        loader = DataLoader(data, batch_size=None, shuffle=False, num_workers=workers)
        assert [flat(batch) for batch in loader] == whole
    for world_size in (2, 4):
        shares = [[flat(batches(rank, world_size)[step]) for rank in range(world_size)] for step in range(12)]
        for step, parts in enumerate(shares):
            joined = [[line for part in parts for line in part[field]] for field in (0, 1)]
            assert joined == whole[step][:2]
            assert all((part[2] is None) == (whole[step][2] is None) and part[3] == whole[step][3] for part in parts)
    resumed = batches()
    assert [flat(resumed[step]) for step in range(5, 12)] == whole[5:]
    with pytest.raises(ValueError, match="batch_size=4 must be a multiple of the 8 ranks"):
        batches(0, 8)
    with pytest.raises(ValueError, match="type_batch_size symmetric_class=4 must be a multiple of the 8 ranks"):
        recipe.check_ranks(8)


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

"""Mining while training (ANCE): which negatives a batch sees, against a naive search; restarts, workers, ranks."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from train_helpers import FROZEN, LORA, deepspeed, log_of, settings, weights_of

import lens
from train.config import Recipe
from train.data import parse_example
from train.ranking import Best
from train.refresh import Refreshed, Share, merged
from train.run import main as train
from train.trainer import LensTrainer

REFRESH = {"refresh_steps": 2, "refresh_negatives": 4, "refresh_depth": 6, "max_steps": 8, "save_total_limit": 9}


def run(empty, *arguments, **changes):
    assert train([empty, *settings(*arguments, **{**LORA, "lora_dropout": 0.2, **REFRESH, **changes})]) == 0


def generation(folder: Path, step: int) -> dict[tuple[int, int], list[str]]:
    """The mined texts of every example, read without Refreshed."""
    with np.load(folder / f"step-{step}.npz") as file:
        text = (folder / f"step-{step}.bin").read_bytes()
        texts = {
            position: text[start:end].decode()
            for position, start, end in zip(file["positions"], file["ends"][:-1], file["ends"][1:], strict=True)
        }
        starts = file["starts"].tolist()
        parts = [file["chosen"][first:last] for first, last in itertools.pairwise(starts)]
        owners = zip(file["sources"].tolist(), file["indices"].tolist(), strict=True)
        return {owner: [texts[i] for i in part.tolist()] for owner, part in zip(owners, parts, strict=True)}


def test_which_mining_serves_which_step():
    refreshed = Refreshed(Path("x"), 3, 1)
    # after steps 3 and 6; the step that is laid out meanwhile still sees the older ones
    assert [refreshed.mined_at(step) for step in range(12)] == [None] * 4 + [3, 3, 3, 6, 6, 6, 9, 9]
    assert [Refreshed(Path("x"), 1, 1).mined_at(step) for step in range(5)] == [None, None, 1, 2, 3]


RULES = {"gradient_accumulation": 2, "refresh_skip": 1, "refresh_max_share": 0.95}


@pytest.mark.parametrize("rules", [{}, RULES])
def test_negatives_are_those_of_a_naive_search_with_the_model_of_that_step(
    rules, empty, mistral, mistral_clusters, pairs, tmp_path
):
    output, data = tmp_path / "run", tmp_path / "data.jsonl"
    lines = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    for number, line in enumerate(lines):  # of two positives, one or the other scores higher
        line["pos"] = [*line["pos"], lines[(number + 3) % 7]["query"]]
        line["pos_scores"] = None
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(empty, mistral, mistral_clusters, data, output, **rules)
    rows = [parse_example(line) for line in lines]
    corpus = list(dict.fromkeys(text for row in rows for text in (*row.pos, *row.neg)))
    accumulation, skip = rules.get("gradient_accumulation", 1), rules.get("refresh_skip", 0)
    short = 0
    for step in (2, 4, 6):
        model = lens.load(output / f"checkpoint-{step}", device="cpu")
        mined = generation(output / "negatives", step)
        served = 8 * accumulation * min(2, 8 - step - 1)  # the queries of the steps that it serves
        assert served / 2 <= len(mined) <= served
        queries = np.concatenate([model.encode_queries([row.query], row.prompt) for row in rows])
        scores = queries @ model.encode_documents(corpus).T
        for (source, index), found in mined.items():
            assert source == 0
            row = rows[index]
            places = {rows.index(rows[i]) for _, i in mined}
            same = {text for i in places if rows[i].query == row.query for text in rows[i].pos} | {row.query}
            best = [i for i in np.argsort(-scores[index], kind="stable")[:6] if scores[index, i] > 0]
            limit = rules.get("refresh_max_share", 9) * max(scores[index, corpus.index(text)] for text in row.pos)
            window = [(rank, corpus[i], scores[index, i]) for rank, i in enumerate(best)]
            pool = [text for rank, text, score in window if text not in same and rank >= skip and score < limit]
            assert set(found[: len(pool)]) <= set(pool)
            assert len(set(found)) == len(found) <= 4
            assert not set(found) & same
            refused = {text for rank, text, score in window if rank < skip or score >= limit}
            assert not set(found) & refused
            short += len(pool) < 4
    assert short or not rules
    log = log_of(output)
    assert any(row.get("refresh_random", 0) > 0 for row in log) or not rules
    steps = [row for row in log if "negatives_age" in row]
    assert [(row["step"], row["negatives_age"]) for row in steps] == [(4, 2), (5, 3), (6, 2), (7, 3), (8, 2)]
    assert [row["step"] for row in log if "refresh_seconds" in row] == [2, 4, 6]


def test_shares_and_their_lists_give_what_one_list_gives(tmp_path):
    class Numbers:
        def shards(self, size, first=0):
            return ((start, list(range(start, min(start + size, 23)))) for start in range(first * size, 23, size))

    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (4, 23)).astype(np.float32)  # with many ties
    for world in (1, 2, 3):
        files = []
        for rank in range(world):
            best = Best(4, 5)
            for start, part in Share(Numbers(), rank, world).shards(4):
                for query in range(4):
                    best.add(query, np.array(part), scores[query, start : start + len(part)])
            files.append(tmp_path / f"{world}-{rank}.npz")
            best.save(files[-1], 0)
        found = merged(files, 5)
        for query in range(4):
            wanted = sorted(range(23), key=lambda i: (-scores[query, i], i))[:5]
            assert found.of(query)[0].tolist() == wanted
            assert found.of(query)[1].tolist() == scores[query, wanted].tolist()
    shares = [number for rank in range(3) for _, part in Share(Numbers(), rank, 3).shards(4) for number in part]
    assert sorted(shares) == list(range(23))
    assert len(list(Share(Numbers(), 1, 3).shards(4))) == 2


def test_files_that_nothing_needs_go_and_a_run_goes_on_from_the_rest(
    empty, mistral, mistral_clusters, pairs, tmp_path, monkeypatch
):
    places = mistral, mistral_clusters, pairs
    few = {"refresh_steps": 1, "save_steps": 2, "save_total_limit": 1}
    run(empty, *places, tmp_path / "whole", **few)
    mined = LensTrainer.refresh_negatives

    def killed(self):
        mined(self)
        if self.state.global_step == 6:
            (tmp_path / "broken" / "negatives" / ".step-6.npz.half").touch()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LensTrainer, "refresh_negatives", killed)
        arguments = settings(*places, tmp_path / "broken", **{**LORA, "lora_dropout": 0.2, **REFRESH, **few})
        assert train([empty, *arguments]) == 130
    folder = tmp_path / "broken" / "negatives"
    # checkpoint 4 goes on with what was mined after step 3; steps 5 and 6 are under way
    assert sorted(path.name for path in folder.glob("step-*.npz")) == [f"step-{n}.npz" for n in (3, 4, 5, 6)]
    (folder / "step-2.work").mkdir()  # as a kill leaves it between the last file and the clean-up
    run(empty, *places, tmp_path / "broken", **few)
    whole, broken = weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken")
    assert all(np.array_equal(broken[name], tensor) for name, tensor in whole.items())
    assert not list(folder.glob(".*"))
    assert not (folder / "corpus.jsonl").exists()


def test_what_a_checkpoint_needs_and_is_gone_is_said(empty, mistral, mistral_clusters, pairs, tmp_path, capsys):
    output = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.run.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        arguments = settings(mistral, mistral_clusters, pairs, output, **{**LORA, **REFRESH, "workers": 1})
        assert train([empty, *arguments]) == 130
    shutil.rmtree(output / "checkpoint-8")
    (output / "negatives" / "step-4.npz").unlink()
    assert train([empty, *arguments]) == 2
    assert "step-4.npz, which checkpoint 6 goes on with, is missing" in capsys.readouterr().err


def test_data_of_other_types_keeps_its_own(empty, mistral, mistral_clusters, pairs, tmp_path):
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    other = tmp_path / "class.jsonl"
    other.write_text("".join(json.dumps({**row, "type": "symmetric_class"}) + "\n" for row in rows))
    changes = {"refresh_steps": 1, "max_steps": 8, "data": [pairs, other]}
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "run", **{**LORA, **REFRESH, **changes})
    place = arguments.index("--data") + 1
    arguments[place : place + 1] = [str(pairs), str(other)]
    assert train([empty, *arguments]) == 0
    found = [generation(tmp_path / "run" / "negatives", step) for step in range(1, 7)]
    assert {source for mined in found for source, _ in mined} == {0}
    assert any(not mined for mined in found)  # a step of the other data alone


@pytest.mark.parametrize("kill_at", ["mining", "step"])
def test_a_killed_run_goes_on_to_the_same_weights(
    kill_at, empty, mistral, mistral_clusters, pairs, tmp_path, monkeypatch
):
    places = mistral, mistral_clusters, pairs
    run(empty, *places, tmp_path / "whole", save_steps=3)

    calls = []
    inner_merged = merged

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:  # after step 6; the last checkpoint is of step 3
            raise KeyboardInterrupt
        return inner_merged(*arguments)

    with monkeypatch.context() as patch:
        if kill_at == "mining":
            patch.setattr("train.refresh.merged", interrupted)
        else:
            inner = LensTrainer.compute_loss

            def killed(self, *arguments, **options):
                if self.state.global_step == 5:
                    raise KeyboardInterrupt
                return inner(self, *arguments, **options)

            patch.setattr(LensTrainer, "compute_loss", killed)
        arguments = settings(*places, tmp_path / "broken", **{**LORA, "lora_dropout": 0.2, **REFRESH, "save_steps": 3})
        assert train([empty, *arguments]) == 130
    run(empty, *places, tmp_path / "broken", save_steps=3)
    whole, broken = weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken")
    assert all(np.array_equal(broken[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_workers_wait_for_what_is_mined(empty, mistral, mistral_clusters, pairs, tmp_path):
    places = mistral, mistral_clusters, pairs
    run(empty, *places, tmp_path / "none")
    run(empty, *places, tmp_path / "two", workers=2)
    none, two = weights_of(tmp_path / "none"), weights_of(tmp_path / "two")
    assert all(np.array_equal(two[name], tensor) for name, tensor in none.items())


@pytest.mark.slow
def test_two_ranks_mine_what_one_mines(empty, mistral, mistral_clusters, pairs, tmp_path):
    plain = {**LORA, "lora_dropout": 0.0, "train_special_tokens": "false", **REFRESH, "max_steps": 4}
    assert train([empty, *settings(mistral, mistral_clusters, pairs, tmp_path / "one", **plain)]) == 0
    both = settings(mistral, mistral_clusters, pairs, tmp_path / "two", **plain, deepspeed="zero1")
    done = deepspeed(empty, both, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (generation(tmp_path / name / "negatives", 2) for name in ("one", "two"))
    assert one == two
    for first, second in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        if "loss" in first:
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-3)


def test_another_corpus_and_stored_states(empty, bert, bert_clusters, pairs, tmp_path):
    extra = tmp_path / "corpus.txt"
    extra.write_text("a passage that no example holds\nanother one of these\nthe third\nthe fourth\nthe fifth\n")
    changes = {
        "refresh_steps": 1,
        "refresh_corpus": extra,
        "max_steps": 3,
        "refresh_max_share": 1.0,
        "backbone": "full",
    }
    run(empty, bert, bert_clusters, pairs, tmp_path / "other", **changes)
    mined = generation(tmp_path / "other" / "negatives", 1)
    assert {text for found in mined.values() for text in found} <= set(extra.read_text().splitlines())
    frozen = {**FROZEN, "refresh_steps": 1, "max_steps": 3}
    assert train([empty, *settings(bert, bert_clusters, pairs, tmp_path / "frozen", **frozen)]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refresh_corpus": "c"}, "refresh_corpus needs refresh_steps"),
        ({"refresh_max_share": 0.9}, "refresh_max_share needs refresh_steps"),
        ({"refresh_steps": 0}, "refresh_steps must be at least 1, found 0"),
        ({"refresh_steps": 5, "refresh_skip": 100}, "refresh_skip must be below refresh_depth=100, found 100"),
        ({"refresh_steps": 5, "refresh_max_share": 1.5}, "refresh_max_share must be above 0 and at most 1, found 1.5"),
        ({"refresh_steps": 5, "streaming": True}, "refresh_steps contradicts streaming=true"),
        ({"refresh_steps": 5, "contrastive_weight": 0.0}, "mined negatives have no teacher scores"),
        (
            {"refresh_steps": 5, "teacher_embeddings": "t", "refresh_corpus": "c"},
            "contradicts teacher_embeddings with refresh_corpus",
        ),
        ({"refresh_steps": 5, "backbone": "frozen", "train_head": True, "refresh_corpus": "c"}, "states|stored"),
    ],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(base="b", data=("d",), output="o", **changes)


def test_data_without_mined_types_is_refused(empty, mistral, mistral_clusters, pairs, tmp_path, capsys):
    rows = [json.loads(line) | {"type": "symmetric_class"} for line in Path(pairs).read_text().splitlines()]
    other = tmp_path / "class.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train([empty, *settings(mistral, mistral_clusters, other, tmp_path / "run", **LORA, **REFRESH)]) == 2
    assert "refresh_steps mines for data of type retrieval and only_1neg, and there is none" in capsys.readouterr().err

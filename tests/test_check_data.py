"""The report on training data, against counts made by hand."""

from __future__ import annotations

import json

import pytest
from conftest import SENTENCES, row, write_rows
from test_sources import write

from lens.backbone import load_tokenizer
from train.check_data import main as check
from train.config import Recipe
from train.sources import make_schedule, read_sources


def scored(pos, neg, **changes):
    neg_texts = [f"n{i}" for i in range(len(neg))]
    return row(pos=["p"], neg=neg_texts, pos_scores=[pos], neg_scores=neg, prompt="find", **changes)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "batch_size: 4\ngroup_size: 4\nseed: 1\ntype_batch_size: {symmetric_class: 2}\n"
        "type_group_size: {symmetric_class: 2}\ndocument_max_length: 8\n"
    )
    return path


def report_of(tmp_path, *arguments, status=0):
    file = tmp_path / "report.json"
    assert check([*map(str, arguments), "--json", str(file), "--overwrite"]) == status
    return json.loads(file.read_text())["data_sets"]


def test_rows_scores_and_what_training_does(tmp_path, recipe, capsys):
    rows = [scored(2.0, [1.0, 0.5, 0.1], query=f"q{i}") for i in range(7)]
    rows[2] = scored(2.0, [3.0, 2.5], query="q2")  # two negatives above the positive, and too few of three
    rows[5]["neg_scores"] = None
    rows[6]["pos_scores"] = [None]
    classes = [row(query=f"q{i}", pos=["a", "b"], type="symmetric_class", prompt=None) for i in range(5)]
    one, two = write_rows(tmp_path / "one.jsonl", *rows), write_rows(tmp_path / "two.jsonl", *classes)
    first, second = report_of(tmp_path, one, two, "--recipe", recipe)
    assert (first["rows"], first["types"], first["errors"]) == (7, {"retrieval": 7}, [])
    assert first["negatives"] == {"min": 2, "mean": 2.86, "p50": 3, "max": 3}
    assert second["positives"] == {"min": 2, "mean": 2, "p50": 2, "max": 2}
    assert (first["rows_with_teacher_scores"], second["rows_with_teacher_scores"]) == (5, 0)
    assert first["findings"] == {"negatives_scored_above_every_positive": 2}
    assert first["places"] == {"negatives_scored_above_every_positive": [f"{one}:3"]}
    assert (first["prompts"], second["prompts"]) == ({"find": 7}, {"None": 5})
    # The first epoch of the run itself: which of its batches have no gap.
    run = Recipe(base="b", output="o", data=(str(one),), batch_size=4, group_size=4, seed=1, warmup_steps=0)
    gaps = [{5, 6} & set(make_schedule(run, read_sources(run)).batch(step)[1]) for step in range(1)]
    assert first["training"] == {
        "type": "retrieval", "group_size": 4, "batch_size": 4, "negatives": "own and in-batch", "instruction": "query",
        "weight": 1.0, "rows_whose_negatives_repeat": 1, "batches": 1,
        "batches_with_distillation": sum(not gap for gap in gaps), "rows_left_over": 3,
    }  # fmt: skip
    assert second["training"] == {
        "type": "symmetric_class", "group_size": 2, "batch_size": 2, "negatives": "own", "instruction": "query",
        "weight": 1.0, "rows_whose_negatives_repeat": 0, "batches": 2, "batches_with_distillation": 0,
        "rows_left_over": 1,
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "an epoch: 2 batches, 0 of them with distillation; 1 rows left over" in said
    assert said.endswith("2 data sets, 12 rows, 3 batches an epoch, 0 errors\n")


def test_duplicates_and_contradictions(tmp_path, recipe):
    rows = [
        row(query="a", pos=["1", "2"], neg=["3"]),
        row(query="a", pos=["2", "1"], neg=["3"]),  # the first row again
        row(query="a", pos=["2"], neg=["4"]),  # the same query
        row(query="a", pos=["5"], neg=["6"]),  # and with another positive
        row(query="b", pos=["7"], neg=["8", "7"]),  # both in one row
        row(query="c", pos=["9"], neg=["1"]),
        row(query="c", pos=["9", "10"], neg=["9"]),  # both in two rows and in one: two positive places
        row(query="a", pos=["5"], neg=["6"], prompt="another task"),
    ]
    path = write_rows(tmp_path / "d.jsonl", *rows)
    (report,) = report_of(tmp_path, path, "--recipe", recipe)
    assert report["findings"] == {
        "duplicate_rows": 1, "duplicate_queries": 3, "queries_with_other_positives_elsewhere": 1,
        "texts_both_positive_and_negative": 3,
    }  # fmt: skip
    assert report["places"] == {
        "duplicate_rows": [f"{path}:2"],
        "duplicate_queries": [f"{path}:{n}" for n in (3, 4, 7)],
        "queries_with_other_positives_elsewhere": [f"{path}:4"],
        "texts_both_positive_and_negative": [f"{path}:{n}" for n in (5, 6, 7)],
    }


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.parquet"])
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_all_errors_are_listed(name, streaming, tmp_path, recipe, datasets_cache, capsys):
    rows = [row() for _ in range(9)]
    for index in (1, 4, 6, 7):
        rows[index] = row(query=" ")
    path = write(tmp_path / name, rows)
    (report,) = report_of(tmp_path, path, "--recipe", recipe, "--limit", 3, *streaming, status=1)
    place = ": row " if name == "d.parquet" else ":"
    message = "`query` must be a text that is not empty, found ' '"
    assert report["errors"] == [f"{path}{place}{line}: {message}" for line in (2, 5, 7, 8)]
    assert report["types"] == {"retrieval": 5}
    said = capsys.readouterr().out
    assert said.count("  error: ") == 3
    assert "... and 1 more errors" in said


def test_broken_lines_and_sources_do_not_stop_it(tmp_path, recipe):
    bad = tmp_path / "bad.jsonl"
    good = json.dumps(row()).encode()
    bad.write_bytes(b"\n".join([good, b"{", b"\xff", b"", b"[1]", json.dumps(row(type="only_1neg")).encode(), good]))
    void = tmp_path / "void.jsonl"
    void.touch()
    gone, first, empty, last = report_of(
        tmp_path, tmp_path / "gone.jsonl", bad, void, write_rows(tmp_path / "ok.jsonl", *[row()] * 4),
        "--recipe", recipe, status=1,
    )  # fmt: skip
    assert "gone.jsonl does not exist" in gone["errors"][0]
    assert [message.split(":")[1] for message in first["errors"]] == ["2", "3", "5", "6"]
    for message, part in zip(
        first["errors"], ("not valid JSON", "not UTF-8", "found list", "of type ret"), strict=False
    ):
        assert part in message
    assert "holds no examples" in empty["errors"][0]
    assert last["errors"] == []
    assert last["findings"] == {"duplicate_rows": 3}


def test_a_data_set_that_is_too_small_for_the_recipe(tmp_path, recipe):
    path = write_rows(tmp_path / "d.jsonl", row(), row())
    (report,) = report_of(tmp_path, path, "--recipe", recipe, status=1)
    assert "has 2 examples, fewer than batch_size=4" in report["errors"][0]
    (report,) = report_of(tmp_path, path)  # without a recipe the default sizes are no demand
    assert "fewer than batch_size=512" in report["training"]["refused"]


def test_lengths_are_those_of_training(tmp_path, recipe, mistral, bert):
    texts = [*SENTENCES, "the fox", "the dog"]
    rows = [row(query=q, pos=[p], neg=[p[:9]], prompt="find the text") for q, p in zip(texts, texts[::-1], strict=True)]
    for base, prompt, specials in (
        (mistral, "<instruct>find the text\n<query>", True),
        (bert, "find the text ", False),
    ):
        for kind in ("retrieval", "symmetric_sts"):
            path = write_rows(tmp_path / "d.jsonl", *({**item, "type": kind} for item in rows))
            (report,) = report_of(tmp_path, path, "--recipe", recipe, "--tokenizer", base)
            tokenizer = load_tokenizer(str(base))
            if specials:
                tokenizer.add_tokens(["<instruct>", "<query>"], special_tokens=True)
            count = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2  # noqa: B023, E731
            queries = sorted(count(prompt + item["query"]) for item in rows)
            before = prompt if kind == "symmetric_sts" else ""
            passages = sorted(count(before + text) for item in rows for text in (*item["pos"], *item["neg"]))
            tokens = report["tokens"]
            assert (tokens["query"]["min"], tokens["query"]["max"]) == (queries[0], queries[-1])
            assert tokens["query"]["p50"] == queries[4]
            assert (tokens["query"]["cut"], tokens["query"]["limit"]) == (0, 512)
            assert tokens["document"]["mean"] == pytest.approx(sum(passages) / 18, abs=0.006)
            assert tokens["document"]["cut"] == pytest.approx(sum(n > 8 for n in passages) / 18, abs=1e-6)
            assert tokens["document"]["measured"] == 18
    (report,) = report_of(tmp_path, path, "--recipe", recipe, "--tokenizer", bert, "--length-rows", 3)
    assert report["tokens"]["query"]["measured"] == 3


def test_it_fails_in_one_line(tmp_path, capsys):
    path = write_rows(tmp_path / "d.jsonl", row())
    for arguments, message in (
        ([], "name a SOURCE"),
        ([path, "--recipe", tmp_path / "gone.yaml"], "gone.yaml does not exist"),
        ([path, "--json", path], "exists and is not empty"),
        ([path, "--limit", "-1"], "--limit and --length-rows must be at least 0"),
        ([path, "--tokenizer", tmp_path / "gone" / "model"], "does not exist"),
    ):
        capsys.readouterr()
        assert check(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert len(error.strip().splitlines()) == 1, error


def test_a_report_does_not_replace_the_data(tmp_path, recipe, capsys):
    path = write_rows(tmp_path / "d.jsonl", row())
    before = path.read_bytes()
    assert check([str(path), "--json", str(tmp_path / "." / "d.jsonl"), "--overwrite"]) == 2
    assert "d.jsonl is a file of the data: name another file" in capsys.readouterr().err
    assert path.read_bytes() == before

"""scripts/compare_*: training pairs without leaks, the plan's commands, the table by hand, and all of it end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SENTENCES, write_rows

sys.path.insert(0, str(ROOT / "scripts"))

import compare_data
import compare_lexical
import compare_report
from steps import StepError


def folder(path: Path, splits: dict[str, range]) -> Path:
    """A BEIR folder of twenty-one documents; query i asks for document i with some of its words."""
    (path / "qrels").mkdir(parents=True)
    texts = [f"{sentence} number {i}" for i, sentence in enumerate(SENTENCES * 3)]
    write_rows(path / "corpus.jsonl", *({"_id": f"d{i}", "text": text} for i, text in enumerate(texts)))
    asked = [" ".join(text.split()[1:5]) + f" {i}" for i, text in enumerate(texts)]
    write_rows(path / "queries.jsonl", *({"_id": f"q{i}", "text": text} for i, text in enumerate(asked)))
    for split, numbers in splits.items():
        judged = "".join(f"q{i}\td{i}\t1\n" for i in numbers)
        (path / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_of_the_evaluation_are_left_out(tmp_path: Path) -> None:
    asked = folder(tmp_path / "asked", {"test": range(3)})
    query = json.loads((asked / "queries.jsonl").read_text().splitlines()[1])["text"]
    unjudged = json.loads((asked / "queries.jsonl").read_text().splitlines()[5])["text"]
    document = json.loads((asked / "corpus.jsonl").read_text().splitlines()[4])["text"]
    pairs = write_rows(
        tmp_path / "pairs.jsonl",
        {"query": query.upper() + "?", "positive": "kept out by its query"},
        {"query": "another question", "positive": document.replace(" ", "  ") + "!"},
        {"query": "one", "positive": "first"},
        {"query": "one", "pos": ["second", "first"]},
        {"query": unjudged, "pos": "third"},
    )
    command = ["--pairs", str(pairs), "--exclude", str(asked), "--output", str(tmp_path / "out")]
    assert compare_data.main(command) == 0
    rows = sorted(read(tmp_path / "out" / "pairs.jsonl"), key=lambda row: row["query"])
    assert rows == sorted(
        [{"query": "one", "pos": ["first", "second"], "neg": []}, {"query": unjudged, "pos": ["third"], "neg": []}],
        key=lambda row: row["query"],
    )
    counts = json.loads((tmp_path / "out" / "data.json").read_text())
    assert counts == {"pairs": 6, "queries_left_out": 1, "passages_left_out": 1, "queries": 2, "passages": 3}


def test_parts_of_documents_are_left_out_and_titles_do_not_hide_them(tmp_path: Path) -> None:
    asked = folder(tmp_path / "asked", {"test": range(3)})
    body = "It was built in nineteen hundred and four, by the sea. Nobody lives there now."
    with (asked / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "titled", "title": "The house", "text": body}) + "\n")
        file.write(json.dumps({"_id": "short", "text": "Two words"}) + "\n")
    passages = {
        body: False,
        "it was built in nineteen-hundred and four by the sea": False,  # its first sentence
        "The house. " + body: False,
        "two words!": False,
        "Nobody lives there now": True,  # a part, but of four words
        "it was built in nineteen hundred and four by the sea near the town": True,
        "was built in nineteen hundred and four by the seaside": True,
    }
    assert compare_data.known(passages, [asked]) == {
        compare_data.wording(text) for text, stays in passages.items() if not stays
    }


def test_a_folder_trains_on_its_train_split(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", {"train": range(8), "test": range(6, 12)})
    command = ["--beir", str(data), "--exclude", str(data), "--output", str(tmp_path / "out"), "--limit", "5"]
    assert compare_data.main(command) == 0
    rows = read(tmp_path / "out" / "pairs.jsonl")
    queries = [row["text"] for row in read(data / "queries.jsonl")]
    assert len(rows) == 5  # of the six that the test split does not ask
    assert {row["query"] for row in rows} <= set(queries[:6])
    documents = [row["text"] for row in read(data / "corpus.jsonl")]
    assert all(row["pos"] == [documents[queries.index(row["query"])]] for row in rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a"}, r"pairs.jsonl:1: expected a text as query, and as positive (or pos) one text or several"),
        ({"query": " ", "positive": "b"}, "pairs.jsonl:1: expected a text"),
        ({"query": "a", "pos": []}, "pairs.jsonl:1: expected a text"),
        ({"query": "a", "pos": [3]}, "pairs.jsonl:1: expected a text"),
    ],
)
def test_rows_without_a_pair(
    row: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", row)
    assert compare_data.main(["--pairs", str(pairs), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_left_to_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "data", {"train": range(3), "test": range(3)})
    command = ["--beir", str(data), "--exclude", str(data), "--output", str(tmp_path / "out")]
    assert compare_data.main(command) == 2
    assert "no pair is left for training" in capsys.readouterr().err


def settings(tmp_path: Path, *extra: str) -> compare_lexical.Settings:
    data = tmp_path / "data"
    if not data.exists():
        folder(data, {"train": range(8), "test": range(8, 12)})
    arguments = ["--beir", str(data), "--output", str(tmp_path / "out"), "--model", str(tmp_path), *extra]
    return compare_lexical.settings_of(compare_lexical.parse(arguments))


def test_rows_bring_the_steps_they_need(tmp_path: Path) -> None:
    every = {step.name for step in compare_lexical.plan(settings(tmp_path))}
    assert {"mlm", "score", "generator", "cluster", "cluster-mlm", *compare_lexical.SPLADE} <= every
    for rows, expected in {
        ("tfidf",): {"data", "mine", "evaluate", "report"},
        ("deepct",): {"data", "mine", "deepct", "evaluate", "report"},
        ("splade-doc",): {"data", "mine", "mlm", "splade-doc", "evaluate", "report"},
        ("lens", "dense"): {"data", "mine", "score", "cluster", "lens", "evaluate", "report"},
        ("doc2query",): {
            "data",
            "mine",
            "generator",
            "doc2query-data",
            "evaluate-doc2query-data",
            "evaluate",
            "report",
        },
    }.items():
        steps = compare_lexical.plan(settings(tmp_path, "--rows", *rows))
        names = [step.name for step in steps]
        assert set(names) == expected
        for place, step in enumerate(steps):
            assert set(step.after) <= set(names[:place])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--steps", "1"], "--steps must be at least 2"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--pairs", "missing.jsonl"], "--pairs missing.jsonl does not exist"),
        (["--beir", "missing"], "--beir missing is not a folder"),
    ],
)
def test_impossible_settings(extra: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=message):
        settings(tmp_path, *extra)


def test_two_folders_of_one_name_and_none_to_train_on(tmp_path: Path) -> None:
    one, two = (folder(tmp_path / name / "data", {"test": range(3)}) for name in "ab")
    with pytest.raises(StepError, match="two --beir folders are named 'data'"):
        settings(tmp_path, "--beir", str(one), str(two))
    with pytest.raises(StepError, match="has no qrels/train.tsv to train on: give --pairs"):
        settings(tmp_path, "--beir", str(one))


def test_orderings_by_hand() -> None:
    better, same, worse = [1.0] * 12, [0.5] * 12, [0.0] * 12
    queries = [f"q{i}" for i in range(12)]
    values = {
        name: {"nDCG@10": dict(zip(queries, column, strict=True))}
        for name, column in {"bm25": same, "DeepCT": better, "tfidf": worse, "doc2query": better}.items()
    }
    rows = compare_report.tested(values, [(one, two) for one, two, _ in compare_report.ORDERINGS])
    found = {(row["system"], row["other"]): compare_report.verdict(row) for row in rows}
    assert found == {
        ("bm25", "tfidf"): "held",
        ("DeepCT", "bm25"): "held",
        ("doc2query", "bm25"): "held",
        ("doc2query", "DeepCT"): "undecided",
    }
    upside = {"bm25": values["doc2query"], "DeepCT": values["tfidf"]}
    (row,) = compare_report.tested(upside, [("DeepCT", "bm25")])
    assert compare_report.verdict(row) == "reversed"
    datasets = {"one": {"orderings": rows}, "two": {"orderings": [row]}}
    text = compare_report.summary(datasets)
    assert "Held on every data set: BM25 > TF-IDF; doc2query > BM25." in text
    assert "Not the same verdict on every data set: DeepCT > BM25." in text
    assert "Not to be told from chance: doc2query > DeepCT." in text
    del values["DeepCT"]["nDCG@10"]["q3"]
    with pytest.raises(ValueError, match="DeepCT and bm25 were evaluated on other queries"):
        compare_report.tested(values, [("DeepCT", "bm25")])


def finished(output: Path, rows: tuple[str, ...]) -> Path:
    """A comparison's output as its steps leave it, with figures that tell every cell apart."""
    queries = [f"q{i}" for i in range(8)]
    facts = {"R@100": 0.9, "RR@10": 0.1, "flops": 1.25, "active_per_query": 3.4, "active_per_document": 56.6,
             "index_mb": 7.75, "milliseconds": {"median": 8.5, "p95": 99.0}, "dimensions": 10}  # fmt: skip

    def evaluation(place: Path, dataset: str, values: dict[str, list[float]]) -> None:
        (place / "per_query").mkdir(parents=True)
        lines = ["query-id\tsystem\tnDCG@10\tRR@10\tR@100"]
        lines += [
            f"{q}\t{name}\t{v}\t0.1\t0.9" for name, row in values.items() for q, v in zip(queries, row, strict=True)
        ]
        (place / "per_query" / f"{dataset}.tsv").write_text("\n".join(lines) + "\n")
        systems = {name: {"nDCG@10": sum(row) / 8, **facts} for name, row in values.items()}
        content = {
            "datasets": {dataset: {"queries": 8, "documents": 21, "systems": systems}},
            "machine": {"cores": 2, "gpu": None},
            "versions": {"python": "3"},
        }
        (place / "results.json").write_text(json.dumps(content))

    evaluation(output / "eval", "data", {"LENS": [0.75] * 8, "bm25": [0.25] * 8})
    evaluation(output / "eval-doc2query" / "data", "expanded", {"bm25": [0.0, 1.0] * 4})
    (output / "data").mkdir()
    (output / "data" / "data.json").write_text(json.dumps({"queries": 1234, "passages": 567}))
    settings = {"rows": rows, "steps": 5, "batch_size": 4, "length": 64, "mlm_steps": 7, "generator_steps": 17,
                "queries": 5, "deepct_scale": 1000, "backbone": "tiny", "pairs": ["a/pairs.jsonl"], "text": [],
                "trained_on_folder": [], "plan": ["data", *rows, "generator"]}  # fmt: skip
    (output / ".steps").mkdir()
    (output / ".steps" / "settings.json").write_text(json.dumps(settings))
    for name, seconds in {"data": 2, "lens": 61, "generator": 31, "splade-max": 1000}.items():
        (output / ".steps" / f"{name}.json").write_text(json.dumps({"key": "k", "seconds": seconds}))
    return output


def test_the_table_cell_by_cell(tmp_path: Path) -> None:
    content = compare_report.gather(finished(tmp_path, ("lens", "doc2query")))
    rows = compare_report.table(content["datasets"]["data"], content["seconds"])
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (rows[0], *rows[2:])]
    assert cells[0] == [
        "", "nDCG@10", "Δ to BM25", "p (Holm)", "R@100", "FLOPS", "active, query", "active, document", "index MB",
        "ms a query", "training s",
    ]  # fmt: skip
    costs = ["0.900", "1.25", "3", "57", "7.8", "8.5"]
    assert cells[1] == ["BM25", "0.250", "–", "–", *costs, "–"]
    doc2query, lens = cells[2:]
    assert doc2query == ["doc2query", "0.500", "+0.250", doc2query[3], *costs, "31"]
    assert lens == ["LENS", "0.750", "+0.500", lens[3], *costs, "61"]
    assert float(lens[3]) == pytest.approx(2 * 2 / 2**8, abs=0.004)  # Holm's factor, two of 256 sign flips as extreme
    assert float(doc2query[3]) > 0.2  # half of its differences are +.75, the others -.25
    assert content["seconds"] == {"data": 2, "lens": 61, "generator": 31}
    text = "\n".join(compare_report.lines(content))
    assert "1,234 queries with 567 passages (a/pairs.jsonl)" in text
    assert "No training pair is a query or a document of the data below" in text
    assert "the other steps: data 2 s." in text


def test_rows_of_an_earlier_call_are_left_out(tmp_path: Path) -> None:
    content = compare_report.gather(finished(tmp_path, ("lens",)))
    assert list(content["datasets"]["data"]["systems"]) == ["bm25", "LENS"]
    text = "\n".join(compare_report.lines({**content, "seconds": {"lens": 61}}))
    assert "doc2query" not in text
    assert "BM25 reads whole documents" in text
    assert "SPLADE v1" not in text


def test_text_of_the_evaluation_and_lengths_beyond_the_backbone(bert: Path, tmp_path: Path) -> None:
    data = folder(tmp_path / "data", {"train": range(3), "test": range(3, 6)})
    with pytest.raises(StepError, match="belongs to data, on which the rows are evaluated"):
        settings(tmp_path, "--text", str(data / "corpus.jsonl"))
    with pytest.raises(StepError, match="--length 127 leaves no room for special tokens in 128 positions"):
        settings(tmp_path, "--model", str(bert), "--length", "127")


@pytest.mark.slow
def test_every_row_from_one_command(bert: Path, tmp_path: Path) -> None:
    data = folder(tmp_path / "my data", {"train": range(14), "test": range(14, 21)})
    command = [sys.executable, "scripts/compare_lexical.py", "--beir", str(data), "--model", str(bert), "--k", "24"]
    command += ["--steps", "2", "--batch-size", "4", "--length", "64", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    systems = results["datasets"]["my data"]["systems"]
    assert list(systems) == list(compare_report.LABELS)
    tested = {row["system"]: row for row in results["datasets"]["my data"]["comparisons"]}
    for name, facts in systems.items():
        assert 0 <= facts["nDCG@10"] <= 1
        assert facts["milliseconds"]["median"] > 0
        assert facts["flops"] > 0
        assert (name in tested) == (name != "bm25")
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(label in report for label in compare_report.LABELS.values())
    assert "<svg" in (tmp_path / "out" / "plot.svg").read_text()
    steps = tmp_path / "out" / ".steps"
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("unchanged since it ran") == len(
        json.loads((steps / "settings.json").read_text())["plan"]
    )


def test_the_page_refuses_what_is_no_comparison_and_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import lexical

    stored = tmp_path / "lexical.json"
    stored.write_text("{}")
    monkeypatch.setattr(lexical, "RESULTS", stored)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text('{"datasets": {}}')
    for given in (["--comparison", str(tmp_path / "eval")], ["--comparison", str(tmp_path)], []):
        monkeypatch.setattr("sys.argv", ["lexical.py", *given])
        with pytest.raises(SystemExit):
            lexical.main()
        error = capsys.readouterr().err
        assert "holds no comparison" in error or "give --comparison" in error
        assert stored.read_text() == "{}"


@pytest.mark.parametrize("row", compare_lexical.SPLADE)
def test_every_splade_row_has_the_rates_of_its_pooling(row: str) -> None:
    words = f"{compare_lexical.SPLADE[row]} {compare_lexical.SPLADE_TRAINING}".split()
    given = {name: words[words.index(name) + 1] for name in ("--learning_rate", "--head_learning_rate")}
    assert all(words.count(name) == 1 for name in given)
    assert list(given.values()) == (["2e-4", "4e-4"] if row.startswith("splade-v1") else ["6e-4", "1e-3"])

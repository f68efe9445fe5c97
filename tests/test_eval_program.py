"""eval/run.py: the program end to end with a stub model, its report, and what bad input gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from test_eval import DOCUMENTS, QRELS, QUERIES, StubLens

import lens
from eval import run
from eval.page import Table


class StubDense:
    def __init__(self, path: str, *options: Any) -> None:
        if path == "missing":
            raise OSError("missing is not there\nsecond line")

    def encode(self, texts: list[str], label: str = "", show_progress: bool = True) -> Any:
        vectors = np.random.default_rng(len(texts)).normal(size=(len(texts), 8)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_beir(folder: Path, corpus: dict[str, str] = DOCUMENTS) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", corpus), ("queries", QUERIES)):
        rows = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    judged = [f"{query}\t{document}\t{score}" for query, row in QRELS.items() for document, score in row.items()]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the BEIR folder `tiny` and the model `mini`; models are stubs."""
    write_beir(tmp_path / "tiny")
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "lens.json").write_text("{}")
    monkeypatch.setattr(lens, "load", StubLens, raising=False)
    monkeypatch.setattr(run, "Dense", StubDense)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_several_devices_are_ended_with_the_program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[StubLens, Any]] = []

    def load(path: str, **options: Any) -> StubLens:
        loaded.append((StubLens(path), options["device"]))
        return loaded[-1][0]

    dense: list[Any] = []
    monkeypatch.setattr(lens, "load", load)
    monkeypatch.setattr(run, "Dense", lambda *options: dense.append(options[1]) or StubDense(*options))
    command = "--model mini --beir tiny --baselines dense --resamples 100 --devices cuda:1 cuda:2"
    assert run.main([*command.split(), "--output", "out"]) == 0
    assert [(model.closed, device) for model, device in loaded] == [(True, ["cuda:1", "cuda:2"])]
    assert dense == ["cuda:1"]
    monkeypatch.setattr(run, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run.main([*command.split(), "--output", "other"]) == 130
    assert loaded[1][0].closed
    with pytest.raises(SystemExit, match="2"):
        run.main([*command.split(), "--device", "cpu"])


def test_program(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_beir(folder / "other")
    command = "--model mini LENS=mini --beir tiny other --baselines bm25 dense --fuse --save-runs --resamples 200"
    assert run.main([*command.split(), "--output", "out", "--block", "2"]) == 0
    results = json.loads((folder / "out" / "results.json").read_text())
    tiny = results["datasets"]["tiny"]
    names = ["mini", "LENS", "dense", "bm25"]
    fused = [f"{name} + {rest}" for name in names[:2] for rest in ("dense", "dense + bm25")]
    assert list(tiny["systems"]) == names + fused
    assert (tiny["queries"], tiny["queries_without_relevant"], tiny["documents"]) == (3, 1, 5)
    facts = {"nDCG@10", "RR@10", "R@100", "seconds", "dimensions", "active_per_query", "active_per_document", "parts"}
    facts |= {"search_seconds", "flops", "index_mb", "milliseconds"}
    assert all(set(system) == facts for system in tiny["systems"].values())
    for name, system in tiny["systems"].items():
        timed = system["milliseconds"]
        assert timed is None if name in fused else 0 < timed["median"] <= timed["p95"]
    assert tiny["systems"]["mini"]["dimensions"] == 16
    compared = {(row["system"], row["other"]) for row in tiny["comparisons"]}
    assert {("mini", "dense"), ("mini", "bm25"), ("LENS + dense", "LENS"), ("LENS + dense", "dense")} <= compared
    assert results["config"]["seed"] == 0
    lines = (folder / "out" / "per_query" / "tiny.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["query-id", "system", "nDCG@10", "RR@10", "R@100"]
    assert len(lines) == 1 + 3 * len(tiny["systems"])
    mean = np.mean([float(line.split("\t")[2]) for line in lines if line.split("\t")[1] == "bm25"])
    assert mean == pytest.approx(tiny["systems"]["bm25"]["nDCG@10"], abs=1e-5)
    trec = (folder / "out" / "runs" / "tiny.LENS_+_dense.trec").read_text().splitlines()
    assert len(trec) == 3 * 5
    assert trec[0].split()[:2] == ["q1", "Q0"]
    page = (folder / "out" / "report.html").read_text()
    assert "sea &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert page.count("<svg ") == 2 * (1 + 3)
    assert "#0" not in page  # no placeholder colour is left
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "| **" in (folder / "out" / "report.md").read_text()
    assert "tiny  bm25  nDCG@10" in capsys.readouterr().out


def test_a_lexical_model_that_gives_nan_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: Any) -> None:
        raise FloatingPointError("a weight is NaN: train again")

    monkeypatch.setattr(run, "lexical_folders", lambda *_: {"weights": "weights"})
    monkeypatch.setattr(run, "load_lexical", lambda *_: None)
    monkeypatch.setattr(run, "lexical_system", fails)
    assert run.main(["--lexical", "weights", "--beir", "tiny", "--output", "out"]) == 2
    assert capsys.readouterr().err == "error: weights: a weight is NaN: train again\n"
    assert not (folder / "out").exists()


def test_baselines_alone_and_repeatable(folder: Path) -> None:
    command = ["--beir", "tiny", "--baselines", "bm25", "--output", "out"]
    assert run.main(command) == 0
    first = json.loads((folder / "out" / "results.json").read_text())["datasets"]["tiny"]
    assert first["comparisons"] == []
    assert run.main([*command, "--overwrite"]) == 0
    second = json.loads((folder / "out" / "results.json").read_text())["datasets"]["tiny"]
    for timed in ("seconds", "search_seconds", "milliseconds"):
        first["systems"]["bm25"].pop(timed)
        second["systems"]["bm25"].pop(timed)
    assert first == second


def test_unknown_judgements_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "tiny" / "qrels" / "test.tsv").open("a") as file:
        file.write("q1\tghost\t1\n")
    arguments = ["--beir", "tiny", "--baselines", "bm25", "--output", "out"]
    assert run.main(arguments) == 2
    assert "unknown document 'ghost'" in capsys.readouterr().err
    assert run.main([*arguments, "--skip-unknown"]) == 0
    assert "names 1 unknown queries or documents (first: document 'ghost')" in capsys.readouterr().err
    assert "ghost" in (folder / "out" / "report.md").read_text()


def test_table_escapes_markdown() -> None:
    table = Table(["a", "b|c"], [["<x>", "1*2"]], frozenset({(0, 1)})).markdown()
    assert table.splitlines() == [r"| a | b\|c |", "| --- | ---: |", r"| \<x\> | **1\*2** |"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run.main(["--help"])
    assert end.value.code == 0
    assert "example: python eval/run.py" in " ".join(capsys.readouterr().out.split())


def break_corpus(line: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with (folder / "tiny" / "corpus.jsonl").open("a") as file:
            file.write(line + "\n")

    return apply


def fill_output(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "precious.txt").write_text("keep")


def same_name(folder: Path) -> None:
    write_beir(folder / "more" / "tiny")


def no_relevant(folder: Path) -> None:
    (folder / "tiny" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")


def spaced_id(folder: Path) -> None:
    break_corpus('{"_id": "a b", "text": "x"}')(folder)


BAD = [
    ("--beir nowhere --baselines bm25", None, "nowhere is not a folder"),
    ("--beir mini --baselines bm25", None, "qrels has no .tsv file"),
    ("--beir tiny --baselines bm25", break_corpus("{oops"), "corpus.jsonl:6: not valid JSON"),
    ("--beir tiny --baselines bm25", break_corpus('{"text": "x"}'), "corpus.jsonl:6: no usable `_id`"),
    ("--beir tiny --baselines bm25", break_corpus('{"_id": "d2", "text": "x"}'), "'d2' was already used in line 2"),
    ("--beir tiny --baselines bm25", no_relevant, "no query has a relevant document"),
    ("--beir tiny --baselines bm25 --split dev", None, "qrels has no dev.tsv; found test"),
    ("--beir tiny more/tiny --baselines bm25", same_name, "two --beir folders are named 'tiny'"),
    ("--beir tiny --baselines bm25", fill_output, "out exists and is not empty"),
    ("--beir tiny --baselines bm25 --overwrite", fill_output, "holds no results.json"),
    ("--beir tiny --baselines bm25 --save-runs", spaced_id, "the id 'a b'"),
    ("--beir tiny --baselines bm25 --bm25-stemmer klingon", None, "unknown stemmer 'klingon'"),
    ("--beir tiny --baselines bm25 --bm25-b 1.5", None, "--bm25-b is 1.5"),
    ("--beir tiny --baselines bm25 --depth 10", None, "--depth is 10: at least 100"),
    ("--beir tiny --baselines bm25 --block 0", None, "--block is 0"),
    ("--beir tiny", None, "nothing to evaluate"),
    ("--beir tiny --model mini --fuse", None, "--fuse sums a model with baselines"),
    ("--beir tiny --baselines dense", None, "needs --dense-model"),
    ("--beir tiny --baselines dense --dense-model missing", None, "cannot load the dense baseline missing"),
    ("--beir tiny --model gone", None, "model gone is neither a folder nor on the hub"),
    ("--beir tiny --model tiny", None, "tiny is no LENS model: it has no lens.json"),
    ("--beir tiny --model mini mini", None, "two systems are named 'mini'"),
    ("--beir tiny --model dense=mini", None, "two systems are named 'dense'"),
]


@pytest.mark.parametrize(("command", "prepare", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_gets_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, prepare: Any, message: str
) -> None:
    if prepare:
        prepare(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run.main([*command.split(), "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_unknown_baseline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run.main(["--beir", "tiny", "--baselines", "okapi"])
    assert end.value.code == 2
    assert "'okapi' (choose from" in capsys.readouterr().err


def test_model_that_gives_nan_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def encode(self: StubLens, texts: list[str], output: str) -> Any:
        vectors = np.full((len(texts), 16), np.nan, dtype=np.float32)
        return csr_matrix(vectors) if output == "csr" else vectors

    monkeypatch.setattr(StubLens, "_encode", encode)
    assert run.main(["--beir", "tiny", "--model", "mini", "--output", "out"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: mini on tiny: expected scores of shape (3, 5), found NaN"
    assert sorted(path.name for path in folder.iterdir()) == ["mini", "tiny"]


def test_all_systems_may_be_tested_against_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--beir", "tiny", "--baselines", "bm25", "tfidf", "--output", "out", "--resamples", "100"]
    assert run.main([*command, "--against", "bm25"]) == 0
    compared = json.loads((folder / "out" / "results.json").read_text())["datasets"]["tiny"]["comparisons"]
    assert {(row["system"], row["other"]) for row in compared} == {("tfidf", "bm25")}
    assert run.main([*command, "--overwrite", "--against", "bm26"]) == 2
    assert "--against bm26: no system has that name; there are bm25, tfidf" in capsys.readouterr().err

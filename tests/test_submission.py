"""Results as the leaderboard takes them: accepted when whole, and every rule broken once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mteb
import pytest
from conftest import SENTENCES, write_rows
from test_eval_program import write_beir

import lens
from eval.encoder import LensEncoder
from eval.meta import artifact_meta
from eval.run import main
from eval.submission import LARGEST, problems
from eval.tasks import local_task

TASKS = {"beir": "Retrieval", "pairs": "STS"}


@pytest.fixture(scope="module")
def run(bert: Path, bert_clusters: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Results of two local tasks, and the metadata of their model as its owner would fill it."""
    place = tmp_path_factory.mktemp("submission")
    lens.LENS.build(bert, bert_clusters, device="cpu").save(place / "tiny")
    (place / "pairs").mkdir()
    pairs = zip(SENTENCES, SENTENCES[1:], range(5), strict=False)
    write_rows(place / "pairs" / "test.jsonl", *({"sentence1": a, "sentence2": b, "score": n} for a, b, n in pairs))
    model = lens.load(place / "tiny", device="cpu")
    filled = {
        "release_date": "2026-01-01", "languages": ["eng-Latn"], "license": "apache-2.0", "open_weights": True,
        "public_training_code": "https://example.org/code", "public_training_data": "https://example.org/data",
        "training_datasets": set(), "reference": "https://example.org",
    }  # fmt: skip
    meta = artifact_meta(model, place / "tiny", "lens-test/tiny").model_copy(update=filled)
    for task in (local_task(str(write_beir(place / "beir"))), local_task(str(place / "pairs"))):
        mteb.evaluate(LensEncoder(model, meta), task, cache=mteb.ResultCache(place), show_progress_bar=False)
    return place / "results", meta


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, run: tuple[Path, Any]) -> None:
    monkeypatch.setattr(mteb, "get_model_metas", lambda: [run[1]])


@pytest.fixture
def folder(run: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of the results, to be spoilt."""
    import shutil

    shutil.copytree(run[0], tmp_path / "results")
    return tmp_path / "results" / "lens-test__tiny" / run[1].revision


def test_whole_results_are_accepted(run: tuple[Path, Any], registered: None) -> None:
    assert problems(run[0], run[1], TASKS, TASKS) == []
    (folder,) = (run[0] / "lens-test__tiny").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "beir.json", "pairs.json", "model_meta.json", "run_settings.jsonl",
    }  # fmt: skip


def spoil(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "pairs.json").unlink(), "1 of 2 tasks have no result, pairs for one"),
        (lambda f: (f / "pairs.json").rename(f / "other.json"), "holds the task pairs: the file should be"),
        (lambda f: (f / "pairs.json").write_text("{"), "pairs.json is no result of mteb"),
        (lambda f: spoil(f / "pairs.json", mteb_version="1.38.0"), "should be later than 2.0.0, found 1.38.0"),
        (lambda f: (f / "run_settings.jsonl").unlink(), "run_settings.jsonl is missing"),
        (lambda f: (f / "run_settings.jsonl").write_text("{bad\n"), "run_settings.jsonl:1: expected task, split"),
        (lambda f: (f / "run_settings.jsonl").write_text(""), "test, default: run_settings.jsonl has no entry for it"),
        (lambda f: (f / "model_meta.json").unlink(), "model_meta.json is missing"),
        (lambda f: spoil(f / "model_meta.json", name="a/b"), "name should be 'lens-test/tiny', found 'a/b'"),
        (lambda f: spoil(f / "model_meta.json", revision="x"), "model_meta.json: revision should be"),
        (lambda f: (f / "beir.json").write_text((f / "beir.json").read_text() + " " * LARGEST), "larger than 10 MB"),
        (
            lambda f: ((f.parent / "old").mkdir(), (f.parent / "old" / "beir.json").write_text("{}")),
            "holds results of the same tasks of another revision, beir.json for one",
        ),
    ],
)  # fmt: skip
def test_every_rule(change: Any, message: str, folder: Path, run: tuple[Path, Any], registered: None) -> None:
    change(folder)
    found = problems(folder.parents[1], run[1], TASKS, TASKS)
    assert any(message in line for line in found), found


def test_rules_of_the_model(run: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place, meta = run
    assert any("mteb has no model lens-test/tiny" in line for line in problems(place, meta, TASKS, TASKS))
    assert any("beir.json: mteb has no task beir" in line for line in problems(place, meta, TASKS))
    monkeypatch.setattr(mteb, "get_model_metas", lambda: [meta.model_copy(update={"revision": "0" * 40})])
    (line,) = problems(place, meta, TASKS, TASKS)
    assert f"mteb knows lens-test/tiny at revision {'0' * 40}" in line
    bare = meta.model_copy(update={"license": None, "training_datasets": None})
    assert any("leaves open: license, training_datasets" in line for line in problems(place, bare, TASKS, TASKS))
    variant = meta.model_copy(update={"experiment_kwargs": {"dtype": "x"}})
    (line,) = problems(place, variant, TASKS, TASKS)
    assert "evaluate first" in line
    assert "experiments" in line
    (tmp_path / "results" / line.split("/results/")[1].partition(" does not")[0]).mkdir(parents=True)
    found = problems(tmp_path / "results", variant, TASKS, TASKS)
    assert any("are experiments, which the leaderboard does not show" in line for line in found)
    assert "evaluate first" in problems(tmp_path, meta, TASKS, TASKS)[0]


def test_the_command(bert: Path, bert_clusters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lens.LENS.build(bert, bert_clusters, device="cpu").save(tmp_path / "tiny")
    given = ["--local", str(write_beir(tmp_path / "beir")), "--submit-dry-run", "--output", str(tmp_path / "out")]
    assert main(["--model", str(tmp_path / "tiny"), "--device", "cpu", *given]) == 1
    out = capsys.readouterr()
    assert "submission: mteb has no model local/tiny" in out.err
    assert "submission of local/tiny: 3 things to mend" in out.out
    assert main([*given, "--baselines", "bm25"]) == 2
    assert "--submit-dry-run checks the results of a model" in capsys.readouterr().err

"""Mining's work folder: whose it is, what a run that is killed leaves, and what is checked before any search."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from filelock import FileLock
from test_mine import Killed, kill_at, made, read, run

import train.mine
import train.work
from lens.search.bm25 import PartialBM25
from train.mine import main as mine
from train.ranking import Best

REMOVALS = 11
"""Files of the work folder in these tests: lists, positives' scores, texts, counts of 6 shards, plan, lock."""


@pytest.fixture
def places(tmp_path):
    """Two BEIR folders, an output and its work folder."""
    output = tmp_path / "mined.jsonl"
    return made(tmp_path / "one", seed=1), made(tmp_path / "other", seed=2), output, tmp_path / "mined.jsonl.work"


def options(beir, output):
    return ["--beir", str(beir), "--output", str(output), "--shard", "10", "--negatives", "4", "--margin", "0.001"]


@pytest.mark.parametrize("calls", range(1, REMOVALS + 1))
def test_a_kill_while_the_work_folder_goes_leaves_nothing_that_is_taken_for_a_search(
    calls, places, tmp_path, monkeypatch
):
    first, second, output, work = places
    expected = tmp_path / "expected.jsonl"
    run(*options(second, expected))
    removed, files = [], os.unlink

    def dying(*arguments, **named):
        if Path(arguments[0]).name.startswith("."):  # what an atomic write leaves
            return files(*arguments, **named)
        removed.append(arguments[0])
        if len(removed) == calls:
            raise Killed
        return files(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", dying)
        with pytest.raises(Killed):
            mine(options(first, output))
    assert work.exists()
    assert output.exists()
    run(*options(second, output), "--overwrite")
    assert output.read_bytes() == expected.read_bytes()
    assert not work.exists()


def test_the_removals_that_are_killed_above_are_all(places, monkeypatch):
    first, _, output, _ = places
    removed, files = [], os.unlink
    monkeypatch.setattr(os, "unlink", lambda path, **named: (removed.append(Path(path).name), files(path, **named)))
    run(*options(first, output))
    removed = [name for name in removed if not name.startswith(".")]
    assert len(removed) == REMOVALS
    assert removed[-2:] == ["plan.json", "lock"]


@pytest.mark.parametrize("name", ["best-0.npz", "notes.txt", "corpus.jsonl", "counts-000000.npz"])
def test_a_folder_that_mining_did_not_make_is_refused_and_stays(name, places, capsys):
    first, _, output, work = places
    work.mkdir()
    (work / name).write_text("precious")
    assert mine(options(first, output)) == 2
    assert f"{work} holds {name} and no plan.json, so mining did not make it: move it" in capsys.readouterr().err
    assert [path.name for path in work.iterdir()] == [name]
    assert (work / name).read_text() == "precious"
    shutil.rmtree(work)
    work.write_text("precious")
    assert mine(options(first, output)) == 2
    assert "is a file: move it" in capsys.readouterr().err
    assert work.read_text() == "precious"


def test_an_empty_folder_a_lock_and_a_torn_plan_are_taken(places):
    first, _, output, work = places
    work.mkdir()
    (work / "lock").write_text("")
    (work / ".plan.json.x1y2").write_text("{")
    run(*options(first, output))
    assert not work.exists()


def test_a_search_that_found_nothing_yet_is_no_reason_to_refuse_other_options(places, tmp_path, monkeypatch):
    first, second, output, work = places
    run(*options(second, tmp_path / "expected.jsonl"))
    with monkeypatch.context() as patch:
        kill_at(patch, PartialBM25, "count", 1)
        patch.setattr(train.work, "_remove", lambda work: None)  # as kill -9 leaves it
        with pytest.raises(Killed):
            mine(options(first, output))
    assert json.loads((work / "plan.json").read_text())["depth"] == 100
    run(*options(second, output))
    assert output.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


def test_a_folder_that_is_refused_for_other_options_is_still_there(places, monkeypatch, capsys):
    first, _, output, work = places
    with monkeypatch.context() as patch:
        kill_at(patch, Best, "save", 1)
        with pytest.raises(Killed):
            mine(options(first, output))
    before = sorted(path.name for path in work.iterdir())
    assert mine([*options(first, output), "--depth", "7"]) == 2
    assert "or remove the folder to start anew" in capsys.readouterr().err
    assert sorted(path.name for path in work.iterdir()) == before


def test_two_runs_into_one_output_do_not_meet(places, capsys):
    first, _, output, work = places
    work.mkdir()
    with FileLock(work / "lock"):
        (work / "plan.json").write_text("{}")
        (work / "corpus.jsonl").write_text("of the other run")
        assert mine(options(first, output)) == 2
        assert f"another run is working in {work}: wait for it" in capsys.readouterr().err
    assert (work / "corpus.jsonl").read_text() == "of the other run"


def test_sigterm_before_anything_is_searched_removes_the_folder(places):
    first, _, output, work = places
    program = (
        "import os, signal, sys, train.mine\n"
        "train.mine.file_facts = lambda path: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(train.mine.main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *options(first, output)]
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 128 + signal.SIGTERM
    assert not work.exists()
    assert not output.exists()


def test_a_manifest_belongs_to_one_output_and_goes_with_it(places, capsys):
    first, second, output, _ = places
    packed = output.with_name("mined.jsonl.gz")
    run(*options(first, output))
    run(*options(second, packed))  # the other form of the same name keeps its own manifest
    manifests = [json.loads(Path(f"{path}.manifest.json").read_text()) for path in (output, packed)]
    assert [manifest["options"]["beir"] for manifest in manifests] == [str(first), str(second)]
    output.unlink()
    run(*options(second, output))
    manifest = json.loads(Path(f"{output}.manifest.json").read_text())
    assert manifest["options"]["beir"] == str(second)
    assert read(output) == read(packed)
    assert mine(options(first, output)) == 2
    assert "mined.jsonl exists and is not empty" in capsys.readouterr().err


def test_a_folder_in_the_place_of_the_manifest_is_named_at_once(places, capsys):
    first, _, output, work = places
    Path(f"{output}.manifest.json").mkdir()
    assert mine(options(first, output)) == 2
    assert "mined.jsonl.manifest.json, where the manifest goes, is a folder" in capsys.readouterr().err
    assert not work.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--bm25-stemmer", "klingon"], "unknown stemmer 'klingon'"), (["--bm25-stopwords", "klingon"], "klingon")],
)
def test_lists_and_stemmers_are_checked_before_anything_is_read(more, message, places, monkeypatch, capsys):
    first, _, output, work = places
    monkeypatch.setattr(train.mine, "read_folder", lambda *_: pytest.fail("the corpus was read"))
    assert mine([*options(first, output), *more]) == 2
    assert message in capsys.readouterr().err
    assert not work.exists()


@pytest.mark.parametrize(("kind", "missing"), [("st", "sentence_transformers"), ("bm25", "bm25s")])
def test_libraries_that_are_missing_are_named_before_anything_is_read(
    kind, missing, places, tmp_path, monkeypatch, capsys
):
    import lens.files

    first, _, output, work = places
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    real = lens.files.importlib.util.find_spec
    monkeypatch.setattr(lens.files.importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    monkeypatch.setattr(train.mine, "read_folder", lambda *_: pytest.fail("the corpus was read"))
    others = ["lens=hub/model"] if kind == "bm25" else ["bm25"]
    spec = kind if kind == "bm25" else f"{kind}={tmp_path / 'model'}"
    assert mine([*options(first, output), "--retriever", *others, spec]) == 2
    error = capsys.readouterr().err
    assert f"{missing} not installed; run: pip install" in error
    assert not work.exists()

"""Benchmarks offline: snapshots fetched, checked, and read by mteb's own tasks."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mteb
import pytest
from conftest import ROOT, SENTENCES, write_rows

sys.path.insert(0, str(ROOT / "scripts"))

import fetch_benchmarks

import lens
from eval.run import main
from eval.snapshot import Snapshot


def repository(folder: Path, top_ranked: bool = False) -> Path:
    """A retrieval data set as mteb's hub holds it."""
    folder.mkdir(parents=True)
    write_rows(folder / "corpus.jsonl", *({"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(SENTENCES)))
    write_rows(folder / "queries.jsonl", *({"_id": f"q{i}", "text": SENTENCES[i][:20]} for i in range(4)))
    write_rows(folder / "test.jsonl", *({"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(4)))
    configs = {
        "default": ("test", "test.jsonl"),
        "corpus": ("corpus", "corpus.jsonl"),
        "queries": ("queries", "queries.jsonl"),
    }
    if top_ranked:
        ranked = [{"query-id": f"q{i}", "corpus-ids": [f"d{i}", f"d{i + 1}", f"d{i + 2}"]} for i in range(4)]
        write_rows(folder / "ranked.jsonl", *ranked)
        configs["top_ranked"] = ("top_ranked", "ranked.jsonl")
    lines = ["---", "configs:"]
    for name, (split, file) in configs.items():
        lines += [f"- config_name: {name}", "  data_files:", f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub of two data sets; what is downloaded from it is listed."""
    place, asked = tmp_path / "hub", []
    repository(place / "mteb" / "nfcorpus")
    repository(place / "mteb" / "AskUbuntuDupQuestions", top_ranked=True)

    def download(name: str, repo_type: str, revision: str, local_dir: Path) -> None:
        assert repo_type == "dataset"
        asked.append(f"{name}@{revision}")
        shutil.copytree(place / name, local_dir, dirs_exist_ok=True)

    def facts(self: Any, name: str, revision: str, files_metadata: bool) -> Any:
        files = [path for path in (place / name).rglob("*") if path.is_file()]
        sizes = [
            SimpleNamespace(rfilename=p.relative_to(place / name).as_posix(), size=p.stat().st_size) for p in files
        ]
        return SimpleNamespace(siblings=sizes)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", facts)
    return asked


def test_snapshots_are_fetched_once_and_read_by_mtebs_tasks(
    hub: list[str], datasets_cache: Path, bert: Path, bert_clusters: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    snapshot, tasks = tmp_path / "snapshot", ["--tasks", "NFCorpus", "AskUbuntuDupQuestions"]
    assert fetch_benchmarks.main([*tasks, "--output", str(snapshot)]) == 0
    revisions = {name: mteb.get_task(name).metadata.dataset for name in tasks[1:]}
    assert sorted(hub) == sorted(f"{data['path']}@{data['revision']}" for data in revisions.values())
    assert fetch_benchmarks.main([*tasks, "--output", str(snapshot)]) == 0
    assert len(hub) == 2  # nothing a second time

    model = tmp_path / "tiny"
    lens.LENS.build(bert, bert_clusters, device="cpu").save(model)
    command = ["--model", str(model), "--device", "cpu", *tasks, "--snapshot", str(snapshot), "--verify"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not found["failures"]
    assert set(found["systems"]["tiny"]["scores"]) == {"NFCorpus", "AskUbuntuDupQuestions"}
    (folder,) = (tmp_path / "out" / "results" / "local__tiny").iterdir()
    for name, data in revisions.items():
        text = (folder / f"{name}.json").read_text()
        assert json.loads(text)["dataset_revision"] == data["revision"]
        assert str(tmp_path) not in text

    # without its candidates a reranking task fails, and is not searched in full
    lost = next((snapshot / "data" / "mteb__AskUbuntuDupQuestions").iterdir())
    shutil.rmtree(lost)
    repository(lost)
    Snapshot(snapshot).add("mteb/AskUbuntuDupQuestions", lost.name, [])
    assert main([*command, "--output", str(tmp_path / "again")]) == 1
    assert "the candidates to rerank (top_ranked) are missing" in capsys.readouterr().err


def test_what_a_snapshot_lacks_is_named(hub: list[str], tmp_path: Path) -> None:
    place = tmp_path / "snapshot"
    with pytest.raises(FileNotFoundError, match="is no snapshot: manifest.json is missing"):
        Snapshot(place)
    assert fetch_benchmarks.main(["--tasks", "NFCorpus", "--output", str(place)]) == 0
    snapshot, data = Snapshot(place), mteb.get_task("NFCorpus").metadata.dataset
    with pytest.raises(FileNotFoundError, match="lacks mteb/nfcorpus at revision abc: it has revision [0-9a-f]{40}"):
        snapshot.check("mteb/nfcorpus", "abc")
    with pytest.raises(FileNotFoundError, match="it has none of that data set"):
        snapshot.use(mteb.get_task("SciFact"))
    corpus = snapshot.place(data["path"], data["revision"]) / "corpus.jsonl"
    whole = corpus.read_bytes()
    corpus.write_bytes(whole[::-1])
    snapshot.check(data["path"], data["revision"])
    with pytest.raises(ValueError, match="corpus.jsonl has another content than when it was fetched"):
        snapshot.check(data["path"], data["revision"], verify=True)
    corpus.write_bytes(whole[:-5])  # an interrupted download
    with pytest.raises(ValueError, match=rf"corpus.jsonl has {len(whole) - 5} bytes, expected {len(whole)} bytes"):
        snapshot.check(data["path"], data["revision"])
    assert fetch_benchmarks.main(["--tasks", "NFCorpus", "--output", str(place)]) == 0  # which fetches it again
    assert corpus.read_bytes() == whole
    corpus.write_bytes(whole[::-1])  # of the same size
    assert fetch_benchmarks.main(["--tasks", "NFCorpus", "--output", str(place)]) == 0
    assert corpus.read_bytes() == whole
    Snapshot(place).check(data["path"], data["revision"], verify=True)
    (place / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="expected a manifest of format 1, found 9"):
        Snapshot(place)


def test_a_data_set_that_came_in_part_is_not_entered(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(name: str, repo_type: str, revision: str, local_dir: Path) -> None:
        repository(local_dir)
        (local_dir / "corpus.jsonl").write_text("")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch_benchmarks.main(["--tasks", "NFCorpus", "--output", str(tmp_path / "snap")]) == 2
    assert "came in part: corpus.jsonl should have" in capsys.readouterr().err
    assert not (tmp_path / "snap" / "manifest.json").exists()


def test_the_parts_of_an_aggregate_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetched: list[str] = []

    def fetch(name: str, revision: str, place: Path) -> None:
        fetched.append(name)
        repository(place)

    monkeypatch.setattr(fetch_benchmarks, "fetch", fetch)
    assert fetch_benchmarks.main(["--tasks", "CQADupstackRetrieval", "--output", str(tmp_path)]) == 0
    assert len(fetched) == 12
    task = mteb.get_task("CQADupstackRetrieval")
    Snapshot(tmp_path).use(task)
    assert all(str(tmp_path) in part.metadata.dataset["path"] for part in task.metadata.tasks)


def test_a_data_set_that_cannot_be_fetched_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert fetch_benchmarks.main(["--tasks", "NFCorpus", "--output", str(tmp_path)]) == 2
    assert "mteb/nfcorpus at revision " in (error := capsys.readouterr().err)
    assert "could not be fetched: no network" in error


def test_bad_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_benchmarks.main(["--tasks", "NFCorpsu", "--output", str(tmp_path)]) == 2
    assert "did you mean NFCorpus" in capsys.readouterr().err

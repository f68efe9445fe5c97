"""AIR-Bench through the package's own classes, on a miniature of the benchmark in its format."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SENTENCES, write_rows

import lens
from eval.airbench import INSTRUCTION, check_hits, expected
from eval.run import main

pytest.importorskip("air_benchmark", reason="needs pip install --no-deps air-benchmark")
QUERIES = {f"q{i}": SENTENCES[i][:25] for i in range(5)}


@pytest.fixture(scope="module")
def model(mistral: Path, mistral_clusters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    lens.LENS.build(mistral, mistral_clusters, device="cpu").save(path)
    return path


def repository(folder: Path, version: str, **splits: list[dict[str, Any]]) -> None:
    """A data set as the hub's AIR-Bench holds it: one configuration for each version, a file for each split."""
    folder.mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: AIR-Bench_{version}", "  data_files:"]
    for name, rows in splits.items():
        write_rows(folder / f"{name}.jsonl", *rows)
        lines += [f"  - split: {name}", f"    path: {name}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def benchmark(folder: Path, version: str) -> Path:
    """News and finance in English; in 24.05 with a public split."""
    corpus = [{"id": f"d{i}", "text": text} for i, text in enumerate(SENTENCES)]
    asked = [{"id": name, "text": text} for name, text in QUERIES.items()]
    judged = [{"qid": f"q{i}", "docid": f"d{i}", "relevance": 1} for i in range(5)]
    for domain in ("news", "finance"):
        if version == "24.04":
            repository(folder / f"qa_{domain}_en", version, corpus_default=corpus, queries_default=asked)
            continue
        parts = {"queries_default_test": asked[:3], "queries_default_dev": asked[3:]}
        repository(folder / f"qa_{domain}_en", version, corpus_default=corpus, **parts)
        repository(folder / f"qrels-qa_{domain}_en-dev", version, qrels_default_dev=judged[3:])
    return folder


def run(model: Path, data: Path, output: Path, version: str, *more: str) -> int:
    given = ["--model", str(model), "--benchmark", "air-bench", "--version", version, "--device", "cpu"]
    return main([*given, "--domains", "news", "finance", "--air-data", str(data), "--output", str(output), *more])


@pytest.mark.parametrize("version", ["24.04", "24.05"])
def test_the_whole_path(
    version: str, model: Path, datasets_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, output = benchmark(tmp_path / "data", version), tmp_path / "out"
    assert run(model, data, output, version) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    with zipfile.ZipFile(output / "tiny_NoReranker.zip") as archive:
        names = sorted(archive.namelist())
        content = json.loads(archive.read("qa/news/en_default_test.json"))
    assert names == ["qa/finance/en_default_test.json", "qa/news/en_default_test.json"]

    encoder = lens.load(model, device="cpu")
    queries = encoder.encode_queries(list(QUERIES.values()), instruction=INSTRUCTION)
    scores = queries @ encoder.encode_documents(SENTENCES).T
    asked = list(QUERIES) if version == "24.04" else list(QUERIES)[:3]
    assert list(content["search_results"]) == asked
    for name in asked:
        wanted = {f"d{i}": score for i, score in enumerate(scores[list(QUERIES).index(name)])}
        assert content["search_results"][name] == pytest.approx(wanted, abs=1e-6)
    if version == "24.05":
        gains = [1 / np.log2(2 + int((scores[i] > scores[i, i]).sum())) for i in (3, 4)]
        ranks = [int((scores[i] > scores[i, i]).sum()) for i in (3, 4)]
        by_hand = np.mean([gain if rank < 10 else 0 for gain, rank in zip(gains, ranks, strict=True)])
        found = json.loads((output / "dev.json").read_text())["qa"]["news"]["en"]["default"]
        assert found["ndcg_at_10"] == pytest.approx(by_hand, abs=1e-5)
        assert "qa news en default  nDCG@10 " in out

    torn = output / "search_results" / "tiny" / "NoReranker" / "qa" / "news" / "en_default_test.json"
    whole = torn.read_text()
    torn.write_text(whole[:100])
    assert run(model, data, output, version) == 0
    assert json.loads(torn.read_text()) == json.loads(whole)
    monkeypatch.setattr(lens.LENS, "encode", lambda *_, **__: pytest.fail("searched again"))
    assert run(model, data, output, version) == 0
    capsys.readouterr()
    assert run(model, data, output, version, "--instruction", "Find it.") == 2
    assert "holds hits of a run with another instruction: choose another --output" in capsys.readouterr().err


def test_files_of_a_complete_run() -> None:
    files = expected("AIR-Bench_24.04", ["qa"], ["wiki", "news"], ["en"])
    assert [file.as_posix() for file in files] == ["qa/wiki/en_default_test.json", "qa/news/en_default_test.json"]
    assert len(expected("AIR-Bench_24.05", ["qa"], ["news"], ["en"])) == 2  # dev and test


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name": "other"}, "model_name should be 'tiny', found 'other'"),
        ({"benchmark_version": "AIR-Bench_24.05"}, "benchmark_version should be 'AIR-Bench_24.04'"),
        ({"domain": "law"}, "domain should be 'news'"),
        ({"search_results": {}}, "holds no search_results"),
        ({"search_results": {"q": {}}}, "query 'q' should have 1 to 1000 hits"),
        ({"search_results": {"q": {"d": "x"}}}, "query 'q' has a score that is no finite number"),
    ],
)
def test_hits_that_the_leaderboard_would_refuse(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "qa" / "news" / "en_default_test.json"
    path.parent.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="is missing"):
        check_hits(path, "AIR-Bench_24.04", "tiny")
    whole = {
        "model_name": "tiny", "reranker_name": "NoReranker", "benchmark_version": "AIR-Bench_24.04", "task_type": "qa",
        "domain": "news", "search_results": {"q": {"d": 0.5}},
    }  # fmt: skip
    path.write_text(json.dumps(whole))
    check_hits(path, "AIR-Bench_24.04", "tiny", ["q"])
    with pytest.raises(ValueError, match="query 'other' has no hits"):
        check_hits(path, "AIR-Bench_24.04", "tiny", ["q", "other"])
    path.write_text(json.dumps({**whole, **change}))
    with pytest.raises(ValueError, match=message):
        check_hits(path, "AIR-Bench_24.04", "tiny")
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        check_hits(path, "AIR-Bench_24.04", "tiny")


def test_bad_command_lines(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = benchmark(tmp_path / "data", "24.04")
    given = ["--model", str(model), "--benchmark", "air-bench", "--output", str(tmp_path / "out"), "--device", "cpu"]
    cases = [
        (["--domains", "sports"], "Invalid domain: sports"),
        (["--task-types", "chat"], "Invalid task type: chat"),
        (["--languages", "xx"], "Invalid language: xx"),
        (["--domains", "law", "--air-data", str(data)], "has no qa_law_en"),
        (["--domains", "law", "--languages", "zh"], "has no qa in zh of law"),
    ]
    for more, message in cases:
        assert main([*given, *more]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
    assert main([*given[2:], "--model", str(tmp_path / "gone")]) == 2
    assert "is neither a folder nor a name OWNER/MODEL" in capsys.readouterr().err

"""The quick start from end to end with the real programs, on a tiny backbone and a tiny folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SENTENCES, write_rows


@pytest.mark.slow
def test_quickstart_on_ones_own_folder_and_backbone(bert: Path, tmp_path: Path) -> None:
    data = tmp_path / "my data"
    (data / "qrels").mkdir(parents=True)
    texts = [f"{sentence} number {i}" for i, sentence in enumerate(SENTENCES * 5)]
    write_rows(data / "corpus.jsonl", *({"_id": f"d{i}", "text": text} for i, text in enumerate(texts)))
    queries = ({"_id": f"q{i}", "text": " ".join(text.split()[2:6]) + f" {i}"} for i, text in enumerate(texts))
    write_rows(data / "queries.jsonl", *queries)
    for split, numbers in (("train", range(25)), ("test", range(25, 35))):
        lines = "".join(f"q{i}\td{i}\t1\n" for i in numbers)
        (data / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    command = [sys.executable, "scripts/quickstart.py", "--data", str(data), "--model", str(bert), "--k", "24"]
    command += ["--output", str(tmp_path / "out"), "--", "--max_steps", "4", "--warmup_steps", "1"]
    command += ["--batch_size", "4", "--document_max_length", "64", "--save_steps", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"BM25", "bm25"} & set(report["metrics"])
    assert {"LENS", "dense", "LENS + dense"} <= set(report["metrics"])
    assert report["peak_rss_mb"] > 1
    assert {"data", "cluster", "mine", "score", "train", "evaluate", "answer"} <= set(report["seconds"])
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("unchanged since it ran") == 7

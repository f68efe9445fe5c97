"""README's commands, run as they stand: only sizes are shrunk, and `my_data` and `corpus.jsonl` are made first."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SENTENCES, save_bert

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = {
    "--k 4000": "--k 48",
    "lens-mini.yaml": "lens-mini.yaml --max_steps 2 --warmup_steps 1 --batch_size 4 --document_max_length 64",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout, with a data set of its own."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("clustering", "train", "eval", "lens", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    data = folder / "my_data"
    (data / "qrels").mkdir(parents=True)
    rows = [{"_id": f"d{i}", "text": f"{text} {i}"} for i, text in enumerate(SENTENCES * 3)]
    (data / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.jsonl").write_text((data / "corpus.jsonl").read_text())
    queries = [{"_id": f"q{i}", "text": " ".join(row["text"].split()[:4])} for i, row in enumerate(rows)]
    (data / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    for split, numbers in (("train", range(14)), ("test", range(14, 21))):
        lines = "".join(f"q{i}\td{i}\t1\n" for i in numbers)
        (data / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    save_bert(folder / "backbone")
    return folder


def run(checkout: Path, command: str) -> subprocess.CompletedProcess[str]:
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "BACKBONE": "backbone"}
    return subprocess.run(
        ["bash", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
    )


def test_commands_for_training_using_and_searching(checkout: Path) -> None:
    train = next(block for block in blocks("sh") if "train/run.py" in block)
    for old, new in SMALLER.items():
        assert old in train
        train = train.replace(old, new)
    commands = train.strip().splitlines()
    assert len(commands) == 5
    for command in commands:
        done = run(checkout, command)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (checkout / "runs" / "mine" / "eval" / "report.html").is_file()

    (checkout / "runs" / "quickstart").mkdir()
    (checkout / "runs" / "quickstart" / "model").symlink_to(checkout / "runs" / "mine" / "model")
    use = next(block for block in blocks("sh") if "lens search" in block)
    for command in use.strip().splitlines():
        done = run(checkout, command)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip()
    (python,) = blocks("python")
    done = run(checkout, f"{shlex.quote(sys.executable)} -c {shlex.quote(python)}")
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout


def test_the_scripts_of_the_readme_exist_and_explain_themselves() -> None:
    scripts = {word for block in blocks("sh") for word in block.split() if word.startswith("scripts/")}
    assert scripts == {"scripts/quickstart.sh", "scripts/test.sh"}
    for script in scripts:
        done = subprocess.run(["bash", script, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0
        assert script in done.stdout


def test_links_of_the_documents_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_every_file_is_named_once_in_the_architecture() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## Every file") : page.index("## Artifacts")]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    folders = ("lens", "clustering", "train", "eval", "scripts", "benchmarks")
    present = [
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".yaml", ".html") and "__pycache__" not in path.parts
    ]
    assert sorted(named) == sorted(present)

"""benchmarks/decoder.py from data to page at toy size, and what it says about missing data and other settings."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from conftest import ROOT

import clustering.run
import eval.run
import train.mine
import train.run
from benchmarks import decoder, page
from benchmarks.decoder_base import Settings, split_pairs, write_beir
from lens.corpus import read_beir

PROGRAMS = {
    "clustering/run.py": clustering.run.main,
    "train/mine.py": train.mine.main,
    "train/run.py": train.run.main,
    "eval/run.py": eval.run.main,
}
WORDS = ("river", "stone", "amber", "falcon", "copper", "violin", "meadow", "lantern", "harbour", "cedar", "marble")


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def write_gz(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Generated sets in the layout of the shared ones: pairs, running text, a BEIR folder."""
    rng = random.Random(0)
    folder = tmp_path / "data"
    rows = [
        {
            "query": f"what of {sentence(rng, 2)} {n}",
            "positive": f"{n} {sentence(rng, 9)}",
            "focus": f"subject {n // 2}",
        }
        for n in range(80)
    ]
    write_gz(folder / "pairs-toy" / "train.jsonl.gz", rows)
    paragraphs = [{"paragraphs": [sentence(rng, 30), sentence(rng, 20)]} for _ in range(40)]
    write_gz(folder / "text-toy" / "train.jsonl.gz", paragraphs)
    write_gz(folder / "zero" / "corpus.jsonl.gz", [{"_id": f"d{n}", "text": sentence(rng, 9)} for n in range(30)])
    write_gz(folder / "zero" / "queries.jsonl.gz", [{"_id": f"q{n}", "text": sentence(rng, 3)} for n in range(6)])
    (folder / "zero" / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(6))]
    (folder / "zero" / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def arguments(data: Path, tmp_path: Path) -> list[str]:
    sizes = {
        "train_pairs": 40, "heldout_queries": 10, "vocabulary": 300, "width": 16, "layers": 1, "heads": 2,
        "lm_length": 16, "lm_batch": 4, "lm_steps": 20, "k": 40, "steps": 10, "batch_size": 8, "seeds": 2,
    }  # fmt: skip
    sets = ["--pairs", "pairs-toy", "--texts", "text-toy", "--zero_shot", "zero", "--variants", "causal last"]
    places = {"data": data, "work": tmp_path / "work", "output": tmp_path / "out.json", "results": tmp_path / "page.md"}
    rest = {**sizes, **places, "device": "cpu", "precision": "fp32"}
    return [*sets, *(part for name, value in rest.items() for part in (f"--{name}", str(value)))]


@pytest.mark.slow
def test_every_step_runs_once_and_ends_in_figures_and_a_page(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def program(name: str, *rest: str | Path) -> None:
        ran.append(name)
        assert not PROGRAMS[name]([str(part) for part in rest])

    monkeypatch.setattr(decoder, "program", program)
    (tmp_path / "page.md").write_text("# Results\n\nKept.\n")
    assert decoder.main(arguments(data, tmp_path)) == 0
    assert ran.count("train/run.py") == 4
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["base"]["loss_per_token"] < 5.7  # below log(300), chance
    assert set(found["datasets"]["heldout"]["systems"]) == {
        "bidirectional max", "causal last", "untrained", "bm25", "dense",
    }  # fmt: skip
    assert len(found["training"]["causal last"]) == 2
    for seed in range(2):  # the summary repeats what eval/run.py itself reports
        reported = json.loads((tmp_path / "work" / f"eval-{seed}" / "results.json").read_text())
        for name in ("heldout", "zero"):
            for system in ("bidirectional max", "causal last"):
                expected = reported["datasets"][name]["systems"][system]["nDCG@10"]
                assert found["datasets"][name]["systems"][system]["seeds"][seed] == pytest.approx(expected, abs=1e-3)
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# Results\n\nKept.\n")
    assert "| causal last |" in text

    ran.clear()  # again: nothing is left to do, and the section replaces itself
    assert decoder.main([*arguments(data, tmp_path), "--note", "Seen once."]) == 0
    assert ran == []
    assert (tmp_path / "page.md").read_text().count("decoder: begin") == 1
    assert "Seen once." in (tmp_path / "page.md").read_text()


def test_what_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decoder.main(["--data", str(tmp_path / "none"), "--work", str(tmp_path / "work")]) == 2
    assert "pairs-medquad/train.jsonl.gz does not exist: give --data" in capsys.readouterr().err
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "own").touch()
    assert decoder.main(arguments(data, tmp_path)) == 2
    assert "holds no settings.json" in capsys.readouterr().err
    (tmp_path / "work" / "own").unlink()
    decoder.prepare(tmp_path / "work", Settings(k=7))
    assert decoder.main(arguments(data, tmp_path)) == 2
    assert "k: 7 -> 40" in capsys.readouterr().err


def test_rows_that_share_anything_stay_on_one_side() -> None:
    rng = random.Random(1)
    rows = [
        {"query": f"q{rng.randrange(90)}", "positive": f"p{rng.randrange(90)}", "focus": f"f{n}" if n % 3 else ""}
        for n in range(60)
    ]
    train_rows, kept = split_pairs(rows, 10, random.Random(0))
    assert len(train_rows) + len(kept) == 60
    assert len({row["query"] for row in kept}) >= 10
    for field in ("query", "positive"):
        assert not {row[field] for row in train_rows} & {row[field] for row in kept}


def test_a_beir_folder_shares_ids_between_equal_texts(tmp_path: Path) -> None:
    rows = [("a", "x"), ("a", "y"), ("b", "y")]
    write_beir(tmp_path / "beir", [{"query": q, "positive": p, "set": "s"} for q, p in rows], "test")
    beir = read_beir(tmp_path / "beir", "test")
    assert list(beir.queries.values()) == ["a", "b"]
    assert list(beir.corpus.values()) == ["x", "y"]
    assert beir.qrels == {"s-q0": {"s-d0": 1, "s-d1": 1}, "s-q1": {"s-d1": 1}}


def test_the_page_is_the_stored_figures() -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / "decoder.json").read_text())
    text = page.PAGE.read_text()
    section = text.partition("<!-- decoder: begin -->\n")[2].partition("\n<!-- decoder: end -->")[0]
    assert section == "\n".join(decoder.page(content))

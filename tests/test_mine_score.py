"""Mining hard negatives and scoring them."""

from __future__ import annotations

import json

import pytest
from conftest import SENTENCES, write_rows

from train.mine import main as mine
from train.score import main as score
from train.sources import read_examples


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    documents = [*SENTENCES, SENTENCES[0]]  # the last one repeats the first
    write_rows(folder / "corpus.jsonl", *({"_id": f"d{i}", "text": text} for i, text in enumerate(documents)))
    write_rows(folder / "queries.jsonl", {"_id": "q0", "text": "quick fox"}, {"_id": "q1", "text": "parse date"})
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td1\t0\nq1\td4\t2\n")
    return folder


def test_mined_negatives_are_never_positives(beir, bert, tmp_path):
    assert mine(["--beir", str(beir), "--output", str(tmp_path / "m.jsonl"), "--negatives", "4"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [r["query"] for r in rows] == ["quick fox", "parse date"]
    for r in rows:
        assert len(r["neg"]) == len(set(r["neg"])) == 4
        assert not set(r["neg"]) & set(r["pos"])
    assert rows[0]["pos"] == [SENTENCES[0]]
    arguments = ["--model", str(bert), "--data", str(tmp_path / "m.jsonl"), "--output", str(tmp_path / "s.jsonl")]
    assert score([*arguments, "--device", "cpu", "--max-length", "64"]) == 0
    scored = read_examples(tmp_path / "s.jsonl", 5)
    assert all(len(e.neg_scores) == 4 and len(e.pos_scores) == 1 for e in scored)
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    reference = SentenceTransformer(modules=[word := Transformer(str(bert)), Pooling(word.get_embedding_dimension())])
    a, b = reference.encode([scored[0].query, scored[0].neg[0]], normalize_embeddings=True)
    assert scored[0].neg_scores[0] == pytest.approx(float(a @ b), abs=1e-4)


def test_mining_and_scoring_fail_in_one_line(beir, bert, tmp_path, capsys):
    taken = tmp_path / "taken.jsonl"
    taken.write_text("precious")
    out = str(tmp_path / "x.jsonl")
    cases = [
        (mine, ["--beir", str(beir), "--output", str(taken)], "is not empty"),
        (mine, ["--beir", str(beir), "--split", "dev", "--output", out], "no dev.tsv; found train"),
        (mine, ["--beir", str(tmp_path / "no"), "--output", out], "is not a folder"),
        (mine, ["--beir", str(beir), "--output", out, "--negatives", "0"], "must be at least 1"),
        (score, ["--model", str(bert), "--data", str(taken), "--output", out], "taken.jsonl:1: not"),
        (score, ["--model", str(bert), "--data", str(taken), "--output", str(taken)], "is not empty"),
    ]
    for program, arguments, message in cases:
        capsys.readouterr()
        assert program(arguments) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert len(error.strip().splitlines()) == 1
    assert taken.read_text() == "precious"

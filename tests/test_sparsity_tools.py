"""eval/pruning.py by hand and against loops, eval/sparsity.py end to end on a tiny model, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SENTENCES, write_rows
from scipy import sparse

import lens
from eval import pruning
from eval.run import main as evaluation
from eval.scoring import evaluate, lens_system, vector_system
from eval.sparsity import main, pruned, stored
from lens.cli import main as lens_main
from lens.corpus import read_beir
from lens.search.exact import search
from lens.vectors import save_embeddings

for module in ("ir_measures", "matplotlib"):
    pytest.importorskip(module, reason='needs pip install "lens-embeddings[eval]"')

DOCUMENTS = np.array(
    [
        [3, 1, 0, 2, 0],
        [3, 0, 0, 2, 0],
        [3, 4, 1, 0, 0],
        [3, 0, 0, 0, 0],
    ],
    dtype=np.float32,
)
QUERIES = np.array([[0, 1, 1, 0, 0], [2, 1, 0, 0, 0]], dtype=np.float32)


def csr(rows: Any) -> Any:
    return pruning.cleaned(np.asarray(rows, dtype=np.float32))


def random(rows: int, dimensions: int, share: float, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return csr(np.where(rng.random((rows, dimensions)) < share, np.round(rng.random((rows, dimensions)), 2), 0))


def test_flops_by_hand_and_by_counting() -> None:
    # dimension 0: half the queries, all documents; 1: all queries, half the documents; 2: half, a quarter
    assert pruning.flops(csr(QUERIES), csr(DOCUMENTS)) == 0.5 * 1 + 1 * 0.5 + 0.5 * 0.25
    queries, documents = random(13, 40, 0.2, 0), random(57, 40, 0.3, 1)
    shared = [
        len(set(queries[i].indices) & set(documents[j].indices))
        for i in range(queries.shape[0])
        for j in range(documents.shape[0])
    ]
    assert pruning.flops(queries, documents) == pytest.approx(np.mean(shared), rel=1e-12)


def test_stored_zeros_are_not_active() -> None:
    matrix = sparse.csr_matrix((np.array([0.0, 2.0, 1.0, 1.0]), ([0, 0, 1, 1], [0, 1, 2, 2])), shape=(2, 4))
    clean = pruning.cleaned(matrix)
    assert clean.toarray().tolist() == [[0, 2, 0, 0], [0, 0, 2, 0]]
    assert pruning.activity(clean).tolist() == [0, 0.5, 0.5, 0]


def test_active_dimensions_by_hand() -> None:
    facts = pruning.active_dimensions(csr(DOCUMENTS))  # 3, 2, 3, 1 of 5, the last of them never
    assert facts == {"mean": 2.25, "p5": pytest.approx(1.15), "p50": 2.5, "p95": 3.0, "p100": 3.0, "dead": 0.2}


def test_bytes_by_hand() -> None:
    assert pruning.csr_bytes(csr(DOCUMENTS)) == 9 * 8 + 5 * 8
    assert pruning.inverted_bytes(csr(DOCUMENTS)) == 9 * (1 + 4) + 6 * 8
    tall = np.zeros((20000, 2))
    tall[[126, 254, 255, 16639], 0] = 1  # gaps 127, 128, 1, 16384: 1 + 2 + 1 + 3 bytes
    tall[127, 1] = 1  # the first of its list: 128, 2 bytes
    assert pruning.inverted_bytes(csr(tall)) == 1 + 2 + 1 + 3 + 2 + 5 * 4 + 3 * 8


def test_pruning_by_hand() -> None:
    documents = csr(DOCUMENTS)
    expected = [[3, 0, 0, 0, 0], [3, 0, 0, 0, 0], [0, 4, 0, 0, 0], [3, 0, 0, 0, 0]]
    assert pruning.keep_top(documents, 1).toarray().tolist() == expected
    # Four values may stay, but the threshold that leaves 4 and all four 3s leaves five: only the 4 lies above it.
    assert pruning.keep_above(documents, 1).toarray().tolist() == [[0] * 5, [0] * 5, [0, 4, 0, 0, 0], [0] * 5]
    kept = pruning.keep_above(documents, 2)  # seven of nine values; eight may stay
    assert kept.toarray().tolist() == [[3, 0, 0, 2, 0], [3, 0, 0, 2, 0], [3, 4, 0, 0, 0], [3, 0, 0, 0, 0]]
    # Dimension 0 is the same in all documents, so it goes first although its values are great.
    assert pruning.variances(documents).tolist() == pytest.approx([0, 2.6875, 0.1875, 1, 0])
    kept = pruning.keep_dimensions(documents, 1)
    assert kept.toarray().tolist() == [[0, 1, 0, 2, 0], [0, 0, 0, 2, 0], [0, 4, 0, 0, 0], [0] * 5]
    for method in pruning.METHODS.values():
        assert (method(documents, 3) != documents).nnz == 0
    assert documents.toarray().tolist() == DOCUMENTS.tolist()


def test_ties_go_to_the_lower_dimension() -> None:
    assert pruning.keep_top(csr([[1, 2, 1, 1, -3]]), 3).toarray().tolist() == [[1, 2, 0, 0, -3]]


@pytest.mark.parametrize("budget", [1, 3, 7, 20])
def test_pruning_against_loops(budget: int) -> None:
    documents = random(60, 50, 0.4, 2)
    dense = documents.toarray()
    for row, kept in zip(dense, pruning.keep_top(documents, budget).toarray(), strict=True):
        best = sorted(range(50), key=lambda j: (-row[j], j))[:budget]
        assert kept.tolist() == [row[j] if j in best else 0 for j in range(50)]
    thresholds = [t for t in np.unique(dense) if (dense > t).sum() <= budget * 60]
    kept = pruning.keep_above(documents, budget).toarray()
    np.testing.assert_array_equal(kept, np.where(dense > min(thresholds), dense, 0))
    left, columns = budget * 60, []
    for j in sorted(range(50), key=lambda j: -np.var(dense[:, j].astype(np.float64))):
        if (dense[:, j] > 0).sum() <= left:
            columns.append(j)
            left -= (dense[:, j] > 0).sum()
    kept = pruning.keep_dimensions(documents, budget).toarray()
    np.testing.assert_array_equal(kept, np.where(np.isin(np.arange(50), columns), dense, 0))


def test_documents_of_length_one_keep_it_when_pruned() -> None:
    unit = pruning.with_unit_rows(csr(DOCUMENTS))
    np.testing.assert_allclose(np.linalg.norm(unit.toarray(), axis=1), 1, atol=1e-6)
    assert pruning.is_unit(unit)
    assert not pruning.is_unit(csr(DOCUMENTS))
    assert pruning.is_unit(pruned(unit, ["top"], [2], None)["top 2"])
    assert not pruning.is_unit(pruned(unit, ["top"], [2], False)["top 2"])
    assert list(pruned(unit, ["top", "threshold"], [9, 2], None)) == ["unpruned", "top 2", "threshold 2"]


def test_timed_search_finds_what_exact_search_finds() -> None:
    queries, documents = random(9, 40, 0.2, 3), random(80, 40, 0.3, 4)
    found, scores = search(queries, documents, 10)
    lists = documents.T.tocsr()
    for row in range(9):
        mine, values = pruning._search(queries[row], lists, 10)
        assert list(mine) == found[row].tolist()
        np.testing.assert_allclose(values, scores[row], rtol=1e-6)
    spent = pruning.latency(queries, documents, repeats=1)
    assert 0 < spent["median"] <= spent["p95"] < 1000


# --- the program -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bert: Path, bert_clusters: Path) -> Path:
    """A BEIR folder `data`, a tiny model `model`, and the model's embeddings of both as files."""
    folder = tmp_path_factory.mktemp("sparsity")
    data = folder / "data"
    (data / "qrels").mkdir(parents=True)
    ends = [" ".join(SENTENCES[n].split()[: n + 2]) for n in range(3)]
    texts = [f"{text} {end}" for end in ends for text in SENTENCES]  # all different, so that rounding orders none
    write_rows(data / "corpus.jsonl", *({"_id": f"d{i}", "text": text} for i, text in enumerate(texts)))
    queries = [" ".join(text.split()[:4]) for text in texts[:9]]
    write_rows(data / "queries.jsonl", *({"_id": f"q{i}", "text": text} for i, text in enumerate(queries)))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(8))
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    lens.LENS.build(bert, bert_clusters, device="cpu").save(folder / "model", include_backbone=True)
    common = ["--model", str(folder / "model"), "--device", "cpu"]
    assert lens_main(["encode", str(data), *common, "--output", str(folder / "corpus.npz")]) == 0
    query_file = str(data / "queries.jsonl")
    arguments = ["encode", query_file, *common, "--kind", "query", "--output", str(folder / "queries.npz")]
    assert lens_main(arguments) == 0
    return folder


def start(folder: Path, output: Path, *options: str) -> dict[str, Any]:
    common = ["--beir", str(folder / "data"), "--resamples", "100", "--latency-queries", "3", "--device", "cpu"]
    assert main([*common, *options, "--output", str(output)]) == 0
    content: dict[str, Any] = json.loads((output / "results.json").read_text())
    return content


@pytest.mark.parametrize("program", [evaluation, main])
def test_a_model_that_gives_nan_is_named(
    program: Any, folder: Path, overflowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", f"broken={overflowing}", "--beir", str(folder / "data"), "--device", "cpu"]
    assert program([*arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "broken: embeddings hold NaN or infinite values" in error
    assert not (tmp_path / "out").exists()


def test_program(folder: Path, tmp_path: Path) -> None:
    results = start(folder, tmp_path / "a", "--model", f"LENS={folder / 'model'}", "--budgets", "1", "3", "5", "900")
    facts = results["systems"]["LENS"]
    model, beir = lens.load(folder / "model", device="cpu"), read_beir(folder / "data")
    peer = evaluate(beir, [lens_system("LENS", model, beir)])
    assert facts["nDCG@10"] == pytest.approx(peer.values["LENS"]["nDCG@10"].mean(), abs=1e-6)
    queries = model.encode_queries([beir.queries[f"q{i}"] for i in range(8)])
    documents = model.encode_documents(list(beir.corpus.values()))
    count = ((queries != 0).astype(float) @ (documents != 0).T).mean()
    assert facts["flops"] == pytest.approx(count, rel=1e-9)
    assert facts["active_documents"]["mean"] == pytest.approx((documents != 0).sum(axis=1).mean())
    assert [(row["method"], row["budget"]) for row in facts["pruned"]] == [
        (method, budget) for method in ("top", "threshold", "dimensions") for budget in (1, 3, 5)
    ]
    for row in facts["pruned"]:
        assert row["active_per_document"] <= row["budget"]
        assert row["flops"] < facts["flops"]
        assert row["inverted_bytes"] < facts["inverted_bytes"]
        assert row["difference"] == pytest.approx(row["nDCG@10"] - facts["nDCG@10"], abs=1e-9)
        assert row["milliseconds"]["median"] > 0
    top = model.encode_documents(list(beir.corpus.values()), top_k=3)
    peer = evaluate(beir, [vector_system("top 3", queries, top, matching=True)])
    assert facts["pruned"][1]["nDCG@10"] == pytest.approx(peer.values["top 3"]["nDCG@10"].mean(), abs=1e-6)
    assert facts["pruned"][0]["difference"] != 0
    report = (tmp_path / "a" / "report.md").read_text()
    assert "| top 3 |" in report
    assert "21 documents, 8 judged queries" in report
    svg = (tmp_path / "a" / "plot.svg").read_text()
    assert svg.count("LENS, threshold") == 1
    assert "nDCG@10" in svg


def test_stored_embeddings_give_the_model_s_figures(folder: Path, tmp_path: Path) -> None:
    model = start(folder, tmp_path / "a", "--model", f"x={folder / 'model'}", "--budgets", "4")["systems"]["x"]
    files = ["--documents", f"x={folder / 'corpus.npz'}"]
    both = start(folder, tmp_path / "b", *files, "--queries", str(folder / "queries.npz"), "--budgets", "4")
    mixed = start(folder, tmp_path / "c", *files, "--model", str(folder / "model"), "--budgets", "4")
    for found in (both["systems"]["x"], mixed["systems"]["x"]):
        for facts in (model, found):
            for row in (facts, *facts["pruned"]):
                row.pop("milliseconds", None)
        assert found == model


def test_stored_embeddings_are_put_in_the_order_of_the_corpus(folder: Path, tmp_path: Path) -> None:
    save_embeddings(tmp_path / "e.npz", csr(DOCUMENTS), ["b", "a", "d", "c"])
    assert stored(str(tmp_path / "e.npz"), ["a", "b", "d"]).toarray().tolist() == DOCUMENTS[[1, 0, 2]].tolist()


def test_no_timing_and_no_pruning(folder: Path, tmp_path: Path) -> None:
    options = ["--model", str(folder / "model"), "--methods", "--latency-queries", "0"]
    facts = start(folder, tmp_path / "a", *options)["systems"]["model"]
    assert facts["milliseconds"] is None
    assert facts["pruned"] == []
    assert "Every budget leaves all values." in (tmp_path / "a" / "report.md").read_text()


BAD = [
    ("", "nothing to measure: give --model"),
    ("--documents corpus.npz", "--documents needs --queries"),
    ("--documents corpus.npz --queries queries.npz queries.npz", "--queries names 2 files for 1"),
    ("--model gone", "model gone is neither a folder nor on the hub"),
    ("--model data", "data is no LENS model"),
    ("--model model --budgets 0", "--budgets must be distinct numbers of at least 1"),
    ("--model model --budgets 4 4", "--budgets must be distinct numbers of at least 1"),
    ("--model model --resamples 5", "--resamples is 5: at least 100"),
    ("--model model --output data", "exists and is not empty"),
    ("--model model --beir gone", "gone is not a folder"),
    ("--documents gone.npz --queries queries.npz", "gone.npz does not exist"),
    ("--documents cut.npz --queries queries.npz", "cut.npz holds no embeddings"),
    ("--documents queries.npz --queries queries.npz", "has no embedding of 'd0'"),
    ("--documents more.npz --queries queries.npz", "more.npz holds 'd99', which the corpus lacks"),
    ("--documents wide.npz --queries queries.npz", "queries have 24 dimensions and documents 30"),
    ("--documents zero.npz --queries queries.npz", "every embedding of the documents is zero"),
    ("--documents x=corpus.npz x=corpus.npz --queries queries.npz queries.npz", "two systems are named 'x'"),
]


@pytest.fixture(scope="module")
def broken(folder: Path) -> Path:
    ids = [f"d{i}" for i in range(21)]
    (folder / "cut.npz").write_bytes((folder / "corpus.npz").read_bytes()[:200])
    save_embeddings(folder / "more.npz", np.ones((22, 24)), [*ids, "d99"])
    save_embeddings(folder / "wide.npz", np.ones((21, 30)), ids)
    save_embeddings(folder / "zero.npz", np.zeros((21, 24)), ids)
    return folder


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_gets_one_line(
    broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    monkeypatch.chdir(broken)
    arguments = ["--beir", "data", "--output", "out", "--device", "cpu", *options.split()]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error, error
    assert error.startswith("eval/sparsity.py: ")
    assert error.count("\n") == 1
    assert not (broken / "out").exists()


def test_an_output_that_is_no_result_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "data", tmp_path / "out")
    arguments = ["--beir", str(folder / "data"), "--model", str(folder / "model"), "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--overwrite"]) == 2
    assert (tmp_path / "out" / "corpus.jsonl").exists()

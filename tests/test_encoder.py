"""lens.encode and its neighbours: formats, pruning, explanations, search, bad options."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import ROOT, SENTENCES

import lens
from lens.devices import resolve_device
from lens.explain import ClusterTokens
from lens.search import search
from lens.vectors import load_embeddings, prune, rank_dims, save_embeddings


@pytest.fixture(scope="module")
def model(bert, bert_clusters):
    return lens.LENS.build(bert, bert_clusters)


def test_shapes_types_and_formats(model):
    dense = model.encode(SENTENCES)
    assert dense.shape == (len(SENTENCES), 24)
    assert dense.dtype == np.float32
    assert (dense >= 0).all()
    np.testing.assert_allclose(np.linalg.norm(dense, axis=1), 1, atol=1e-6)
    tensor = model.encode(SENTENCES, output="torch")
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), dense)
    sparse = model.encode(SENTENCES, output="csr", batch_tokens=20)
    assert isinstance(sparse, scipy.sparse.csr_matrix)
    np.testing.assert_allclose(sparse.toarray(), dense, atol=1e-6)


@pytest.mark.parametrize("output", ["numpy", "torch", "csr"])
def test_empty_list(model, output):
    assert model.encode([], output=output).shape == (0, 24)
    assert model.encode_queries([], instruction="x", output=output, dims=[1, 2]).shape == (0, 2)


def test_empty_and_blank_texts_are_zero_rows(model):
    rows = model.encode(["", "  \n", "fox"])
    assert rows[:2].sum() == 0
    assert rows[2].sum() > 0


@pytest.mark.slow
def test_a_text_of_a_million_characters(model):
    long = "fox dog " * 125_000
    np.testing.assert_allclose(model.encode([long])[0], model.encode([long[:8000]])[0], atol=1e-6)


def test_instruction_matters_and_is_not_pooled(model):
    with_it = model.encode_queries(["the fox"], instruction="parse a date")
    without = model.encode_queries(["the fox"])
    assert np.abs(with_it - without).max() > 1e-4


def test_top_k_and_dims(model):
    full = model.encode(SENTENCES)
    best = model.encode(SENTENCES, top_k=5)
    assert ((best > 0).sum(1) <= 5).all()
    np.testing.assert_allclose(np.linalg.norm(best, axis=1), 1, atol=1e-6)
    for row, kept in zip(full, best, strict=True):
        expected = np.where(row >= np.sort(row)[-5], row, 0)
        np.testing.assert_allclose(kept, expected / np.linalg.norm(expected), atol=1e-6)
    dims = [7, 3, 11]
    some = model.encode(SENTENCES, dims=dims)
    expected = full[:, dims]
    np.testing.assert_allclose(some, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(rank_dims(full), np.argsort(-(full.astype(float) ** 2).mean(0), kind="stable"))


def test_prune_by_hand():
    rows = torch.tensor([[3.0, 0.0, 4.0, 1.0]])
    assert prune(rows, top_k=2).tolist() == [[3.0, 0.0, 4.0, 0.0]]
    assert prune(rows, dims=[2, 0], normalize=True).tolist() == [[pytest.approx(0.8), pytest.approx(0.6)]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "passage"}, ValueError, "kind must be 'query' or 'document'"),
        ({"output": "list"}, ValueError, "output must be"),
        ({"top_k": 0}, ValueError, "top_k must be a whole number of at least 1"),
        ({"dims": [0, 24]}, ValueError, "distinct columns from 0 to 23"),
        ({"dims": [1, 1]}, ValueError, "distinct columns"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens must be a whole number of at least 1, found 0"),
        ({"batch_tokens": "512"}, ValueError, "batch_tokens must be a whole number of at least 1, found '512'"),
        ({"instruction": 3}, TypeError, "instruction must be a str or None"),
    ],
)
def test_bad_options(model, options, error, message):
    with pytest.raises(error, match=message):
        model.encode(["a"], **options)


@pytest.mark.parametrize(
    ("texts", "found"), [(None, "NoneType"), (5, "int"), ({"a": "b"}, "dict"), ({"a"}, "set"), ("a", "one str")]
)
def test_what_is_no_list_of_texts(model, texts, found):
    with pytest.raises(TypeError, match=f"^expected a list of texts, found {found}"):
        model.encode(texts)
    assert model.encode(text for text in ("a", "b")).shape == (2, 24)


def test_bad_devices_and_dtypes(bert, bert_clusters, monkeypatch):
    for wrong in ("yes", 2):
        with pytest.raises(ValueError, match=f"packed must be True, False or None; found {wrong!r}"):
            lens.LENS.build(bert, bert_clusters, device="cpu", packed=wrong)
    with pytest.raises(ValueError, match="quantization must be one of 4bit, 8bit, int8 or None; found 'int4'"):
        lens.load("nowhere", device="cpu", quantization="int4")
    with pytest.raises(ValueError, match="device must be cuda, mps or cpu, found 'gpu'"):
        lens.LENS.build(bert, bert_clusters, device="gpu")
    with pytest.raises(ValueError, match="dtype must be float32"):
        lens.LENS.build(bert, bert_clusters, dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees none"):
            lens.LENS.build(bert, bert_clusters, device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device() == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2' was asked for but the last that torch sees is cuda:1"):
        resolve_device("cuda:2")
    with pytest.raises(ValueError, match="int8' is for a CPU in float32, and this is cpu and cuda in torch.float32"):
        lens.load("nowhere", device=["cpu", "cuda:1"], quantization="int8")


def test_bfloat16_is_near_float32(bert, bert_clusters, model):
    rough = lens.LENS.build(bert, bert_clusters, dtype="bfloat16", device="cpu").encode(SENTENCES)
    assert rough.dtype == np.float32
    assert (rough * model.encode(SENTENCES)).sum(1).min() > 0.99


def test_module_level_encode(model, tmp_path, monkeypatch):
    model.save(tmp_path / "m")
    expected = model.encode_queries(SENTENCES)
    np.testing.assert_array_equal(lens.encode(SENTENCES, tmp_path / "m", kind="query"), expected)
    monkeypatch.setenv("LENS_MODEL", str(tmp_path / "m"))
    np.testing.assert_array_equal(lens.encode(SENTENCES, kind="query"), expected)
    monkeypatch.delenv("LENS_MODEL")
    with pytest.raises(ValueError, match="LENS_MODEL"):
        lens.encode(SENTENCES)


def test_explanation_adds_up_to_the_score(model):
    query, document = "copy a directory", "copy the whole directory tree"
    score = float(model.similarity(model.encode_queries([query]), model.encode_documents([document]))[0, 0])
    whole = model.explain(query, document, k=None)
    assert whole.score == pytest.approx(score, abs=1e-6)
    assert sum(match.weight for match in whole.matches) == pytest.approx(score, abs=1e-6)
    assert sum(match.share for match in whole.matches) == pytest.approx(1, abs=1e-9)
    assert whole.rest_count == 0
    short = model.explain(query, document, k=3)
    assert len(short.matches) == 3
    assert sum(match.weight for match in short.matches) + short.rest == pytest.approx(score, abs=1e-6)
    assert "further clusters" in str(short)
    weights = [match.weight for match in whole.matches]
    assert weights == sorted(weights, reverse=True)
    vectors = model.explain(model.encode_queries([query])[0], model.encode_documents([document])[0], k=None)
    assert vectors.score == pytest.approx(score, abs=1e-6)


def test_explanation_of_nothing(model):
    empty = model.explain("", "fox")
    assert (empty.score, empty.matches, empty.rest) == (0.0, [], 0.0)
    with pytest.raises(ValueError, match="k must be at least 1"):
        model.explain("fox", "fox", k=0)
    with pytest.raises(ValueError, match="expected one embedding of 24 values, found 3"):
        model.explain(np.zeros(3, np.float32), "fox")


def test_tokens_seen_in_the_texts_come_first():
    class Words:
        def decode(self, ids):
            return ["run", "Run", " run", "walk", "sat"][ids[0]]

    tokens = ClusterTokens(np.array([1, 1, 1, 1, 0], dtype=np.int32), 3, Words())
    assert tokens(1) == ["run", "Run", "walk"]
    assert tokens(1, frozenset([3])) == ["walk", "run", "Run"]
    assert tokens(0) == ["sat"]
    assert tokens(2) == []


def test_terms_are_the_greatest_values(model):
    row = model.encode(["copy the tree"])[0]
    listed = model.terms("copy the tree", k=4)
    assert [cluster for cluster, _, _ in listed] == np.argsort(-row, kind="stable")[:4].tolist()
    assert all(weight == pytest.approx(float(row[cluster])) for cluster, _, weight in listed)
    assert all(model.tokens(cluster) for cluster, _, _ in listed)


@pytest.mark.parametrize("sparse", [False, True])
def test_search_equals_a_naive_sort(sparse):
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 3, (9, 6)).astype(np.float32)  # small whole numbers: many ties
    documents = rng.integers(0, 3, (40, 6)).astype(np.float32)
    give = scipy.sparse.csr_matrix if sparse else np.asarray
    indices, scores = search(give(queries), give(documents), k=7)
    for row, query in enumerate(queries):
        naive = sorted(range(40), key=lambda n: (-float(query @ documents[n]), n))[:7]
        assert indices[row].tolist() == naive
        np.testing.assert_allclose(scores[row], (documents[naive] @ query), rtol=1e-6)
    assert search(give(queries), give(documents), k=99)[0].shape == (9, 40)
    with pytest.raises(ValueError, match="k must be at least 1"):
        search(give(queries), give(documents), k=0)
    with pytest.raises(ValueError, match="6 dimensions, documents 5"):
        search(give(queries), give(documents[:, :5]), k=1)


@pytest.mark.parametrize("name", ["e.npz", "e.safetensors"])
def test_embedding_files(model, tmp_path, name):
    rows = model.encode(SENTENCES)
    ids = [f"id\n{i}" for i in range(len(rows))]
    save_embeddings(tmp_path / name, rows, ids)
    loaded, names = load_embeddings(tmp_path / name)
    np.testing.assert_array_equal(loaded.toarray(), rows)
    assert names == ids
    if name.endswith("npz"):
        np.testing.assert_array_equal(scipy.sparse.load_npz(tmp_path / name).toarray(), rows)
    with pytest.raises(FileExistsError):
        save_embeddings(tmp_path / name, rows, ids)
    (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(ValueError, match="holds no embeddings"):
        load_embeddings(tmp_path / name)


def test_only_known_endings(tmp_path):
    with pytest.raises(ValueError, match="npz or .safetensors"):
        save_embeddings(tmp_path / "e.txt", np.zeros((1, 2)), ["a"])


# --- the library stands alone ---------------------------------------------------------------------------------------


def test_lens_imports_none_of_the_programs():
    code = "import sys, lens, lens.cli; print([m for m in sys.modules if m.split('.')[0] in " + (
        "('clustering', 'train', 'eval', 'scripts', 'benchmarks')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


# --- the command line -----------------------------------------------------------------------------------------------


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "lens.cli", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beir")
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as file:
        for number, sentence in enumerate(SENTENCES):
            file.write(json.dumps({"_id": f"d{number}", "title": "", "text": sentence}) + "\n")
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "copy a directory tree"}) + "\n")
    return folder


def test_cli_encode_search_explain(saved, corpus, model, tmp_path):
    done = run("encode", corpus, "--model", saved, "--output", tmp_path / "d.npz")
    assert done.returncode == 0, done.stderr
    loaded, ids = load_embeddings(tmp_path / "d.npz")
    assert ids == [f"d{i}" for i in range(len(SENTENCES))]
    np.testing.assert_allclose(loaded.toarray(), model.encode_documents(SENTENCES), atol=1e-6)
    expected = search(model.encode_queries(["copy a directory tree"]), model.encode_documents(SENTENCES), 3)
    for extra in ((), ("--embeddings", tmp_path / "d.npz")):
        done = run("search", "copy a directory tree", "--model", saved, "--corpus", corpus, "-k", 3, "--json", *extra)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert [row["document"] for row in rows] == [f"d{i}" for i in expected[0][0]]
        assert rows[0]["score"] == pytest.approx(float(expected[1][0, 0]), abs=1e-5)
    done = run("search", "--queries", corpus / "queries.jsonl", "--model", saved, "--corpus", corpus, "-k", 2,
               "--output", tmp_path / "run.trec")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.trec").read_text().splitlines()[0].split()[:4] == ["q1", "Q0", f"d{expected[0][0, 0]}", "1"]
    done = run("explain", "--model", saved, "--query", "copy", "--document", "copy the tree")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("score ")


def test_cli_errors_are_one_line_and_lose_nothing(saved, corpus, tmp_path):
    (tmp_path / "taken.npz").write_bytes(b"precious")
    (tmp_path / "bad.jsonl").write_text('{"_id": "a", "text": "x"}\nnot json\n')
    (tmp_path / "twice.jsonl").write_text('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n')
    (tmp_path / "noid.jsonl").write_text('{"text": "x"}\n')
    cases = [
        (("encode", corpus, "--model", saved, "--output", tmp_path / "taken.npz"), "taken.npz exists"),
        (("encode", corpus, "--model", saved, "--output", tmp_path / "e.csv"), ".npz or .safetensors"),
        (("encode", corpus, "--model", tmp_path, "--output", tmp_path / "e.npz"), "no lens.json"),
        (
            ("encode", tmp_path / "bad.jsonl", "--model", saved, "--output", tmp_path / "e.npz"),
            "bad.jsonl:2: not valid",
        ),
        (
            ("encode", tmp_path / "twice.jsonl", "--model", saved, "--output", tmp_path / "e.npz"),
            "already used in line 1",
        ),
        (
            ("encode", tmp_path / "noid.jsonl", "--model", saved, "--output", tmp_path / "e.npz"),
            "noid.jsonl:1: no usable",
        ),
        (
            ("encode", tmp_path / "gone.txt", "--model", saved, "--output", tmp_path / "e.npz"),
            "gone.txt does not exist",
        ),
        (("encode", corpus, "--model", saved, "--output", tmp_path / "e.npz", "--instruction", "x"), "--kind query"),
        (("search", "--model", saved, "--corpus", corpus), "give queries"),
        (("search", "q", "--model", saved, "--corpus", corpus, "-k", "0"), "k must be at least 1"),
    ]
    for arguments, message in cases:
        done = run(*arguments)
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert message in done.stderr, (message, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert (tmp_path / "taken.npz").read_bytes() == b"precious"
    assert not (tmp_path / "e.npz").exists()

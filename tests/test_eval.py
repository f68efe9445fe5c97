"""eval/: measures, tests, BM25 and dense by hand, equality with naive loops, invariances."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import sparse, stats
from tokenizers.processors import TemplateProcessing

import lens
from eval import scoring
from eval.lexical import lexical_system
from eval.metrics import compare, holm, interval, per_query, randomisation_test
from eval.scoring import (
    System,
    bm25_system,
    dense_system,
    evaluate,
    fuse,
    judged_queries,
    lens_system,
    query_latency,
    rank,
    tfidf_system,
    vector_system,
)
from lens.corpus import Beir, read_beir
from lens.deepct import DeepCT
from lens.dense import Dense
from lens.files import require
from lens.search.bm25 import BM25
from lens.sparterm import SparTerm
from lens.text import token_batches

for module in ("bm25s", "Stemmer", "ir_measures", "matplotlib"):
    pytest.importorskip(module, reason='needs pip install "lens-embeddings[eval]"')

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DOCUMENTS = {
    "d1": "the red fox jumps",
    "d2": "a red red rose",
    "d3": "<b>blue</b> & green | sea",
    "d4": "fox and hound hunt the fox",
    "d5": "an old sea song",
}
QUERIES = {
    "q1": "red fox",
    "q2": "sea <script>alert(1)</script>",
    "q3": "nothing relevant here",
    "d5": "song of the sea",
}
QRELS = {"q1": {"d1": 2, "d4": 1}, "q2": {"d3": 1, "d5": 1}, "q3": {"d1": 0}, "d5": {"d5": 1, "d3": 1}}


@pytest.fixture
def beir() -> Beir:
    return Beir("tiny", DOCUMENTS, QUERIES, QRELS)


class StubLens:
    """Bags of hashed letters: non-negative unit vectors like those of LENS, without a model."""

    def __init__(self, path: str = "", **options: Any) -> None:
        self.config = SimpleNamespace(base="stub-backbone", normalize=True)
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def _encode(self, texts: list[str], output: str) -> Any:
        vectors = np.zeros((len(texts), 16), dtype=np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for letter in text:
                row[ord(letter) % 16] += 1
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return sparse.csr_matrix(vectors) if output == "csr" else vectors

    def encode_queries(self, texts: list[str], instruction: str | None = None, output: str = "numpy") -> Any:
        return self._encode([(instruction or "") + text for text in texts], output)

    def encode_documents(self, texts: list[str], output: str = "numpy") -> Any:
        return self._encode(texts, output)


# measures


def test_measures_by_hand() -> None:
    qrels = {"q": {"a": 3, "b": 1, "c": 2}, "empty": {"a": 1}, "late": {"z": 1}}
    filler = [f"f{i}" for i in range(200)]
    run_ = {"q": ["x", "a", "b"], "empty": [], "late": [*filler[:10], "z"]}
    values = per_query(qrels, run_)
    gained = 3 / math.log2(3) + 1 / math.log2(4)
    ideal = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert values["nDCG@10"] == pytest.approx([gained / ideal, 0, 0])
    assert values["RR@10"] == pytest.approx([1 / 2, 0, 0])  # rank 11 is beyond the cut
    assert values["R@100"] == pytest.approx([2 / 3, 0, 1])
    values = per_query({"q": {"z": 1, "y": 1}}, {"q": [*filler[:99], "z", "y"]})
    assert values["R@100"] == pytest.approx([1 / 2])


def test_unknown_measure_is_named() -> None:
    with pytest.raises(ValueError, match="nDGC@10"):
        per_query({"q": {"a": 1}}, {"q": ["a"]}, ["nDGC@10"])


def test_randomisation_test_equals_enumeration() -> None:
    differences = np.array([0.3, -0.1, 0.25, 0.4, 0.0, 0.1, -0.05, 0.6])
    flips = np.array(list(itertools.product([1, -1], repeat=len(differences))))
    means = (flips * differences).mean(axis=1)
    expected = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
    assert randomisation_test(differences) == pytest.approx(expected)
    assert randomisation_test(-differences) == pytest.approx(expected)


def test_randomisation_test_sampled() -> None:
    differences = np.random.default_rng(1).normal(0.1, 1, size=200)
    p = randomisation_test(differences, seed=3)
    assert p == randomisation_test(differences, seed=3)
    assert p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.03)
    assert randomisation_test(np.zeros(30)) == 1


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_compare() -> None:
    a, b = np.array([0.5, 0.2, 0.9, 0.4]), np.array([0.1, 0.2, 1.0, 0.1])
    (found,) = compare({"a": {"nDCG@10": a}, "b": {"nDCG@10": b}}, [("a", "b")])
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.difference == pytest.approx(0.15)
    assert found.p_t == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert found.low is not None
    assert found.low < 0.15 < found.high
    assert found.p == found.p_holm == randomisation_test(a - b)
    (same,) = compare({"a": {"nDCG@10": a}}, [("a", "a")])
    assert (same.p, same.p_t, same.low, same.high) == (1, 1, 0, 0)
    (single,) = compare({"a": {"R@100": a[:1]}, "b": {"R@100": b[:1]}}, [("a", "b")])
    assert (single.p, single.p_t, single.low) == (None, None, None)


def test_interval_covers_the_mean() -> None:
    values = np.random.default_rng(0).uniform(size=300)
    low, high = interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(300), rel=0.05)


# BM25


def naive_bm25(documents: list[list[str]], query: list[str], k1: float, b: float) -> list[float]:
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        counts, score = Counter(document), 0.0
        for token in query:
            frequency = sum(token in other for other in documents)
            idf = math.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5))
            length = 1 - b + b * len(document) / average
            score += idf * counts[token] / (counts[token] + k1 * length)
        scores.append(score)
    return scores


def test_bm25_equals_formula() -> None:
    index = BM25(list(DOCUMENTS.values()), stopwords="none", stemmer="none", k1=1.4, b=0.6)
    texts = [text.replace("<b>", "b ").replace("</b>", " b").split() for text in DOCUMENTS.values()]
    words = [[word for word in text if word.isalpha()] for text in texts]
    queries = ["red fox", "the sea the sea", "unknown", ""]
    expected = [naive_bm25(words, query.split(), 1.4, 0.6) for query in queries]
    np.testing.assert_allclose(index.score(queries), expected, atol=1e-6)


def test_bm25_words() -> None:
    index = BM25(["read_csv reads files", "the of", ""])
    assert index.tokens(["Reading the CSV file", "zebra", ""]) == [["read", "csv", "file"], [], []]
    assert index.dimensions == 3
    assert not BM25(["", "the"]).score(["the", "cat"]).any()


@pytest.mark.parametrize("options", [{"stopwords": "klingon"}, {"stemmer": "klingon"}])
def test_bm25_unknown_language(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="klingon"):
        BM25(["text"], **options)


@pytest.mark.skipif(not (SHARED / "adi").is_dir(), reason="shared/data/adi is not beside this checkout")
def test_bm25_on_adi() -> None:
    data = read_beir(SHARED / "adi")
    plain = bm25_system("plain", data, stemmer="none")
    found = evaluate(data, [plain, bm25_system("bm25", data)])
    assert found.values["plain"]["nDCG@10"].mean() == pytest.approx(0.438, abs=0.01)
    assert found.values["bm25"]["nDCG@10"].mean() == pytest.approx(0.486, abs=0.005)


# dense


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [3, 50, 7, 7, 1, 20, 8]
    found = token_batches(lengths, 24)
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    assert all(len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= 24 for rows in found)
    assert found[0] == [1]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a letter vocabulary, saved as Hugging Face does."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    path = tmp_path_factory.mktemp("bert")
    letters = [chr(code) for code in range(97, 123)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)).save_pretrained(path)
    return path


@pytest.mark.parametrize("packs", [True, False])
def test_dense_is_the_mean_over_unpadded_tokens(bert: Path, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    if not packs:
        monkeypatch.setattr("lens.dense.choose_packed", lambda *_: False)
    texts = ["a fox", "", "the longest text of all of them", "b", "lone \ud800 surrogate"]
    dense = Dense(bert, device="cpu", max_length=12, batch_tokens=20)
    found = dense.encode(texts)
    assert dense._packed == packs
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    for row, text in zip(found, texts, strict=True):
        tokens = tokenizer(text.replace("\ud800", "?"), truncation=True, max_length=12, return_tensors="pt")
        with torch.no_grad():
            mean = model(**tokens).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


def test_dense_decoders_stay_causal_and_texts_without_tokens_are_zero(mistral: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(mistral)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")  # no BOS: an empty text has no token
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(mistral)
    model.save_pretrained(tmp_path)
    texts = ["the lazy dog", "", "a date from a string, and more"]
    dense = Dense(tmp_path, device="cpu")
    found = dense.encode(texts)
    assert dense._packed
    assert not found[1].any()
    for row in (0, 2):
        ids = tokenizer(texts[row], add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            mean = model.eval().model(**ids).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(found[row], mean / np.linalg.norm(mean), atol=1e-5)


def test_dense_unusable_device(bert: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        Dense(bert, device="nowhere")


# scoring


def test_rank_breaks_ties_by_position() -> None:
    scores = np.array([0.5, 0.0, 0.7, 0.5, 0.5, -np.inf], dtype=np.float32)
    for k in range(1, 7):
        expected = [2, 0, 3, 4, 1][:k]
        assert rank(scores, k).documents.tolist() == expected
        assert rank(scores, k, matching=True).documents.tolist() == [i for i in expected if i != 1]


def test_fusion_equals_naive_loop(beir: Beir) -> None:
    random = np.random.default_rng(0)
    a, b, c = (random.uniform(size=(3, 5)).astype(np.float32) for _ in range(3))
    c[1] = 0
    systems = [System(name, lambda rows: a) for name in "ab"] + [System("c", lambda rows: c, bounded=False)]
    found = fuse(list(zip(systems, (a, b, c), strict=True)))
    for i, j in itertools.product(range(3), range(5)):
        scaled = c[i, j] / max(c[i]) if max(c[i]) else 0
        assert found[i, j] == pytest.approx(a[i, j] + b[i, j] + scaled, rel=1e-6)


@pytest.mark.parametrize("block", [1, 2, 100])
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_evaluation_is_the_same_for_any_block(
    beir: Beir, block: int, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(size: int | None) -> scoring.Evaluation:
        parts = [scoring.lens_system("LENS", StubLens(), beir), bm25_system("bm25", beir)]
        return evaluate(beir, parts, {"both": ["LENS", "bm25"]}, block=size, keep_rankings=True)

    expected = measured(None)
    monkeypatch.setattr(scoring, "SPARSE_BELOW", sparsity)
    monkeypatch.setattr(scoring, "CHUNK_VALUES", 32)
    found = measured(block)
    assert found.queries == expected.queries == ["q1", "q2", "d5"]
    for name in ("LENS", "bm25", "both"):
        for measure, values in expected.values[name].items():
            np.testing.assert_allclose(found.values[name][measure], values)
        for one, other in zip(found.rankings[name], expected.rankings[name], strict=True):
            assert one.documents.tolist() == other.documents.tolist()


def test_queries_without_relevant_documents_are_left_out(beir: Beir) -> None:
    assert judged_queries(beir) == ["q1", "q2", "d5"]


def test_drop_self(beir: Beir) -> None:
    system = vector_system("same", np.ones((3, 1), np.float32), np.ones((5, 1), np.float32))
    kept, dropped = (evaluate(beir, [system], drop_self=drop, keep_rankings=True) for drop in (False, True))
    assert kept.rankings["same"][2].documents.tolist() == [0, 1, 2, 3, 4]
    assert dropped.rankings["same"][2].documents.tolist() == [0, 1, 2, 3]
    assert dropped.rankings["same"][1].documents.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("scores", [np.full((3, 5), np.nan), np.zeros((3, 4))])
def test_impossible_scores_name_the_system(beir: Beir, scores: Any) -> None:
    with pytest.raises(ValueError, match=r"broken on tiny: expected scores of shape \(3, 5\)"):
        evaluate(beir, [System("broken", lambda rows: scores)])


def test_missing_extra_names_the_pip_command() -> None:
    with pytest.raises(ImportError, match=r"no_such_module not installed; run: pip install 'lens-embeddings\[eval\]'"):
        require("eval", "json", "no_such_module")


def test_costs_by_hand() -> None:
    queries = np.array([[1, 0, 2], [0, 0, 3]], dtype=np.float32)
    documents = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 4], [5, 0, 0]], dtype=np.float32)
    # dimensions 0 and 2: half of the queries times two of four documents, all of the queries times one of four
    for form in (np.asarray, sparse.csr_array):
        facts = vector_system("x", form(queries), form(documents)).facts
        assert facts["flops"] == pytest.approx(0.5 * 0.5 + 1 * 0.25)
        pairs = [(q * d != 0).sum() for q in queries for d in documents]
        assert facts["flops"] == pytest.approx(sum(pairs) / 8)
    assert facts["index_mb"] * 2**20 == 5 * 8 + 5 * 8  # values and columns, offsets
    assert vector_system("x", queries, documents).facts["index_mb"] * 2**20 == documents.nbytes


def test_costs_of_bm25_by_hand() -> None:
    corpus = {"a": "fox fox dog", "b": "dog", "c": "bird"}
    beir = Beir("x", corpus, {"1": "fox dog dog", "2": "whale"}, {"1": {"a": 1}, "2": {"b": 1}})
    facts = bm25_system("bm25", beir).facts
    assert facts["flops"] == pytest.approx((1 + 2) / 2 / 3)  # postings of fox and of dog, none of whale
    assert facts["index_mb"] * 2**20 == 4 * 8
    evaluation = evaluate(beir, [bm25_system("bm25", beir)])
    assert 0 < evaluation.search_seconds["bm25"] <= evaluation.seconds["bm25"]


def test_one_query_asked_alone_has_the_scores_it_has_among_others(beir: Beir, bert: Path) -> None:
    deepct = DeepCT.build(bert, device="cpu", max_length=64)
    model = lens.LENS.build(bert, device="cpu")
    bags = lens.LENS.build(bert, device="cpu", query_encoder="bag", positions="all", normalize=False)
    built = [
        bm25_system("bm25", beir),
        tfidf_system("tfidf", beir),
        dense_system("dense", Dense(bert, "cpu"), beir),
        lens_system("LENS", model, beir),
        lens_system("bags", bags, beir),
        lexical_system("SparTerm", SparTerm.build(bert, device="cpu"), beir),
        lexical_system("DeepCT", deepct, beir),
    ]
    texts = [beir.queries[query] for query in judged_queries(beir)]
    for system in built:
        expected = system.score(slice(0, len(texts)))
        assert system.asking is not None
        ask = system.asking()
        for text, row in zip(texts, expected, strict=True):
            np.testing.assert_allclose(ask(text), row, rtol=1e-5, atol=1e-5)
        timed = query_latency(system, texts)
        assert timed is not None
        assert 0 < timed["median"] <= timed["p95"]
    assert query_latency(System("fused", lambda rows: np.zeros((1, 1), np.float32)), texts) is None

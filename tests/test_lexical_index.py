"""Words, BM25 over given frequencies, and TF-IDF: against bm25s, naive loops and values by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_eval import DOCUMENTS, QRELS, QUERIES
from test_eval_program import write_beir

from eval import run
from eval.scoring import evaluate, judged_queries, tfidf_system
from lens.corpus import Beir
from lens.search.bm25 import BM25
from lens.search.impacts import WeightedBM25
from lens.search.words import Words

for module in ("bm25s", "Stemmer", "sklearn"):
    pytest.importorskip(module, reason='needs pip install "lens-embeddings[eval]"')

FREQUENCIES = [{"red": 3, "fox": 1}, {"red": 1, "rose": 7, "gone": 0}, {"sea": 2, "song": 2, "lost": -4}, {}]


def naive_bm25(query: list[str], rows: list[dict[str, float]], k1: float, b: float) -> list[float]:
    """Lucene's BM25 by the formula, term by term."""
    rows = [{term: tf for term, tf in row.items() if tf > 0} for row in rows]
    mean = sum(sum(row.values()) for row in rows) / len(rows)
    scores = []
    for row in rows:
        score = 0.0
        for term in query:
            df = sum(term in other for other in rows)
            tf = row.get(term, 0)
            norm = k1 * (1 - b + b * sum(row.values()) / mean)
            score += math.log(1 + (len(rows) - df + 0.5) / (df + 0.5)) * tf / (tf + norm) if tf else 0.0
        scores.append(score)
    return scores


def test_one_score_by_hand() -> None:
    """N=4, df(fox)=1, |d|=4, mean length (4+8+4+0)/4=4, k1=2, b=0.5: idf ln(1+3.5/1.5), tf part 1/(1+2)."""
    index = WeightedBM25(FREQUENCIES, k1=2.0, b=0.5)
    assert index.score([["fox"]])[0] == pytest.approx([math.log(1 + 3.5 / 1.5) / 3, 0, 0, 0])


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (10.0, 0.4), (0.0, 0.0), (2.0, 1.0)])
def test_given_frequencies_score_as_the_formula_and_as_repeated_words(k1: float, b: float) -> None:
    queries = [["red"], ["rose", "sea"], ["fox", "fox", "gone"], ["unknown"], []]
    index = WeightedBM25(FREQUENCIES, k1, b)
    found = index.score(queries)
    wanted = [naive_bm25(query, FREQUENCIES, k1, b) for query in queries]
    assert np.allclose(found, wanted, atol=1e-6)
    assert sorted(index.vocabulary) == ["fox", "red", "rose", "sea", "song"]
    texts = [" ".join(term for term, tf in row.items() for _ in range(max(0, int(tf)))) for row in FREQUENCIES]
    library = BM25(texts, "none", "none", k1, b)
    assert np.allclose(found, library.score([" ".join(query) for query in queries]), atol=1e-6)


def test_fractions_count_as_they_are() -> None:
    rows = [{"a": 0.25, "b": 1.5}, {"a": 2.75}]
    assert np.allclose(WeightedBM25(rows).score([["a", "b"]])[0], naive_bm25(["a", "b"], rows, 1.2, 0.75), atol=1e-6)


def test_an_index_without_any_term_scores_nothing() -> None:
    assert WeightedBM25([{}, {"a": 0}]).score([["a"], []]).tolist() == [[0, 0], [0, 0]]


def test_one_document() -> None:
    beir = Beir("one", {"d": "a fox"}, {"q": "fox"}, {"q": {"d": 1}})
    assert evaluate(beir, [tfidf_system("tfidf", beir)]).values["tfidf"]["nDCG@10"].tolist() == [1.0]
    assert WeightedBM25([{"fox": 3}]).score([["fox"]])[0] == pytest.approx([math.log(1 + 0.5 / 1.5) * 3 / 4.2])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_frequencies_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        WeightedBM25([{"a": value}])
    with pytest.raises(ValueError, match="b from 0 to 1"):
        WeightedBM25([{"a": 1}], b=1.5)


def test_words_are_those_of_bm25_with_their_places() -> None:
    texts = ["The Running_fox, RUNS!", "", "and the", "İstanbul naïve café x2"]
    words = Words()
    assert words(texts)[:3] == [["run", "fox", "run"], [], []]
    located = words.located(texts)
    assert [[word.term for word in row] for row in located[:3]] == words(texts)[:3]
    assert [(word.start, word.end, word.lower) for word in located[0]] == [
        (4, 11, "running"), (12, 15, "fox"), (17, 21, "runs"),
    ]  # fmt: skip
    for text, row in zip(texts, located, strict=True):
        assert all(text[word.start : word.end].lower() == word.lower for word in row)
    with pytest.raises(ValueError, match="klingon"):
        Words(stemmer="klingon")
    with pytest.raises(ValueError, match="elvish"):
        Words(stopwords="elvish")


def test_tfidf_equals_a_naive_loop() -> None:
    beir = Beir("tiny", DOCUMENTS, QUERIES, QRELS)
    system = tfidf_system("tfidf", beir)
    words = Words()
    documents, queries = words(list(DOCUMENTS.values())), words([QUERIES[query] for query in judged_queries(beir)])
    idf = {
        term: math.log((1 + len(documents)) / (1 + sum(term in row for row in documents))) + 1
        for row in documents
        for term in row
    }

    def vector(terms: list[str]) -> dict[str, float]:
        weights = {t: (1 + math.log(tf)) * idf[t] for t, tf in Counter(terms).items() if t in idf}
        norm = math.sqrt(sum(value**2 for value in weights.values()))
        return {t: value / norm for t, value in weights.items()}

    vectors = [vector(row) for row in documents]
    wanted = [[sum(v * row.get(t, 0) for t, v in vector(query).items()) for row in vectors] for query in queries]
    assert np.allclose(system.score(slice(0, len(queries))), wanted, atol=1e-6)
    assert np.max(wanted) > 0.3
    assert evaluate(beir, [system]).values["tfidf"]["nDCG@10"][0] > 0.8  # "red fox" finds the red fox


def test_tfidf_is_a_baseline_that_is_not_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_beir(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert run.main(["--beir", "tiny", "--baselines", "bm25", "tfidf", "--resamples", "100", "--output", "out"]) == 0
    systems = json.loads((tmp_path / "out" / "results.json").read_text())["datasets"]["tiny"]["systems"]
    assert list(systems) == ["bm25", "tfidf"]
    assert systems["tfidf"]["dimensions"] == systems["bm25"]["dimensions"]


def test_a_corpus_without_words_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_beir(tmp_path / "tiny", dict.fromkeys(DOCUMENTS, "the !"))
    monkeypatch.chdir(tmp_path)
    assert run.main(["--beir", "tiny", "--baselines", "tfidf", "--output", "out"]) == 2
    assert "no document holds a word" in capsys.readouterr().err

"""Mining's parts by hand and against naive loops: filters, running lists, exact search, fusion, BM25 in parts."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import scipy.sparse

from lens.search.bm25 import BM25, PartialBM25
from train.negatives import Rules, choose, draw
from train.passages import key_of
from train.ranking import Best, Faiss, fuse, search_dense, search_sparse


def pick(scores, positives=(0.8,), keys=None, banned=(), **rules):
    """Positions of the negatives among candidates 0, 1, ... with these scores, random ones not filled up."""
    keys = np.array(range(len(scores)) if keys is None else keys)
    counts = Counter()
    rules = Rules(**{"negatives": 99, "sample": "top", **rules})
    found = choose(rules, 0, np.arange(len(scores)), np.array(scores, float), np.array(positives, float), keys,
                   set(banned), counts)  # fmt: skip
    return [position for position, score in found if score is not None], counts


def test_margins_by_hand():
    scores = [0.95, 0.8, 0.79, 0.76, 0.75, 0.7, 0.5]
    assert pick(scores)[0] == [0, 1, 2, 3, 4, 5, 6]
    assert pick(scores, max_share=1.0)[0] == [2, 3, 4, 5, 6]  # below the positive's, not equal to it
    chosen, counts = pick(scores, max_share=0.95)  # below 0.76
    assert chosen == [4, 5, 6]
    assert counts["max_share"] == 4
    chosen, counts = pick([3.0, 2.5, 2.0, 1.0], positives=[3.0], margin=0.5)  # below 2.5
    assert chosen == [2, 3]
    assert counts["margin"] == 2
    assert pick([3.0, 2.5, 2.0, 1.0], positives=[3.0], margin=0.5, max_share=0.5)[0] == [3]
    assert pick([3.0, 2.5, 2.0, 1.0], positives=[1.5, 3.0], max_share=1.0)[0] == [1, 2, 3]
    assert pick([3.0, 2.5, 2.0, 1.0], positives=[1.5, 3.0], max_share=1.0, anchor="lowest")[0] == [3]
    # of a positive below 0, a share of 0.5 is half of its size further down: -2 -> -3
    assert pick([-1.0, -2.0, -2.5, -3.5], positives=[-2.0], max_share=0.5)[0] == [3]


def test_the_window_positives_and_copies_by_hand():
    keys = [7, 1, 2, 2, 3, 9, 1]
    chosen, counts = pick([7, 6, 5, 4, 3, 2, 1], keys=keys, banned=[7, 9], skip=2)
    assert chosen == [2, 4]  # 0 and 5 are banned, 1 skipped and 6 its copy, 3 a copy of 2
    assert counts == {"positive, query or blank": 2, "skip": 1, "duplicate": 2, "random": 0}


def test_refused_candidates_are_no_random_passages_either():
    counts = Counter()
    keys = np.array([0, 1, 2, 3, 4, 4, 5])
    rules = Rules(negatives=5, skip=1, max_share=0.5)
    found = choose(rules, 3, np.array([0, 1, 2]), np.array([9.0, 8.0, 1.0]), np.array([4.0]), keys, {3}, counts)
    assert found[0] == (2, 1.0)
    assert sorted(keys[position] for position, _ in found[1:]) == [4, 5]  # 0 skipped, 1 filtered, 3 a positive
    assert all(score is None for _, score in found[1:])


def test_random_share_and_draw():
    keys = np.arange(1000)
    rules = Rules(negatives=10, random_share=0.3, sample="top")
    found = choose(rules, 0, np.arange(20), np.arange(20, 0, -1.0), np.zeros(1), keys, set(), Counter())
    assert [position for position, score in found if score is not None] == list(range(7))
    assert len({position for position, _ in found}) == 10
    again = choose(rules, 0, np.arange(20), np.arange(20, 0, -1.0), np.zeros(1), keys, set(), Counter())
    other = choose(rules, 1, np.arange(20), np.arange(20, 0, -1.0), np.zeros(1), keys, set(), Counter())
    assert found == again != other
    keys = np.repeat([5, 6, 7], 400)  # nearly all of the corpus is refused
    assert [keys[position] for position in draw(random.Random(0), 4, keys, {5, 6})] == [7]
    assert draw(random.Random(0), 4, keys, {5, 6, 7}) == []
    counts = Counter(draw(random.Random(seed), 1, np.arange(4), {0})[0] for seed in range(3000))
    assert set(counts) == {1, 2, 3}
    assert all(abs(count - 1000) < 4 * math.sqrt(3000 * 2 / 9) for count in counts.values())


def test_sampling_draws_every_rank_alike():
    counts = Counter()
    for number in range(2000):
        rules = Rules(negatives=2, depth=6)
        found = choose(rules, number, np.arange(6), np.arange(6, 0, -1.0), np.zeros(1), np.arange(6), set(), Counter())
        assert [position for position, _ in found] == sorted(position for position, _ in found)
        counts.update(position for position, _ in found)
    assert all(abs(count - 2000 / 3) < 4 * math.sqrt(2000 * 2 / 9) for count in counts.values())


def test_keys_do_not_see_white_space():
    assert key_of(" a  b\n") == key_of("a b")
    assert key_of("a b") != key_of("A b")
    assert key_of(" \t") == key_of("")


def naive(scores, k, lexical=False):
    """Places and scores of the k best of one query, ties by place."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return [(place, scores[place]) for place in order if not lexical or scores[place] > 0][:k]


@pytest.mark.parametrize("shard", [1, 7, 50, 300])
@pytest.mark.parametrize("proposals", ["numpy", "faiss"])
def test_dense_search_is_exact_for_any_shard(shard, proposals):
    if proposals == "faiss":
        pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    passages = rng.normal(size=(300, 24)).astype(np.float32)
    passages[40:200:3] = passages[3]  # many ties
    passages[250] = passages[3] * np.float32(1 + 1e-7)
    queries = np.concatenate([rng.normal(size=(9, 24)).astype(np.float32), passages[3:4]])
    best = Best(len(queries), 20)
    for start in range(0, 300, shard):
        part = passages[start : start + shard]
        search_dense(queries, part, start, best, Faiss(part, False) if proposals == "faiss" else None)
    scores = np.einsum("qd,nd->qn", queries.astype(np.float64), passages.astype(np.float64)).astype(np.float32)
    for row in range(len(queries)):
        positions, values = best.of(row)
        assert list(zip(positions, values, strict=True)) == naive(scores[row], 20)


def test_faiss_hands_over_to_numpy_where_a_gpu_proposes_no_more():
    pytest.importorskip("faiss")
    passages = np.ones((100, 4), dtype=np.float32)
    proposals = Faiss(passages, False)
    proposals.limit = 16
    (places, _scores), *rest = proposals(np.ones((3, 4), dtype=np.float32), 5, np.full(3, 1e-5, dtype=np.float32))
    assert len(rest) == 2
    assert places.tolist() == list(range(100))


@pytest.mark.parametrize("shard", [1, 7, 200])
def test_sparse_search_is_exact_for_any_shard(shard):
    rng = np.random.default_rng(1)
    passages = (rng.integers(0, 4, (200, 30)) * (rng.random((200, 30)) < 0.1)).astype(np.float32)
    queries = (rng.integers(0, 4, (12, 30)) * (rng.random((12, 30)) < 0.1)).astype(np.float32)
    queries[5] = 0
    best = Best(len(queries), 15)
    rows = scipy.sparse.csr_matrix(queries)
    for start in range(0, 200, shard):
        search_sparse(rows, scipy.sparse.csr_matrix(passages[start : start + shard]), start, best)
    for row in range(len(queries)):
        positions, values = best.of(row)
        expected = naive([sum(a * b for a, b in zip(queries[row], p, strict=True)) for p in passages], 15, True)
        assert list(zip(positions, values, strict=True)) == expected


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        Best(1, 3).add(0, np.array([0]), np.array([np.nan], dtype=np.float32))


def lists(*rows, k=4, lexical=True):
    found = []
    for row in rows:
        best = Best(1, k)
        best.add(0, np.array([place for place, _ in row]), np.array([score for _, score in row], dtype=np.float32))
        best.lexical = lexical
        found.append(best)
    return found


def test_reciprocal_rank_fusion_by_hand():
    both = lists([(5, 9.0), (6, 4.0), (7, 2.0)], [(7, 0.9), (8, 0.5)])
    positions, scores, own = fuse(both, "rrf", [1.0, 2.0], 0, np.array([[4.0, 0.0], [0.7, 0.0]]))
    assert positions.tolist() == [7, 8, 5, 6]
    assert scores.tolist() == pytest.approx([1 / 63 + 2 / 61, 2 / 62, 1 / 61, 1 / 62])
    # a text with 4.0 and 0.7 has rank 2 in both; without a common word it is in neither list
    assert own.tolist() == pytest.approx([1 / 62 + 2 / 62, 0.0])


def test_fusion_of_normalised_scores_by_hand():
    both = lists([(1, 9.0), (2, 5.0), (3, 4.0), (4, 1.0)], [(4, 0.8), (9, 0.2)])
    positions, scores, own = fuse(both, "sum", [1.0, 2.0], 0, np.array([[7.0, 0.5], [0.4, 0.0]]))
    # the first list is full: 1 -> 0, 9 -> 1; the second is not: 0 -> 0, 0.8 -> 1
    assert positions.tolist() == [4, 1, 2, 9]  # 2 and 9 tie at 0.5
    assert scores.tolist() == pytest.approx([2.0, 1.0, 0.5, 0.5])
    assert own.tolist() == pytest.approx([0.75 + 2 * 0.5, 0.0])
    (equal,) = lists([(3, -2.0), (4, -2.0)], lexical=False)
    assert fuse([equal, equal], "sum", [1.0, 1.0], 0, np.array([[-2.0], [-3.0]]))[1].tolist() == [2.0, 2.0]


WORDS = ["river", "stones", "amber", "running", "runs", "harbour", "cedar", "the", "of", "marble", "falcon", "copper"]


@pytest.mark.parametrize("stemmer", ["english", "none"])
@pytest.mark.parametrize("shard", [1, 7, 90])
def test_bm25_in_parts_equals_bm25_over_all(shard, stemmer):
    rng = random.Random(4)
    documents = [" ".join(rng.choices(WORDS, k=rng.randrange(14))) for _ in range(90)] + ["", "  "]
    queries = [" ".join(rng.choices([*WORDS, "unknown"], k=rng.randrange(1, 6))) for _ in range(25)] + ["the of"]
    parts = [documents[start : start + shard] for start in range(0, len(documents), shard)]
    partial = PartialBM25(queries, stemmer=stemmer, k1=0.9, b=0.4)
    counts = [partial.count(part) for part in parts]
    for part in counts:
        partial.observe(part)
    weights = [partial.weigh(part) for part in counts]
    found = [np.concatenate([partial.score(query, w) for w in weights]) for query in range(len(queries))]
    expected = BM25(documents, stemmer=stemmer, k1=0.9, b=0.4).score(queries)
    np.testing.assert_array_equal(np.array(found), expected)
    assert expected.max() > 0


def test_bm25_in_parts_takes_a_corpus_without_words():
    partial = PartialBM25(["river"])
    counts = partial.count(["", "!"])
    partial.observe(counts)
    assert partial.score(0, partial.weigh(counts)).tolist() == [0, 0]

"""BM25 by bm25s: the lexical baseline, and, over a corpus that is read in parts, the miner of hard negatives.

Legend: Q queries, N documents, T distinct tokens of the queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from lens.search.words import Words


class BM25:
    """BM25 as Lucene scores it (`method="lucene"` of bm25s): the sum over the tokens t of a query, repetitions
    included, of idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|)), idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5)).

    Texts become words as lens/search/words.py says, with the names of its lists and stemmers. Raises ValueError for a
    name that it does not know.
    """

    def __init__(
        self,
        documents: Sequence[str],
        stopwords: str = "english",
        stemmer: str = "english",
        k1: float = 1.2,
        b: float = 0.75,
    ) -> None:
        self._words = Words(stopwords, stemmer)
        import bm25s

        tokens = bm25s.tokenize(list(documents), **self._words.options)
        self._vocabulary = set(tokens.vocab) - {""}  # bm25s gives a text without words the token ""
        self._index = bm25s.BM25(method="lucene", k1=k1, b=b)
        if self._vocabulary:
            self._index.index(tokens, show_progress=False)
        self._size = len(documents)
        self.dimensions = len(self._vocabulary)
        self.active_per_document = float(np.mean([len(set(ids)) for ids in tokens.ids]))
        numbers = [number for ids in tokens.ids for number in set(ids)]
        counts = np.bincount(numbers, minlength=len(tokens.vocab) + 1)
        self._documents_with = {token: int(counts[number]) for token, number in tokens.vocab.items()}

    def tokens(self, queries: Sequence[str]) -> list[list[str]]:
        """The tokens of each query that occur in some document, repetitions included."""
        return [[token for token in row if token in self._vocabulary] for row in self._words(queries)]

    @property
    def held(self) -> int:
        """Bytes of the postings: a float32 weight and a 32-bit document for each token of each document."""
        return 8 * sum(self._documents_with[token] for token in self._vocabulary)

    def flops(self, queries: Sequence[str]) -> float:
        """Postings that a query reads on average, for each document of the corpus."""
        read = [sum(self._documents_with[token] for token in set(row)) for row in self.tokens(queries)]
        return float(np.mean(read)) / max(self._size, 1)

    def score(self, queries: Sequence[str]) -> NDArray[np.float32]:
        """Scores of all documents, (n, N), in any range from 0 up; 0 = no common token."""
        scores = np.zeros((len(queries), self._size), dtype=np.float32)  # (n, N)
        for row, tokens in zip(scores, self.tokens(queries), strict=True):
            if tokens:
                row[:] = self._index.get_scores(tokens)
        return scores


@dataclass(frozen=True)
class Counts:
    """One part of a corpus as BM25 sees it: `tokens` (n, T) CSC, how often each token of the queries occurs in each
    document, and `lengths` (n,), all tokens of each document."""

    tokens: Any
    lengths: NDArray[np.int64]


class PartialBM25:
    """BM25 over a corpus of which one part is in memory at a time, with the scores of `BM25` over the whole of it.

    `observe` the counts of every part once: they give the corpus-wide document frequencies and mean length. Then
    `weigh` the counts of a part, and `score` queries against them. Only tokens that occur in some query are counted.
    """

    def __init__(
        self,
        queries: Sequence[str],
        stopwords: str = "english",
        stemmer: str = "english",
        k1: float = 1.2,
        b: float = 0.75,
    ) -> None:
        self._words = Words(stopwords, stemmer)
        rows = self._words(queries)
        # Sorted, because bm25s numbers stems in another order in every process and counts are kept in files.
        columns = {token: i for i, token in enumerate(sorted(set(chain.from_iterable(rows))))}
        self._columns: dict[str, int] = columns
        self._queries = [[columns[token] for token in row if token in columns] for row in rows]
        self._k1, self._b = k1, b
        self._documents = self._length = 0
        self._frequencies = np.zeros(len(columns), dtype=np.int64)  # (T,)

    def count(self, documents: Sequence[str]) -> Counts:
        """The counts of n documents."""
        import bm25s

        tokens = bm25s.tokenize(list(documents), **self._words.options)
        lengths = np.array([len(ids) for ids in tokens.ids], dtype=np.int64)
        columns = np.full(len(tokens.vocab) + 1, -1, dtype=np.int64)  # the part's number of a token -> its column
        for token, number in tokens.vocab.items():
            columns[number] = self._columns.get(token, -1)
        found = columns[np.fromiter(chain.from_iterable(tokens.ids), dtype=np.int64, count=int(lengths.sum()))]
        rows = np.repeat(np.arange(len(lengths)), lengths)
        known = found >= 0
        ones = np.ones(int(known.sum()), dtype=np.float32)
        shape = (len(lengths), len(self._columns))
        return Counts(scipy.sparse.csc_matrix((ones, (rows[known], found[known])), shape=shape), lengths)

    def observe(self, counts: Counts) -> None:
        """Adds a part to the corpus-wide statistics."""
        self._documents += len(counts.lengths)
        self._length += int(counts.lengths.sum())
        self._frequencies += np.diff(counts.tokens.indptr)

    def weigh(self, counts: Counts) -> Any:
        """What each token adds to a document's score, (n, T) CSC float32."""
        tokens, size = counts.tokens, self._documents
        idf = [math.log(1 + (size - df + 0.5) / (df + 0.5)) for df in self._frequencies.tolist()]  # (T,)
        mean = self._length / max(size, 1) or 1.0  # 0 only where no document has a token
        norm = self._k1 * ((1 - self._b) + self._b * counts.lengths[tokens.indices] / mean)
        each = np.repeat(np.array(idf, dtype=np.float32), np.diff(tokens.indptr))
        weights = (each * (tokens.data / (norm + tokens.data))).astype(np.float32)
        return scipy.sparse.csc_matrix((weights, tokens.indices, tokens.indptr), shape=tokens.shape)

    def score(self, query: int, weights: Any) -> NDArray[np.float32]:
        """Scores (n,) of the query of that number for the documents of `weights`; 0 = no common token."""
        scores = np.zeros(weights.shape[0], dtype=np.float32)
        for column in self._queries[query]:
            part = slice(weights.indptr[column], weights.indptr[column + 1])
            scores[weights.indices[part]] += weights.data[part]  # a document stands once in a column
        return scores

"""BM25 by bm25s: the lexical baseline, and the miner of hard negatives.

Legend: Q queries, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lens.files import require

TOKEN_PATTERN = r"(?u)[^\W_]+"
"""Runs of letters and digits; an underscore separates, so that `read_csv` is two words."""


class BM25:
    """BM25 as Lucene scores it (`method="lucene"` of bm25s): the sum over the tokens t of a query, repetitions
    included, of idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|)), idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5)).

    Texts are lower-cased and split by TOKEN_PATTERN. `stopwords` names a list of bm25s, `stemmer` a Snowball stemmer
    of PyStemmer; "none" leaves the step out. Raises ValueError for a name they do not know.
    """

    def __init__(
        self,
        documents: Sequence[str],
        stopwords: str = "english",
        stemmer: str = "english",
        k1: float = 1.2,
        b: float = 0.75,
    ) -> None:
        require("bm25", "bm25s", "Stemmer")
        import bm25s
        import Stemmer

        if stemmer not in ("none", *Stemmer.algorithms()):
            raise ValueError(f"unknown stemmer {stemmer!r}: use none or one of {', '.join(Stemmer.algorithms())}")
        self._options: dict[str, Any] = {
            "token_pattern": TOKEN_PATTERN,
            "stopwords": [] if stopwords == "none" else stopwords,
            "stemmer": None if stemmer == "none" else Stemmer.Stemmer(stemmer),
            "show_progress": False,
        }
        tokens = bm25s.tokenize(list(documents), **self._options)
        self._vocabulary = set(tokens.vocab) - {""}  # bm25s gives a text without words the token ""
        self._index = bm25s.BM25(method="lucene", k1=k1, b=b)
        if self._vocabulary:
            self._index.index(tokens, show_progress=False)
        self._size = len(documents)
        self.dimensions = len(self._vocabulary)
        self.active_per_document = float(np.mean([len(set(ids)) for ids in tokens.ids]))

    def tokens(self, queries: Sequence[str]) -> list[list[str]]:
        """The tokens of each query that occur in some document, repetitions included."""
        import bm25s

        rows = bm25s.tokenize(list(queries), **self._options, return_ids=False)
        return [[token for token in row if token in self._vocabulary] for row in rows]

    def score(self, queries: Sequence[str]) -> NDArray[np.float32]:
        """Scores of all documents, (n, N), in any range from 0 up; 0 = no common token."""
        scores = np.zeros((len(queries), self._size), dtype=np.float32)  # (n, N)
        for row, tokens in zip(scores, self.tokens(queries), strict=True):
            if tokens:
                row[:] = self._index.get_scores(tokens)
        return scores

"""BM25 over term frequencies that a model gives: documents and queries as sparse vectors whose inner product it is.

Legend: N documents, Q queries, V terms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse
from numpy.typing import NDArray


class WeightedBM25:
    """An index of documents given as term -> frequency, whole numbers or not; 0 or less counts as absent.

    The score is that of lens.search.bm25.BM25 on texts which repeat each term as often as its frequency says: a
    document's length is the sum of its frequencies, and df counts the documents in which a term is left. `documents`
    (N, V) holds idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean |d|)), `queries` (Q, V) how often a term is asked for.
    """

    def __init__(self, frequencies: Sequence[Mapping[str, float]], k1: float = 1.2, b: float = 0.75) -> None:
        """Raises ValueError for a frequency that is not finite, k1 below 0 and b outside 0 to 1."""
        if not k1 >= 0 or not 0 <= b <= 1:
            raise ValueError(f"k1 must be at least 0 and b from 0 to 1, found {k1} and {b}")
        kept = [{term: value for term, value in row.items() if not value <= 0} for row in frequencies]
        self.vocabulary = {term: i for i, term in enumerate(sorted({term for row in kept for term in row}))}
        tf = _matrix(kept, self.vocabulary).astype(np.float64)  # (N, V)
        if not np.isfinite(tf.data).all():
            raise ValueError("a term's frequency is NaN or infinite")
        count = tf.shape[0]
        lengths = np.asarray(tf.sum(axis=1)).ravel()  # (N,)
        mean = lengths.mean() if count and lengths.any() else 1.0
        df = np.bincount(tf.indices, minlength=tf.shape[1])  # (V,)
        idf = np.log1p((count - df + 0.5) / (df + 0.5))
        owner = np.repeat(np.arange(count), np.diff(tf.indptr))
        saturated = tf.data / (tf.data + k1 * (1 - b + b * lengths[owner] / mean))
        data = (idf[tf.indices] * saturated).astype(np.float32)
        self.documents = scipy.sparse.csr_array((data, tf.indices, tf.indptr), shape=tf.shape)

    def queries(self, terms: Sequence[Sequence[str]]) -> scipy.sparse.csr_array:
        """Queries given as terms, repetitions included, as vectors (Q, V); terms that no document holds drop out."""
        rows = [Counter(term for term in row if term in self.vocabulary) for row in terms]
        return _matrix(rows, self.vocabulary)

    def score(self, terms: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """Scores (Q, N) of all documents."""
        return np.asarray((self.queries(terms) @ self.documents.T).toarray(), dtype=np.float32)


def _matrix(rows: Sequence[Mapping[str, float]], vocabulary: Mapping[str, int]) -> scipy.sparse.csr_array:
    """Term -> value of each row as a float32 matrix (rows, V)."""
    indices = [vocabulary[term] for row in rows for term in row]
    data = np.array([value for row in rows for value in row.values()], dtype=np.float32)
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    matrix = scipy.sparse.csr_array(
        (data, np.array(indices, dtype=np.int64), indptr), shape=(len(rows), len(vocabulary))
    )
    matrix.sort_indices()
    return matrix

"""Exact search: every query against every document, in blocks, ties broken by the lower document index."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from lens.vectors import to_csr, to_dense

# Legend: Q queries, N documents, K clusters.

_BLOCK_SCORES = 1 << 25  # scores held at a time: 128 MB


def search(queries: Any, documents: Any, k: int = 10) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k documents of highest inner product for every query.

    Shapes: queries (Q, K) and documents (N, K), each numpy, torch or scipy sparse -> indices (Q, min(k, N)) and
    scores of the same shape, best first. Raises ValueError for k below 1 and for unequal K.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions, documents {documents.shape[1]}")
    sparse: bool = scipy.sparse.issparse(documents)
    columns: Any = to_csr(documents).T.tocsr() if sparse else to_dense(documents).T  # (K, N)
    rows: Any = to_csr(queries) if sparse else to_dense(queries)  # (Q, K)
    k = min(k, documents.shape[0])
    indices = np.zeros((queries.shape[0], k), dtype=np.int64)
    scores = np.zeros((queries.shape[0], k), dtype=np.float32)
    step = max(1, _BLOCK_SCORES // max(1, documents.shape[0]))
    for start in range(0, queries.shape[0], step):
        block = rows[start : start + step] @ columns
        best, values = top(block.toarray() if sparse else block, k)
        indices[start : start + step], scores[start : start + step] = best, values
    return indices, scores


def top(scores: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Columns and values of the k greatest scores of each row (Q, N) -> (Q, k), ties by the lower column."""
    if k == 0:
        return np.zeros((len(scores), 0), np.int64), np.zeros((len(scores), 0), np.float32)
    if k < scores.shape[1]:
        threshold = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
        order = np.empty((len(scores), k), np.int64)
        for row, (values, limit) in enumerate(zip(scores, threshold[:, 0], strict=True)):
            candidates = np.flatnonzero(values >= limit)
            order[row] = candidates[np.argsort(-values[candidates], kind="stable")][:k]
    else:
        order = np.argsort(-scores, axis=1, kind="stable").astype(np.int64)
    return order, np.take_along_axis(scores, order, axis=1)

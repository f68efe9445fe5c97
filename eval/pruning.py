"""What sparse embeddings cost, and smaller ones made of them: FLOPS, active dimensions, bytes, static pruning, latency.

Embeddings are CSR matrices (N, K) in which a dimension is active where its value is not zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lens.search.exact import top

# Legend: n queries, N documents, K dimensions.

Csr = Any
"""A scipy CSR matrix or array."""
PERCENTILES = (5, 50, 95, 100)
WARM_UP = 5
"""Queries searched before any is timed."""
UNIT = 1e-3
"""How far from 1 the length of a row may be that counts as one."""


def cleaned(embeddings: Any) -> Csr:
    """Embeddings as float32 CSR without stored zeros, columns of a row in order."""
    matrix = sparse.csr_matrix(embeddings, dtype=np.float32, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def activity(embeddings: Csr) -> NDArray[np.float64]:
    """Share of the rows in which each dimension is active (K,)."""
    return np.bincount(embeddings.indices, minlength=embeddings.shape[1]) / max(1, embeddings.shape[0])


def flops(queries: Csr, documents: Csr) -> float:
    """Expected multiplications per query-document pair: the sum over dimensions of the share of queries times the
    share of documents in which it is active. Source: Paria et al., "Minimizing FLOPs to Learn Efficient Sparse
    Representations", ICLR 2020, as SPLADE's papers report it."""
    return float(activity(queries) @ activity(documents))


def active_dimensions(embeddings: Csr) -> dict[str, float]:
    """Active dimensions per row, their mean and percentiles, and the share of dimensions active in no row (`dead`)."""
    counts = np.diff(embeddings.indptr)
    facts = {"mean": float(counts.mean())}
    facts |= {f"p{share}": float(np.percentile(counts, share)) for share in PERCENTILES}
    facts["dead"] = float((activity(embeddings) == 0).mean())
    return facts


def csr_bytes(documents: Csr) -> int:
    """Bytes of the CSR index: a value of 4 bytes and a column of 4 for each non-zero, and an offset of 8 a row."""
    return int(documents.nnz * 8 + (documents.shape[0] + 1) * 8)


def inverted_bytes(documents: Csr) -> int:
    """Bytes of an inverted file: for each non-zero a value of 4 bytes and the gap to the document before it in the
    dimension's list, in 7 bits a byte; for each dimension an offset of 8."""
    columns = documents.tocsc()
    columns.sort_indices()
    gaps = np.diff(columns.indices.astype(np.int64), prepend=-1)
    firsts = columns.indptr[:-1][np.diff(columns.indptr) > 0]
    gaps[firsts] = columns.indices[firsts] + 1
    widths = np.ones(len(gaps), dtype=np.int64)
    for bits in (7, 14, 21, 28):
        widths += gaps >= 1 << bits
    return int(widths.sum() + documents.nnz * 4 + (documents.shape[1] + 1) * 8)


def is_unit(embeddings: Csr) -> bool:
    """Whether every row that is not zero has length one."""
    lengths = _lengths(embeddings)
    return bool((np.abs(lengths[lengths > 0] - 1) < UNIT).all())


def _lengths(embeddings: Csr) -> NDArray[np.float64]:
    return np.sqrt(np.asarray(embeddings.multiply(embeddings).sum(axis=1), dtype=np.float64).ravel())


def with_unit_rows(embeddings: Csr) -> Csr:
    """Every row that is not zero, at length one."""
    lengths = _lengths(embeddings)
    scaled = embeddings.copy()
    scaled.data /= np.repeat(np.where(lengths > 0, lengths, 1), np.diff(embeddings.indptr)).astype(np.float32)
    return scaled


def keep_top(documents: Csr, budget: int) -> Csr:
    """The `budget` values of greatest size of each document, ties by the lower dimension."""
    rows = np.repeat(np.arange(documents.shape[0]), np.diff(documents.indptr))
    order = np.lexsort((documents.indices, -np.abs(documents.data), rows))
    kept = np.zeros(documents.nnz, dtype=bool)
    kept[order[np.arange(documents.nnz) - documents.indptr[rows] < budget]] = True
    return _only(documents, kept)


def keep_above(documents: Csr, budget: int) -> Csr:
    """Values above one threshold for the whole corpus, the least that leaves no more than `budget` of them a document
    on average."""
    total = budget * documents.shape[0]
    if documents.nnz <= total:
        return documents
    sizes = np.abs(documents.data)
    threshold = -np.partition(-sizes, total)[total]  # the greatest value that goes; its equals go with it
    return _only(documents, sizes > threshold)


def keep_dimensions(documents: Csr, budget: int) -> Csr:
    """The dimensions that tell documents apart most, as many as leave no more than `budget` values a document on
    average: by falling variance over the documents, each taken where it fits into what is left."""
    columns = np.bincount(documents.indices, minlength=documents.shape[1])  # non-zeros of each dimension
    left = budget * documents.shape[0]
    if documents.nnz <= left:
        return documents
    chosen = np.zeros(documents.shape[1], dtype=bool)
    for dimension in np.argsort(-variances(documents), kind="stable"):
        if columns[dimension] <= left:
            chosen[dimension] = True
            left -= columns[dimension]
    return _only(documents, chosen[documents.indices])


def variances(documents: Csr) -> NDArray[np.float64]:
    """Variance of each dimension over the documents (K,). What is the same in all documents orders none of them."""
    values = documents.data.astype(np.float64)
    mean, square = (
        np.bincount(documents.indices, weights=values**power, minlength=documents.shape[1]) / documents.shape[0]
        for power in (1, 2)
    )
    return np.maximum(square - mean**2, 0)


METHODS: dict[str, Callable[[Csr, int], Csr]] = {
    "top": keep_top,
    "threshold": keep_above,
    "dimensions": keep_dimensions,
}
"""Ways of pruning (N, K) documents to a mean number of values a document."""


def _only(documents: Csr, kept: NDArray[np.bool_]) -> Csr:
    matrix = documents.copy()
    matrix.data = np.where(kept, matrix.data, 0)
    matrix.eliminate_zeros()
    return matrix


def latency(queries: Csr, documents: Csr, k: int = 10, repeats: int = 3) -> dict[str, float]:
    """Milliseconds from a query's embedding to its k best documents by exact search, one query at a time on one core:
    the lists of its active dimensions are added up. Median and 95th percentile over queries, each the median of
    `repeats` searches. Encoding the query is not included."""
    lists = documents.T.tocsr()  # (K, N)
    rows = [queries[row] for row in range(queries.shape[0])]
    k = min(k, documents.shape[0])
    for row in rows[:WARM_UP]:
        _search(row, lists, k)
    taken = np.empty((repeats, len(rows)))
    for repeat in range(repeats):
        for place, row in enumerate(rows):
            start = time.perf_counter()
            _search(row, lists, k)
            taken[repeat, place] = 1000 * (time.perf_counter() - start)
    each = np.median(taken, axis=0)
    return {"median": float(np.median(each)), "p95": float(np.percentile(each, 95))}


def _search(query: Csr, lists: Csr, k: int) -> tuple[Sequence[int], Sequence[float]]:
    found, scores = top((query @ lists).toarray(), k)
    return found[0], scores[0]

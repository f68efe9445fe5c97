"""Exact search over a corpus that comes in chunks: the best documents so far, and a file from which to go on.

Legend: Q queries, n documents of a chunk, K dimensions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy import sparse

from lens.files import atomic_file, read_tensors
from lens.search.exact import top

Embeddings = NDArray[np.float32] | sparse.csr_matrix
BLOCK_SCORES = 1 << 25
"""Scores that are held at a time (128 MB)."""


class RunningTop:
    """The k best documents of every query over the chunks seen so far, ties by the lower position in the corpus.

    `positions` (Q, k) int64, -1 where there are fewer documents, and `scores` (Q, k) float32, best first; `seen` is the
    number of documents. After all chunks they are what one search of the whole corpus gives, whatever the chunks were.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.positions = np.full((queries, k), -1, dtype=np.int64)
        self.scores = np.full((queries, k), -np.inf, dtype=np.float32)
        self.seen = 0

    def add(self, score: Callable[[slice], NDArray[np.float32]], size: int) -> None:
        """Takes in the next `size` documents; `score(rows)` gives the scores (n, size) of some of the queries.

        Raises ValueError when a score is not a number.
        """
        step = max(1, BLOCK_SCORES // max(1, size))
        for start in range(0, len(self.scores), step):
            rows = slice(start, min(start + step, len(self.scores)))
            scores = score(rows)
            if np.isnan(scores).any():
                raise ValueError(f"scores of the documents from {self.seen} on are not numbers")
            # documents come in order, so one that only equals the last of the best stands behind it
            better = scores > self.scores[rows, -1:]
            for row in np.flatnonzero(better.any(1)):
                self._merge(start + row, np.flatnonzero(better[row]), scores[row])
        self.seen += size

    def _merge(self, query: int, found: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        k = self.scores.shape[1]
        best, values = top(scores[None, found], min(k, len(found)))
        merged = np.concatenate([self.scores[query], values[0]])
        places = np.concatenate([self.positions[query], found[best[0]] + self.seen])
        order = np.argsort(-merged, kind="stable")[:k]  # those from before come first among equals
        self.scores[query], self.positions[query] = merged[order], places[order]

    def save(self, path: str | os.PathLike[str], identity: str) -> None:
        """Writes the state, atomically; `identity` says of what search it is."""
        tensors = {"positions": torch.from_numpy(self.positions), "scores": torch.from_numpy(self.scores)}
        with atomic_file(path, overwrite=True) as file:
            save_file({**tensors, "seen": torch.tensor([self.seen])}, file, {"identity": identity})

    @classmethod
    def resume(cls, path: str | os.PathLike[str], identity: str, queries: int, k: int) -> RunningTop:
        """The state that `save` wrote of the same search, else an empty one."""
        found = cls(queries, k)
        if Path(path).is_file() and _identity(path) == identity:
            tensors = read_tensors(path, {"positions": (queries, k), "scores": (queries, k), "seen": (1,)})
            found.positions, found.scores = tensors["positions"].numpy(), tensors["scores"].numpy()
            found.seen = int(tensors["seen"])
        return found


def _identity(path: str | os.PathLike[str]) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("identity")
    except (SafetensorError, OSError):
        return None


def inner_products(
    queries: Embeddings, documents: Embeddings, device: torch.device | None = None
) -> Callable[[slice], NDArray[np.float32]]:
    """A function from a slice of the queries (Q, K) to their inner products (n, N) with the documents (N, K): sparse
    where both are, else dense, in float32 and on `device` where one is given."""
    if sparse.issparse(queries) and sparse.issparse(documents):
        lists = documents.T.tocsr()  # (K, N)
        return lambda rows: (queries[rows] @ lists).toarray()
    dense: Any = documents.toarray() if sparse.issparse(documents) else documents
    if device is not None and device.type != "cpu":
        return _on_device(queries, dense, device)
    return lambda rows: _dense(queries[rows]) @ dense.T


def _on_device(
    queries: Embeddings, documents: NDArray[np.float32], device: torch.device
) -> Callable[[slice], NDArray[np.float32]]:
    held = torch.from_numpy(documents).to(device)
    return lambda rows: (torch.from_numpy(_dense(queries[rows])).to(device) @ held.T).cpu().numpy()


def _dense(embeddings: Embeddings) -> NDArray[np.float32]:
    return embeddings.toarray() if sparse.issparse(embeddings) else embeddings

"""Embeddings of a task's texts, computed once, and what is made of them: pruned, or joined with another model's.

Legend: N texts, K dimensions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType
from numpy.typing import NDArray
from scipy import sparse

from eval.encoder import PROBE, SPARSE_BELOW, ChunkedEncoder
from eval.instructions import ASYMMETRIC
from lens.vectors import prune, to_csr, to_dense

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

Matrix = Any
"""Embeddings (N, K): a scipy CSR matrix or a numpy array."""
BLOCK = 4096
"""Rows that are pruned at a time, because that takes them dense."""


class Store:
    """The embeddings of one task's texts by a model, each text embedded once for each side that it stands on.

    `output` is "csr" or "numpy", as they are kept. No more than `limit` bytes are: a call's texts that would pass it
    are embedded again whenever they are asked for, of which standard error and `notes` get a line for each task.
    """

    def __init__(self, source: ChunkedEncoder, output: str, limit: int) -> None:
        self.source = source
        self.output = output
        self.limit = limit
        self.notes: list[str] = []
        self.forget()

    def forget(self) -> None:
        """Lets go of all embeddings."""
        self.task: str | None = None
        self.rows: dict[Any, dict[str, int]] = {}
        self.held: dict[Any, Matrix] = {}
        self.told = False

    def vectors(self, texts: Sequence[str], task: TaskMetadata, side: PromptType | None) -> Matrix:
        """The embeddings (N, K) of distinct texts; those of another task than in the last call are let go of."""
        if task.name != self.task:
            self.forget()
            self.task = task.name
        # symmetric tasks embed all their texts alike, whatever mteb calls the side
        key = side == PromptType.document if task.type in ASYMMETRIC else None
        rows = self.rows.setdefault(key, {})
        new = [text for text in texts if text not in rows]
        if new:
            fresh, _ = self.source.known(new, task, side, self.output)
            if sum(map(size_of, self.held.values())) + size_of(fresh) > self.limit:
                self._tell(task.name)
                number = {text: row for row, text in enumerate(new)}
                known = [rows[text] for text in texts if text in rows]
                if not known:
                    return fresh
                order = iter(range(len(known)))
                places = [len(known) + number[text] if text in number else next(order) for text in texts]
                return _stacked([self.held[key][known], fresh])[places]
            for text in new:
                rows[text] = len(rows)
            self.held[key] = _stacked([self.held[key], fresh]) if key in self.held else fresh
        if not texts:
            return self.source.vectors(texts, task, side, self.output)
        return self.held[key][[rows[text] for text in texts]]

    def _tell(self, task: str) -> None:
        if not self.told:
            self.told = True
            self.notes.append(f"{task}: embeddings beyond {self.limit / 1e6:,.0f} MB were computed again")
            print(
                f"{task}: its embeddings take more than --memory-mb {self.limit / 1e6:,.0f}: those beyond are computed "
                "again for every point",
                file=sys.stderr,
                flush=True,
            )


def size_of(vectors: Matrix) -> int:
    """Bytes of embeddings."""
    if sparse.issparse(vectors):
        return int(vectors.data.nbytes + vectors.indices.nbytes + vectors.indptr.nbytes)
    return int(vectors.nbytes)


def _stacked(parts: Sequence[Matrix]) -> Matrix:
    return sparse.vstack(parts, format="csr") if sparse.issparse(parts[0]) else np.concatenate(parts)


class Variant(ChunkedEncoder):
    """What `change` makes of the stores' embeddings, for `mteb.evaluate`: (N, K) of each -> (N, any width)."""

    def __init__(self, meta: ModelMeta, stores: Sequence[Store], change: Callable[..., Matrix]) -> None:
        first = stores[0].source
        # chunks of the model's own size, so that the texts of one are embedded together as they are without a store
        super().__init__(meta, meta.embed_dim or 1, first.device, chunk=min(store.source.chunk for store in stores))
        self.stores = stores
        self.change = change

    def vectors(self, texts: Sequence[str], task: TaskMetadata, side: PromptType | None, output: str) -> Matrix:
        found = self.change(*(store.vectors(texts, task, side) for store in self.stores))
        if output == "numpy":
            return to_dense(found)
        return to_csr(found) if output == "csr" else found

    def _either(self, texts: list[str], task: TaskMetadata, side: PromptType) -> Matrix:
        found = self._embed(texts, task, side, "either")
        if not sparse.issparse(found):
            return found
        probe = found[:PROBE]
        return found if probe.nnz < SPARSE_BELOW * probe.shape[0] * probe.shape[1] else found.toarray()


def named(meta: ModelMeta, width: int, **facts: str | float) -> ModelMeta:
    """The metadata of a model's variant of `width` dimensions, whose results mteb keeps by these facts."""
    kept = {**(meta.experiment_kwargs or {}), **facts}
    return meta.model_copy(update={"experiment_kwargs": kept, "loader": None, "embed_dim": width})


def unchanged(vectors: Matrix) -> Matrix:
    """The embeddings as they are."""
    return vectors


def pruning(
    dims: NDArray[np.int64] | None = None, top_k: int | None = None, normalize: bool = False
) -> Callable[[Matrix], Matrix]:
    """A function that prunes embeddings (N, K) as `lens.vectors.prune` does -> CSR (N, len(dims) or K)."""
    columns = None if dims is None else torch.from_numpy(np.sort(dims))

    def change(vectors: Matrix) -> Matrix:
        blocks = [
            to_csr(prune(torch.from_numpy(to_dense(vectors[start : start + BLOCK])), columns, top_k, normalize))
            for start in range(0, max(1, vectors.shape[0]), BLOCK)
        ]
        return sparse.vstack(blocks, format="csr")

    return change


def weighted(weight: float) -> Callable[[Matrix, Matrix], Matrix]:
    """A function that joins embeddings (N, K) and (N, D) of unit length -> array (N, K + D) whose inner products are
    `weight` times those of the first and 1 - `weight` times those of the second.

    A row that is zero in one of the two is shorter than one, so tasks that take cosines give the other more weight.
    """

    def change(first: Matrix, second: Matrix) -> Matrix:
        parts = [np.float32(weight**0.5) * to_dense(first), np.float32((1 - weight) ** 0.5) * to_dense(second)]
        return np.concatenate(parts, axis=1)

    return change

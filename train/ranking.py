"""The best passages of every query over a corpus that comes in shards: exact, ties by the order of the corpus.

A running list of the k best per query takes in one shard after another, so that the result does not depend on where
the corpus is cut. Inner products of dense vectors are first computed in float32, block by block, by numpy or faiss; all
passages that rounding could have kept out of the list are then computed again in float64, each by itself, so that they
do not depend on the shape of a block either. Several lists of one query are fused at the end.

Legend: Q queries, n passages of a shard, D dimensions, k passages kept, R retrievers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lens.files import atomic_file

BLOCK_SCORES = 1 << 24  # scores held at a time: 64 MB
BLOCK_ROWS = 1 << 12  # vectors computed again at a time
FAISS_GPU_LIMIT = 2048  # passages a query, of faiss on GPUs
RRF_CONSTANT = 60

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Best:
    """The k best passages of each of Q queries so far: `positions` (Q, k), -1 where there are fewer, and `scores`
    (Q, k), -inf there; best first."""

    def __init__(self, queries: int, k: int) -> None:
        self.positions = np.full((queries, k), -1, dtype=np.int64)
        self.scores = np.full((queries, k), -np.inf, dtype=np.float32)
        self.lexical = False
        """Whether the scores are those of a lexical retriever: above 0, or there is nothing in common."""

    def worst(self, query: int) -> float:
        """What a later passage must score above to be taken in; -inf while there is room."""
        return float(self.scores[query, -1])

    def add(self, query: int, positions: Ints, scores: Floats) -> None:
        """Takes in passages that stand behind all earlier ones in the corpus, in any order.

        Raises ValueError for scores that are not finite.
        """
        if not np.isfinite(scores).all():
            raise ValueError("scores are not finite numbers")
        k = self.scores.shape[1]
        order = np.lexsort((positions, -scores))[:k]
        values = np.concatenate([self.scores[query], scores[order]])
        best = np.argsort(-values, kind="stable")[:k]  # equal scores stay as they are: earlier passages first
        self.positions[query] = np.concatenate([self.positions[query], positions[order]])[best]
        self.scores[query] = values[best]

    def of(self, query: int) -> tuple[Ints, NDArray[np.float64]]:
        """The positions and scores of one query, as many as there are."""
        size = int((self.positions[query] >= 0).sum())
        return self.positions[query, :size], self.scores[query, :size].astype(np.float64)

    def save(self, path: Path, shards: int) -> None:
        """Writes the lists, and how many shards they hold, atomically (.npz)."""
        with atomic_file(path, overwrite=True) as temporary:
            facts = {"shards": shards, "lexical": self.lexical}
            np.savez(temporary, positions=self.positions, scores=self.scores, **facts)

    def load(self, path: Path) -> int:
        """Reads what `save` wrote and returns how many shards it holds."""
        with np.load(path, allow_pickle=False) as file:
            self.positions, self.scores, self.lexical = file["positions"], file["scores"], bool(file["lexical"])
            return int(file["shards"])


def search_sparse(queries: Any, passages: Any, start: int, best: Best) -> None:
    """Takes a shard of CSR rows (n, D), the first at position `start`, in; only scores above 0 count, since others
    have nothing in common with the query (Q, D). Every product is summed in the order of the query's dimensions."""
    columns = passages.T.tocsr()
    step = max(1, BLOCK_SCORES // max(1, passages.shape[0]))
    for first in range(0, queries.shape[0], step):
        block = queries[first : first + step] @ columns
        for row in range(block.shape[0]):
            part = slice(block.indptr[row], block.indptr[row + 1])
            scores = block.data[part]
            chosen = ~(scores <= max(best.worst(first + row), 0.0))  # NaN goes on to where it is refused
            if chosen.any():
                best.add(first + row, block.indices[part][chosen].astype(np.int64) + start, scores[chosen])


def search_dense(queries: Floats, passages: Floats, start: int, best: Best, faiss: Faiss | None = None) -> None:
    """Takes a shard of vectors (n, D), the first at position `start`, in, for queries (Q, D); `faiss`, or else numpy,
    proposes passages."""
    k = min(best.scores.shape[1], len(passages))
    lengths = np.linalg.norm(queries, axis=1)
    longest = float(np.linalg.norm(passages, axis=1).max())
    # An inner product of D float32 terms is off by less than D * eps / 2 times the lengths (Higham 2002, section 3.1).
    slack = passages.shape[1] * np.finfo(np.float32).eps * lengths * longest  # (Q,)
    step = max(1, BLOCK_SCORES // len(passages))
    for first in range(0, len(queries), step):
        block, margin = queries[first : first + step], slack[first : first + step]
        proposals = by_numpy(block, passages, k, margin) if faiss is None else faiss(block, k, margin)
        for row, (places, rough) in enumerate(proposals, first):
            places = places[rough >= best.worst(row) - slack[row]]
            if len(places):
                best.add(row, places + start, exact(queries[row], passages, places))


def exact(query: Floats, passages: Floats, places: Ints) -> Floats:
    """Inner products (m,) of one query (D,) with the m passages at these places, each rounded once, to float32."""
    found = np.empty(len(places), dtype=np.float32)
    for first in range(0, len(places), BLOCK_ROWS):
        part = places[first : first + BLOCK_ROWS]
        found[first : first + BLOCK_ROWS] = (passages[part].astype(np.float64) * query).sum(1)
    return found


def by_numpy(queries: Floats, passages: Floats, k: int, slack: Floats) -> Iterator[tuple[Ints, Floats]]:
    """For each query the places, and rough scores, of all passages that may be among its k best."""
    scores = queries @ passages.T
    worst = np.partition(scores, len(passages) - k, axis=1)[:, len(passages) - k]
    for row, least in zip(scores, worst - 2 * slack, strict=True):
        places = np.flatnonzero(~(row < least))
        yield places, row[places]


@functools.cache
def _gpu_memory() -> Any:
    """What faiss keeps on the GPU between shards."""
    import faiss

    return faiss.StandardGpuResources()


class Faiss:
    """Proposals by a flat index of faiss over the vectors (n, D) of one shard, on the GPU where `gpu` says so."""

    def __init__(self, passages: Floats, gpu: bool) -> None:
        import faiss

        self.passages = passages
        self.index = faiss.IndexFlatIP(passages.shape[1])
        self.limit = len(passages)
        if gpu:
            self.index = faiss.index_cpu_to_gpu(_gpu_memory(), 0, self.index)
            self.limit = min(self.limit, FAISS_GPU_LIMIT)
        self.index.add(np.ascontiguousarray(passages))

    def __call__(self, queries: Floats, k: int, slack: Floats) -> Iterator[tuple[Ints, Floats]]:
        """As `by_numpy`, by asking for more passages until those that are left lie too low."""
        wanted, todo = k, np.arange(len(queries))
        found: dict[int, tuple[Ints, Floats]] = {}
        while len(todo) and wanted < self.limit:
            wanted = min(2 * wanted, self.limit)
            scores, places = self.index.search(queries[todo], wanted)
            least = scores[:, k - 1] - 2 * slack[todo]
            done = (scores[:, -1] < least) | (wanted == len(self.passages))
            for row in np.flatnonzero(done):
                near = scores[row] >= least[row]
                found[int(todo[row])] = places[row][near], scores[row][near]
            todo = todo[~done]
        rest = by_numpy(queries[todo], self.passages, k, slack[todo])
        found |= dict(zip(todo.tolist(), rest, strict=True))
        for row in range(len(queries)):
            yield found[row]


def fuse(
    lists: Sequence[Best], how: str, weights: Sequence[float], query: int, own: NDArray[np.float64]
) -> tuple[Ints, NDArray[np.float64], NDArray[np.float64]]:
    """One list of at most k from the lists of R retrievers for a query: positions, fused scores, and the fused scores
    (m,) of m further texts whose scores by each retriever are `own` (R, m).

    "rrf" adds weight / (60 + rank), "sum" weight * (score - least) / (greatest - least) of the list, least being 0
    where a lexical list is not full, and 1 for every score where all are equal. What a list does not hold gets nothing
    from it.
    """
    total: dict[int, float] = {}
    fused = np.zeros(own.shape[1])
    for best, weight, scores in zip(lists, weights, own, strict=True):
        positions, values = best.of(query)
        if not len(positions):
            continue
        full = len(positions) == best.scores.shape[1]
        least = 0.0 if best.lexical and not full else values[-1]
        if how == "rrf":
            parts = weight / (RRF_CONSTANT + 1 + np.arange(len(values)))
            ranks = 1 + (values[None, :] > scores[:, None]).sum(1)
            inside = (scores >= values[-1]) if full else (scores > (0 if best.lexical else -np.inf))
            fused += np.where(inside, weight / (RRF_CONSTANT + ranks), 0)
        else:
            width = values[0] - least
            parts = weight * (values - least) / width if width else np.full(len(values), weight)
            fused += weight * (np.maximum(scores - least, 0) / width if width else scores >= least)
        for position, part in zip(positions.tolist(), parts.tolist(), strict=True):
            total[position] = total.get(position, 0.0) + part
    order = sorted(total, key=lambda position: (-total[position], position))[: lists[0].scores.shape[1]]
    return np.array(order, dtype=np.int64), np.array([total[position] for position in order]), fused

"""Embedding -> weighted clusters with their tokens; query x document -> what matched and how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Legend: V vocabulary, K clusters.


@dataclass(frozen=True)
class Match:
    """One cluster that query and document share."""

    cluster: int
    tokens: list[str]
    """Readable tokens of the cluster; those that occur in the query or the document come first."""
    weight: float
    """query value x document value: the cluster's part of the score."""
    share: float
    """weight / score."""


@dataclass(frozen=True)
class Explanation:
    """A score and its parts: the weights of `matches` and `rest` sum to `score`."""

    score: float
    matches: list[Match]
    rest: float
    """Weight of the matched clusters beyond the k listed ones."""
    rest_count: int
    """Number of those clusters."""

    def __str__(self) -> str:
        lines = [f"score {self.score:.4f}"]
        lines += [f"{m.share:7.1%}  cluster {m.cluster:<6d} {', '.join(m.tokens[:8])}" for m in self.matches]
        if self.rest_count:
            share = self.rest / self.score if self.score else 0.0
            lines.append(f"{share:7.1%}  {self.rest_count} further clusters")
        return "\n".join(lines)


class ClusterTokens:
    """The readable tokens of each cluster, from the labels (V,) of a head and the tokenizer."""

    def __init__(self, labels: NDArray[np.int32], dimensions: int, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.order = np.argsort(labels, kind="stable")
        self.bounds = np.searchsorted(labels[self.order], np.arange(dimensions + 1))
        self.readable: dict[int, str] = {}

    def ids(self, cluster: int) -> list[int]:
        """Token ids of a cluster, rising."""
        return [int(i) for i in self.order[self.bounds[cluster] : self.bounds[cluster + 1]]]

    def __call__(self, cluster: int, first: frozenset[int] = frozenset()) -> list[str]:
        """Readable tokens of a cluster without repetitions, those with an id in `first` before the others."""
        ids = sorted(self.ids(cluster), key=lambda i: (i not in first, i))
        return list(dict.fromkeys(self._text(i) for i in ids))

    def _text(self, token: int) -> str:
        if token not in self.readable:
            text = self.tokenizer.decode([token]).strip()
            self.readable[token] = text or str(self.tokenizer.convert_ids_to_tokens(token))
        return self.readable[token]


def explain(
    query: NDArray[np.float32],
    document: NDArray[np.float32],
    tokens: ClusterTokens,
    k: int | None = 10,
    seen: frozenset[int] = frozenset(),
) -> Explanation:
    """Splits the inner product of two embeddings (K,) by cluster; k None lists every match.

    `seen` holds token ids of the two texts, which are named first in their clusters.
    """
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1 or None, found {k}")
    products = query.astype(np.float64) * document.astype(np.float64)
    order = np.argsort(-products, kind="stable")
    order = order[: np.count_nonzero(products > 0)]
    score = float(products.sum())
    listed = order if k is None else order[:k]
    matches = [
        Match(int(c), tokens(int(c), seen), float(products[c]), float(products[c]) / score if score else 0.0)
        for c in listed
    ]
    rest = order[len(listed) :]
    return Explanation(score, matches, float(products[rest].sum()), len(rest))


def terms(
    embedding: NDArray[np.float32], tokens: ClusterTokens, k: int = 10, seen: frozenset[int] = frozenset()
) -> list[tuple[int, list[str], float]]:
    """The k largest values of an embedding (K,) as (cluster, tokens, weight), as in Table 3 of arXiv 2501.09749."""
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    order = np.argsort(-embedding, kind="stable")[:k]
    return [(int(c), tokens(int(c), seen), float(embedding[c])) for c in order if embedding[c] > 0]

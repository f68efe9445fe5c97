"""Queries as bags of tokens: no backbone at search time (splade-doc, arXiv 2109.10086; with IDF arXiv 2411.04403).

    e_k = w_k if a token of cluster k occurs in the query, else 0

The bag holds the text's own tokens, once each; special tokens are not added, and an instruction is no part of it. So
it is what sentence-transformers' SparseStaticEmbedding computes, over clusters as well as over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens.text import Tokens, check_texts, move, offsets, tokenizing

# Legend: B texts, T tokens of all texts, V vocabulary, K dimensions (clusters, or tokens of the vocabulary).

_BLOCK = 4096  # texts tokenised at a time


@dataclass(frozen=True, slots=True)
class BagBatch:
    """Tokens of B queries one after another."""

    bag_ids: Tensor  # (T,) int64
    bag_offsets: Tensor  # (B+1,) int64, the texts' offsets

    def inputs(self, device: torch.device | None = None) -> dict[str, Any]:
        """Arguments of LensModel, on `device` (None: where they are)."""
        return move({"bag_ids": self.bag_ids, "bag_offsets": self.bag_offsets}, device)


def lay_out(tokens: Sequence[Tokens]) -> BagBatch:
    """The tokens of queries, as TextProcessor makes them of a model with query_encoder="bag", laid out for it."""
    ids = torch.tensor([token for item in tokens for token in item.ids], dtype=torch.long)
    return BagBatch(ids, offsets([len(item.ids) for item in tokens]))


def bag(ids: Tensor, offsets: Tensor, labels: Tensor, dimensions: int) -> Tensor:
    """(B, K) float32: 1 where one of a text's ids (T,), with the texts' offsets (B+1,), has that label, else 0.

    `labels` (V,) holds the dimension of every token, -1 for tokens in none, as are ids from V on. Never waits for a
    GPU.
    """
    owner = torch.repeat_interleave(offsets.diff(), output_size=len(ids))  # (T,)
    found = labels.long()[ids.clamp(max=len(labels) - 1)]
    nowhere = (ids >= len(labels)) | (found < 0)
    present = torch.zeros(len(offsets) - 1, dimensions + 1, device=ids.device)
    present[owner, torch.where(nowhere, dimensions, found)] = 1.0
    return present[:, :dimensions]


def idf(texts: Iterable[str], tokenizer: Any, labels: Tensor | None = None, dimensions: int | None = None) -> Tensor:
    """Inverse document frequencies (K,) float32 of a corpus of N texts, for `LexicalHead.weigh_queries`:

        ln(1 + (N - n_k + 0.5) / (n_k + 0.5))

    where n_k texts hold a token of dimension k; it is BM25's (Robertson and Zaragoza 2009) and positive. `labels` (V,)
    and `dimensions` (K) are those of a head; without labels every token of the tokenizer is a dimension of its own.
    Texts are read one block at a time, in full length. Raises TypeError and ValueError as `check_texts`, and ValueError
    without any text.
    """
    if labels is None:
        labels = torch.arange(max(tokenizer.get_vocab().values()) + 1)
    clusters = labels.cpu().numpy().astype(np.int64)
    width = int(clusters.max()) + 1 if dimensions is None else dimensions
    counts, total = np.zeros(width, dtype=np.int64), 0
    stream = iter(check_texts(texts) if isinstance(texts, str | bytes) else texts)
    while block := check_texts(islice(stream, _BLOCK)):
        with tokenizing:
            encoded = tokenizer(block, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        for ids in encoded:
            held = np.unique(clusters[[token for token in ids if token < len(clusters)]])
            counts[held[(held >= 0) & (held < width)]] += 1
        total += len(block)
    if total == 0:
        raise ValueError("no text was given: inverse document frequencies need a corpus")
    return torch.from_numpy(np.log1p((total - counts + 0.5) / (counts + 0.5))).float()

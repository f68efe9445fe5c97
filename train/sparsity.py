"""What makes embeddings sparse while they are learnt: regularisers, their warm-up, and keeping the largest values.

    flops = sum_j (mean_n |w_nj|)^2        l1 = mean_n sum_j |w_nj|        over the texts n of all ranks' batches

(Paria et al. 2020, arXiv 2004.05665; SPLADE, arXiv 2107.05720). flops bounds, for dimensions that are active
independently of each other, the products that scoring a query against a document takes, and so asks for evenly used
dimensions; l1 only for few and small values.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

# Legend: N texts of this rank, W ranks, K clusters.

Regulariser = Literal["flops", "l1"]


class _MeanOverRanks(torch.autograd.Function):
    """The mean of all ranks' tensors; each rank's gradient is the sum of all ranks' gradients of it, over W.

    Every rank computes its loss from the same mean, and data parallelism takes the mean of the ranks' gradients: what
    comes out is the gradient of one loss over the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor) -> Tensor:
        total = mean.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()


def mean_over_ranks(mean: Tensor) -> Tensor:
    """The mean over ranks of a tensor that each computed from equally many texts, with gradients."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return mean
    averaged: Tensor = _MeanOverRanks.apply(mean)  # type: ignore[no-untyped-call]
    return averaged


def regulariser(kind: Regulariser, embeddings: Tensor) -> Tensor:
    """The regulariser of embeddings (N, K) and those of all other ranks, which must be equally many; a scalar."""
    if kind == "l1":
        return mean_over_ranks(embeddings.abs().sum(1).mean())
    return mean_over_ranks(embeddings.abs().mean(0)).square().sum()


def warmed_up(weight: float, step: int, steps: int) -> float:
    """The regulariser's weight at optimizer step `step`, the first being 1: weight * (step / steps)^2 up to `steps`,
    then `weight`."""
    return weight * min(step / steps, 1.0) ** 2 if steps else weight


def keep_top(embeddings: Tensor, count: int | None, normalize: bool = False) -> Tensor:
    """Embeddings (N, K) with all but the `count` largest values of each row set to 0, which then get no gradient, and
    of unit length where `normalize` says so, as `encode(top_k=...)` gives them; None: as they are."""
    if count is None or count >= embeddings.shape[1]:
        return embeddings
    kept = embeddings.detach().topk(count, dim=1).indices
    masked = embeddings * torch.zeros_like(embeddings).scatter_(1, kept, 1.0)
    return F.normalize(masked, dim=1) if normalize else masked

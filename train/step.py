"""The forward pass of one step, in mini-batches whose activations are not kept (gradient caching).

A contrastive loss needs the embeddings of the whole batch, but their gradients can be carried back one mini-batch at
a time (Gao et al. 2021, arXiv 2101.06983). Here each mini-batch is one torch checkpoint: its embeddings stay, its
activations are computed again in the backward pass, with the random numbers of the first time. To everything around
it, be it data parallelism, DeepSpeed or a gradient scaler, a step remains one forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lens.model import LensModel
from train.top import TopLayers

# Legend: Q queries, P passages per query, K clusters.


class QueryPassageModel(nn.Module):
    """Queries and passages in one forward pass, so that data-parallel wrappers see one call a step."""

    def __init__(self, model: LensModel, top: TopLayers | None = None) -> None:
        super().__init__()
        self.model = model
        self.top = top

    def forward(
        self,
        queries: Any,
        passages: Any,
        mini_batches: Sequence[dict[str, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of the queries (Q, K) and of the passages (Q*P, K).

        `queries` and `passages` are inputs of LensModel, or of `top`; with `mini_batches`, which then hold the inputs,
        they are the places (Q,) and (Q*P,) of their texts in the mini-batches one after another.
        """
        if mini_batches is None:
            return self._embed(**queries), self._embed(**passages)
        partitioned = any(hasattr(parameter, "ds_id") for parameter in self.parameters())
        runs = list(mini_batches)
        if partitioned:
            # ZeRO-3 collects every layer's weights from all ranks: each must run as many passes as the others. No
            # place names what is added here, so its gradient is zero.
            first = {name: tensor[:1] for name, tensor in runs[0].items()}
            runs += [first] * (_most(len(runs), queries.device) - len(runs))
        if len(runs) == 1:
            embeddings = self._embed(**runs[0])
        else:
            embeddings = torch.cat([self._cached(inputs, partitioned) for inputs in runs])
        return embeddings[queries], embeddings[passages]

    def _cached(self, inputs: dict[str, Tensor], partitioned: bool) -> Tensor:
        # Partitioned weights have no shape between uses, and a pass that stops early would leave them collected.
        check = "none" if partitioned else "default"
        with set_checkpoint_early_stop(not partitioned):
            embeddings: Tensor = checkpoint(self._embed, use_reentrant=False, determinism_check=check, **inputs)
        return embeddings

    def _embed(self, below: Tensor | None = None, pooled: Tensor | None = None, **inputs: Tensor) -> Tensor:
        if below is not None:
            assert self.top is not None
            assert pooled is not None
            ends = F.pad(pooled.cumsum(0), (1, 0))  # pooled positions before each position
            hidden = self.top(below, inputs["cu_seqlens"])[pooled]
            inputs = {"hidden": hidden, "cu_seqlens": ends[inputs["cu_seqlens"]]}
        embeddings: Tensor = self.model(**inputs)
        return embeddings

    def train(self, mode: bool = True) -> QueryPassageModel:
        """As nn.Module's; of a backbone whose last layers alone are trained, those alone leave eval mode."""
        super().train(mode)
        if self.top is not None:
            self.top.train(mode)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's, but frozen parameters, which checkpoints leave out, may be missing."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        lost = [name for name in result.missing_keys if name not in frozen]
        if strict and (lost or result.unexpected_keys):
            raise RuntimeError(f"checkpoint lacks {lost[:5]}, has unknown {result.unexpected_keys[:5]}")
        return result


def _most(count: int, device: torch.device) -> int:
    """The greatest `count` of any rank."""
    if not dist.is_initialized():
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)

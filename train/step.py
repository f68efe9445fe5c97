"""The forward pass of one step, in mini-batches whose activations are not kept (gradient caching).

A contrastive loss needs the embeddings of the whole batch, but their gradients can be carried back one mini-batch at
a time (Gao et al. 2021, arXiv 2101.06983). Here each mini-batch but the last is one torch checkpoint: its embeddings
stay, its activations are computed again in the backward pass, with the random numbers of the first time. To everything
around it, be it data parallelism, DeepSpeed or a gradient scaler, a step remains one forward and one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lens.dropped import speed_up
from lens.model import LensModel
from train.top import TopLayers

# Legend: Q queries, P passages per query or pooled positions of all texts, K clusters.


class QueryPassageModel(nn.Module):
    """Queries and passages in one forward pass, so that data-parallel wrappers see one call a step."""

    def __init__(self, model: LensModel, top: TopLayers | None = None) -> None:
        super().__init__()
        self.model = model
        self.top = top
        speed_up(model)

    def forward(
        self,
        queries: Any,
        passages: Any,
        mini_batches: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of the queries (Q, K) and of the passages (Q*P, K).

        `queries` and `passages` are inputs of LensModel, or of `top`; with `mini_batches`, which then hold the inputs,
        they are the places (Q,) and (Q*P,) of their texts in the mini-batches one after another. Queries that are bags
        of tokens are in no mini-batch, and always inputs.
        """
        if mini_batches is None:
            return self._embed(**queries), self._embed(**passages)
        if isinstance(queries, dict):
            return self._embed(**queries), self.forward(passages[:0], passages, mini_batches)[1]
        # As one argument: only from positional ones does torch see whose random numbers it must keep.
        parts = [checkpoint(self._run, part, use_reentrant=False) for part in mini_batches[:-1]]
        parts.append(self._run(mini_batches[-1]))  # the backward pass comes to its activations at once
        embeddings = torch.cat(parts)
        together = embeddings[torch.cat([queries, passages])]  # whose gradient is one tensor, not two
        return together[: len(queries)], together[len(queries) :]

    def _run(self, inputs: dict[str, Any]) -> Tensor:
        return self._embed(**inputs)

    def _embed(self, **inputs: Any) -> Tensor:
        if "bag_ids" in inputs:
            bags: Tensor = self.model(**inputs)
            return bags
        embeddings: Tensor = self.model(hidden=self.states(**inputs), pool_offsets=inputs["pool_offsets"])
        return embeddings

    def states(self, **inputs: Any) -> Tensor:
        """Final states (P, D) of the pooled positions of one pass's texts."""
        if "hidden" in inputs:
            found: Tensor = inputs["hidden"]
            return found
        if "below" in inputs:
            assert self.top is not None
            return self.top(inputs["below"], inputs["lengths"]).index_select(0, inputs["pooled"])
        return self.model.pooled_states(**{name: value for name, value in inputs.items() if name != "pool_offsets"})

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


def cached_backward(
    model: nn.Module,
    mini_batches: Sequence[dict[str, Any]],
    loss: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor, bool], None],
) -> Tensor:
    """Gradient caching in two explicit passes, for ZeRO-3, which cannot collect weights inside a torch checkpoint.

    Embeds the mini-batches without gradients, takes `loss` of all embeddings (N, K), then embeds each again with the
    random numbers of the first time and hands its part of the gradient on: `backward(surrogate, last)`. All ranks run
    as many passes, for each collects every layer's weights from all. Returns the detached loss.
    """
    device = next(model.parameters()).device
    idle = first_texts(mini_batches[0], 1)  # no place names what is added here, so its gradient is zero
    runs = [*mini_batches, *[idle] * (_most(len(mini_batches), device) - len(mini_batches))]
    states, parts = [], []
    with torch.no_grad():
        for inputs in runs:
            states.append(_random_state(device))
            parts.append(_rows(model, inputs))
    after = _random_state(device)
    leaf = torch.cat(parts).requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    gradients = leaf.grad.split([len(part) for part in parts])
    for number, (inputs, state, gradient) in enumerate(zip(runs, states, gradients, strict=True)):
        _set_random_state(device, state)
        backward((_rows(model, inputs) * gradient).sum(), number == len(runs) - 1)
    _set_random_state(device, after)
    return value.detach()


def first_texts(inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """The model inputs of the first texts of one pass, padded or packed; on a GPU it waits for the offsets."""
    ends = inputs["pool_offsets"][: count + 1]
    cut = {**inputs, "pool_offsets": ends}
    if "hidden" in inputs:
        return {**cut, "hidden": inputs["hidden"][: int(ends[-1])]}
    cut["pooled"] = inputs["pooled"][: int(ends[-1])]
    if "lengths" not in inputs:
        return cut | {name: inputs[name][:count] for name in ("input_ids", "attention_mask")}
    cut["lengths"] = inputs["lengths"][:count]
    rows = "below" if "below" in inputs else "input_ids"
    cut[rows] = inputs[rows][: sum(cut["lengths"])]
    return cut if rows == "below" else cut | {"cu_seqlens": inputs["cu_seqlens"][: count + 1]}


def _rows(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    every = torch.arange(len(inputs["pool_offsets"]) - 1, device=inputs["pool_offsets"].device)
    embeddings: Tensor = model(every, every[:0], [inputs])[0]
    return embeddings


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _most(count: int, device: torch.device) -> int:
    """The greatest `count` of any rank."""
    if not dist.is_initialized():
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)

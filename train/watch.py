"""What training does to the clusters: figures for the log, and warnings when embeddings collapse."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from train.loss import Loss
from train.parallel import collected
from train.step import QueryPassageModel, first_texts

# Legend: Q queries, N passages, T pooled positions of all texts, L those of one, D hidden size, K clusters.

_SAMPLE = 8  # texts whose maxima are traced to their positions at each log step


class Watch:
    """Means over the steps since the last log line, of all ranks. Read only when logged, so that no step waits."""

    def __init__(self, model: QueryPassageModel) -> None:
        self.model = model
        self.warned: set[str] = set()
        self._reset()
        self._since: float | None = None

    def _reset(self) -> None:
        self._waited = 0.0
        self._sums: dict[str, Tensor] = {}
        self._active: Tensor | None = None  # (K,) passages in which each cluster was active
        self._steps = self._passages = 0
        self._inputs: dict[str, Any] | None = None

    def count(self, loss: Loss, queries: Tensor, passages: Tensor, inputs: dict[str, Any]) -> None:
        """Takes in one batch: its loss, embeddings (Q, K) and (N, K), and the batch itself."""
        active = passages > 0
        unit = F.normalize(queries.float(), dim=1)
        pairs = max(len(unit) * (len(unit) - 1), 1)
        parts = {
            "contrastive": loss.contrastive,
            "kd": loss.kd,
            **({} if loss.sparsity is None else {"sparsity": loss.sparsity}),
            "accuracy": loss.accuracy,
            "active_per_query": (queries > 0).sum(1).float().mean(),
            "active_per_passage": active.sum(1).float().mean(),
            "flops": ((queries > 0).float().mean(0) * active.float().mean(0)).sum(),
            "query_cosine": (unit.sum(0).square().sum() - unit.square().sum()) / pairs,
        }
        for name, value in parts.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        used = active.sum(0)
        self._active = used if self._active is None else self._active + used
        self._steps += 1
        self._passages += len(passages)
        self._inputs = inputs

    def wait(self, seconds: float) -> None:
        """Takes in what the process waited for a batch."""
        if self._since is None:  # time counts from the first batch on
            self._since = time.perf_counter() - seconds
        self._waited += seconds

    def figures(self) -> dict[str, float]:
        """The figures since the last call; all ranks call together. Empty when nothing was counted.

        `accuracy` is the share of queries whose positive scores highest, `query_cosine` the mean cosine of two queries
        of a batch. `dead_clusters` and `always_on_clusters` are shares of the K clusters that were active in none and
        in all passages; `maxima_first` and `maxima_last` shares of the active clusters of some texts whose maximum
        lies at the first and at the last pooled position. `data_wait` is the share of the time that the process waited
        for batches, the mean of all ranks; where it runs ahead of a GPU, that need not keep the GPU waiting.
        """
        if self._active is None or self._inputs is None:
            return {}
        values = torch.stack([value.float() for value in self._sums.values()]) / self._steps
        first, last = maxima_at_ends(self.model, sample_of(self._inputs))
        now = time.perf_counter()
        waited = torch.full_like(first, self._waited / max(now - (self._since or now), 1e-9))
        totals = torch.cat([values, torch.stack([first, last, waited])])
        active, passages = self._active, self._passages
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
            totals /= dist.get_world_size()
            dist.all_reduce(active)
            passages *= dist.get_world_size()
        figures = dict(zip([*self._sums, "maxima_first", "maxima_last", "data_wait"], totals.tolist(), strict=True))
        figures["dead_clusters"] = float((active == 0).float().mean())
        figures["always_on_clusters"] = float((active == passages).float().mean())
        self._reset()
        self._since = now
        return figures

    def warnings(self, figures: dict[str, float]) -> list[str]:
        """What in `figures` says that the embeddings collapse; each kind is told once a run."""
        found = {
            "empty": (
                figures["active_per_passage"] < 1,
                "passages have hardly an active cluster ({active_per_passage:.2f} on average): lower the learning rate",
            ),
            "same": (
                figures["query_cosine"] > 0.99,
                "all queries get nearly the same embedding (mean cosine {query_cosine:.3f}): lower the learning rate",
            ),
            "sink": (
                figures["maxima_first"] > 0.5,
                "{maxima_first:.0%} of the maxima lie at the first pooled position: embeddings hardly see the text",
            ),
            "always on": (
                figures["always_on_clusters"] > 0.5,
                "{always_on_clusters:.0%} of the clusters are active in every passage: they tell texts apart by "
                "weight alone",
            ),
            "dead": (
                figures["dead_clusters"] > 0.9,
                "{dead_clusters:.0%} of the clusters were active in no passage since the last log line",
            ),
        }
        new = [name for name, (holds, _) in found.items() if holds and name not in self.warned]
        self.warned.update(new)
        return [found[name][1].format(**figures) for name in new]


def sample_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """The model inputs of the first few passages of a batch; with mini-batches, of its longest texts."""
    return first_texts(inputs["passages"] if inputs["mini_batches"] is None else inputs["mini_batches"][0], _SAMPLE)


@torch.no_grad()
def maxima_at_ends(model: QueryPassageModel, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Shares of the active clusters' maxima at the first and at the last pooled position, over texts of two and more.

    Zeros when no cluster is active. `inputs` are those of one pass of `model`.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        hidden, cu_seqlens = model.states(**inputs), inputs["pool_offsets"]
        head = model.model.head
        first = last = total = torch.zeros((), device=hidden.device)
        with collected(head):
            states = head.transform(hidden.to(head.weight.dtype), cu_seqlens)
            for text in torch.split(states, cu_seqlens.diff().tolist()):  # (L, D)
                if len(text) < 2:
                    continue
                greatest, places = F.linear(text, head.weight, head.bias).max(0)  # (K,)
                active = greatest > 0
                first = first + (active & (places == 0)).sum()
                last = last + (active & (places == len(text) - 1)).sum()
                total = total + active.sum()
        return first / total.clamp(min=1), last / total.clamp(min=1)
    finally:
        for module, training in modes.items():
            module.training = training

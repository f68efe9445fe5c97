"""Embeddings -> loss: InfoNCE over gathered passages, plus distillation of teacher scores.

    contrastive = mean_i -log softmax(q_i . p / temperature)[positive of i]      over all passages p of the batch
    kd = mean_i KL(softmax(teacher_i / kd_temperature) || softmax(q_i . p / temperature))     over i's own passages

(arXiv 2501.09749, section 3.3). In place of KL, kd may be MarginMSE, the mean over i's own negatives n of
((q_i . p - q_i . n) - (teacher_ip - teacher_in))^2 (Hofstaetter et al. 2020, arXiv 2010.02666; SPLADE v2). A bi-encoder
teacher has scores for all passages of the batch, and kd is then taken over all of them, like the contrastive part.

False negatives can be left out of the contrastive softmax: passages with the text of one of the query's positives or of
the query itself, and those that the teacher scores above the positive; kd sees every passage, because the teacher says
what each is worth. The gather carries gradients, so that the data-parallel mean over ranks is the gradient of the loss
of the whole batch, whatever the number of ranks, and `kd_weight` means what it says.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

# Legend: Q queries of this rank, P passages per query, W ranks, C candidates of a query, K clusters.


@dataclass(frozen=True)
class Loss:
    """`total` carries the gradient; the others are detached, for the log."""

    total: Tensor
    contrastive: Tensor
    kd: Tensor
    accuracy: Tensor
    """Share of queries whose positive scores above all other passages."""
    sparsity: Tensor | None = None
    """The weighted regularisers, where there are any."""

    def with_sparsity(self, value: Tensor) -> Loss:
        """The loss with the weighted regularisers added."""
        return replace(self, total=self.total + value, sparsity=value.detach())


class _Gather(torch.autograd.Function):
    """All ranks' rows in rank order; the backward pass sums all ranks' gradients of the rows that were this one's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        ctx.count = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.count :][: ctx.count]


def gather(rows: Tensor) -> Tensor:
    """(n, ...) of every rank -> (W*n, ...) in rank order, with gradients; the input itself on one rank."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


def contrastive_loss(
    queries: Tensor,
    passages: Tensor,
    teacher: Tensor | None,
    temperature: float,
    kd_weight: float,
    kd_temperature: float,
    in_batch: bool,
    teacher_vectors: tuple[Tensor, Tensor] | None = None,
    keys: tuple[Tensor, Tensor] | None = None,
    teacher_margin: float | None = None,
    contrastive_weight: float = 1.0,
    distillation: Literal["kl", "margin_mse"] = "kl",
) -> Loss:
    """Loss of this rank's queries (Q, K) against passages (Q*P, K), each query's own P in a row, positive first.

    `teacher` (Q, P) or None switches distillation; `teacher_vectors`, a bi-encoder's embeddings of the queries (Q, E)
    and passages (Q*P, E), takes its place and scores every passage. `in_batch` adds the passages of all other queries,
    of all ranks, as negatives. `keys` names texts by numbers, those that are no negatives of each query (Q, M), padded
    with -1, and the passages (Q*P,). With `teacher_margin`, passages that the teacher scores above the query's
    positive by more than it are no negatives either; without teacher_vectors this concerns a query's own passages.
    `distillation` says what kd is; margins are taken of undivided scores. Raises ValueError when the numbers do not
    fit.
    """
    count = len(queries)
    if count == 0 or len(passages) % count:
        raise ValueError(f"{len(passages)} passages cannot be shared out among {count} queries")
    group = len(passages) // count
    own = torch.einsum("qk,qpk->qp", queries, passages.view(count, group, -1)) / temperature  # (Q, P)
    if teacher is not None and teacher.shape != own.shape:
        raise ValueError(f"teacher scores {tuple(teacher.shape)} do not fit {tuple(own.shape)} queries x passages")
    rows = torch.arange(count, device=queries.device)
    if in_batch:
        every = gather(passages)  # (W*Q*P, K)
        scores = queries @ every.T / temperature  # (Q, C) with C = W*Q*P
        rank = dist.get_rank() if len(every) != len(passages) else 0
        target = (rank * count + rows) * group
    else:
        scores = own  # (Q, C) with C = P
        target = torch.zeros_like(rows)
    marks = None  # (Q, C) teacher scores of the passages that the kd part covers
    if teacher_vectors is not None:
        wanted, known = teacher_vectors
        if in_batch:
            marks = wanted @ gather(known).T
        else:
            marks = torch.einsum("qe,qpe->qp", wanted, known.view(count, group, -1))
    false = torch.zeros_like(scores, dtype=torch.bool)
    if keys is not None:
        excepted, names = keys
        listed = gather(names)[None] if in_batch else names.view(count, group)  # (1 or Q, C)
        for column in excepted.T:  # one by one: (Q, C, M) would not fit for queries with many positives
            false |= listed == column[:, None]
    if teacher_margin is not None and marks is not None:
        false |= marks > marks.gather(1, target[:, None]) + teacher_margin
    elif teacher_margin is not None and teacher is not None:
        columns = target[:, None] + torch.arange(group, device=target.device)  # (Q, P)
        above = teacher > teacher[:, :1] + teacher_margin
        false[rows[:, None], columns] |= above
    false[rows, target] = False
    contrasted = scores.masked_fill(false, -torch.inf)
    contrastive = F.cross_entropy(contrasted, target)
    kd = torch.zeros((), device=queries.device)
    if kd_weight > 0 and scores.shape[1] > 1:
        distil = functools.partial(_distil, kind=distillation, temperature=temperature, kd_temperature=kd_temperature)
        if marks is not None:
            kd = distil(scores, marks, target)
        elif teacher is not None and group > 1:
            kd = distil(own, teacher, torch.zeros_like(target))
    total = contrastive_weight * contrastive + kd_weight * kd
    with torch.no_grad():
        accuracy = (contrasted.argmax(1) == target).float().mean()
    return Loss(total, contrastive.detach(), kd.detach(), accuracy)


def _distil(
    scores: Tensor, teacher: Tensor, positive: Tensor, kind: str, temperature: float, kd_temperature: float
) -> Tensor:
    """kd of scores divided by the temperature (Q, C), the teacher's (Q, C) and the positives' columns (Q,)."""
    if kind == "kl":
        return F.kl_div(scores.log_softmax(1), (teacher / kd_temperature).softmax(1), reduction="batchmean")
    column = positive[:, None]
    margins, wanted = (s.gather(1, column) - s for s in (scores * temperature, teacher))  # 0 for the positive itself
    return (margins - wanted).square().sum() / (len(scores) * (scores.shape[1] - 1))

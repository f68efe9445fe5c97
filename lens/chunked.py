"""The head's torch backend: logits exist for one block of rows x clusters at a time, small enough for the cache.

Of each block only what a text needs remains: its maximum and where it was reached, or its sum. Texts are taken in
order of length, so that neighbours of one length are reduced by one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lens import products

# Legend: B texts, T pooled tokens of all texts, D hidden size, K clusters.

_BLOCK = (1024, 512)  # rows x clusters: 2 MB of float32, which stays in the second-level caches of two cores
_GPU_BLOCK = (8192, 2048)
_ENTRIES = 1 << 16  # gradients of maxima that the backward pass takes at a time


def max_pool(rows: Tensor, weight: Tensor, bias: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """Per text and cluster the greatest logit, (T, D), (K, D), (K,) or None -> (B, K) float32.

    -inf for a text without rows. Gradients go to the first row that reaches the maximum.
    """
    if not torch.is_grad_enabled():  # parameters want gradients even then, and the argmax takes as long as the maximum
        return reduce_max(rows, weight, bias, lengths)[0]
    pooled: Tensor = _MaxLogits.apply(rows, weight, bias, tuple(lengths))  # type: ignore[no-untyped-call]
    return pooled


def sum_pool(rows: Tensor, weight: Tensor, bias: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """Per text and cluster the sum of log1p(relu(logit)), (T, D), (K, D), (K,) or None -> (B, K) float32."""
    pooled: Tensor = _SumWeights.apply(rows, weight, bias, tuple(lengths))  # type: ignore[no-untyped-call]
    return pooled


class _Run(NamedTuple):
    """Neighbouring rows of one block: `texts` texts from number `first` on with `length` rows each.

    A text that is longer than a block comes in several runs, of which only the first is not `later`.
    """

    first: int
    texts: int
    length: int
    later: bool


def _blocks(lengths: Sequence[int], limit: int) -> Iterator[tuple[slice, list[_Run]]]:
    """Slices of at most `limit` rows with their runs, for texts of these lengths one after another."""
    start = rows = 0
    runs: list[_Run] = []
    for text, length in enumerate(lengths):
        if runs and rows + length > limit:
            yield slice(start, start + rows), runs
            start, rows, runs = start + rows, 0, []
        for done in range(0, length - limit, limit):
            yield slice(start, start + limit), [_Run(text, 1, limit, done > 0)]
            start += limit
        rest = length - (length - 1) // limit * limit if length else 0
        if not rest:
            continue
        later = rest < length
        last = runs[-1] if runs else None
        together = last is not None and last.length == rest and last.first + last.texts == text
        if last is not None and together and not last.later and not later:
            runs[-1] = last._replace(texts=last.texts + 1)
        else:
            runs.append(_Run(text, 1, rest, later))
        rows += rest
    if runs:
        yield slice(start, start + rows), runs


def _by_length(lengths: Sequence[int], device: torch.device) -> tuple[list[int], Tensor | None, Tensor | None]:
    """Lengths in falling order, the texts in that order and their rows; None and None when they already are."""
    if all(first >= second for first, second in itertools.pairwise(lengths)):
        return list(lengths), None, None
    sizes = torch.tensor(lengths)
    sizes, order = torch.sort(sizes, descending=True, stable=True)
    starts = torch.tensor(lengths).cumsum(0)[order] - sizes  # of each text's rows
    ends = sizes.cumsum(0)
    within = torch.arange(int(ends[-1])) - (ends - sizes).repeat_interleave(sizes)
    places = starts.repeat_interleave(sizes) + within
    return sizes.tolist(), order.to(device), places.to(device)


def block_size(device: torch.device) -> tuple[int, int]:
    """Rows and clusters of one block."""
    return _BLOCK if device.type == "cpu" else _GPU_BLOCK


class Blocks(Protocol):
    """Logits of all rows, one block of at most `height` rows at a time; a block lives until the next is asked for."""

    height: int

    def columns(self) -> Iterator[slice]:
        """The blocks of clusters, one after another."""

    def __call__(self, part: slice, columns: slice) -> Tensor:
        """The block (rows of `part`, clusters of `columns`)."""


class Packed(Protocol):
    """Rows of a head in a form of their own (see lens/int8.py)."""

    def __len__(self) -> int: ...

    def logits(self, rows: Tensor) -> Blocks:
        """Logits of rows (T, D)."""


class _Logits:
    """Blocks of rows @ weight.T, by torch each written over the one before (see lens/products.py)."""

    def __init__(self, rows: Tensor, weight: Tensor) -> None:
        self.rows, self.weight = rows, weight
        self.height, self.width = block_size(rows.device)
        self.onednn = products.fits(rows, weight)
        size = min(self.height, max(len(rows), 1)) * min(self.width, max(len(weight), 1))
        self.memory = rows.new_empty(0 if self.onednn else size)

    def columns(self) -> Iterator[slice]:
        for start in range(0, len(self.weight), self.width):
            yield slice(start, min(start + self.width, len(self.weight)))

    def __call__(self, part: slice, columns: slice) -> Tensor:
        weight = self.weight[columns]
        if self.onednn:
            return products.linear(self.rows[part], weight)
        height = part.stop - part.start
        out = self.memory[: height * len(weight)].view(height, len(weight))
        return torch.mm(self.rows[part], weight.t(), out=out)


def reduce_max(
    rows: Tensor, weight: Tensor | Packed, bias: Tensor | None, lengths: Sequence[int], training: bool = False
) -> tuple[Tensor, Tensor]:
    """Greatest logits (B, K) float32 and, when `training`, the row of each, (B, K) int32, else (0, 0)."""
    sizes, order, places = _by_length(lengths, rows.device)
    values = torch.full((len(lengths), len(weight)), -torch.inf, device=rows.device)
    argmax = torch.zeros(values.shape if training else (0, 0), dtype=torch.int32, device=rows.device)
    logits = _logits(rows if places is None else rows[places], weight)
    countdown = torch.arange(logits.height, 0, -1, dtype=torch.float32, device=rows.device)
    marks = torch.empty(0, device=rows.device)
    for part, runs in _blocks(sizes, logits.height):
        for columns in logits.columns():
            block = logits(part, columns)
            if training and marks.numel() < block.numel():
                marks = torch.empty(block.numel(), device=rows.device)
            start = 0
            for number, count, length, later in runs:
                texts, end = slice(number, number + count), start + count * length
                own = block[start:end].view(count, length, -1)
                best = own.amax(1)
                if training:
                    first = _first(own, best, marks, countdown)
                    first += torch.arange(count, dtype=torch.int32, device=rows.device)[:, None] * length
                    first += part.start + start
                    if later:  # an equal one in an earlier block stays the first
                        first = torch.where(best > values[texts, columns], first, argmax[texts, columns])
                    argmax[texts, columns] = first
                values[texts, columns] = torch.maximum(best, values[texts, columns]) if later else best
                start = end
    if order is not None and places is not None:
        values = torch.empty_like(values).index_copy_(0, order, values)
        if training:
            argmax = torch.empty_like(argmax).index_copy_(0, order, places.int()[argmax])
    if bias is not None:
        values += bias.float()  # rounding keeps order, so the maximum may be taken before
    return values, argmax


def reduce_sum(rows: Tensor, weight: Tensor | Packed, bias: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """Sums of log1p(relu(logit)), (B, K) float32."""
    sums = torch.zeros(len(lengths), len(weight), device=rows.device)
    logits = _logits(rows, weight)
    for part, runs in _blocks(lengths, logits.height):
        for columns in logits.columns():
            block = _biased(logits(part, columns), bias, columns).clamp_(min=0).log1p_()
            start = 0
            for number, count, length, _ in runs:
                end = start + count * length
                sums[number : number + count, columns] += block[start:end].view(count, length, -1).sum(1)
                start = end
    return sums


def _logits(rows: Tensor, weight: Tensor | Packed) -> Blocks:
    return _Logits(rows, weight) if isinstance(weight, Tensor) else weight.logits(rows)


class _MaxLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, lengths: tuple[int, ...]) -> Tensor:
        values, argmax = reduce_max(rows, weight, bias, lengths, any(ctx.needs_input_grad))
        ctx.save_for_backward(rows, weight, argmax)
        ctx.has_bias, ctx.lengths = bias is not None, lengths
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weight, argmax = ctx.saved_tensors
        gradient = gradients[0]  # (B, K)
        if 0 in ctx.lengths:  # whose texts have no argmax
            empty = torch.tensor([length == 0 for length in ctx.lengths], device=gradient.device)
            gradient = gradient.masked_fill(empty[:, None], 0.0)
        d_rows = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_rows = _row_gradient(gradient, argmax, weight, ctx.lengths).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = _weight_gradient(gradient, argmax, rows).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            d_bias = gradient.sum(0).to(weight.dtype)
        return d_rows, d_weight, d_bias, None


def _row_gradient(gradient: Tensor, argmax: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    """(T, D) float32 of gradient and argmax (B, K), a few texts at a time."""
    weight = weight.float()
    out = torch.empty(sum(lengths), weight.shape[1], device=weight.device)
    height = max(_ENTRIES // max(len(weight), 1), 1)
    end = 0
    for first in range(0, len(lengths), height):
        texts = slice(first, first + height)
        start, end = end, end + sum(lengths[texts])
        text, cluster = gradient[texts].nonzero(as_tuple=True)
        row, order = torch.sort(argmax[texts][text, cluster] - start, stable=True)
        scale = gradient[texts][text, cluster][order]
        out[start:end] = _bags(weight, cluster[order], row, scale, end - start)
    return out


def _weight_gradient(gradient: Tensor, argmax: Tensor, rows: Tensor) -> Tensor:
    """(K, D) float32 of gradient and argmax (B, K), a few clusters at a time."""
    count, rows = gradient.shape[1], rows.float()
    out = torch.empty(count, rows.shape[1], device=rows.device)
    width = max(_ENTRIES // max(len(gradient), 1), 1)
    for first in range(0, count, width):
        columns = slice(first, first + width)
        turned = gradient[:, columns].t().contiguous()
        cluster, text = turned.nonzero(as_tuple=True)
        chosen = argmax[:, columns][text, cluster].long()
        out[columns] = _bags(rows, chosen, cluster, turned[cluster, text], len(turned))
    return out


def _first(block: Tensor, best: Tensor, memory: Tensor, countdown: Tensor) -> Tensor:
    """Where each maximum is reached first, (N, L, C) and (N, C) -> (N, C) int32.

    `max` would tell, but reads column by column; comparing, counting down and taking the maximum again goes through
    the block in order and is about nine times as fast on a CPU.
    """
    length = block.shape[1]
    marks = memory[: block.numel()].view(block.shape)
    torch.eq(block, best[:, None], out=marks)
    marks *= countdown[-length:, None]
    return (length - marks.amax(1)).to(torch.int32).clamp_(max=length - 1)  # NaN equals nothing


def _bags(table: Tensor, index: Tensor, bag: Tensor, scale: Tensor, count: int) -> Tensor:
    """out[b] = sum of scale[j] * table[index[j]] over j with bag[j] = b, for rising `bag`: (count, D) float32, as the
    table is."""
    if len(index) == 0:
        return torch.zeros(count, table.shape[1], device=table.device)
    offsets = torch.searchsorted(bag, torch.arange(count, device=bag.device, dtype=bag.dtype))
    return F.embedding_bag(index, table, offsets, mode="sum", per_sample_weights=scale.float())


class _SumWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, lengths: tuple[int, ...]) -> Tensor:
        sums = reduce_sum(rows, weight, bias, lengths)
        ctx.save_for_backward(rows, weight, bias)
        ctx.lengths = lengths
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weight, bias = ctx.saved_tensors
        gradient = gradients[0]  # (B, K)
        needs_rows, needs_weight, needs_bias, _ = ctx.needs_input_grad
        d_rows = torch.zeros(rows.shape, device=rows.device) if needs_rows else None
        d_weight = torch.zeros(weight.shape, device=rows.device) if needs_weight else None
        d_bias = torch.zeros(len(weight), device=rows.device) if bias is not None and needs_bias else None
        logits = _Logits(rows, weight)
        owner = torch.repeat_interleave(torch.tensor(ctx.lengths, dtype=torch.long)).to(rows.device)  # (T,)
        for part, _ in _blocks(ctx.lengths, logits.height):
            for columns in logits.columns():
                block = _biased(logits(part, columns), bias, columns)
                slope = torch.where(block > 0, gradient[owner[part], columns] / (1 + block), 0.0)
                if d_rows is not None:
                    d_rows[part].addmm_(slope, weight[columns].float())
                if d_weight is not None:
                    d_weight[columns].addmm_(slope.t(), rows[part].float())
                if d_bias is not None:
                    d_bias[columns] += slope.sum(0)
        return (
            None if d_rows is None else d_rows.to(rows.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(weight.dtype),
            None,
        )


def _biased(logits: Tensor, bias: Tensor | None, columns: slice) -> Tensor:
    """The block in float32, with the bias added."""
    logits = logits.float()
    return logits if bias is None else logits.add_(bias[columns].float())

"""The lexical head on a GPU: pooled logits without logits in memory, forward and backward (Triton).

Operators of torch (`torch.ops.lens.*`), so that torch.compile passes through them. Nothing waits for the device, and
no result depends on the order in which programs run. Imported only where the backend is used: it needs triton.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lens import triton_kernels as kernels

# Legend: B texts, T packed rows, D hidden size, K clusters.

INTERPRETED = kernels.INTERPRETED

_GRADIENT_ELEMENTS = 1 << 26  # gradients of logits alive at a time in the backward pass of sum pooling: 128 MB of bf16


def max_pool(
    rows: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """The greatest logit of each text and cluster, -inf for texts without rows; gradient to the first argmax row only.

    rows (T, D) and weight (K, D) in the same dtype of float16, bfloat16, float32; bias (K,); cu_seqlens (B+1,) the
    offsets of the texts; lengths (B,) how many rows of each text count, from its offset on (None: up to the next
    offset). Returns (B, K) float32. A NaN among a text's logits gives inf. Under autocast the product is computed in
    autocast's dtype, in float32 as torch.backends.cuda.matmul says.
    """
    rows, weight = _cast(rows), _cast(weight)
    starts, ends = _bounds(cu_seqlens, lengths)
    training = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    values: Tensor = torch.ops.lens.max_logits(rows, weight, starts, ends, training)[0]
    return values if bias is None else values + bias.float()  # one shift for all rows of a cluster: the argmax stays


def sum_pool(
    rows: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """The sum over each text's rows of log(1 + relu(logit)), 0 for texts without rows; arguments as for max_pool."""
    rows, weight = _cast(rows), _cast(weight)
    starts, ends = _bounds(cu_seqlens, lengths)
    sums: Tensor = torch.ops.lens.sum_logits(rows, weight, bias, starts, ends)
    return sums


def flat(hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Padded (B, L, D) with mask (B, L) -> rows (B*L, D), offsets (B+1,) and lengths (B,) for max_pool and sum_pool.

    Each text's pooled rows come first, in their order; the others follow. Shapes do not depend on the mask's content,
    so that the device is not waited for, as hidden[mask] would.
    """
    texts, length = hidden.shape[:2]
    cu_seqlens = torch.arange(texts + 1, device=hidden.device) * length
    rows = hidden.flatten(0, 1)
    if mask is None:
        return rows, cu_seqlens, None
    mask = mask.bool()
    places = torch.argsort(mask.to(torch.uint8), dim=1, descending=True, stable=True)
    return rows.index_select(0, (places + cu_seqlens[:-1, None]).flatten()), cu_seqlens, mask.sum(1)


def _cast(tensor: Tensor) -> Tensor:
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _bounds(cu_seqlens: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    starts = cu_seqlens[:-1].to(torch.int32, copy=True)
    return starts, cu_seqlens[1:].to(torch.int32, copy=True) if lengths is None else starts + lengths.int()


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _precision(tensor: Tensor) -> str:
    if tensor.dtype != torch.float32:
        return "ieee"
    matmul: Any = torch.backends.cuda.matmul
    # Once the newer setting was used, torch refuses to tell the older one.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _slots(rows: int, texts: int) -> int:
    """Rows of one text in a tile: few for short texts, and enough that a few texts fill the tile by themselves."""
    mean = rows / texts
    by_length = 16 if mean <= 64 else 32 if mean <= 256 else 128
    return max(by_length, 128 >> min(texts.bit_length() - 1, 3))


def _processors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def _pieces(rows: Tensor, texts: int, clusters: int) -> int:
    """Into how many pieces of 256 rows or more few long texts are cut, so that every processor gets two programs."""
    programs = -(-clusters // 128) * -(-texts * _slots(len(rows), texts) // 128)
    return max(1, min(2 * _processors(rows) // programs, len(rows) // texts // 256))


def _pool(
    rows: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor, ends: Tensor, summed: bool, argmax: bool
) -> tuple[Tensor, Tensor]:
    """Values (B, K) and argmax (B, K), empty unless wanted."""
    texts, clusters = len(starts), len(weight)
    if len(rows) == 0 or texts == 0 or clusters == 0:
        values = rows.new_full((texts, clusters), 0.0 if summed else -torch.inf, dtype=torch.float32)
        return values, torch.full((texts, clusters) if argmax else (0,), -1, dtype=torch.int32, device=rows.device)
    pieces = _pieces(rows, texts, clusters)
    if pieces == 1:
        return _launch(rows, weight, bias, starts, ends, summed, argmax)
    share = (ends - starts).clamp(min=0)[:, None] * torch.arange(pieces + 1, device=rows.device) // pieces
    bounds = (starts[:, None] + share).int()  # (B, pieces + 1)
    values, winners = _launch(
        rows, weight, bias, bounds[:, :-1].flatten(), bounds[:, 1:].flatten(), summed, argmax
    )  # (B * pieces, K)
    values = values.view(texts, pieces, clusters)
    if summed:
        return values.sum(1), winners
    greatest, piece = values.max(1)  # of equal ones the first
    return greatest, winners.view(values.shape).gather(1, piece[:, None])[:, 0] if argmax else winners


def _launch(
    rows: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor, ends: Tensor, summed: bool, argmax: bool
) -> tuple[Tensor, Tensor]:
    texts, clusters = len(starts), len(weight)
    values = rows.new_empty((texts, clusters), dtype=torch.float32)
    winners = rows.new_empty((texts, clusters) if argmax else (0,), dtype=torch.int32)
    rows, weight = _unit_stride(rows), _unit_stride(weight)
    order = torch.argsort(ends - starts, descending=True, stable=True)  # texts of one tile are of similar length
    slots = _slots(len(rows), texts)

    def grid(sizes: dict[str, int]) -> tuple[int]:
        return (-(-clusters // sizes["CLUSTERS"]) * -(-texts // (sizes["COLUMNS"] // slots)),)

    with _device(rows):
        kernels.pool[grid](
            values, winners, rows, weight, bias, starts, ends, order,
            texts, len(rows), clusters, rows.stride(0), weight.stride(0), WIDTH=rows.shape[1], SLOTS=slots,
            SUM=summed, ARGMAX=argmax, HAS_BIAS=bias is not None, PRECISION=_precision(rows),
        )  # fmt: skip
    return values, winners


def _add_chosen(source: Tensor, chosen: Tensor, factor: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """(N, D): the sum of factor[e] * source[chosen[e]] over e from starts (N,) to ends (N,), in source's dtype."""
    source = _unit_stride(source)
    out = source.new_empty(len(starts), source.shape[1])
    if out.numel():
        with _device(source):
            kernels.add_chosen[(len(starts), -(-source.shape[1] // 128))](
                out, source, chosen, factor, starts, ends, out.stride(0), source.stride(0),
                WIDTH=source.shape[1], ENTRIES=32, DEPTH=128,
            )  # fmt: skip
    return out


@torch.library.custom_op(
    "lens::max_logits",
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor starts, Tensor ends, bool argmax) -> (Tensor, Tensor)",
)
def _max_logits(rows: Tensor, weight: Tensor, starts: Tensor, ends: Tensor, argmax: bool) -> tuple[Tensor, Tensor]:
    return _pool(rows, weight, None, starts, ends, summed=False, argmax=argmax)


@_max_logits.register_fake
def _(rows: Tensor, weight: Tensor, starts: Tensor, ends: Tensor, argmax: bool) -> tuple[Tensor, Tensor]:
    shape = (len(starts), len(weight))
    return rows.new_empty(shape, dtype=torch.float32), rows.new_empty(shape if argmax else (0,), dtype=torch.int32)


@torch.library.custom_op(
    "lens::max_logits_d_rows",
    mutates_args=(),
    schema="(Tensor gradient, Tensor argmax, Tensor rows, Tensor weight, Tensor ends) -> Tensor",
)
def _max_d_rows(gradient: Tensor, argmax: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    total = len(rows)
    dtype = torch.int32 if total < 1 << 30 else torch.int64
    # Sorted, each row's clusters lie together. Odd keys are rows, even ones end a text: the flat keys rise throughout.
    keys = torch.where(gradient != 0, 2 * argmax.to(dtype) + 1, 2 * ends.to(dtype)[:, None])
    keys, clusters = torch.sort(keys, dim=1, stable=True)
    wanted = 2 * torch.arange(total, dtype=dtype, device=rows.device) + 1
    starts = torch.searchsorted(keys.flatten(), wanted)
    stops = torch.searchsorted(keys.flatten(), wanted, right=True)
    return _add_chosen(weight, clusters.int(), gradient.gather(1, clusters), starts, stops)


@_max_d_rows.register_fake
def _(gradient: Tensor, argmax: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


@torch.library.custom_op(
    "lens::max_logits_d_weight",
    mutates_args=(),
    schema="(Tensor gradient, Tensor argmax, Tensor rows) -> Tensor",
)
def _max_d_weight(gradient: Tensor, argmax: Tensor, rows: Tensor) -> Tensor:
    texts, clusters = gradient.shape
    bounds = torch.arange(clusters + 1, device=rows.device) * texts
    return _add_chosen(rows, argmax.t().contiguous(), gradient.t().contiguous(), bounds[:-1], bounds[1:])


@_max_d_weight.register_fake
def _(gradient: Tensor, argmax: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty(gradient.shape[1], rows.shape[1])


def _save_max(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, weight, _, ends, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(rows, weight, ends, output[1])


def _max_backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    rows, weight, ends, argmax = ctx.saved_tensors
    gradient = torch.where(argmax >= 0, gradient, 0.0)
    d_rows = d_weight = None
    if ctx.needs_input_grad[0]:
        d_rows = torch.ops.lens.max_logits_d_rows(gradient, argmax, rows, weight, ends)
    if ctx.needs_input_grad[1]:
        d_weight = torch.ops.lens.max_logits_d_weight(gradient, argmax, rows)
    return d_rows, d_weight, None, None, None


_max_logits.register_autograd(_max_backward, setup_context=_save_max)


@torch.library.custom_op(
    "lens::sum_logits",
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor? bias, Tensor starts, Tensor ends) -> Tensor",
)
def _sum_logits(rows: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor, ends: Tensor) -> Tensor:
    return _pool(rows, weight, bias, starts, ends, summed=True, argmax=False)[0]


@_sum_logits.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty((len(starts), len(weight)), dtype=torch.float32)


@torch.library.custom_op(
    "lens::sum_logits_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor rows, Tensor weight, Tensor? bias, Tensor starts, Tensor ends, bool[3] needed)"
    " -> (Tensor, Tensor, Tensor)",
)
def _sum_gradients(
    gradient: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weight and bias, empty where not needed; one block of rows x K at a time."""
    (total, width), clusters = rows.shape, len(weight)
    d_rows = rows.new_zeros((total, width) if needed[0] else (0,))
    d_weight = rows.new_zeros((clusters, width) if needed[1] else (0,), dtype=torch.float32)
    d_bias = rows.new_zeros((clusters,) if needed[2] else (0,), dtype=torch.float32)
    if total and len(starts) and clusters:
        gradient, rows, weight = gradient.contiguous(), _unit_stride(rows), _unit_stride(weight)
        place = torch.arange(total, dtype=torch.int32, device=rows.device)
        owner = torch.searchsorted(ends, place, right=True, out_int32=True).clamp_(max=len(starts) - 1)
        owner = torch.where((starts[owner] <= place) & (place < ends[owner]), owner, -1)
        height = max(_GRADIENT_ELEMENTS // clusters, 128)
        for first in range(0, total, height):
            part = slice(first, first + height)
            inner = _block_gradient(gradient, rows[part], weight, bias, owner[part])
            if needed[0]:
                d_rows[part] = inner @ weight
            if needed[1]:
                d_weight += inner.t() @ rows[part]
            if needed[2]:
                d_bias += inner.sum(0, dtype=torch.float32)
    return d_rows, d_weight.to(weight.dtype), d_bias if bias is None else d_bias.to(bias.dtype)


def _block_gradient(gradient: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor) -> Tensor:
    inner = rows.new_empty(len(rows), len(weight))

    def grid(sizes: dict[str, int]) -> tuple[int]:
        return (-(-len(rows) // sizes["COLUMNS"]) * -(-len(weight) // sizes["CLUSTERS"]),)

    with _device(rows):
        kernels.sum_logit_gradient[grid](
            inner, gradient, rows, weight, bias, owner, len(rows), len(weight), rows.stride(0), weight.stride(0),
            WIDTH=rows.shape[1], HAS_BIAS=bias is not None, PRECISION=_precision(rows),
        )  # fmt: skip
    return inner


@_sum_gradients.register_fake
def _(
    gradient: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias = weight.new_empty(len(weight) if needed[2] else 0, dtype=torch.float32 if bias is None else bias.dtype)
    return rows.new_empty(rows.shape if needed[0] else 0), weight.new_empty(weight.shape if needed[1] else 0), d_bias


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sum_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.lens.sum_logits_backward(gradient, *ctx.saved_tensors, needed)
    return *(d if need else None for d, need in zip(gradients, needed, strict=True)), None, None


_sum_logits.register_autograd(_sum_backward, setup_context=_save_sum)

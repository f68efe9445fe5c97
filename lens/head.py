"""Hidden states -> lexical embedding: the only copy of the formula.

    e_k = max over pooled positions i of log(1 + relu(h_i . c_k + b_k))        (LENS, arXiv 2501.09749, section 3)

`log1p` and `relu` are monotone, so the maximum is taken over the bare logits and activated afterwards on the
(B, K) result. Maximum pooling passes gradient only to the positions where a maximum is reached, so nothing of size
(B, L, K) needs to survive the forward pass.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lens.config import LensConfig, Pooling

# Legend: B texts, L tokens, T pooled tokens of all texts, D hidden size, V vocabulary, K clusters.

Backend = Literal["auto", "eager", "chunked", "triton"]


def _missing_for_triton() -> str:
    """What triton lacks on this machine, nothing being imported; it compiles a C module when it first runs a kernel."""
    if find_spec("triton") is None:
        return "triton: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler: install gcc"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "Python's C headers: install python3-dev"
    return ""


_TRITON_LACKS = _missing_for_triton()
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CHUNK_ELEMENTS = 1 << 24  # logits alive at a time in the chunked backend: 64 MB of float32


def activate(logits: Tensor) -> Tensor:
    """log(1 + relu(logits)) in float32."""
    return torch.log1p(torch.relu(logits.float()))


def lexical_pool(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    pooling: Pooling = "max",
    backend: Backend = "auto",
) -> Tensor:
    """Pools log1p(relu(hidden . weight + bias)) over the positions of each text.

    Shapes: hidden (B, L, D) with mask (B, L), true where pooled (None: everywhere); or packed hidden (T, D) with
    cu_seqlens (B+1,), the offsets of the texts. weight (K, D), bias (K,). Returns (B, K) float32, differentiable
    in hidden, weight and bias; a text without pooled positions gets zeros. `eager` is the readable reference and
    holds all B*L*K logits; `chunked` holds 64 MB of them at most and keeps none for the backward pass; `triton` keeps
    them in a GPU's registers, never waits for the GPU, and so does not check what is in cu_seqlens. `auto` takes it
    for float16, bfloat16 and float32 on CUDA devices from compute capability 8.0 on.
    Raises ValueError for shapes that do not fit together, for unknown names, and for tensors that triton cannot take;
    ImportError for backend="triton" where triton or what it needs is not installed.
    """
    _check(hidden, weight, bias, mask, cu_seqlens)
    if pooling not in ("max", "sum", "last"):
        raise ValueError(f"pooling must be max, sum or last; found {pooling!r}")
    if backend not in ("auto", "eager", "chunked", "triton"):
        raise ValueError(f"backend must be auto, eager, chunked or triton; found {backend!r}")
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    if pooling != "last" and (backend == "triton" or (backend == "auto" and _triton_fits(hidden))):
        return _triton(hidden, weight, bias, mask, cu_seqlens, pooling)
    rows, lengths = _rows(hidden, mask, cu_seqlens)
    if pooling == "last":
        return _last(rows, lengths, weight, bias)
    if backend == "eager":
        return _eager(rows, lengths, weight, bias, pooling)
    if pooling == "sum":
        return _chunked_sum(rows, lengths, weight, bias)
    greatest: Tensor = _MaxLogits.apply(rows, weight, bias, tuple(lengths))  # type: ignore[no-untyped-call]
    return activate(greatest)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    packed = cu_seqlens is not None
    if hidden.dim() != (2 if packed else 3):
        raise ValueError(
            f"hidden must be (T, D) with cu_seqlens and (B, L, D) without; found {tuple(hidden.shape)} "
            f"{'with' if packed else 'without'} cu_seqlens"
        )
    if packed and mask is not None:
        raise ValueError("give mask (padded input) or cu_seqlens (packed input), not both")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be (K, {hidden.shape[-1]}) to fit hidden; found {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},); found {tuple(bias.shape)}")
    if mask is not None and mask.shape != hidden.shape[:2]:
        raise ValueError(f"mask must be {tuple(hidden.shape[:2])}; found {tuple(mask.shape)}")


def _rows(hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, list[int]]:
    """Pooled rows of all texts, one after another (T, D), and the number of rows of each text (B)."""
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        if int(cu_seqlens[0]) != 0 or sum(lengths) != len(hidden) or min(lengths, default=0) < 0:
            raise ValueError(f"cu_seqlens must rise from 0 to T={len(hidden)}; found {cu_seqlens.tolist()}")
        return hidden, lengths
    if mask is None:
        return hidden.flatten(0, 1), [hidden.shape[1]] * hidden.shape[0]
    mask = mask.bool()
    return hidden[mask], mask.sum(1).tolist()


def _eager(rows: Tensor, lengths: list[int], weight: Tensor, bias: Tensor | None, pooling: Pooling) -> Tensor:
    weights = activate(F.linear(rows, weight, bias))  # (T, K)
    pooled = []
    for text in torch.split(weights, lengths):  # (rows of one text, K)
        if len(text) == 0:
            pooled.append(text.sum(0))
        else:
            pooled.append(text.max(0).values if pooling == "max" else text.sum(0))
    return torch.stack(pooled) if pooled else weights.new_zeros(0, len(weight))  # (B, K)


def _last(rows: Tensor, lengths: list[int], weight: Tensor, bias: Tensor | None) -> Tensor:
    counts = torch.tensor(lengths, dtype=torch.long, device=rows.device)
    filled = counts > 0
    ends = counts.cumsum(0)[filled] - 1
    pooled = torch.zeros(len(lengths), len(weight), device=rows.device)
    return pooled.masked_scatter(filled[:, None], activate(F.linear(rows[ends], weight, bias)))  # (B, K)


def last_rows(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The last row of each text, packed rows (T, D) with offsets (B+1,) -> (B, D); zeros for texts without rows."""
    filled = cu_seqlens.diff() > 0
    ends = (cu_seqlens[1:] - 1)[filled]
    empty = rows.new_zeros(len(filled), rows.shape[1])
    return empty.masked_scatter(filled[:, None], rows[ends])


def _column_chunks(rows: int, columns: int) -> list[slice]:
    width = max(_CHUNK_ELEMENTS // max(rows, 1), 64)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def _chunked_sum(rows: Tensor, lengths: list[int], weight: Tensor, bias: Tensor | None) -> Tensor:
    owner = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.long, device=rows.device))  # (T,)

    def columns(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        zeros = torch.zeros(len(lengths), len(weight), device=rows.device)
        return zeros.index_add(0, owner, activate(F.linear(rows, weight, bias)))

    parts = [
        checkpoint(columns, rows, weight[c], None if bias is None else bias[c], use_reentrant=False)
        for c in _column_chunks(len(rows), len(weight))
    ]
    return torch.cat(parts, dim=1)  # (B, K)


def _triton_fits(hidden: Tensor) -> bool:
    return (
        hidden.is_cuda
        and hidden.dtype in _TRITON_DTYPES
        and not _TRITON_LACKS
        and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
    )


def _triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    pooling: Pooling,
) -> Tensor:
    if _TRITON_LACKS:
        raise ImportError(f"backend='triton' needs {_TRITON_LACKS}, or take backend='auto'")
    if hidden.dtype not in _TRITON_DTYPES:
        raise ValueError(f"backend='triton' takes float16, bfloat16 and float32; found {hidden.dtype}: cast, or 'auto'")
    from lens import triton_pool

    if not (hidden.is_cuda or triton_pool.INTERPRETED):
        raise ValueError(
            f"backend='triton' needs CUDA tensors; found {hidden.device}: move them, take backend='auto', "
            "or set TRITON_INTERPRET=1 before Python starts, which is slow and for tests"
        )
    lengths = None
    if cu_seqlens is None:
        hidden, cu_seqlens, lengths = triton_pool.flat(hidden, mask)
    if pooling == "sum":
        return triton_pool.sum_pool(hidden, weight, bias, cu_seqlens, lengths)
    return activate(triton_pool.max_pool(hidden, weight, bias, cu_seqlens, lengths))


class _MaxLogits(torch.autograd.Function):
    """Per text and cluster the greatest logit (B, K), -inf without positions; gradient to the argmax rows only."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, lengths: tuple[int, ...]) -> Tensor:
        texts, clusters = len(lengths), len(weight)
        values = torch.full((texts, clusters), -torch.inf, dtype=torch.float32, device=rows.device)
        argmax = torch.zeros((texts, clusters), dtype=torch.long, device=rows.device)
        training = any(ctx.needs_input_grad)
        for c in _column_chunks(len(rows), clusters):
            logits = F.linear(rows, weight[c], None if bias is None else bias[c])  # (T, columns)
            start = 0
            for text, part in enumerate(torch.split(logits, list(lengths))):
                if len(part) == 0:
                    continue
                if training:
                    best = part.max(0)
                    values[text, c] = best.values.float()
                    argmax[text, c] = best.indices + start
                else:
                    values[text, c] = part.amax(0).float()
                start += len(part)
        ctx.save_for_backward(rows, weight, argmax)
        ctx.has_bias = bias is not None
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weight, argmax = ctx.saved_tensors
        gradient = gradients[0]  # (B, K)
        text, cluster = gradient.nonzero(as_tuple=True)
        sparse = torch.sparse_coo_tensor(
            torch.stack([argmax[text, cluster], cluster]),
            gradient[text, cluster],
            (len(rows), len(weight)),
            check_invariants=False,
        ).coalesce()  # (T, K): one entry per active cluster of each text
        d_rows = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_rows = torch.sparse.mm(sparse, weight.float()).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = torch.sparse.mm(sparse.t().coalesce(), rows.float()).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            d_bias = gradient.sum(0).to(weight.dtype)
        return d_rows, d_weight, d_bias, None


def whitened(weight: Tensor) -> Tensor:
    """Rows (K, D) -> centred rows times the inverse square root of their covariance, scaled to a mean norm of 1.

    A sentence encoder was never trained to be read through its word embeddings, which crowd a few directions of the
    hidden space. Whitened, they cover it evenly, so that the overlap of two texts' active clusters follows the angle
    between their states (relu features of evenly spread rows: Cho & Saul 2009, the arc-cosine kernel of order 1).
    Directions in which the rows do not vary stay at zero. Raises ValueError unless K > D + 1, since D + 1 rows or fewer
    would all come out equally far from each other, and when all rows are the same.
    """
    count, width = weight.shape
    if count <= width + 1:
        raise ValueError(f"whitening {width} dimensions needs more than {width + 1} centroids, found {count}")
    rows = weight.double()
    centred = rows - rows.mean(0)
    spread, directions = torch.linalg.eigh(centred.T @ centred)  # (D,) rising, (D, D)
    if not float(spread[-1]) > 1e-12 * float(rows.square().sum()):
        raise ValueError("all centroids are the same: nothing to whiten")
    inverse = torch.where(spread > 1e-10 * spread[-1], spread.clamp(min=1e-300).rsqrt(), 0.0)
    evened = centred @ (directions * inverse) @ directions.T
    scaled: Tensor = (evened / evened.norm(dim=1).mean()).to(weight.dtype)
    return scaled


class NoTransform(nn.Module):
    """Hidden states as they are. Every transform takes packed states (T, D) and the texts' offsets (B+1,)."""

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        return hidden


class MlmTransform(nn.Module):
    """BERT's MLM transform, LayerNorm(GELU(dense(x))), (T, D) -> (T, D)."""

    def __init__(self, hidden_size: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        normed: Tensor = self.norm(F.gelu(self.dense(hidden)))
        return normed


class ResidualTransform(nn.Module):
    """x + up(GELU(down(LayerNorm(x)))), (..., D) -> (..., D), with `up` zero at first: it starts as the identity."""

    def __init__(self, hidden_size: int, expansion: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, expansion * hidden_size)
        self.up = nn.Linear(expansion * hidden_size, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        changed: Tensor = hidden + self.up(F.gelu(self.down(self.norm(hidden))))
        return changed


class ContextTransform(nn.Module):
    """x + gate * mean of the text's x, (T, D) -> (T, D).

    Sentence encoders are trained so that the mean over a text's positions carries its meaning, which no single
    position does; with it each position's logits tell what the text is about, and the position adds its own word.
    """

    def __init__(self, hidden_size: int, gate: float = 10.0) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((hidden_size,), gate))

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        lengths = cu_seqlens.diff()  # (B,)
        owner = torch.repeat_interleave(lengths)  # (T,)
        sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, owner, hidden)
        means = sums / lengths.clamp(min=1)[:, None]  # (B, D)
        return hidden + self.gate * means[owner]


class LexicalHead(nn.Module):
    """The clustered (or full vocabulary) head: optional transform, centroids (K, D), optional bias (K,), pooling.

    `labels` (V,) int32 holds the cluster of every token id, -1 for tokens in none. The dense ablation has no
    centroids: `weight` is (0, D), and the last pooled state (D,) is the embedding.
    """

    labels: Tensor

    def __init__(self, config: LensConfig, labels: Tensor) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.normalize = config.normalize
        self.backend: Backend = "auto"
        self.dense = config.head == "dense"
        self.weight = nn.Parameter(torch.empty(0 if self.dense else config.dimensions, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.dimensions)) if config.bias else None
        self.transform: nn.Module = NoTransform()
        if config.transform == "mlm":
            self.transform = MlmTransform(config.hidden_size)
        elif config.transform == "residual":
            self.transform = ResidualTransform(config.hidden_size)
        elif config.transform == "context":
            self.transform = ContextTransform(config.hidden_size)
        self.register_buffer("labels", labels.to(torch.int32), persistent=False)
        nn.init.normal_(self.weight, std=config.hidden_size**-0.5)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """hidden (B, L, D) with mask (B, L), or (T, D) with cu_seqlens (B+1,) -> embeddings (B, K) float32."""
        if cu_seqlens is None:  # the transform, too, sees pooled positions only
            mask = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
            mask = mask.bool()
            hidden, cu_seqlens = hidden[mask], F.pad(mask.sum(1).cumsum(0), (1, 0))
        states = self.transform(hidden, cu_seqlens)
        if self.dense:
            pooled = last_rows(states, cu_seqlens).float()
        else:
            pooled = lexical_pool(
                states, self.weight, self.bias, cu_seqlens=cu_seqlens, pooling=self.pooling, backend=self.backend
            )
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

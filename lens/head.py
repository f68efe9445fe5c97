"""Hidden states -> lexical embedding: the only copy of the formula.

    e_k = max over pooled positions i of log(1 + relu(h_i . c_k + b_k))        (LENS, arXiv 2501.09749, section 3)

`log1p` and `relu` are monotone, so the maximum is taken over the bare logits and activated afterwards on the
(B, K) result. Maximum pooling passes gradient only to the positions where a maximum is reached, so nothing of size
(B, L, K) is ever needed: lens/chunked.py computes the same without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lens import chunked
from lens.backends import Backend, choose
from lens.bag import bag
from lens.config import Activation, LensConfig, Pooling, TransformActivation
from lens.int8 import Int8Rows

# Legend: B texts, L tokens, T pooled tokens of all texts, D hidden size, V vocabulary, K clusters.


def activate(logits: Tensor, activation: Activation = "log1p") -> Tensor:
    """log(1 + relu(logits)) in float32; with `log1p_twice` log(1 + that)."""
    once = torch.log1p(torch.relu(logits.float()))
    return torch.log1p(once) if activation == "log1p_twice" else once


def lexical_pool(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    pooling: Pooling = "max",
    backend: Backend = "auto",
    activation: Activation = "log1p",
) -> Tensor:
    """Pools log1p(relu(hidden . weight + bias)), or what `activation` says, over the positions of each text.

    Shapes: hidden (B, L, D) with mask (B, L), true where pooled (None: everywhere); or packed hidden (T, D) with
    cu_seqlens (B+1,), the offsets of the texts. weight (K, D), bias (K,). Returns (B, K) float32, differentiable
    in hidden, weight and bias; a text without pooled positions gets zeros. `eager` is the readable reference and
    holds all B*L*K logits; `chunked` holds one block of them, forward and backward (see lens/chunked.py); `triton`
    keeps them in a GPU's registers, never waits for the GPU, and so does not check what is in cu_seqlens. `auto` takes
    it for float16, bfloat16 and float32 on CUDA devices from compute capability 8.0 on, else `chunked`.
    Raises ValueError for shapes that do not fit together, for unknown names, and for tensors that triton cannot take;
    ImportError for backend="triton" where triton or what it needs is not installed.
    """
    _check(hidden, weight, bias, mask, cu_seqlens)
    if pooling not in ("max", "sum", "last"):
        raise ValueError(f"pooling must be max, sum or last; found {pooling!r}")
    if activation not in ("log1p", "log1p_twice"):
        raise ValueError(f"activation must be log1p or log1p_twice; found {activation!r}")
    if activation == "log1p_twice" and pooling == "sum":
        raise ValueError("activation='log1p_twice' goes with pooling max and last, not with sum")
    backend = choose(backend, hidden)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    if backend == "triton" and pooling != "last":
        return _triton(hidden, weight, bias, mask, cu_seqlens, pooling, activation)
    rows, lengths = _rows(hidden, mask, cu_seqlens)
    if pooling == "last":
        return _last(rows, lengths, weight, bias, activation)
    if backend == "eager":
        return _eager(rows, lengths, weight, bias, pooling, activation)
    if pooling == "sum":
        return chunked.sum_pool(rows, weight, bias, lengths)
    return activate(chunked.max_pool(rows, weight, bias, lengths), activation)


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
    lengths = mask.sum(1).tolist()
    if sum(lengths) == mask.numel():  # choosing rows would copy them, and their gradient back
        return hidden.flatten(0, 1), lengths
    return hidden[mask], lengths


def _eager(
    rows: Tensor, lengths: list[int], weight: Tensor, bias: Tensor | None, pooling: Pooling, activation: Activation
) -> Tensor:
    weights = activate(F.linear(rows, weight, bias), activation)  # (T, K)
    pooled = []
    for text in torch.split(weights, lengths):  # (rows of one text, K)
        if len(text) == 0:
            pooled.append(text.sum(0))
        else:
            pooled.append(text.max(0).values if pooling == "max" else text.sum(0))
    return torch.stack(pooled) if pooled else weights.new_zeros(0, len(weight))  # (B, K)


def _last(rows: Tensor, lengths: list[int], weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    counts = torch.tensor(lengths, dtype=torch.long, device=rows.device)
    filled = counts > 0
    ends = counts.cumsum(0)[filled] - 1
    pooled = torch.zeros(len(lengths), len(weight), device=rows.device)
    return pooled.masked_scatter(filled[:, None], activate(F.linear(rows[ends], weight, bias), activation))  # (B, K)


def last_rows(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The last row of each text, packed rows (T, D) with offsets (B+1,) -> (B, D); zeros for texts without rows."""
    filled = cu_seqlens.diff() > 0
    if len(rows) == 0:
        return rows.new_zeros(len(filled), rows.shape[1])
    return torch.where(filled[:, None], rows[(cu_seqlens[1:] - 1).clamp(min=0)], 0.0)


def _triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    pooling: Pooling,
    activation: Activation,
) -> Tensor:
    from lens import triton_pool

    lengths = None
    if cu_seqlens is None:
        hidden, cu_seqlens, lengths = triton_pool.flat(hidden, mask)
    if pooling == "sum":
        return triton_pool.sum_pool(hidden, weight, bias, cu_seqlens, lengths)
    return activate(triton_pool.max_pool(hidden, weight, bias, cu_seqlens, lengths), activation)


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


ACTIVATIONS: dict[TransformActivation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class MlmTransform(nn.Module):
    """The transform of an MLM head, LayerNorm(activation(dense(x))), (T, D) -> (T, D)."""

    def __init__(self, hidden_size: int, activation: TransformActivation = "gelu", eps: float = 1e-12) -> None:
        super().__init__()
        self.activation = activation
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        normed: Tensor = self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))
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
        owner = torch.repeat_interleave(lengths, output_size=len(hidden))  # (T,)
        sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, owner, hidden)
        means = sums / lengths.clamp(min=1)[:, None]  # (B, D)
        return hidden + self.gate * means[owner]


class LexicalHead(nn.Module):
    """The clustered (or full vocabulary) head: optional transform, centroids (K, D), optional bias (K,), pooling.

    `labels` (V,) int32 holds the cluster of every token id, -1 for tokens in none. The dense ablation has no
    centroids: `weight` is (0, D), and the last pooled state (D,) is the embedding. Where queries are bags of tokens
    `query_weights` (K,) holds the value of each dimension, 1 until `weigh_queries`; it is not trained unless its
    requires_grad is set.
    """

    labels: Tensor

    def __init__(self, config: LensConfig, labels: Tensor) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.activation = config.activation
        self.normalize = config.normalize
        self.backend: Backend = "auto"
        self.dense = config.head == "dense"
        self.weight = nn.Parameter(torch.empty(0 if self.dense else config.dimensions, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.dimensions)) if config.bias else None
        bags = config.query_encoder == "bag"
        self.query_weights = nn.Parameter(torch.ones(config.dimensions), requires_grad=False) if bags else None
        self.transform: nn.Module = NoTransform()
        if config.transform == "mlm":
            self.transform = MlmTransform(config.hidden_size, config.transform_activation, config.transform_eps)
        elif config.transform == "residual":
            self.transform = ResidualTransform(config.hidden_size)
        elif config.transform == "context":
            self.transform = ContextTransform(config.hidden_size)
        self.rows: Int8Rows | None = None
        """The rows of `weight` in int8, which then stand in for it."""
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
        elif self.rows is not None and self.pooling != "last":
            pooled = self._pool_int8(states, self.rows, cu_seqlens.diff().tolist())
        else:
            pooled = lexical_pool(
                states,
                self.weight,
                self.bias,
                cu_seqlens=cu_seqlens,
                pooling=self.pooling,
                backend=self.backend,
                activation=self.activation,
            )
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def bag(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Queries as bags of tokens: ids (T,) of all texts with offsets (B+1,) -> embeddings (B, K) float32,
        differentiable in `query_weights`. Raises ValueError for a model whose queries are none."""
        weights = self._query_weights()
        embeddings = bag(ids, offsets, self.labels, len(weights)) * weights.float()
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

    @torch.no_grad()
    def weigh_queries(self, weights: Tensor) -> None:
        """Gives each dimension of queries, as bags of tokens, its weight (K,), such as `lens.bag.idf`.

        Raises ValueError for another shape, for values that are not finite, and as `bag`.
        """
        own = self._query_weights()
        if weights.shape != own.shape:
            raise ValueError(
                f"query weights must be ({len(own)},), one for each dimension; found {tuple(weights.shape)}"
            )
        if not bool(torch.isfinite(weights).all()):
            raise ValueError("query weights hold NaN or infinite values")
        own.copy_(weights)

    def _query_weights(self) -> Tensor:
        if self.query_weights is None:
            raise ValueError("queries of this model are no bags of tokens: build it with query_encoder='bag'")
        return self.query_weights

    def quantize(self) -> None:
        """Multiplies in int8 from now on, on a CPU and without gradients (see lens/int8.py)."""
        if not self.dense:
            self.rows = Int8Rows(self.weight)

    def _pool_int8(self, states: Tensor, rows: Int8Rows, lengths: list[int]) -> Tensor:
        if self.pooling == "sum":
            return chunked.reduce_sum(states, rows, self.bias, lengths)
        return activate(chunked.reduce_max(states, rows, self.bias, lengths)[0], self.activation)

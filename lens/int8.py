"""Encoding on a CPU in 8 bits: weights with one scale per output, activations with one scale per token.

Linear layers and the head multiply integers (oneDNN's kernels in torch) and give float32 back; what lies between them,
attention among it, stays in float32. A token's scale follows from its own values alone, so that a text's embedding
does not depend on the texts beside it. For encoding only: nothing is differentiable.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lens import products
from lens.chunked import Blocks, block_size

# Legend: T tokens, I and O inputs and outputs of a linear layer, D hidden size, K clusters.

_SIBLINGS = (  # linear layers of one module that take the same input
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
)
_ROWS = 512  # tokens quantised and multiplied at a time, so that they stay in the cache


class _Packed:
    """Weights (O, I) in int8, packed for the kernel, with the scale of each output."""

    def __init__(self, weight: Tensor) -> None:
        weight = weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp(min=1e-12)
        self.__setstate__(((weight / scales[:, None]).round().to(torch.int8), scales))

    def __setstate__(self, state: tuple[Tensor, Tensor]) -> None:
        weight, self.scales = state
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.zeros = torch.zeros(len(weight), dtype=torch.long)

    def __getstate__(self) -> tuple[Tensor, Tensor]:
        return self.weight.to_dense().t().contiguous(), self.scales

    def __call__(self, tokens: Tensor) -> Tensor:
        """Products (T, O) float32 of quantised tokens (T, I), in units of the tokens' scales."""
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            tokens, 1.0, _top() + 1, self.weight, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product


def _top() -> int:
    """Greatest whole number of an activation, which is then stored from 1 to 2 top + 1, zero being top + 1.

    Processors without VNNI add two products in 16 bits, which 2 * 127 * 127 just fits and more would overflow.
    """
    return 127 if torch.cpu._is_vnni_supported() else 63


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (T, I) as uint8 around _top() + 1, and their scales (T, 1).

    Raises FloatingPointError for NaN and infinite values.
    """
    top = _top()
    scales = x.abs().amax(1, keepdim=True) / top
    if not math.isfinite(float(scales.sum())):
        raise FloatingPointError("activations hold NaN or infinite values, which int8 cannot hold")
    steps = scales.clamp(min=1e-30).reciprocal()
    tokens = torch.mul(x, steps).round_().to(torch.int8)  # straight to uint8 would take six times as long
    return tokens.view(torch.uint8).add_(top + 1), scales  # modulo 256


Blocked = list[tuple[slice, Tensor, Tensor]]  # of at most _ROWS tokens: which, in int8, and their scales


class _Shared:
    """An input's tokens, quantised for the first of `count` layers that take it and kept for the others."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: tuple[weakref.ref[Tensor], Blocked, list[int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "kept": None}

    def __call__(self, x: Tensor) -> Blocked:
        kept = self.kept  # read once: another thread may be using the model
        if kept is None or kept[0]() is not x:
            kept = self.kept = weakref.ref(x), list(_blocks(x)), []
        kept[2].append(1)
        if len(kept[2]) == self.count:
            self.kept = None
        return kept[1]


def _blocks(x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    rows = x.reshape(-1, x.shape[-1])
    for start in range(0, len(rows), _ROWS):
        part = slice(start, start + _ROWS)
        yield part, *_quantised(rows[part])


class Int8Linear(nn.Module):
    """x (..., I) float32 -> x W^T + b (..., O) float32, multiplied in 8 bits."""

    bias: Tensor
    shared: _Shared | None = None
    """What layers that take the same input, as query, key and value do, have in common."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = _Packed(linear.weight)
        bias = torch.zeros(self.out_features) if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product, a block of tokens at a time."""
        out = x.new_empty(x.shape[:-1].numel(), self.out_features)
        for part, tokens, scales in _blocks(x) if self.shared is None else self.shared(x):
            torch.addcmul(self.bias, self.packed(tokens), scales, out=out[part])
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, int8"


class Int8Rows:
    """The head's rows (K, D), one packed piece for each block of clusters."""

    def __init__(self, weight: Tensor) -> None:
        self.count = len(weight)
        self.height, self.width = block_size(weight.device)
        self.pieces = [_Packed(weight[start : start + self.width]) for start in range(0, self.count, self.width)]

    def __len__(self) -> int:
        return self.count

    def logits(self, rows: Tensor) -> Blocks:
        """Blocks of rows (T, D) @ these rows in float32; raises FloatingPointError for NaN or infinite values."""
        return _Int8Logits(rows, self)


class _Int8Logits:
    def __init__(self, rows: Tensor, weight: Int8Rows) -> None:
        self.weight, self.height = weight, weight.height
        self.tokens, self.scales = _quantised(rows)

    def columns(self) -> Iterator[slice]:
        for start in range(0, len(self.weight), self.weight.width):
            yield slice(start, min(start + self.weight.width, len(self.weight)))

    def __call__(self, part: slice, columns: slice) -> Tensor:
        product: Tensor = self.weight.pieces[columns.start // self.weight.width](self.tokens[part])
        return product.mul_(self.scales[part])


def quantize(model: Any) -> None:
    """Puts a float32 LensModel on the CPU into 8 bits, an adapter merged in first.

    It can then no longer be trained or saved. Raises ValueError when this build of torch has no 8-bit kernels.
    """
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        raise ValueError("quantization='int8' needs a build of torch with oneDNN's kernels: leave it out here")
    if isinstance(model.backbone, PeftModel):
        model.backbone = model.backbone.merge_and_unload()
    for module in list(model.backbone.modules()):
        for name, child in list(module.named_children()):
            if type(child) in (nn.Linear, products.Linear):
                setattr(module, name, Int8Linear(child))
    for module in model.backbone.modules():
        for names in _SIBLINGS:
            found = [getattr(module, name, None) for name in names]
            layers = [layer for layer in found if isinstance(layer, Int8Linear)]
            if len(layers) == len(names):
                shared = _Shared(len(layers))
                for layer in layers:
                    layer.shared = shared
    model.head.quantize()


def is_int8(model: nn.Module) -> bool:
    """Whether a model has linear layers in int8."""
    return any(isinstance(module, Int8Linear) for module in model.modules())

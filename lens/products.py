"""Matrix products in float32 on CPUs for which torch's usual library, MKL, has no fast kernels.

On AMD processors with AVX-512, MKL's float32 product reaches half of what oneDNN's does, which torch ships as well
(benchmarks/products.py). There linear layers multiply by oneDNN's kernel where no gradient is wanted, and the head's
blocks always; everywhere else products are torch's own.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Legend: T rows, I and O inputs and outputs of a linear layer.

_CPU_FACTS = Path("/proc/cpuinfo")


@functools.cache
def pays() -> bool:
    """Whether this is such a processor. What it is decides, never a measurement, so that results stay the same."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in _CPU_FACTS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I) and bias (O,) -> x W^T + b (..., O), by the faster kernel."""
    if not fits(x, weight, bias):
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def fits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN's kernel can take these, with no gradient, and pays."""
    return (
        not torch.compiler.is_compiling()  # first: what follows cannot be compiled
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > x.shape[-1]  # a single row is no product of matrices
        and not torch.is_grad_enabled()
        and pays()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and (bias is None or (bias.is_contiguous() and bias.dtype == weight.dtype and len(bias) == len(weight)))
    )


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def speed_up(module: nn.Module) -> None:
    """Makes every nn.Linear of `module` on a CPU a Linear, in place, where that pays."""
    if torch.compiler.is_compiling() or not pays():  # in this order, as above
        return
    for part in module.modules():
        if type(part) is nn.Linear and part.weight.device.type == "cpu":
            part.__class__ = Linear

"""Backbones in 4 and 8 bits by bitsandbytes: QLoRA's NF4 (arXiv 2305.14314) and LLM.int8() (arXiv 2208.07339).

The weights of linear layers are quantised while they are read; embeddings, norms and the head of LENS stay as they are.
Quantised weights are only ever used: what is saved is the adapter, and merging goes into the unquantised backbone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from lens.files import require

Quantization = Literal["4bit", "8bit"]


def quantization_config(kind: Quantization, dtype: torch.dtype) -> Any:
    """transformers' configuration of `kind`, computing in `dtype`; `4bit` is NF4 with doubly quantised scales.

    Raises ValueError for other kinds, ImportError with the pip command when bitsandbytes is not installed.
    """
    if kind not in get_args(Quantization):
        raise ValueError(f"quantization must be one of {', '.join(get_args(Quantization))} or None; found {kind!r}")
    require("quantized", "bitsandbytes", "accelerate")
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_quantized(backbone: nn.Module) -> bool:
    """Whether a backbone, or the one inside a PEFT wrapper, was loaded in 4 or 8 bits."""
    bare: Any = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone  # type: ignore[operator]
    return bool(getattr(bare, "is_loaded_in_4bit", False) or getattr(bare, "is_loaded_in_8bit", False))


def keep_differentiable(backbone: nn.Module) -> None:
    """Keeps 4-bit layers in the one form that gradients pass through: on CPUs with AVX512-BF16, bitsandbytes repacks
    them at the first forward pass in eval mode for a kernel without a backward pass, and training would then silently
    get no gradient through them."""
    for module in backbone.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@contextmanager
def exact_rows(backbone: nn.Module) -> Iterator[None]:
    """Within, 8-bit layers work on each token by itself: usually which features count as outliers is decided by the
    whole batch, so that a token changes others by rounding without any attention."""
    states: list[Any] = [
        module.state
        for module in (backbone.modules() if getattr(backbone, "is_loaded_in_8bit", False) else ())
        if hasattr(getattr(module, "state", None), "threshold")
    ]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold

"""FLOPs of LENS by formula: on a decoder of Mistral's form, and on an encoder of BERT's.

Model FLOPs of a decoder's token, for N weights in the layers' matrices, n in the LoRA matrices, L positions and a head
of K centroids of width D:

    forward   2 N + 2 n + 4 L D layers (attention) + 2 K D (head)
    training  4 N + 6 n + 12 L D layers + 2 K D

Frozen matrices need no gradient of their own, hence 4 N rather than 6 N; gradients reach the head's few active
clusters alone and are not counted. Utilisation (MFU) is model FLOPs over time and the GPU's dense bf16 peak. Hardware
FLOPs (HFU) add what is computed again: the layers' forward pass under gradient checkpointing, and a whole forward pass
under gradient caching.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PEAK_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
"""Dense bf16 peaks by a part of the device's name, from the makers' data sheets (SXM boards)."""


@dataclass(frozen=True)
class Shape:
    """A Mistral and the texts that it is measured on. Lengths are in tokens."""

    width: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    clusters: int
    length: int
    passages: int
    """Passages per query."""
    lora_r: int

    @property
    def matrices(self) -> int:
        """N: weights in the layers' linear maps."""
        keys = self.width // self.heads * self.kv_heads
        return self.layers * (2 * self.width * (self.width + keys) + 3 * self.width * self.feed_forward)

    @property
    def lora(self) -> int:
        """n: weights in the LoRA matrices of all seven maps."""
        keys = self.width // self.heads * self.kv_heads
        ends = 2 * 2 * self.width + 2 * (self.width + keys) + 3 * (self.width + self.feed_forward)
        return self.layers * self.lora_r * ends


SHAPES = {
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 32000, 8000, 512, 8, 32),
    "tiny": Shape(64, 128, 2, 4, 2, 400, 100, 32, 3, 4),
}


@dataclass(frozen=True)
class Case:
    """One measurement: what runs, with which weights, on how much at a time."""

    work: str
    """train or encode."""
    weights: str = "bf16"
    """bf16 or 4bit."""
    batch: int = 8
    """Queries per step (train) or thousands of tokens per batch (encode)."""
    checkpointing: bool = True
    """Whether layers are computed again in the backward pass (train)."""
    mini_batch_tokens: int | None = None
    """Tokens per forward pass under gradient caching (train); None: the batch at once."""
    compiled: bool = False
    """Whether torch compiles the layers."""


def forward_flops(shape: Shape, lora: bool) -> float:
    """FLOPs of one token's forward pass, every position pooled."""
    attention = 4 * shape.length * shape.width * shape.layers
    weights = shape.matrices + (shape.lora if lora else 0)
    return 2 * weights + attention + 2 * shape.clusters * shape.width


def training_flops(shape: Shape) -> float:
    """Model FLOPs of one token's forward and backward pass with LoRA."""
    attention = 12 * shape.length * shape.width * shape.layers
    return 4 * shape.matrices + 6 * shape.lora + attention + 2 * shape.clusters * shape.width


def hardware_flops(shape: Shape, case: Case) -> float:
    """FLOPs of one token with what is computed again."""
    head = 2 * shape.clusters * shape.width
    again = forward_flops(shape, lora=True) - head if case.checkpointing else 0.0
    return training_flops(shape) + again + cached_share(shape, case) * forward_flops(shape, lora=True)


def cached_share(shape: Shape, case: Case) -> float:
    """Share of a batch's texts, all of one length, that gradient caching embeds again: all but the last mini-batch."""
    if case.mini_batch_tokens is None:
        return 0.0
    texts, together = case.batch * (shape.passages + 1), max(case.mini_batch_tokens // shape.length, 1)
    return (texts - 1) // together * together / texts


def peak_of(name: str, given: float | None) -> float | None:
    """Dense bf16 peak in TFLOP/s, given or by the device's name."""
    return given or next((float(peak) for part, peak in PEAK_TFLOPS.items() if part in name), None)


def encoder_flops(
    config: Mapping[str, Any],
    lengths: Sequence[int],
    rows: int,
    transform: bool = False,
    pooled: Sequence[int] | None = None,
) -> dict[str, float]:
    """FLOPs of the matrix products of one forward pass of texts of these lengths in tokens, by kind.

    `config` is that of a model of BERT's form; `transform` adds the dense layer of its MLM head, `pooled` are the
    positions of each text that meet the head's `rows` (None: all).
    """
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    tokens, squares = sum(lengths), sum(length * length for length in lengths)
    heads = tokens if pooled is None else sum(pooled)
    return {
        "linear": 2 * tokens * layers * (4 * width * width + 2 * width * inner) + 2 * heads * width * width * transform,
        "attention": 4 * squares * width * layers,
        "head": 2 * heads * width * rows,
    }

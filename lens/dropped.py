"""Dropout on a CPU, where torch's own takes a tenth of a training step and keeps four bytes for every value.

Random numbers are the costly part: 16 bits a value, four values from one draw, take a quarter of the time of torch's
Bernoulli numbers, and a mask keeps one byte. Attention with dropout has no fused kernel on a CPU and would keep two
matrices of scores; here they are drawn and computed again in the backward pass, as flash attention does (Dao et al.
2022, arXiv 2205.14135). Probabilities are rounded to 1/65536.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import repeat_kv

# Legend: N texts of one length, H attention heads, L tokens, E size of a head.

_LEVELS = 1 << 16


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
) -> Tensor:
    """Attention (N, L, H, E) of query (N, H, L, E), key and value (N, heads, L, E), each score dropped by chance.

    `mask`, true where a token sees another, broadcasts to (N, H, L, L); `causal` counts without one. Random numbers
    come from torch's generator.
    """
    length = query.shape[2]
    if causal and mask is None:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    seed = int(torch.randint(1 << 62, ()))
    arguments = query, key, value, mask, scale, min(level_of(dropout), _LEVELS - 1), seed
    if torch.is_grad_enabled():
        out: Tensor = checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)
    else:
        out = _attend(*arguments)
    return out.transpose(1, 2)


class Dropout(nn.Dropout):
    """nn.Dropout with the random numbers of `draw` on a CPU; compiled and elsewhere, and for p=1, as it was."""

    def forward(self, input: Tensor) -> Tensor:
        level = level_of(self.p)
        usual = input.device.type != "cpu" or torch.compiler.is_compiling() or level == _LEVELS
        if usual or level == 0 or not self.training or self.inplace:
            return super().forward(input)
        return input.masked_fill(draw(input.shape, level), 0.0).mul_(_LEVELS / (_LEVELS - level))


def speed_up(module: nn.Module) -> None:
    """Makes every nn.Dropout in `module` a Dropout, in place."""
    for part in module.modules():
        if type(part) is nn.Dropout:
            part.__class__ = Dropout


def level_of(dropout: float) -> int:
    """A probability in 65536ths."""
    return round(dropout * _LEVELS)


def draw(shape: Sequence[int], level: int, seed: int | None = None) -> Tensor:
    """Booleans of `shape`, each true with probability level / 65536, of torch's generator or one of this seed."""
    count = torch.Size(shape).numel()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
    return (bits.view(torch.int16)[:count] < level - _LEVELS // 2).view(shape)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, level: int, seed: int
) -> Tensor:
    shared = query.shape[1] // key.shape[1]  # query heads that share one of key and value
    key, value = repeat_kv(key, shared), repeat_kv(value, shared)
    scores = (query * scale) @ key.transpose(2, 3)  # (N, H, L, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    kept = scores.softmax(-1).masked_fill(draw(scores.shape, level, seed), 0.0)
    return (kept @ value) * (_LEVELS / (_LEVELS - level))

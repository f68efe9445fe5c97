"""The last layers of a backbone on stored states of the layer below, so that training them costs only themselves.

    states of the layer below (once, train/states.py) -> last layers -> the backbone's final states

The layers below are frozen, so their outputs never change. The backbone's own forward pass runs, with its mask, its
positions and its final norm, but with the last layers as its only ones and the stored states as their input: any
transformers model with one list of layers will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lens.backbone import hidden_states

# Legend: B texts, L tokens, T tokens of all texts, D hidden size.

_GROUP = 16  # texts padded together


class TopLayers:
    """The last `count` layers of a transformers backbone. Raises ValueError unless 1 <= count < number of layers."""

    def __init__(self, backbone: nn.Module, count: int) -> None:
        self.backbone = backbone
        self._parent, self._name, layers = layer_list(backbone)
        if not 1 <= count < len(layers):
            raise ValueError(
                f"top_layers must be from 1 to {len(layers) - 1}, found {count}: it has {len(layers)} layers, "
                "and backbone=full trains them all"
            )
        self.layers = nn.ModuleList(list(layers)[-count:])
        self._below: Tensor | None = None

    def below(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States (B, L, D) that enter the first of the last layers, of ids (B, L) under mask (B, L)."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        handle = self.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            hidden_states(self.backbone, input_ids, attention_mask)
        finally:
            handle.remove()
        return found[0]

    def __call__(self, states: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Packed states of the layer below (T, D) with offsets (B+1,) -> the backbone's final states (T, D).

        Texts of like length are padded together, a few at a time.
        """
        lengths = cu_seqlens.diff()
        parts = list(torch.split(states, lengths.tolist()))
        order = lengths.argsort().tolist()
        with self._only():
            for start in range(0, len(order), _GROUP):
                group = order[start : start + _GROUP]
                padded = pad_sequence([parts[i] for i in group], batch_first=True)  # (B, L, D)
                mask = torch.arange(padded.shape[1], device=states.device) < lengths[group][:, None]
                self._below = padded
                final = hidden_states(self.backbone, torch.zeros_like(mask, dtype=torch.long), mask.long())
                for row, i in zip(final, group, strict=True):
                    parts[i] = row[: len(parts[i])]
        return torch.cat(parts)

    @contextmanager
    def _only(self) -> Iterator[None]:
        """Within, the backbone has only the last layers, and the first of them takes `_below` for its input."""

        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._below, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._below}

        every = getattr(self._parent, self._name)
        handle = self.layers[0].register_forward_pre_hook(replace, with_kwargs=True)
        setattr(self._parent, self._name, self.layers)
        try:
            yield
        finally:
            setattr(self._parent, self._name, every)
            handle.remove()
            self._below = None


def layer_list(backbone: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that holds a backbone's list of layers, the list's name there and the list; ValueError without one."""
    count = backbone.config.num_hidden_layers  # type: ignore[union-attr]
    for parent in backbone.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return parent, name, child
    raise ValueError(f"{type(backbone).__name__} has no single list of {count} layers: use backbone=lora or full")

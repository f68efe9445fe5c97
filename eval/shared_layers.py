"""Layers that several models have in common are computed once for all of them.

Models that differ in their head, or in their last layers, have the layers below from one backbone. Side by side on the
same texts, the first one's states that leave these layers are held, and the others take them from there. Nothing is
rounded: a batch is known by its tokens and mask, and layers are shared only where all their weights are equal.

Legend: B texts, T tokens, D hidden size.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lens.backbone import bare_model
from lens.int8 import is_int8
from lens.packed import packing_limit

LOCAL = ("_name_or_path", "_attn_implementation", "transformers_version", "dtype")
"""Facts of a configuration that decide no state, or are compared otherwise."""


class SharedLayers:
    """Has `backbones` share the states below their last layers, of which `limit` bytes are held until `forget`, on
    their device.

    `layers` is how many they share: 0 where weights or configurations differ from the first layer on, or where models
    hand on more than states. Of `batches` so far `hits` took states that were held.
    """

    def __init__(self, backbones: Sequence[nn.Module], limit: int) -> None:
        self.limit = limit
        self.hits = self.batches = 0
        self._held: dict[bytes, Tensor] = {}
        self._size = 0
        self._key: bytes | None = None
        self._found: Tensor | None = None
        self._undo: list[Any] = []
        self.layers = shared_count(backbones)
        if self.layers and not self._works(backbones):
            self.close()
            self.layers = 0
        self.forget()
        self.hits = self.batches = 0

    def forget(self) -> None:
        """Lets go of all states."""
        self._held.clear()
        self._size = 0
        self._key = self._found = None

    def close(self) -> None:
        """Leaves the backbones as they were."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.forget()

    def _join(self, backbones: Sequence[nn.Module]) -> None:
        for backbone in backbones:
            self._undo.append(backbone.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        last = {_layers(backbone)[self.layers - 1] for backbone in backbones}
        for layer in (layer for backbone in backbones for layer in _layers(backbone)[: self.layers]):
            self._undo.append(functools.partial(_restore, layer, vars(layer).get("forward")))
            layer.forward = self._handed_on(layer.forward, layer in last)  # type: ignore[method-assign]

    def _begin(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found = hashlib.blake2b(digest_size=20)
        for name, value in (*enumerate(args), *sorted(options.items())):
            if isinstance(value, Tensor):
                found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                found.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
            else:
                found.update(f"{name} {value!r}".encode())
        self._key = found.digest()
        held = self._held.get(self._key)
        self._found = None if held is None else held.clone()  # the layers above may work in place
        self.batches += 1
        self.hits += held is not None

    def _handed_on(self, forward: Any, last: bool) -> Any:
        def hand_on(*args: Any, **options: Any) -> Any:
            if self._found is not None:
                return self._found
            output = forward(*args, **options)
            if last and isinstance(output, Tensor) and self._key is not None:
                size = output.numel() * output.element_size()
                if self._size + size <= self.limit:
                    self._held[self._key] = output.clone()
                    self._size += size
            return output

        return hand_on

    @torch.inference_mode()
    def _works(self, backbones: Sequence[nn.Module]) -> bool:
        """Whether every backbone gives with the states of the first what it gives by itself."""
        device = next(backbones[0].parameters()).device
        ids = torch.arange(5, 17, device=device)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        alone = [backbone(**inputs).last_hidden_state for backbone in backbones]
        self._join(backbones)
        together = [backbone(**inputs).last_hidden_state for backbone in backbones]
        took = self.hits == len(backbones) - 1
        return took and all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def shared_count(backbones: Sequence[nn.Module]) -> int:
    """How many layers, from the first on, are the same in all `backbones`; at least one is left to each."""
    bare = all(bare_model(backbone) is backbone for backbone in backbones)  # PEFT's layers go deeper
    if len(backbones) < 2 or not bare or any(is_int8(backbone) for backbone in backbones):  # not in a state_dict
        return 0
    for backbone in backbones:
        packing_limit(backbone)  # which may switch the attention
    facts = [_facts(backbone) for backbone in backbones]
    if any(found != facts[0] for found in facts):
        return 0
    lists = [_layers(backbone) for backbone in backbones]
    outside = [
        {name: value for name, value in backbone.state_dict().items() if not name.startswith(prefix)}
        for backbone, prefix in ((backbone, _prefix(backbone)) for backbone in backbones)
    ]
    if not lists[0] or any(not _equal(outside[0], other) for other in outside[1:]):
        return 0
    count = 0
    for layers in list(zip(*lists, strict=True))[:-1]:
        states = [layer.state_dict() for layer in layers]
        if any(not _equal(states[0], other) for other in states[1:]):
            break
        count += 1
    return count


def _facts(backbone: Any) -> Any:
    config = {name: value for name, value in backbone.config.to_dict().items() if name not in LOCAL}
    weight = next(backbone.parameters())
    where = type(backbone), backbone.config._attn_implementation, str(weight.device), weight.dtype, backbone.training
    return config, where


def _prefix(backbone: nn.Module) -> str:
    wanted = _layers(backbone)
    return next((f"{name}." for name, module in backbone.named_modules() if module is wanted), "")


def _layers(backbone: Any) -> nn.ModuleList:
    """The backbone's list of layers; an empty one where there is none or more than one that could be it."""
    count = getattr(backbone.config, "num_hidden_layers", None)
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return lists[0] if len(lists) == 1 else nn.ModuleList()


def _restore(layer: nn.Module, forward: Any) -> None:
    layer.__dict__.pop("forward", None)
    if forward is not None:
        layer.forward = forward


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        isinstance(value, Tensor) and value.shape == other[name].shape and torch.equal(value, other[name])
        for name, value in one.items()
    )

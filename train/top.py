"""The last layers of a backbone on stored states of the layer below, so that training them costs only themselves.

    states of the layer below (once, train/states.py) -> last layers -> the backbone's final states

The layers below are frozen, so their outputs never change. The backbone's own forward pass runs, with its masks, its
positions and its final norm, but the layers below hand on the stored states instead of computing. That this gives what
the whole backbone gives is not believed but probed: a model that does more between its layers is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lens.backbone import hidden_states
from lens.packed import packed_states
from lens.text import offsets, token_batches

# Legend: B texts, L tokens, T tokens of all texts, D hidden size.

_BATCH_TOKENS = {"cpu": 1 << 11}  # padded tokens of one forward pass
_TOLERANCE = 1e-3  # relative; a mask or layer mistaken for another gives 1e-1 and more


class TopLayers:
    """The last `count` layers of a transformers backbone, which alone are left trainable; `packed`: without padding.

    Raises ValueError unless 1 <= count < number of layers, and for a backbone that cannot be cut there.
    """

    def __init__(self, backbone: nn.Module, count: int, packed: bool = False) -> None:
        self.backbone = backbone
        self.packed = packed
        every = layer_list(backbone)
        if len(every) < 2:
            raise ValueError("backbone=top needs at least two layers, and it has one: use backbone=full")
        if not 1 <= count < len(every):
            raise ValueError(
                f"top_layers must be from 1 to {len(every) - 1}, found {count}: it has {len(every)} layers, "
                "and backbone=full trains them all"
            )
        self._lower = list(every)[:-count]
        self.layers = nn.ModuleList(list(every)[-count:])
        self._rest: tuple[Any, ...] | None = None  # what layers give beside states; None: bare states
        self._probe()
        backbone.requires_grad_(False)
        self.layers.requires_grad_(True)

    def train(self, mode: bool = True) -> None:
        """Sets the last layers' mode; the rest stays in eval mode: its dropout would be noise that nothing learns."""
        self.backbone.eval()
        self.layers.train(mode)

    def below(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """States (B, L, D) that leave the layers below, of ids (B, L) under mask (B, L)."""
        return self._caught(lambda: hidden_states(self.backbone, input_ids, attention_mask))

    def below_packed(self, input_ids: Tensor, cu_seqlens: Tensor, lengths: Sequence[int]) -> Tensor:
        """States (T, D) that leave the layers below, of packed ids (T,) with offsets (B+1,) and lengths (B)."""
        return self._caught(lambda: packed_states(self.backbone, input_ids, cu_seqlens, lengths))[0]

    def _caught(self, run: Callable[[], Any]) -> Tensor:
        found: list[Any] = []
        handle = self._lower[-1].register_forward_hook(lambda module, args, output: found.append(output))
        try:
            run()
        finally:
            handle.remove()
        output = found[0]
        self._rest = tuple(output[1:]) if isinstance(output, tuple) else None
        states: Tensor = output if self._rest is None else output[0]
        return states

    def __call__(self, states: Tensor, lengths: Sequence[int]) -> Tensor:
        """Packed states of the layer below (T, D) of texts of these lengths (B) -> the backbone's final states (T, D).

        Texts of like length go together.
        """
        parts = list(torch.split(states, list(lengths)))
        budget = _BATCH_TOKENS.get(states.device.type, 1 << 15)
        for batch in token_batches(lengths, budget, self.packed):
            sizes = [lengths[i] for i in batch]
            if self.packed:
                chosen = torch.cat([parts[i] for i in batch])
                with self._handing_on(chosen[None].to(next(self.layers.parameters()).dtype)):
                    ids = torch.zeros(len(chosen), dtype=torch.long, device=chosen.device)
                    final = packed_states(self.backbone, ids, offsets(sizes).to(chosen.device), sizes)
                for part, i in zip(torch.split(final, sizes), batch, strict=True):
                    parts[i] = part.to(states.dtype)
                continue
            padded = pad_sequence([parts[i] for i in batch], batch_first=True)  # (B, L, D)
            if padded.shape[1] == 0:
                continue
            mask = torch.arange(padded.shape[1]) < torch.tensor(sizes)[:, None]
            mask = mask.to(states.device)
            with self._handing_on(padded.to(next(self.layers.parameters()).dtype)):
                final = hidden_states(self.backbone, torch.zeros_like(mask, dtype=torch.long), mask.long())
            for row, i in zip(final, batch, strict=True):
                parts[i] = row[: len(parts[i])].to(states.dtype)
        return torch.cat(parts)

    @contextmanager
    def _handing_on(self, states: Tensor) -> Iterator[None]:
        """Within, the layers below compute nothing and give `states`.

        They stay in their places, because models choose masks by a layer's number (Gemma, Qwen).
        """
        output = states if self._rest is None else (states, *self._rest)
        own = [vars(layer).get("forward") for layer in self._lower]
        for layer in self._lower:
            layer.forward = lambda *args, **kwargs: output  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer, forward in zip(self._lower, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward  # type: ignore[method-assign]

    @torch.no_grad()
    def _probe(self) -> None:
        """Raises ValueError unless two texts of unequal length come out as they do of the whole backbone."""
        modes = {module: module.training for module in self.backbone.modules()}
        self.backbone.eval()
        weight = next(self.layers.parameters())
        rows = self.backbone.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        ids = (torch.arange(24, device=weight.device).view(2, 12) * 7 + 5) % rows
        lengths = torch.tensor([12, 7], device=weight.device)
        mask = torch.arange(12, device=weight.device) < lengths[:, None]
        cut = f"{type(self.backbone).__name__} cannot be cut below its last {len(self.layers)} layers"
        try:
            whole = hidden_states(self.backbone, ids, mask.long())[mask].float()
            packed = self.below(ids, mask.long())[mask]
            if any(item is not None for item in self._rest or ()):
                raise ValueError("its layers give more than states")
            found = self(packed, [12, 7]).float()
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{cut} ({' '.join(str(error).split())[:120]}): use another value of backbone") from error
        finally:
            for module, training in modes.items():
                module.training = training
        tolerance = _TOLERANCE if weight.dtype == torch.float32 else 0.05
        if not float((found - whole).norm()) <= tolerance * float(whole.norm()):
            raise ValueError(f"{cut}: their outputs then differ. Use another value of backbone")


def layer_list(backbone: nn.Module) -> nn.ModuleList:
    """A backbone's list of layers; raises ValueError when there is none or more than one that could be it."""
    count = getattr(backbone.config, "num_hidden_layers", None)
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(lists) != 1:
        raise ValueError(
            f"{type(backbone).__name__} has {len(lists)} lists of its {count} layers, and backbone=top needs one: "
            "use another value of backbone"
        )
    return lists[0]

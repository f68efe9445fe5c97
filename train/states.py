"""Hidden states of frozen layers, computed once and kept in a file, so that training what lies above them is fast.

Kept in float16, (T, D) for T tokens of all distinct texts: the final states of pooled positions where the whole
backbone is frozen, the states below its last layers, of all positions, where those are trained (train/top.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lens.backbone import hidden_states
from lens.files import read_json, write_json
from lens.model import LensModel
from lens.packed import packed_states
from lens.products import speed_up
from lens.text import TextProcessor, Tokens, offsets, pooled_places, token_batches
from train.data import Example, Key, tokenize
from train.top import TopLayers

# Legend: B texts, T kept tokens of all texts, D hidden size.


def keys_of(sources: Sequence[Sequence[Example]], queries: bool = True) -> list[Key]:
    """Every distinct (text, kind, instruction) that training on `sources` can ask for, in order, without `queries` of
    passages alone."""

    def walk() -> Iterable[Key]:
        for source in sources:
            for example in source:
                if queries:
                    yield example.query, "query", example.prompt
                instruction = example.prompt if example.symmetric else None
                for passage in (*example.pos, *example.neg):
                    yield passage, "document", instruction

    return list(dict.fromkeys(walk()))


class HiddenStates:
    """The file of hidden states, addressed by text. `spans` are the pooled positions of texts kept whole, else None."""

    def __init__(
        self,
        path: Path,
        keys: Sequence[Key],
        lengths: Sequence[int],
        width: int,
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.index = {key: i for i, key in enumerate(keys)}
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.spans = spans
        self.path, self.shape = path, (int(self.offsets[-1]), width)
        self.states = np.memmap(path, dtype=np.float16, mode="r", shape=self.shape)

    def lengths(self, texts: Sequence[Key]) -> list[int]:
        """Stored positions of each text."""
        rows = [self.index[key] for key in texts]
        counts: list[int] = (self.offsets[np.array(rows) + 1] - self.offsets[rows]).tolist()
        return counts

    def batch(self, texts: Sequence[Key]) -> dict[str, Any]:
        """Packed states (T, D) float32 of the texts, in order, as QueryPassageModel takes them.

        They are named `hidden` where they are final; `below`, with the texts' `lengths` and the places of the pooled
        positions, where the last layers are still to come.
        """
        rows = [self.index[key] for key in texts]
        parts = [self.states[self.offsets[i] : self.offsets[i + 1]] for i in rows]
        lengths = tuple(len(part) for part in parts)
        states = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        if self.spans is None:
            return {"hidden": states, "pool_offsets": offsets(lengths)}
        pooled, ends = pooled_places([self.spans[row] for row in rows], offsets(lengths).tolist())
        return {"below": states, "lengths": lengths, "pooled": pooled, "pool_offsets": ends}


@torch.inference_mode()
def compute_states(
    model: LensModel,
    text: TextProcessor,
    keys: Sequence[Key],
    path: Path,
    top: TopLayers | None = None,
    batch_tokens: int = 8192,
    packed: bool = False,
) -> HiddenStates:
    """Computes the states of `keys` with the model's backbone, or takes them from `path` when they are the same.

    With `top` they are those below its layers; with `packed` they are computed without padding. Raises OSError
    when the disk is full.
    """
    tokens = tokenize(text, keys)
    kept = [(item.start, item.end) if top is None else (0, len(item.ids)) for item in tokens]
    lengths = [end - start for start, end in kept]
    width = model.config.hidden_size
    digest = hashlib.sha256(repr((model.config.to_dict(), width, top and len(top.layers))).encode())
    for item in tokens:
        digest.update(np.array([item.start, item.end, *item.ids], dtype=np.int64).tobytes())
    stamp, wanted = path.with_suffix(".json"), {"sha256": digest.hexdigest(), "bytes": max(sum(lengths), 1) * width * 2}
    if not _is_written(path, stamp, wanted):
        path.parent.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        states = np.memmap(path, dtype=np.float16, mode="w+", shape=(max(sum(lengths), 1), width))
        starts = np.concatenate([[0], np.cumsum(lengths)])
        device = next(model.backbone.parameters()).device
        model.eval()
        speed_up(model.backbone)
        rows = [i for i in range(len(tokens)) if lengths[i]]
        with tqdm(total=len(rows), desc="hidden states", unit="text", leave=False) as bar:
            for places in token_batches([len(tokens[i].ids) for i in rows], batch_tokens, packed):
                part = [rows[place] for place in places]
                hidden = _states(model, text, [tokens[i] for i in part], top, packed, device)  # (T, D)
                for text_states, i in zip(hidden.split([len(tokens[i].ids) for i in part]), part, strict=True):
                    found = text_states[slice(*kept[i])]
                    if not bool(torch.isfinite(found).all()):
                        raise ValueError("hidden states exceed float16 (65504): train with cache_hidden: false")
                    states[starts[i] : starts[i + 1]] = found.numpy()
                bar.update(len(part))
        states.flush()
        del states
        write_json(stamp, wanted)
    spans = None if top is None else [(item.start, item.end) for item in tokens]
    return HiddenStates(path, keys, lengths, width, spans)


def _states(
    model: LensModel, text: TextProcessor, tokens: list[Tokens], top: TopLayers | None, packed: bool, device: Any
) -> Tensor:
    """States (T, D) of all tokens of the texts in float16, on the CPU."""
    if packed:
        inputs = text.pack(tokens).inputs(device)
        where = inputs["input_ids"], inputs["cu_seqlens"], inputs["lengths"]
        hidden = packed_states(model.backbone, *where) if top is None else top.below_packed(*where)
    else:
        batch = text.collate(tokens)
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        hidden = (hidden_states(model.backbone, ids, mask) if top is None else top.below(ids, mask))[mask.bool()]
    return hidden.to(torch.float16).cpu()


def _is_written(path: Path, stamp: Path, wanted: dict[str, Any]) -> bool:
    """Whether the file of these states is there, whole."""
    try:
        return read_json(stamp) == wanted and path.stat().st_size == wanted["bytes"]
    except (OSError, ValueError):
        return False

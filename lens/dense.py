"""The dense baseline and teacher: a backbone's mean-pooled, normalised hidden states.

Legend: n texts, B texts of a batch, L tokens, T tokens of all texts, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lens import products
from lens.backbone import hidden_states, load_backbone, load_tokenizer, position_limit
from lens.devices import resolve_device
from lens.packed import choose_packed, packed_states
from lens.text import token_batches


class Dense:
    """The backbone as it comes, without LENS: mean of a text's last hidden states, L2-normalised.

    `max_length` is in tokens, special tokens included, and at most what the backbone allows; `batch_tokens` bounds
    the tokens of one batch, padded where the backbone cannot do without (lens/packed.py). A decoder stays causal.
    Raises OSError when the model or its tokenizer cannot be found, ValueError for damaged ones and for a device that is
    not there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str | None = None,
        dtype: str | None = None,
        max_length: int = 128,
        batch_tokens: int | None = None,
    ) -> None:
        self._tokenizer = load_tokenizer(os.fspath(path))
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._device = resolve_device(device)
        if max_length < 3:
            raise ValueError(f"max_length must be at least 3 tokens, found {max_length}")
        model: Any
        kind = getattr(torch, dtype or "float32")
        model, _, _ = load_backbone(os.fspath(path), bidirectional=False, dtype=kind, device=self._device)
        self._model = model.eval()
        products.speed_up(self._model)
        self._max_length = min(max_length, position_limit(self._model) or max_length)
        half = kind in (torch.bfloat16, torch.float16)
        self._packed = choose_packed(self._model, self._max_length, None, half)
        self._batch_tokens = batch_tokens or (4096 if self._device.type == "cpu" else 32768)
        self.dimensions = int(self._model.config.hidden_size)

    def encode(self, texts: Sequence[str], label: str = "dense", show_progress: bool = True) -> NDArray[np.float32]:
        """Embeddings (n, D) of unit length, in the order of the texts."""
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        tokens = self._tokenizer(clean, truncation=True, max_length=self._max_length)["input_ids"] if clean else []
        embeddings = np.zeros((len(texts), self.dimensions), dtype=np.float32)  # (n, D)
        bar = tqdm(total=len(texts), desc=label, unit="text", disable=None if show_progress else True)
        with torch.inference_mode(), bar as progress:
            for rows in token_batches([len(ids) for ids in tokens], self._batch_tokens, self._packed):
                means = self._means([tokens[row] for row in rows])
                embeddings[rows] = F.normalize(means, dim=-1).cpu().numpy()
                progress.update(len(rows))
        return embeddings

    def _means(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Means (B, D) of the hidden states of each of B texts, 0 for a text without tokens."""
        lengths = torch.tensor([len(ids) for ids in tokens], device=self._device)
        if self._packed:
            offsets = F.pad(lengths.cumsum(0), (1, 0))
            ids = torch.tensor([token for text in tokens for token in text], dtype=torch.long, device=self._device)
            states = packed_states(self._model, ids, offsets, [len(text) for text in tokens])  # (T, D)
            owner = torch.repeat_interleave(lengths, output_size=len(states))  # (T,)
            sums = states.new_zeros(len(tokens), states.shape[1], dtype=torch.float32)
            sums.index_add_(0, owner, states.float())
        else:
            batch = self._tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self._device)
            hidden = hidden_states(self._model, batch["input_ids"], batch["attention_mask"]).float()  # (B, L, D)
            sums = (hidden * batch["attention_mask"].unsqueeze(-1)).sum(1)
        return sums / lengths.clamp(min=1).unsqueeze(-1)

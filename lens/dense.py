"""The dense baseline and teacher: a backbone's mean-pooled, normalised hidden states.

Legend: n texts, B texts of a batch, L tokens, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lens.backbone import load_backbone, load_tokenizer, position_limit, resolve_device
from lens.text import token_batches


class Dense:
    """The backbone as it comes, without LENS: mean of the last hidden states over the attention mask, L2-normalised.

    `max_length` is in tokens, special tokens included, and at most what the backbone allows; `batch_tokens` bounds
    the padded tokens of one batch. A decoder stays causal. Raises OSError when the model or its tokenizer
    cannot be found, ValueError for damaged ones and for a device that is not there.
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
        self._max_length = min(max_length, position_limit(self._model) or max_length)
        self._batch_tokens = batch_tokens or (4096 if self._device.type == "cpu" else 32768)
        self.dimensions = int(self._model.config.hidden_size)

    def encode(self, texts: Sequence[str], label: str = "dense") -> NDArray[np.float32]:
        """Embeddings (n, D) of unit length, in the order of the texts."""
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        tokens = self._tokenizer(clean, truncation=True, max_length=self._max_length)["input_ids"] if clean else []
        embeddings = np.zeros((len(texts), self.dimensions), dtype=np.float32)  # (n, D)
        with torch.inference_mode(), tqdm(total=len(texts), desc=label, unit="text", disable=None) as progress:
            for rows in token_batches([len(ids) for ids in tokens], self._batch_tokens):
                batch = self._tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt")
                batch = batch.to(self._device)
                hidden = self._model(**batch).last_hidden_state.float()  # (B, L, D)
                mask = batch["attention_mask"].unsqueeze(-1)  # (B, L, 1)
                mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)  # (B, D)
                embeddings[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
                progress.update(len(rows))
        return embeddings

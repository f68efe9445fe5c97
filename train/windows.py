"""Raw text -> windows of tokens -> masked batches, for masked language modelling.

Of the texts their tokens are held, 4 bytes each, and 8 bytes for each window; while they are read, a hash of each text
too, in a set that takes about 100 bytes a text.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from lens.corpus import texts_file
from lens.files import read_jsonl, read_lines
from lens.text import token_batches
from train.passages import BLANK, key_of

# Legend: B windows, L tokens, V vocabulary.

FIELDS = ("text", "paragraphs", "query", "positive", "pos", "neg")
"""Fields of a row that hold a text, or a list of texts."""
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
_AT_ONCE = 1000  # texts
_BATCH_TOKENS = 2048  # of a part of a batch, padding included


def stream(path: str | Path) -> Iterator[str]:
    """The texts of a .txt file (one a line), of the fields FIELDS of a .jsonl file, or of the corpus of a BEIR folder;
    `title`, where there is one, goes before `text`.

    Raises FileNotFoundError, and ValueError for another kind of file and, as "FILE:LINE: ...", for a row without text.
    """
    path = texts_file(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: --text takes {', '.join(SUFFIXES)} and BEIR folders: convert it, or rename it")
    if ".jsonl" not in path.suffixes:
        yield from (line for _, line in read_lines(path))
        return
    for number, row in read_jsonl(path):
        fields = [name for name in FIELDS if row.get(name) is not None]
        if not fields:
            raise ValueError(f"{path}:{number}: a row needs one of the fields {', '.join(FIELDS)}; found {list(row)}")
        for name in fields:
            texts = row[name] if isinstance(row[name], list) else [row[name]]
            if name == "text":
                texts = [row.get("title") or "", *texts]
            if not all(isinstance(text, str) for text in texts):
                what = "`title` and `text`" if name == "text" else f"`{name}`"
                raise ValueError(f"{path}:{number}: {what} must hold text only, found {texts!r:.80}")
            yield from [" ".join(filter(None, texts))] if name == "text" else texts


class Windows:
    """The distinct texts of files as tokens, each text cut into windows of `max_length` tokens, special ones included.

    Raises what `stream` raises, and ValueError where no text holds a token.
    """

    def __init__(self, files: Sequence[str | Path], tokenizer: Any, max_length: int) -> None:
        self.special: NDArray[np.int64] = np.array(sorted(tokenizer.all_special_ids))
        tokens, ends = array("i"), array("q", [0])
        seen = {BLANK}
        for file in files:
            texts = _unseen(stream(file), seen)
            while some := list(islice(texts, _AT_ONCE)):
                found = tokenizer(some, truncation=True, max_length=max_length, return_overflowing_tokens=True)
                for window in found["input_ids"]:
                    if not np.isin(window, self.special).all():
                        tokens.extend(window)
                        ends.append(len(tokens))
        self.texts = len(seen) - 1
        if not tokens:
            raise ValueError(f"{', '.join(map(str, files))}: no text holds a token: give files with text in them")
        self.tokens: NDArray[np.int32] = np.frombuffer(tokens, dtype=np.int32)
        self.ends: NDArray[np.int64] = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        """The tokens (L,) of a window."""
        return self.tokens[self.ends[index] : self.ends[index + 1]]

    def frequencies(self, size: int) -> Tensor:
        """How often each of `size` tokens occurs, special ones never: (V,) float32."""
        counts = np.bincount(self.tokens, minlength=size)
        counts[self.special] = 0
        return torch.from_numpy(counts).float()

    def parts(self, rows: Sequence[int]) -> list[list[dict[str, list[int]]]]:
        """Windows in groups of similar length, each window as a collator takes it."""
        windows = [self[row] for row in rows]
        features = [
            {"input_ids": window.tolist(), "special_tokens_mask": np.isin(window, self.special).astype(int).tolist()}
            for window in windows
        ]
        groups = token_batches([len(window) for window in windows], _BATCH_TOKENS)
        return [[features[i] for i in group] for group in groups]


def _unseen(texts: Iterator[str], seen: set[int]) -> Iterator[str]:
    for text in texts:
        if (key := key_of(text)) not in seen:
            seen.add(key)
            yield text


def plain(windows: Windows, rows: Sequence[int], tokenizer: Any) -> list[dict[str, Tensor]]:
    """Windows as they are, in parts of similar length: `input_ids` and `attention_mask`, each (B, L)."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    found = [collator(part) for part in windows.parts(rows)]
    return [{name: part[name] for name in ("input_ids", "attention_mask")} for part in found]


def mask(
    windows: Windows, rows: Sequence[int], tokenizer: Any, share: float, kept: float, seed: int
) -> list[dict[str, Tensor]]:
    """Windows of which `share` of the tokens are to be predicted: of these `kept` stay as they are, 1/9 of the others
    become random tokens and the rest the mask token (BERT: 0.1, so 10% and 80%). In parts of similar length:
    `input_ids`, `attention_mask` and `labels`, -100 but where a token is to be predicted, each (B, L). That is one
    token of all at least.
    """
    collator = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=share, mask_replace_prob=(1 - kept) * 8 / 9, random_replace_prob=(1 - kept) / 9
    )
    collator.generator = torch.Generator().manual_seed(seed)
    parts = windows.parts(rows)
    while True:
        masked = [dict(collator(part)) for part in parts]
        if any(bool((part["labels"] >= 0).any()) for part in masked):
            return masked

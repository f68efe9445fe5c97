"""DeepCT (arXiv 1910.10687): text -> a weight for each of its words, which as a term frequency feeds a BM25 index.

A linear layer over an encoder's hidden states regresses onto query term recall, the share of a passage's queries that
hold the term. A word's weight is that of its first subword. Texts longer than the encoder's limit are read in windows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import lens
from lens.backbone import check_base, hidden_states, load_backbone, load_tokenizer, position_limit, resize_vocabulary
from lens.config import check_fields
from lens.devices import Device, resolve_device
from lens.files import read_json, read_tensors
from lens.search.impacts import WeightedBM25
from lens.search.words import Word, Words
from lens.text import check_texts, token_batches

# Legend: B windows, L tokens, P words, D hidden size.

CONFIG_FILE, HEAD_FILE = "deepct.json", "head.safetensors"
FORMAT_VERSION = 1
SCALE = 100
"""Frequency of a word of weight 1."""


@dataclass(frozen=True)
class DeepCTConfig:
    """The facts of a model, as they stand in deepct.json."""

    base: str
    """Where the encoder came from."""
    max_length: int = 128
    """Tokens of a window, special tokens included."""
    stopwords: str = "english"
    """Stopword list of bm25s, or none: these words get no weight."""
    stemmer: str = "english"
    """Snowball stemmer, or none."""

    def __post_init__(self) -> None:
        if type(self.max_length) is not int or self.max_length < 4:
            raise ValueError(f"max_length must be a whole number of at least 4 tokens, found {self.max_length!r}")


class Window(NamedTuple):
    """A piece of a text: its token ids, special tokens included, and its words with the place of their first token."""

    ids: list[int]
    words: list[Word]
    places: list[int]


class DeepCTModel(nn.Module):
    """Tokens in, word weights out: an encoder and a linear layer (D -> 1)."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear = nn.Linear(int(backbone.config.hidden_size), 1)  # type: ignore[union-attr, arg-type]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, places: Tensor, targets: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`weights` (P,) of the words whose first tokens lie at `places` (P,) among the B*L of ids (B, L); with
        `targets` (P,) also `loss`, their mean squared error."""
        states = hidden_states(self.backbone, input_ids, attention_mask).flatten(0, 1)
        weights = self.linear(states.index_select(0, places)).squeeze(-1).float()
        if targets is None:
            return {"weights": weights}
        return {"loss": F.mse_loss(weights, targets), "weights": weights}


class DeepCT:
    """A model with its tokenizer and word analysis on a device; get one from `DeepCT.build` or `DeepCT.load`."""

    def __init__(self, model: DeepCTModel, tokenizer: Any, config: DeepCTConfig, device: Device | None = None) -> None:
        self.device = resolve_device(device)
        self.model, self.tokenizer, self.config = model.to(self.device).eval(), tokenizer, config
        self.words = Words(config.stopwords, config.stemmer)

    @classmethod
    def build(cls, base: str | os.PathLike[str], device: Device | None = None, **settings: Any) -> DeepCT:
        """An untrained model over an encoder (folder or hub id); `settings` are fields of DeepCTConfig.

        Raises FileNotFoundError or ValueError naming what is wrong.
        """
        base = check_base(base)
        tokenizer = load_tokenizer(base)
        backbone, _, _ = load_backbone(base)
        config = DeepCTConfig(base, **settings)
        limit = position_limit(backbone)
        if limit is not None and config.max_length > limit:
            raise ValueError(f"max_length={config.max_length} is more than the {limit} positions of {base}")
        return cls(DeepCTModel(backbone), tokenizer, config, device)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: Device | None = None) -> DeepCT:
        """Reads a folder that `write` filled; raises FileNotFoundError or ValueError naming the file."""
        folder = Path(path)
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: it is no DeepCT model folder")
        config = read_config(folder / CONFIG_FILE, FORMAT_VERSION, DeepCTConfig)
        tokenizer = load_tokenizer(str(folder))
        backbone, _, _ = load_backbone(str(folder))
        resize_vocabulary(backbone, len(tokenizer))
        model = DeepCTModel(backbone)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.linear.state_dict().items()}
        tensors = read_tensors(folder / HEAD_FILE, shapes)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise ValueError(f"{folder / HEAD_FILE} holds NaN or infinite values; the file is damaged")
        model.linear.load_state_dict(tensors)
        return cls(model, tokenizer, config, device)

    def write(self, folder: Path) -> None:
        """Writes the artifact's files into an existing folder, deepct.json last."""
        self.model.backbone.save_pretrained(folder)  # type: ignore[operator]
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.linear.state_dict().items()}
        save_file(state, folder / HEAD_FILE, {"format": "pt"})
        self.tokenizer.save_pretrained(folder)
        content = {"format_version": FORMAT_VERSION, "lens_version": lens.__version__, **asdict(self.config)}
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def windows(self, texts: Sequence[str]) -> list[list[Window]]:
        """The windows of each text, in order; a word cut by a window's end belongs to the one it begins in."""
        texts = check_texts(texts)
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.config.max_length,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        located = self.words.located(texts)
        found: list[list[Window]] = [[] for _ in texts]
        taken = [0] * len(texts)  # words of each text that windows before hold
        for window, text in enumerate(encoded["overflow_to_sample_mapping"]):
            words, places = [], []
            offsets = encoded["offset_mapping"][window]
            special = encoded["special_tokens_mask"][window]
            for place, (start, end) in enumerate(offsets):
                while not special[place] and taken[text] < len(located[text]):
                    word = located[text][taken[text]]
                    if end <= word.start:
                        break
                    if start < word.end:
                        words.append(word)
                        places.append(place)
                    taken[text] += 1  # a word before this token has none, such as a character that is cleaned away
            found[text].append(Window(encoded["input_ids"][window], words, places))
        return found

    def collate(self, windows: Sequence[Window]) -> dict[str, Tensor]:
        """Arguments of the model for windows, padded on the right."""
        width = max(len(window.ids) for window in windows)
        pad = next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.unk_token_id, 0) if i is not None)
        ids = torch.full((len(windows), width), pad, dtype=torch.long)
        mask = torch.zeros((len(windows), width), dtype=torch.long)
        for row, window in enumerate(windows):
            ids[row, : len(window.ids)] = torch.tensor(window.ids)
            mask[row, : len(window.ids)] = 1
        places = [row * width + place for row, window in enumerate(windows) for place in window.places]
        return {"input_ids": ids, "attention_mask": mask, "places": torch.tensor(places, dtype=torch.long)}

    @torch.inference_mode()
    def weights(self, texts: Sequence[str], batch_tokens: int | None = None) -> list[list[tuple[Word, float]]]:
        """Each text's words in order with their weights, as the model gives them. Raises FloatingPointError for weights
        that are not finite."""
        budget = batch_tokens or (1 << 12 if self.device.type == "cpu" else 1 << 15)
        found: list[list[tuple[Word, float]]] = [[] for _ in texts]
        with tqdm(total=len(texts), desc="DeepCT", unit="text", disable=None, leave=False) as bar:
            for start in range(0, len(texts), 1024):  # texts whose windows are held at a time
                parts = self.windows(texts[start : start + 1024])
                flat = [window for part in parts for window in part]
                values: list[NDArray[np.float32]] = [np.empty(0, dtype=np.float32)] * len(flat)
                for rows in token_batches([len(window.ids) for window in flat], budget):
                    batch = {k: v.to(self.device) for k, v in self.collate([flat[i] for i in rows]).items()}
                    weights = self.model(**batch)["weights"].cpu()
                    if not bool(torch.isfinite(weights).all()):
                        raise FloatingPointError("DeepCT gave a weight that is NaN or infinite: train again")
                    counts = [len(flat[i].words) for i in rows]
                    for i, part_weights in zip(rows, weights.split(counts), strict=True):
                        values[i] = part_weights.numpy()
                left = iter(values)
                for text, part in enumerate(parts, start):
                    for window in part:
                        found[text] += list(zip(window.words, next(left).tolist(), strict=True))
                bar.update(len(parts))
        return found

    def frequencies(self, texts: Sequence[str], scale: float = SCALE) -> list[dict[str, int]]:
        """Term frequencies round(scale * weight) of each text, those of 0 and below left out.

        As in the released code, of a word's occurrences the highest weight counts, and words of one stem are summed.
        """
        return [term_frequencies(row, scale) for row in self.weights(texts)]

    def index(self, texts: Sequence[str], k1: float = 10.0, b: float = 0.75, scale: float = SCALE) -> WeightedBM25:
        """A BM25 index of the texts with these frequencies."""
        return WeightedBM25(self.frequencies(texts, scale), k1, b)


def term_frequencies(weighted: Sequence[tuple[Word, float]], scale: float = SCALE) -> dict[str, int]:
    """Frequencies by term of one text's words with their weights; see `DeepCT.frequencies`."""
    highest: dict[tuple[str, str], float] = {}
    for word, weight in weighted:
        key = word.lower, word.term
        highest[key] = max(weight, highest.get(key, weight))
    terms: dict[str, int] = {}
    for (_, term), weight in highest.items():
        frequency = round(scale * weight)
        if frequency > 0:
            terms[term] = terms.get(term, 0) + frequency
    return terms


def read_config(path: Path, newest: int, kind: Any) -> Any:
    """The dataclass `kind` from a model's JSON file; raises ValueError for unknown fields and for a format version
    above `newest`."""
    values = read_json(path)
    version = values.pop("format_version", None)
    values.pop("lens_version", None)
    if not isinstance(version, int) or version > newest:
        raise ValueError(f"{path}: format_version must be a whole number up to {newest}, found {version!r}: upgrade")
    try:
        check_fields(values, (field.name for field in fields(kind)), "configuration")
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error

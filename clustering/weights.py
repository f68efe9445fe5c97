"""Model folder or hub id -> the one head matrix, and nothing else of the model.

A checkpoint of tens of gigabytes holds its head in one tensor of one shard. This room finds that tensor by its name,
reads it in slices, and leaves the rest of the file untouched.

Legend: V rows of the head (vocabulary entries), D hidden size, K clusters.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from lens.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)

# Output projections, the most specific first. A name matches whole or after a dot.
OUTPUT_NAMES = (
    "cls.predictions.decoder.weight",  # BERT, DeBERTa
    "lm_head.decoder.weight",  # RoBERTa, XLM-R, MPNet
    "predictions.decoder.weight",  # ALBERT
    "lm_predictions.lm_head.weight",  # DeBERTa v2 (new heads)
    "vocab_projector.weight",  # DistilBERT
    "generator_lm_head.weight",  # ELECTRA
    "lm_head.weight",  # decoders
    "embed_out.weight",  # GPT-NeoX
    "pred_layer.proj.weight",  # XLM
)
# ModernBERT's name is so plain that only the whole name counts.
EXACT_OUTPUT_NAMES = ("decoder.weight", "output.weight")
INPUT_NAMES = (
    "embeddings.word_embeddings.weight",  # BERT and most encoders
    "embeddings.tok_embeddings.weight",  # ModernBERT
    "embed_tokens.weight",  # most decoders
    "word_embeddings.weight",  # BLOOM, Falcon
    "wte.weight",  # GPT-2
    "embed_in.weight",  # GPT-NeoX
    "tok_embeddings.weight",
    "word_embedding.weight",  # XLNet
    "shared.weight",  # T5
)
HEADED = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
FLOATS = ("F64", "F32", "F16", "BF16")
SLICE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Head:
    """The head of a model: its matrix, and where it came from."""

    weight: np.ndarray  # (V, D) float32
    tensor: str
    file: str
    kind: str  # "output head", "tied embeddings" or "word embeddings"
    dtype: str
    model: str
    revision: str | None


class Source:
    """The files of one model, in a local folder or fetched one by one from the hub."""

    def __init__(self, model: str | os.PathLike[str], revision: str | None = None) -> None:
        """Raises FileNotFoundError for a path that does not exist, NotADirectoryError for a file, and ValueError
        for what is neither a folder nor a hub id, or a revision of a local folder.
        """
        self.model = os.fspath(model)
        self.revision = revision
        self.local = Path(self.model).expanduser()
        self.is_local = self.local.is_dir()
        self.offline = False
        if self.is_local:
            if revision is not None:
                raise ValueError(
                    f"--revision {revision} goes with a hub id; {self.model} is a local folder: leave it out"
                )
            return
        if self.local.exists():
            raise NotADirectoryError(f"{self.model} is a file: give the folder of the model, or a hub id")
        if self.model.startswith(("/", ".", "~")) or self.model.count("/") > 1:
            raise FileNotFoundError(
                f"{self.model} does not exist: give the folder of a model, or a hub id such as org/name"
            )
        try:
            validate_repo_id(self.model)
        except HFValidationError as error:
            raise ValueError(f"{self.model!r} is neither a folder nor a hub id such as org/name: {error}") from error

    def find(self, name: str) -> Path | None:
        """The local path of one file, downloaded when need be; None where the model (or the offline cache) has none.

        Raises OSError with one line when the hub refuses.
        """
        if self.is_local:
            path = self.local / name
            return path if path.is_file() else None
        try:
            path = Path(hf_hub_download(self.model, name, revision=self.revision))
        except EntryNotFoundError as error:
            self.offline = isinstance(error, LocalEntryNotFoundError)
            return None
        except HfHubHTTPError as error:
            reason = str(error).strip().splitlines()[-1]
            raise OSError(
                f"the hub refused {name} of {self.model} (revision {self.revision or 'main'}): {reason}"
            ) from error
        if path.parent.parent.name == "snapshots":
            self.revision = path.parent.name  # further files come from the same commit
        return path

    def require(self, name: str, why: str) -> Path:
        """The path of one file; raises FileNotFoundError naming it, why it is needed, and the remedy."""
        path = self.find(name)
        if path is not None:
            return path
        remedy = (
            "the hub was not reached and the local cache lacks it: connect (and unset HF_HUB_OFFLINE), or give a folder"
            if self.offline
            else "save the model with save_pretrained, or download it again"
        )
        raise FileNotFoundError(f"{self.model} has no {name} ({why}): {remedy}")

    def tokenizer_folder(self) -> Path | None:
        """A folder with the tokenizer files, or None where the model brings none."""
        found = [path for path in map(self.find, TOKENIZER_FILES) if path is not None]
        return found[0].parent if found else None


def read_head(source: Source, tensor: str | None = None) -> Head:
    """Reads the one matrix whose rows stand for vocabulary entries, as float32 (V, D).

    Takes the output head where the checkpoint stores one, else the input embeddings (tied models and plain
    encoders); `tensor` names another. No more than one slice of the file is held beside the result.
    Raises FileNotFoundError for missing files, and ValueError for pickled, truncated, quantised or foreign
    checkpoints, ambiguous names, a size that contradicts config.json, and NaN or infinite weights.
    """
    config = read_json(source.require("config.json", "it says what model this is"))
    files = tensor_files(source)
    name, kind = (tensor, "named by --tensor") if tensor is not None else resolve(files, config, source.model)
    if name not in files:
        near = [other for other in files if name.rsplit(".", 2)[-2:] == other.rsplit(".", 2)[-2:]] or list(files)
        raise ValueError(f"{source.model} has no tensor {name}; it has {_some(near)}")
    path = source.require(files[name], f"{INDEX} says it holds {name}")
    rows, width, dtype = _inspect(path, name)
    expected = vocabulary_size(config)
    if tensor is None and expected is not None and rows != expected:
        raise ValueError(
            f"{path}: {name} has {rows} rows, config.json says vocab_size {expected}: "
            "not a head over this vocabulary; name the right tensor with --tensor"
        )
    weight = _read_rows(path, name, rows, width, dtype)
    return Head(weight, name, path.name, kind, dtype, source.model, source.revision)


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """`vocab_size` of a config.json, also where a text model is one part of several; None where it says nothing."""
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def tensor_files(source: Source) -> dict[str, str]:
    """Maps every tensor's name to the file that holds it; raises as `read_head` does."""
    index = source.find(INDEX)
    if index is not None:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{index}: expected an object `weight_map` from tensor names to files")
        if any(Path(file).name != file for file in files.values()):
            raise ValueError(f"{index}: `weight_map` leaves the folder of the model; refusing to follow it")
        return files
    path = source.find(SINGLE)
    if path is None:
        pickle = next((name for name in PICKLES if source.find(name) is not None), None)
        if pickle is not None:
            raise ValueError(
                f"{source.model} has only {pickle}, a pickle that can run code when read: convert it once with "
                "AutoModel.from_pretrained(...).save_pretrained(..., safe_serialization=True) and give that folder"
            )
        path = source.require(SINGLE, "nor model.safetensors.index.json; the weights are read from it")
    with _open(path) as file:
        return dict.fromkeys(file.keys(), path.name)


def resolve(names: Iterable[str], config: Mapping[str, Any], model: str) -> tuple[str, str]:
    """Picks the head among tensor names: the output head, else the input embeddings; returns (name, kind).

    Raises ValueError when there is neither, when several tensors qualify, or when a language model that says its
    embeddings are not tied lacks its output head.
    """
    names = sorted(names)
    found = _match(names, OUTPUT_NAMES, EXACT_OUTPUT_NAMES, model)
    if found is not None:
        return found, "output head"
    architecture = str((config.get("architectures") or ["unknown"])[0])
    headed = architecture.endswith(HEADED)
    if headed and config.get("tie_word_embeddings") is False:
        raise ValueError(
            f"{model}: config.json says {architecture} with tie_word_embeddings false, but no output head is stored; "
            "the checkpoint is incomplete: download it again, or name a tensor with --tensor"
        )
    found = _match(names, INPUT_NAMES, (), model)
    if found is None:
        raise ValueError(
            f"{model}: found no output head and no word embeddings among {len(names)} tensors ({_some(names)}); "
            "name one with --tensor"
        )
    return found, "tied embeddings" if headed else "word embeddings"


def _match(names: list[str], endings: Iterable[str], exact: Iterable[str], model: str) -> str | None:
    for ending in endings:
        found = [name for name in names if name == ending or name.endswith("." + ending)]
        if len(found) > 1:
            raise ValueError(f"{model}: {' and '.join(found)} could each be the head; choose one with --tensor")
        if found:
            return found[0]
    return next((name for name in names if name in exact), None)


def _some(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} is not a whole safetensors file ({size} bytes: {error}); write or download it again"
        ) from error


def _inspect(path: Path, name: str) -> tuple[int, int, str]:
    with _open(path) as file:
        if name not in set(file.keys()):
            raise ValueError(f"{path}: {INDEX} says it holds {name}, but it does not; download the model again")
        part = file.get_slice(name)
        shape, dtype = part.get_shape(), part.get_dtype()
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{path}: {name} should be a matrix (V, D), found shape {tuple(shape)}")
    if dtype not in FLOATS:
        raise ValueError(
            f"{path}: {name} is stored as {dtype}, a quantised form; use a checkpoint in {', '.join(FLOATS)}"
        )
    return shape[0], shape[1], dtype


def _read_rows(path: Path, name: str, rows: int, width: int, dtype: str) -> np.ndarray:
    """Reads a matrix (rows, width) slice by slice; the file is closed between slices, which gives its pages back."""
    weight = np.empty((rows, width), dtype=np.float32)
    step = max(1, SLICE_BYTES // (width * 4))
    for start in range(0, rows, step):
        with _open(path) as file:
            part = weight[start : start + step]
            part[:] = file.get_slice(name)[start : start + step].to(torch.float32).numpy()
        good = np.isfinite(part).all(axis=1)
        if not good.all():
            first = start + int(np.argmin(good))
            raise ValueError(
                f"{path}: {name} holds NaN or infinite weights (first in row {first}, stored as {dtype}); "
                "the checkpoint is damaged: download it again, or repair those rows"
            )
    return weight

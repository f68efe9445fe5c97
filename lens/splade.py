"""Released SPLADE checkpoints -> LensModel: what lens/layout.py found, with its weights.

The model is one of ours from then on: encoded, explained, quantised, trained and saved as any other, with a full
vocabulary head. Its vectors are those of sentence-transformers' SparseEncoder on the same folder.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from tokenizers.normalizers import Lowercase, Sequence
from torch import Tensor

from lens.backbone import architecture_of, load_backbone, load_config, load_tokenizer, position_limit
from lens.bag import idf
from lens.config import LensConfig
from lens.files import read_json, read_tensors
from lens.head import LexicalHead
from lens.layout import Layout, module_folders, read_layout
from lens.model import LensModel, fetch
from lens.quantized import Quantization
from lens.vocabulary import read_vocabulary_head

# Legend: V vocabulary, K dimensions.

__all__ = ["idf", "load_splade"]

SpladePooling = Literal["max", "sum"]
_LONGEST = 1 << 20  # tokens, where nothing limits a text


def load_splade(
    path: str | os.PathLike[str],
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    attn_implementation: str | None = None,
    device: torch.device | None = None,
    quantization: Quantization | None = None,
    pooling: SpladePooling | None = None,
) -> tuple[LensModel, Any]:
    """A SPLADE checkpoint, a folder or a hub repository, as a model in eval mode, and its tokenizer.

    `pooling` is that of a masked LM without modules.json (None: max). Texts are cut at the length that SparseEncoder
    takes. Raises FileNotFoundError, or ValueError naming the file and what does not fit.
    """
    folder = _whole(path, revision)
    if base is not None:
        raise ValueError(f"{folder} holds its own weights, which base={base!r} would replace: leave base out")
    if quantization is not None:
        raise ValueError(
            f"quantization={quantization!r}: the MLM head of {folder} would be quantised too. Convert it once with "
            "lens.load(FOLDER).save(NEW), then load NEW with quantization"
        )
    layout = read_layout(folder)
    if pooling not in (None, "max", "sum"):
        raise ValueError(f"pooling must be 'max', 'sum' or None; found {pooling!r}")
    if pooling is not None and layout.pooling not in (None, pooling):
        raise ValueError(f"pooling={pooling!r} contradicts {folder}, which says {layout.pooling!r}: leave pooling out")
    place = str(layout.model)
    if architecture_of(load_config(place)) != "encoder":
        raise ValueError(f"{place} is no masked LM")
    tokenizer = _tokenizer(layout)
    backbone, wrapper, missing = load_backbone(
        place, dtype=dtype, attn_implementation=attn_implementation, with_head=True, device=device
    )
    assert wrapper is not None
    if missing:
        raise ValueError(f"{place} lacks weights of its masked LM: {', '.join(missing[:5])}")
    state, facts = read_vocabulary_head(wrapper, missing, {})
    _check_vocabulary(layout, tokenizer, facts["dimensions"])
    config = LensConfig(
        base=place,
        architecture="encoder",
        head="vocabulary",
        activation=layout.activation,
        pooling=pooling or layout.pooling or "max",
        positions="all",
        prompt="plain",
        instruction=layout.instruction,
        normalize=layout.normalize,
        query_encoder="bag" if layout.query is not None else "model",
        **_lengths(layout, tokenizer, wrapper.config, position_limit(backbone)),
        **facts,
    )
    head = LexicalHead(config, torch.arange(config.dimensions, dtype=torch.int32))
    head.load_state_dict({**head.state_dict(), **state})
    if layout.query is not None:
        head.weigh_queries(_query_weights(layout.query, folder, tokenizer, config.dimensions))
    if layout.max_active_dims is not None:
        warnings.warn(
            f"{folder}: sentence-transformers keeps the {layout.max_active_dims} largest values of each vector "
            f"(max_active_dims); here encode(..., top_k={layout.max_active_dims}) does",
            stacklevel=3,
        )
    model = LensModel(backbone, head.to(device=device, dtype=dtype), config)
    model.backbone_is_own = True
    return model.eval(), tokenizer


def _whole(path: str | os.PathLike[str], revision: str | None) -> Path:
    """The checkpoint's folder; of a hub repository also the folders of its modules, and a pickle of weights where it
    has no other: transformers reads it without running code of it."""
    folder = fetch(path, revision)
    if Path(path).expanduser().is_dir():
        return folder
    wanted = [f"{place}/{name}" for place in module_folders(folder) for name in ("*.json", "*.safetensors", "*.txt")]
    if not any(folder.glob("model*.safetensors")):
        wanted.append("pytorch_model*")
    if wanted:
        snapshot_download(os.fspath(path), revision=revision, allow_patterns=wanted)
    return folder


def _tokenizer(layout: Layout) -> Any:
    tokenizer = load_tokenizer(str(layout.model))
    if layout.lowercase:
        backend = tokenizer.backend_tokenizer
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = Sequence([Lowercase(), *own])
    return tokenizer


def _check_vocabulary(layout: Layout, tokenizer: Any, rows: int) -> None:
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        raise ValueError(
            f"{layout.model}: the tokenizer's ids go up to {last}, but the masked LM has a vocabulary of {rows}: they "
            "do not belong together"
        )
    if layout.dimensions not in (None, rows):
        raise ValueError(
            f"{layout.model}: SpladePooling was saved for {layout.dimensions} dimensions, but the masked LM has a "
            f"vocabulary of {rows}: they do not belong together"
        )


def _lengths(layout: Layout, tokenizer: Any, config: Any, positions: int | None) -> dict[str, Any]:
    """The limits that SparseEncoder takes, and never more than the backbone has positions."""
    length = layout.max_length
    if length is None:
        trained = getattr(config, "max_position_embeddings", None)
        length = min(tokenizer.model_max_length, _LONGEST if trained in (None, -1) else trained)
    limit = _LONGEST if positions is None else positions
    document = int(min(layout.document_length or length, limit))
    query = int(min(layout.query_length or length, limit))
    if layout.query is not None:  # a bag of tokens, which no backbone limits
        query = int(min(load_tokenizer(str(layout.query)).model_max_length, _LONGEST))
    return {"query_max_length": query, "document_max_length": document}


def _query_weights(place: Path, folder: Path, tokenizer: Any, dimensions: int) -> Tensor:
    """The weights (K,) of a SparseStaticEmbedding; tokens beyond its vocabulary have none."""
    theirs = load_tokenizer(str(place))
    if _form(theirs) != _form(tokenizer):
        raise ValueError(f"{place}: the tokenizer of queries is not that of documents, and LENS has one for both")
    facts = read_json(place / "config.json")
    source = facts.get("path")
    if isinstance(source, str) and source.endswith(".json"):
        path = next((p for p in (place / source, folder / source) if p.is_file()), place / source)
        values = read_json(path)
        weights = torch.zeros(dimensions)
        vocabulary = theirs.get_vocab()
        for token, value in values.items():
            if not isinstance(value, int | float):
                raise ValueError(f"{path}: the weight of {token!r} should be a number, found {value!r:.80}")
            if token in vocabulary:
                weights[vocabulary[token]] = value
        return weights
    weight = read_tensors(place / "model.safetensors", {"weight": (None,)})["weight"].float()
    if len(weight) > dimensions:
        raise ValueError(
            f"{place / 'model.safetensors'}: weights of {len(weight)} tokens, but the masked LM has a vocabulary of "
            f"{dimensions}"
        )
    return torch.nn.functional.pad(weight, (0, dimensions - len(weight)))


def _form(tokenizer: Any) -> str:
    """How a tokenizer splits texts: all of it but the marks around them."""
    backend = tokenizer.backend_tokenizer
    parts = [repr(part) for part in (backend.normalizer, backend.pre_tokenizer)]
    return "\n".join([*parts, str(sorted(backend.get_vocab(with_added_tokens=True).items()))])

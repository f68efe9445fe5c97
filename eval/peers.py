"""Other people's models beside LENS in the same run: any sentence-transformers model, any model that mteb knows."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import mteb
from mteb.models.model_meta import ModelMeta
from mteb.models.models_protocols import CrossEncoderProtocol, EncoderProtocol

from eval.meta import local_name, named_place, revision_of
from lens.files import read_json

KINDS = ("SentenceTransformer", "SparseEncoder", "MultiVectorEncoder", "CrossEncoder")
"""Classes of sentence-transformers, as config_sentence_transformers.json names them."""


def open_peer(given: str, device: str | None = None) -> tuple[str, Any]:
    """A model of a command line, as [NAME=]DIR or a name of mteb's registry or the hub: what it is called here, and
    itself as mteb evaluates it, with the prompts and the similarity that its makers chose.

    Raises FileNotFoundError, OSError or ValueError naming what was given.
    """
    short, place = named_place(given)
    if Path(place).is_dir():
        model = _from_folder(Path(place), device)
        facts = {"name": local_name(short), "revision": revision_of(place)}
        model.mteb_model_meta = model.mteb_model_meta.model_copy(update=facts)
        return short, model
    if place.startswith((".", "/")) or place.count("/") > 1:
        raise FileNotFoundError(f"--peers {place}: no such folder")
    try:
        return short, mteb.get_model(place, device=device)
    except Exception as error:  # of mteb, hub and the model's own package: whatever their loaders raise
        known = [meta.name for meta in mteb.get_model_metas() if meta.name]
        close = difflib.get_close_matches(place, known, 3, 0.6)
        hint = f"; did you mean {' or '.join(close)}?" if close and place not in close else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"--peers {place}: neither a folder nor to be had as a model: {reason:.200}{hint}") from error


def _from_folder(folder: Path, device: str | None) -> Any:
    import sentence_transformers
    from mteb import models

    if (folder / "lens.json").is_file():
        raise ValueError(f"--peers {folder} is a LENS model: give it with --model")
    settings = folder / "config_sentence_transformers.json"
    kind = read_json(settings).get("model_type", KINDS[0]) if settings.is_file() else None
    if kind is None and (folder / "modules.json").is_file():
        kind = KINDS[0]
    if kind is None and (folder / "config.json").is_file():
        names = read_json(folder / "config.json").get("architectures") or ()
        kind = KINDS[3] if any(name.endswith("ForSequenceClassification") for name in names) else None
    if kind not in KINDS:
        raise ValueError(f"--peers {folder}: no model of sentence-transformers ({', '.join(KINDS)}): no modules.json")
    wrappers = {
        "SentenceTransformer": models.SentenceTransformerEncoderWrapper,
        "SparseEncoder": models.SparseEncoderWrapper,
        "MultiVectorEncoder": models.MultiVectorWrapper,
        "CrossEncoder": models.CrossEncoderWrapper,
    }
    try:
        return wrappers[kind](getattr(sentence_transformers, kind)(str(folder), device=device))
    except Exception as error:  # whatever damaged weights and settings make their readers raise
        raise OSError(f"--peers {folder}: {' '.join(str(error).split()):.300}") from error


def takes(system: Any, task: Any) -> bool:
    """Whether a system is for a task: searches without embeddings only retrieve and rerank, and cross-encoders, which
    would read every query with every document of a corpus, only rerank."""
    if isinstance(system, CrossEncoderProtocol):
        return bool(task.metadata.type == "Reranking")
    return isinstance(system, EncoderProtocol) or task.metadata.type in ("Retrieval", "Reranking")


def dimensions_of(meta: ModelMeta) -> int | None:
    """The length of a model's embeddings, the longest where it has several."""
    size = meta.embed_dim
    return max(size) if isinstance(size, list | tuple) else size

"""What a leaderboard has to know of a model: mteb's ModelMeta, with a loader that works."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import mteb
from mteb.models.model_meta import ModelMeta, ScoringFunction

import lens
from eval.encoder import LensEncoder
from lens.card import read_facts
from lens.encoder import LENS
from lens.identity import model_files

RELEASED = ("yibinlei/LENS-d4000", "yibinlei/LENS-d8000")
"""Checkpoints that mteb knows, without a loader of its own."""


def released_meta(name: str, compat: str | None = None) -> ModelMeta:
    """mteb's entry of a released checkpoint, which can then be loaded: as `lens.load` embeds, or with
    compat="official" as the released code does, which goes into the results as an experiment of its own."""
    loader = functools.partial(load_encoder, **({"compat": compat} if compat else {}))
    experiment = {"compat": compat} if compat else None
    return mteb.get_model_meta(name).model_copy(update={"loader": loader, "experiment_kwargs": experiment})


def revision_of(folder: str | os.PathLike[str]) -> str:
    """40 hexadecimal digits of a model folder's content, so that results of another model never pass for its own."""
    files = json.dumps(model_files(folder), sort_keys=True)
    return hashlib.sha256(files.encode()).hexdigest()[:40]


def artifact_meta(model: LENS, folder: str | os.PathLike[str], name: str | None = None) -> ModelMeta:
    """The ModelMeta of one of our artifacts, or of a SPLADE checkpoint, in a folder; `name` is OWNER/MODEL, by default
    local/FOLDER.

    What only its owner knows (release date, public code and data, languages) is left open. Raises ValueError for a
    name without an owner.
    """
    folder = Path(folder).resolve()
    name = name or f"local/{folder.name}"
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"a model's name has the form OWNER/MODEL; found {name!r}")
    config, module = model.config, model.model
    embedding = module.backbone.get_input_embeddings()
    parameters = [*module.parameters(), *module.buffers()]
    facts = read_facts(folder)
    return ModelMeta(
        loader=functools.partial(load_encoder, path=folder),
        name=name,
        revision=revision_of(folder),
        release_date=None,
        languages=None,
        n_parameters=sum(parameter.numel() for parameter in module.parameters()),
        n_embedding_parameters=embedding.weight.numel(),
        memory_usage_mb=round(sum(p.numel() * p.element_size() for p in parameters) / 2**20, 1),
        max_tokens=config.longest,
        embed_dim=config.dimensions,
        license=facts.license,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE if config.normalize else ScoringFunction.DOT_PRODUCT,
        use_instructions=config.prompt == "lens",
        training_datasets=None,
        adapted_from=config.base if not Path(config.base).is_absolute() else Path(config.base).name,
        model_type=["dense" if config.head == "dense" else "sparse"],
    )


def load_encoder(
    name: str,
    revision: str | None = None,
    device: Any = None,
    path: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    **options: Any,
) -> LensEncoder:
    """What mteb calls to load a model: the folder at `path`, else the hub's `name` at `revision`. `options` are those
    of `lens.load`. Raises what `lens.load` raises, and ValueError for a folder that changed since it was named."""
    model = lens.load(path or name, device=device, revision=None if path else revision, **options)
    meta = artifact_meta(model, path, name) if path else released_meta(name, options.get("compat"))
    if revision is not None and meta.revision != revision:
        raise ValueError(f"{path or name} is of revision {meta.revision}, not {revision}: its files have changed")
    return LensEncoder(model, meta, work)

"""What a leaderboard has to know of a model: mteb's ModelMeta, with a loader that works."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mteb
from mteb.models.model_meta import ModelMeta, ScoringFunction

import lens
from eval.encoder import LensEncoder
from lens.card import read_facts
from lens.encoder import LENS
from lens.files import read_json
from lens.identity import sha256
from lens.model import fetch

RELEASED = ("yibinlei/LENS-d4000", "yibinlei/LENS-d8000")
"""Checkpoints that mteb knows, without a loader of its own."""


FILES = ("*.json", "*.safetensors", "*.bin", "*.pth", "*.model", "*.txt")
"""What of a model's folder is part of its revision, in subfolders too, checkpoints of training aside."""
FILLED = (
    "release_date", "languages", "license", "open_weights", "public_training_code", "public_training_data",
    "training_datasets", "reference", "adapted_from", "citation", "contacts",
)  # fmt: skip
"""Fields of a ModelMeta that only the model's owner knows."""


def released_meta(name: str, **options: Any) -> ModelMeta:
    """mteb's entry of a released checkpoint, which can then be loaded. `options` are those of `lens.load` by which its
    embeddings differ, see `variant`."""
    return variant(mteb.get_model_meta(name), load_encoder, **options)


def variant(meta: ModelMeta, loader: Callable[..., Any], **options: Any) -> ModelMeta:
    """The metadata of a model that is loaded with options such as compat="official" or dtype="bfloat16". They go into
    its loader, and into the results as an experiment of their own."""
    given = {name: value for name, value in options.items() if value is not None}
    changes = {"loader": functools.partial(loader, **given), "experiment_kwargs": given or None}
    return meta.model_copy(update=changes)


def revision_of(folder: str | os.PathLike[str], base: str | None = None) -> str:
    """40 hexadecimal digits of a model folder's content, and of its backbone's where that is another folder, so that
    results of another model never pass for its own. Every byte is read: minutes for tens of GB."""
    places = [Path(folder), *([Path(base)] if base and Path(base).is_dir() else [])]
    lines = []
    for number, place in enumerate(places):
        for path in sorted({path for pattern in FILES for path in place.rglob(pattern) if path.is_file()}):
            inside = path.relative_to(place)
            if not any(part.startswith(("checkpoint-", ".")) for part in inside.parts):
                lines.append(f"{number} {inside.as_posix()} {sha256(path)}")
    if not lines:
        raise ValueError(f"{folder} holds no file of a model")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:40]


def filled(meta: ModelMeta, path: str | os.PathLike[str]) -> ModelMeta:
    """The metadata with the fields of a JSON file, which only the model's owner knows.

    Raises FileNotFoundError or ValueError naming file and field.
    """
    values = read_json(path)
    unknown = sorted(values.keys() - set(FILLED))
    if unknown:
        raise ValueError(f"{path}: {unknown[0]!r} is no field to fill; there are {', '.join(FILLED)}")
    try:
        return ModelMeta.model_validate({**dict(meta), **values})
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split()):.300}") from error


def named_place(given: str) -> tuple[str, str]:
    """What is given as [NAME=]PLACE: its name, else the last part of the place, and the place."""
    name, separator, place = given.partition("=")
    return (name, place) if separator and not Path(given).exists() else (Path(given).name, given)


def local_name(short: str) -> str:
    """The name in results of a model that only its folder or the command line names."""
    return "local/" + (re.sub(r"[^\w.-]+", "-", short, flags=re.ASCII).strip("-._") or "model")


def artifact_meta(
    model: LENS, folder: str | os.PathLike[str], name: str | None = None, commit: str | None = None, **options: Any
) -> ModelMeta:
    """The ModelMeta of one of our artifacts, or of a SPLADE checkpoint, in a folder; `name` is OWNER/MODEL, by default
    local/FOLDER, `commit` its revision on the hub, by default a hash of its files, `options` those of `variant`.

    What only its owner knows (release date, public code and data, languages) is left open. Raises ValueError for a
    name without an owner.
    """
    folder = Path(folder).resolve()
    name = name or local_name(folder.name)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, flags=re.ASCII):
        raise ValueError(f"a model's name has the form OWNER/MODEL, of letters, digits and ._-; found {name!r}")
    config, module = model.config, model.model
    embedding = module.backbone.get_input_embeddings()
    parameters = [*module.parameters(), *module.buffers()]
    facts = read_facts(folder)
    meta = ModelMeta(
        loader=None,
        name=name,
        revision=commit or revision_of(folder, config.base),
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
    return variant(meta, functools.partial(load_encoder, path=None if commit else folder), **options)


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
    if name in RELEASED and path is None:
        meta = released_meta(name, **options)
    else:
        meta = artifact_meta(model, path or fetch(name, revision), name, None if path else revision, **options)
    if revision is not None and meta.revision != revision:
        raise ValueError(f"{path or name} is of revision {meta.revision}, not {revision}: its files have changed")
    return LensEncoder(model, meta, work)


def open_model(
    given: str, device: Any = None, name: str | None = None, fill: str | None = None, **options: Any
) -> tuple[str, LENS, ModelMeta]:
    """A model of a command line, as [NAME=]DIR, a released checkpoint or a model of the hub: what it is called here,
    itself, and its metadata. `options` are those of `lens.load` by which its embeddings differ.

    Raises FileNotFoundError or ValueError naming what was given, and what `lens.load` raises.
    """
    short, place = named_place(given)
    if Path(place).is_dir():
        model = lens.load(place, device=device, **options)
        meta = artifact_meta(model, place, name or (local_name(short) if place != given else None), **options)
    elif place in RELEASED:
        if name or fill:
            raise ValueError(f"{place} has its name and metadata from mteb: leave out --name and --meta")
        meta = released_meta(place, **options)
        model = lens.load(place, device=device, revision=meta.revision, **options)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place):
        folder = fetch(place)
        commit = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None
        model = lens.load(folder, device=device, **options)
        meta = artifact_meta(model, folder, name or place, commit, **options)
    else:
        raise FileNotFoundError(f"model {place} is neither a folder nor a name OWNER/MODEL of the hub")
    return short, model, meta if fill is None else filled(meta, fill)

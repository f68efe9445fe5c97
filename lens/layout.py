"""What the JSON files of a SPLADE checkpoint say: a masked LM alone, or a sparse encoder of sentence-transformers.

    config.json with an architecture ...ForMaskedLM                             (naver/splade)
    modules.json: MLMTransformer or Transformer, SpladePooling [, Normalize]    (sentence-transformers)
    modules.json: Router of query -> SparseStaticEmbedding, document -> the two above [, Normalize]

Modules are known by the last part of their type, for their packages have moved. Whatever would change vectors and is
not understood is refused by name. No weights are read here and nothing heavy is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from lens.config import Activation, Pooling
from lens.files import read_json

MODULES_FILE, ROUTER_FILE, SETTINGS_FILE = "modules.json", "router_config.json", "config_sentence_transformers.json"
TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
KNOWN = (
    "MLMTransformer (or Transformer with transformer_task fill-mask) and SpladePooling, for asymmetric models a Router "
    "whose query route is a SparseStaticEmbedding, and Normalize"
)
_TRANSFORMERS = ("MLMTransformer", "Transformer")
_ACTIVATIONS: dict[str, Activation] = {"relu": "log1p", "log1p_relu": "log1p_twice"}
_UNSUPPORTED = ("processing_kwargs", "query_expansion", "tokenizer_name_or_path")
_ARGUMENTS = ("processor_kwargs", "tokenizer_args")  # the newer and the older name


class Module(NamedTuple):
    """A module's class name, its type in full and the folder in which it stands."""

    kind: str
    type: str
    folder: Path


@dataclass(frozen=True)
class Layout:
    """What there is to know of a SPLADE checkpoint beside its weights."""

    model: Path
    """The folder of the masked LM and its tokenizer."""
    pooling: Pooling | None = None
    """None where the checkpoint does not say."""
    activation: Activation = "log1p"
    dimensions: int | None = None
    """Of the vectors, where the checkpoint says."""
    max_length: int | None = None
    """Tokens of the longest text; None: as many as tokenizer and positions allow."""
    query_length: int | None = None
    document_length: int | None = None
    """The same for one kind of text, where it has a limit of its own."""
    lowercase: bool = False
    """Whether texts are put into lower case whatever the tokenizer does."""
    normalize: bool = False
    instruction: str | None = None
    """What stands before queries, without the space at its end."""
    query: Path | None = None
    """The folder of the static weights of queries, which are bags of tokens then."""
    max_active_dims: int | None = None
    """How many values of each vector sentence-transformers keeps."""


def is_splade(folder: Path) -> bool:
    """Whether `folder` holds a masked LM, or modules of sentence-transformers, and no LENS model.

    Raises ValueError for a damaged JSON file.
    """
    if (folder / "lens.json").is_file():
        return False
    if (folder / MODULES_FILE).is_file():
        return not any(module.kind == "LensModule" for module in _modules(folder))
    if not (folder / "config.json").is_file():
        return False
    names = read_json(folder / "config.json").get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForMaskedLM") for name in names)


def read_layout(folder: Path) -> Layout:
    """The layout of a SPLADE checkpoint's folder.

    Raises FileNotFoundError for a file that is missing, ValueError naming the file and what is not supported.
    """
    if not (folder / MODULES_FILE).is_file():
        return Layout(folder)
    modules = _modules(folder)
    names = " + ".join(module.kind for module in modules)
    query: list[Module] | None = None
    document, rest = modules[:2], modules[2:]
    if modules and modules[0].kind in ("Router", "Asym"):
        query, document = _routes(folder, modules[0].folder)
        rest = modules[1:]
    _check_known(folder, [*modules, *document, *(query or [])])
    if [module.kind in _TRANSFORMERS for module in document] != [True, False] or document[1].kind != "SpladePooling":
        raise ValueError(f"{folder / MODULES_FILE}: {names} is no sparse encoder that LENS reads: it reads {KNOWN}")
    if [module.kind for module in rest] not in ([], ["Normalize"]):
        raise ValueError(f"{folder / MODULES_FILE}: only Normalize may follow; found {names}")
    static = query if query is not None and query != document else None
    if static is not None and [module.kind for module in static] != ["SparseStaticEmbedding"]:
        raise ValueError(
            f"{folder / MODULES_FILE}: queries go through {' + '.join(module.kind for module in static)}; LENS reads a "
            "SparseStaticEmbedding there, or the modules of the documents"
        )
    encoder, pooling = document
    settings = _optional(folder / SETTINGS_FILE)
    return Layout(
        model=encoder.folder,
        **_pooling(pooling.folder / "config.json"),
        **_transformer(encoder),
        normalize=bool(rest),
        instruction=_instruction(folder / SETTINGS_FILE, settings, static is not None),
        query=static[0].folder if static is not None else None,
        max_active_dims=settings.get("max_active_dims"),
    )


def module_folders(folder: Path) -> list[str]:
    """The folders below `folder` in which modules stand, as the files at its top say; with "/" between parts."""
    modules = _modules(folder) if (folder / MODULES_FILE).is_file() else []
    if modules and modules[0].kind in ("Router", "Asym") and (modules[0].folder / ROUTER_FILE).is_file():
        for route in _routes(folder, modules[0].folder):
            modules += route
    places = [module.folder.relative_to(folder).as_posix() for module in modules]
    return [place for place in dict.fromkeys(places) if place != "."]


def _modules(folder: Path) -> list[Module]:
    path = folder / MODULES_FILE
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("type"), str) and isinstance(entry.get("path", ""), str)
        for entry in entries
    ):
        raise ValueError(f"{path}: expected a list of modules with `type` and `path`")
    return [_module(path, entry["type"], folder, entry.get("path", "")) for entry in entries]


def _module(source: Path, kind: str, folder: Path, place: str) -> Module:
    parts = PurePosixPath(place)
    if parts.is_absolute() or ".." in parts.parts or "\\" in place:
        raise ValueError(f"{source}: the module {kind} lies outside the folder, in {place!r}")
    return Module(kind.rpartition(".")[2], kind, folder / parts)


def _routes(folder: Path, router: Path) -> tuple[list[Module], list[Module]]:
    """The modules of queries and of documents."""
    path = router / ROUTER_FILE
    if not path.is_file() and router != folder:
        path = router / "config.json"  # as older versions name it
    content = read_json(path)
    types, structure = content.get("types"), content.get("structure")
    if not isinstance(types, dict) or not isinstance(structure, dict):
        raise ValueError(f"{path}: expected `types` and `structure` of the routes")
    if sorted(structure) != ["document", "query"] or (content.get("parameters") or {}).get("route_mappings"):
        raise ValueError(f"{path}: LENS reads the two routes query and document; found {', '.join(structure)}")
    routes: dict[str, list[Module]] = {}
    for route, names in structure.items():
        if not isinstance(names, list) or not all(isinstance(types.get(name), str) for name in names):
            raise ValueError(f"{path}: route {route!r} names modules without a type: {names!r:.80}")
        routes[route] = [_module(path, types[name], router, name) for name in names]
    return routes["query"], routes["document"]


def _check_known(folder: Path, modules: Sequence[Module]) -> None:
    known = {*_TRANSFORMERS, "SpladePooling", "Normalize", "Router", "Asym", "SparseStaticEmbedding"}
    for module in modules:
        if module.kind not in known:
            raise ValueError(f"{folder / MODULES_FILE} names {module.type}, which LENS does not read: it reads {KNOWN}")


def _pooling(path: Path) -> dict[str, Any]:
    facts = read_json(path)
    pooling, activation = facts.get("pooling_strategy", "max"), facts.get("activation_function", "relu")
    if pooling not in ("max", "sum"):
        raise ValueError(f"{path}: pooling_strategy must be max or sum; found {pooling!r}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{path}: activation_function must be one of {', '.join(_ACTIVATIONS)}; found {activation!r}")
    if (pooling, activation) == ("sum", "log1p_relu"):
        raise ValueError(f"{path}: activation_function log1p_relu goes with pooling_strategy max here, not with sum")
    dimensions = facts.get("embedding_dimension", facts.get("word_embedding_dimension"))
    return {"pooling": cast(Pooling, pooling), "activation": _ACTIVATIONS[activation], "dimensions": dimensions}


def _transformer(module: Module) -> dict[str, Any]:
    """Lengths and lower case of the settings that sentence-transformers saves beside a masked LM."""
    path = next((module.folder / n for n in TRANSFORMER_FILES if (module.folder / n).is_file()), None)
    facts = {} if path is None else read_json(path)
    task = facts.get("transformer_task", "fill-mask" if module.kind == "MLMTransformer" else "feature-extraction")
    if task != "fill-mask":
        raise ValueError(f"{path or module.folder}: transformer_task must be fill-mask; found {task!r}")
    for name in _UNSUPPORTED:
        if facts.get(name):
            raise ValueError(f"{path}: {name} is not supported; found {facts[name]!r:.80}")
    arguments = {name: value for field in _ARGUMENTS for name, value in (facts.get(field) or {}).items()}
    length = arguments.pop("model_max_length", facts.get("max_seq_length"))
    if arguments:
        raise ValueError(f"{path}: options of the tokenizer are not supported; found {', '.join(arguments)}")
    lengths = {"max_length": length}
    lengths |= {name: facts.get(name) for name in ("query_length", "document_length")}
    for name, value in lengths.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{path}: {name} should be a number of tokens; found {value!r}")
    return {**lengths, "lowercase": bool(facts.get("do_lower_case"))}


def _instruction(path: Path, settings: Mapping[str, Any], static: bool) -> str | None:
    """What sentence-transformers puts before queries; what it would put before documents is refused."""
    prompts = settings.get("prompts") or {}
    query, document = prompts.get("query"), prompts.get("document")
    if document:
        raise ValueError(f"{path}: a prompt of documents is not supported; found {document!r:.80}")
    if not query:
        return None
    if static:
        raise ValueError(f"{path}: a prompt of queries that are bags of tokens is not supported; found {query!r:.80}")
    if not query.endswith(" ") or not query.strip():
        raise ValueError(f"{path}: the prompt of queries must end with a space; found {query!r:.80}")
    return cast(str, query[:-1])


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}

"""DeepCT and SparTerm as systems of an evaluation, and how the command line names them."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.scoring import System, judged_queries, lens_system, vector_system
from lens.corpus import Beir
from lens.deepct import CONFIG_FILE as DEEPCT_FILE
from lens.deepct import SCALE, DeepCT
from lens.sparterm import CONFIG_FILE as SPARTERM_FILE
from lens.sparterm import MODES, SparTerm


def deepct_system(
    name: str, model: DeepCT, beir: Beir, k1: float = 10.0, b: float = 0.75, scale: float = SCALE
) -> System:
    """BM25 over the term frequencies of a DeepCT model as a system; the options are those of `DeepCT.index`."""
    start = time.perf_counter()
    index = model.index(list(beir.corpus.values()), k1, b, scale)
    queries = index.queries(model.words([beir.queries[query] for query in judged_queries(beir)]))
    system = vector_system(
        name,
        queries,
        index.documents,
        matching=True,
        seconds=time.perf_counter() - start,
        encode=lambda text: index.queries(model.words([text])),
    )
    return replace(system, bounded=False)


def lexical_folders(arguments: Sequence[str], taken: Collection[str]) -> dict[str, str]:
    """Names and folders, `[NAME=]FOLDER[:MODE]`; without a name the folder's, and the mode's after a hyphen.

    Raises ValueError for a name that is used twice or `taken`.
    """
    folders: dict[str, str] = {}
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        if not separator or Path(argument).exists():
            path, mode = _split(argument)
            name, folder = Path(path).resolve().name + (f"-{mode}" if mode else ""), argument
        if name in folders or name in taken:
            raise ValueError(f"two systems are named {name!r}: tell them apart with --lexical NAME={folder}")
        folders[name] = folder
    return folders


def _split(folder: str) -> tuple[str, str]:
    """Folder and mode of FOLDER:MODE, an empty mode where there is none."""
    path, separator, mode = folder.rpartition(":")
    return (path, mode) if separator and not Path(folder).exists() else (folder, "")


def load_lexical(folder: str, device: str | None = None) -> DeepCT | SparTerm:
    """The model of a folder; `FOLDER:MODE` chooses SparTerm's mode. Raises FileNotFoundError for a folder of neither
    kind and ValueError for a mode that there is not."""
    path, mode = _split(folder)
    if (Path(path) / SPARTERM_FILE).is_file():
        if mode and mode not in MODES:
            raise ValueError(f"{folder}: the mode must be one of {', '.join(MODES)}, found {mode!r}")
        return SparTerm.load(path, device, **({"mode": mode} if mode else {}))
    if (Path(path) / DEEPCT_FILE).is_file():
        if mode:
            raise ValueError(f"{folder}: a DeepCT model has no modes: leave :{mode} out")
        return DeepCT.load(path, device)
    raise FileNotFoundError(f"{path} holds neither {DEEPCT_FILE} nor {SPARTERM_FILE}: it is no model of either kind")


def lexical_system(name: str, model: Any, beir: Beir, *deepct: float) -> System:
    """A model that `load_lexical` gave as a system; `deepct` are k1, b and scale of `deepct_system`."""
    return deepct_system(name, model, beir, *deepct) if isinstance(model, DeepCT) else lens_system(name, model, beir)

"""Hybrids of two systems of a run: their best documents fused by mteb's HybridSearch, weights chosen on dev data.

A hybrid searches nothing itself: it reads what its members have found, so that it costs seconds.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import mteb
from mteb.models import HybridSearch
from mteb.models.model_meta import ModelMeta

from eval.board import Board
from eval.peers import takes
from eval.snapshot import parts_of, unload
from eval.tasks import DEV, local_task
from eval.units import RETRIEVES, Kept, part_of, statistic
from lens.files import read_json, write_json
from lens.identity import sha256

FUSIONS = ("rsf", "rrf")
"""mteb's names: the weighted sum of scores scaled to 0..1 within each query, and reciprocal rank fusion."""
GRID = tuple(step / 10 for step in range(11))
"""Weights of the first member that are tried."""
EQUAL = 0.5


@dataclass(frozen=True)
class Chosen:
    """The weight of a hybrid's first member, and the mean dev score at each weight that was tried, if any."""

    weight: float
    tried: Mapping[str, float]


@functools.lru_cache(maxsize=2)
def _predictions(path: Path, changed: int) -> Any:
    """A file of predictions, hundreds of MB for millions of hits; `changed` is when it was written."""
    return read_json(path)


class Replay:
    """What a system found, as mteb's search protocol: read from the predictions that it left in `output`."""

    def __init__(self, output: Path, meta: ModelMeta, task: Any) -> None:
        self.mteb_model_meta = meta
        self.files = {part.metadata.name: Kept(output, meta, part).predictions for part in parts_of(task)}
        self.identical = {part.metadata.name for part in parts_of(task) if part.ignore_identical_ids}

    def index(self, corpus: Any, **_: Any) -> None:
        """Nothing is left to do."""

    def search(self, queries: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, **_: Any) -> Any:
        """Query id -> document id -> score, as it was found. Raises FileNotFoundError where nothing was."""
        path = self.files[task_metadata.name]
        if not path.is_file():
            raise FileNotFoundError(f"{self.mteb_model_meta.name} has left no predictions to fuse")
        found = _predictions(path, path.stat().st_mtime_ns)[hf_subset][hf_split]
        if task_metadata.name in self.identical:
            found = {query: {name: s for name, s in hits.items() if name != query} for query, hits in found.items()}
        return found


class Fused(HybridSearch):
    """mteb's HybridSearch of systems that have searched already, without its progress bars."""

    def index(self, corpus: Any, **_: Any) -> None:
        """Nothing is left to do."""

    def search(self, queries: Any, *, top_k: int, **place: Any) -> dict[str, dict[str, float]]:
        """The `top_k` best documents of each query, ties by falling id as in mteb's measures."""
        found = [system.search(queries, **place) for system in self.wrapped_models]
        answers = {}
        for query in queries["id"]:
            fused = self.fuse([hits.get(query, {}) for hits in found])
            best = sorted(fused.items(), key=lambda hit: (hit[1], hit[0]), reverse=True)[:top_k]
            answers[query] = dict(best)
        return answers


def hybrid(output: Path, metas: Sequence[ModelMeta], task: Any, fusion: str, weight: float) -> Fused:
    """The fusion of two systems for one task; `weight`, from 0 to 1, is the first one's.

    A document that a system has not among its best counts 0 there.
    """
    weights = [weight, 1 - weight]
    found = Fused([Replay(output, meta, task) for meta in metas], weights, None, fusion)
    parts = [(meta.name, meta.revision, meta.experiment_name) for meta in metas]
    content = repr((parts, fusion, weights, mteb.__version__))
    short = "+".join(str(meta.name).rpartition("/")[2] for meta in metas)
    facts = {
        "name": f"local/{short}-{fusion}",
        "revision": hashlib.sha256(content.encode()).hexdigest()[:40],
        "framework": ["NumPy"],
    }
    found.mteb_model_meta = found.mteb_model_meta.model_copy(update=facts)
    return found


def choose(output: Path, metas: Sequence[ModelMeta], tasks: Sequence[Any], fusion: str) -> Chosen:
    """The weight of GRID with the best mean main score over dev tasks, the one nearest to EQUAL where several are.

    The members' predictions lie in `output`; without dev tasks the weights are equal.
    """
    if not tasks:
        return Chosen(EQUAL, {})
    scores: dict[float, list[float]] = {weight: [] for weight in GRID}
    for task in tasks:
        task.load_data()
        for weight, found in scores.items():
            found.append(_score(hybrid(output, metas, task, fusion, weight), task))
        unload(task)
    means = {weight: round(fmean(found), 6) for weight, found in scores.items()}
    best = max(means, key=lambda weight: (means[weight], -abs(weight - EQUAL)))
    return Chosen(best, {str(weight): mean for weight, mean in means.items()})


def _score(system: Fused, task: Any) -> float:
    parts = []
    for subset in task.hf_subsets:
        for split in task.eval_splits:
            queries = task.dataset[subset][split]["queries"]
            place = {"hf_split": split, "hf_subset": subset, "task_metadata": task.metadata}
            found = system.search(queries, top_k=max(task.k_values), encode_kwargs={}, **place)
            part = part_of(task, found, {}, subset, split)
            if part is None:
                raise ValueError(f"{task.metadata.name}: its {task.metadata.main_score} is no mean over queries")
            parts.append(statistic("mean", part))
    return fmean(parts)


def members(options: argparse.Namespace, names: Iterable[str], tasks: Sequence[Any]) -> dict[str, tuple[str, str]]:
    """The hybrids' members by hybrid. Raises ValueError for one that is no pair of systems, or has nothing to fuse."""
    found: dict[str, tuple[str, str]] = {}
    for given in options.hybrids:
        pairs = [(a, b) for a in names for b in names if a != b and f"{a}+{b}" == given]
        if not pairs:
            raise ValueError(f"--hybrids {given!r} is no pair of these systems: {', '.join(names)}")
        found[given] = pairs[0]
    if options.dev and not found:
        raise ValueError("--dev is what the weights of hybrids are chosen on: give --hybrids")
    if found and not any(task.metadata.type in RETRIEVES for task in tasks):
        raise ValueError("--hybrids fuse what was retrieved, and no task retrieves or reranks")
    return found


def dev_tasks(given: Sequence[str], tasks: Sequence[Any]) -> list[Any]:
    """The tasks that weights are chosen on, of folders given as DIR or DIR:KIND.

    Raises ValueError where the file with the judgements, scores or labels is, byte for byte, one that is evaluated, and
    for two tasks of one name.
    """
    evaluated = {sha256(task.judged) for task in tasks if hasattr(task, "judged")} if given else set()
    found = {}
    for place in given:
        task = local_task(place, DEV)
        if sha256(task.judged) in evaluated:
            raise ValueError(f"--dev {place}: its split {task.eval_splits[0]} is evaluated: that would be no test")
        if task.metadata.name in found:
            raise ValueError(f"two --dev tasks are named {task.metadata.name!r}: rename a folder")
        found[task.metadata.name] = task
    return list(found.values())


def unfusable(output: Path, metas: Sequence[ModelMeta], task: Any) -> bool:
    """Whether a task has too many queries for its hits to be kept."""
    contents = [Kept(output, meta, part).content() for meta in metas for part in parts_of(task)]
    return any(content is not None and not content.get("predicted", True) for content in contents)


def chosen_weights(
    options: argparse.Namespace, found: Mapping[str, Any], pairs: Mapping[str, tuple[str, str]], dev: Sequence[Any]
) -> dict[str, tuple[tuple[str, str], str, Chosen]]:
    """Name of each hybrid -> its members, fusion and weight, which OUTPUT/hybrids.json tells too. The members' results
    on dev data lie in OUTPUT/dev. Raises ValueError where one of them failed there."""
    if not pairs:
        return {}
    names = list(dict.fromkeys(name for pair in pairs.values() for name in pair))
    for task in dev:
        if task.metadata.type not in RETRIEVES:
            raise ValueError(f"--dev {task.metadata.name}: weights are chosen on retrieval and reranking")
        other = next((name for name in names if not takes(found[name], task)), None)
        if other is not None:
            raise ValueError(f"--dev {task.metadata.name}: {other} is not for {task.metadata.type}")
    board = Board(options.output / "dev", names)
    for task in dev:
        for name in names:
            board.evaluate(name, found[name], task)
        unload(task)
    if board.failures:
        raise ValueError(f"no weights can be chosen: {board.failures[0]}")
    weights = {}
    for given, pair in pairs.items():
        metas = [found[name].mteb_model_meta for name in pair]
        for fusion in options.fusion:
            chosen = choose(options.output / "dev", metas, dev, fusion)
            weights[f"{given} {fusion}"] = pair, fusion, chosen
            print(f"{given} {fusion}: weight {chosen.weight} of {pair[0]}, " + ("by dev" if dev else "no --dev given"))
    content = {
        name: {"members": list(pair), "fusion": fusion, "dev": [task.metadata.name for task in dev], **asdict(chosen)}
        for name, (pair, fusion, chosen) in weights.items()
    }
    write_json(options.output / "hybrids.json", content)
    return weights

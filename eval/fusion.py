"""Hybrids of two systems of a run: their best documents fused by mteb's HybridSearch, weights chosen on dev data.

A hybrid searches nothing itself: it reads what its members have found, so that it costs seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import mteb
from mteb.models import HybridSearch
from mteb.models.model_meta import ModelMeta

from eval.units import Kept, part_of, statistic
from lens.files import read_json

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


class Replay:
    """What a system found, as mteb's search protocol: read from the predictions that it left in `output`."""

    def __init__(self, output: Path, meta: ModelMeta, task: Any) -> None:
        self.mteb_model_meta = meta
        path = Kept(output, meta, task).predictions
        self.found = read_json(path) if path.is_file() else None

    def index(self, corpus: Any, **_: Any) -> None:
        """Nothing is left to do."""

    def search(self, queries: Any, *, hf_split: str, hf_subset: str, **_: Any) -> Any:
        """Query id -> document id -> score, as it was found. Raises FileNotFoundError where nothing was."""
        if self.found is None:
            raise FileNotFoundError(f"{self.mteb_model_meta.name} has left no predictions to fuse")
        return self.found[hf_subset][hf_split]


def hybrid(output: Path, metas: Sequence[ModelMeta], task: Any, fusion: str, weight: float) -> HybridSearch:
    """The fusion of two systems for one task; `weight`, from 0 to 1, is the first one's.

    A document that a system has not among its best counts 0 there.
    """
    weights = [weight, 1 - weight]
    found = HybridSearch([Replay(output, meta, task) for meta in metas], weights, None, fusion)
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
        task.unload_data()
    means = {weight: round(fmean(found), 6) for weight, found in scores.items()}
    best = max(means, key=lambda weight: (means[weight], -abs(weight - EQUAL)))
    return Chosen(best, {str(weight): mean for weight, mean in means.items()})


def _score(system: HybridSearch, task: Any) -> float:
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

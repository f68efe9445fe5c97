"""nDCG@10 of the model as it is, on folders in BEIR layout, shared out among the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from lens.corpus import Beir, read_beir
from lens.encoder import LENS
from lens.files import read_json, require
from lens.search.exact import search

MEASURE = "nDCG@10"
EVALUATION_FILE = "evaluation.json"
_DEPTH = 10


def read_evaluation(paths: Sequence[str]) -> list[Beir]:
    """The data sets of an evaluation; raises FileNotFoundError and ValueError, also for two of one name."""
    require("train", "ir_measures")
    found = [read_beir(path) for path in paths]
    for path, data in zip(paths, found, strict=True):
        if not any(score > 0 for judged in data.qrels.values() for score in judged.values()):
            raise ValueError(f"{path}: no judgement is above 0: nothing can be measured")
    names = [data.name for data in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"eval_data names two folders called {name}: rename one")
    return found


def evaluate(model: LENS, data: Sequence[Beir], instruction: str | None = None) -> dict[str, float]:
    """`eval_NAME_ndcg@10` of each data set and their mean, `eval_ndcg@10`; every rank calls and gets the same.

    Each rank searches its share of the documents for all queries, and the best of all shares are ranked.
    """
    values = {}
    for one in data:
        values[f"eval_{one.name}_ndcg@10"] = _ndcg(model, one, instruction)
    return {**values, "eval_ndcg@10": float(np.mean(list(values.values())))}


def _ndcg(model: LENS, data: Beir, instruction: str | None) -> float:
    import ir_measures

    together = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    names = list(data.corpus)[rank::ranks]
    queries = model.encode_queries(list(data.queries.values()), instruction, output="csr", show_progress=False)
    found: list[list[tuple[float, int]]] = [[] for _ in data.queries]  # score and place in the corpus
    if names:
        documents = model.encode_documents([data.corpus[n] for n in names], output="csr", show_progress=False)
        for row, (indices, scores) in enumerate(zip(*search(queries, documents, _DEPTH), strict=True)):
            found[row] = [(float(score), int(i) * ranks + rank) for i, score in zip(indices, scores, strict=True)]
    if together:
        shares: list[Any] = [None] * ranks
        dist.all_gather_object(shares, found)
        found = [[pair for share in shares for pair in share[row]] for row in range(len(data.queries))]
    every = list(data.corpus)
    run = {
        query: {every[i]: float(-place) for place, (_, i) in enumerate(sorted(pairs, key=lambda p: (-p[0], p[1])))}
        for query, pairs in zip(data.queries, found, strict=True)
    }
    measure = ir_measures.parse_measure(MEASURE)
    value: float = ir_measures.calc_aggregate([measure], data.qrels, run)[measure]
    return value


def best_folder(output: Path) -> Path:
    """Where the best model by evaluation is kept."""
    return output / "best"


def best_so_far(output: Path) -> dict[str, Any] | None:
    """The evaluation of the best model: its values, `step` and `instruction`; None before the first."""
    try:
        return read_json(best_folder(output) / EVALUATION_FILE)
    except FileNotFoundError:
        return None

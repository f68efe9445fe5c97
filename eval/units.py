"""What a task's score is made of: a value for each query, pair, text or draw, for tests and for comparing runs.

mteb stores scores only, so its predictions are turned into a file beside the results,
OUTPUT/units/OWNER__MODEL/REVISION/TASK.json:

    {"task", "measure", "revision", "score", "kind", "cost",
     "parts": [{"split", "subset", "names", "values", "gold"}]}     and "first", the best document of each query

The score is the mean over parts of a statistic: of kind "mean" the mean of `values` (nDCG@10 of a query, the share of
experiments that class a text rightly, V-measure of a draw), "spearman" their rank correlation with `gold`, "ap" their
average precision for the labels in `gold`. A task whose score is nothing of this has no parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval
from datasets import Dataset
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from lens.files import read_json, write_json

MOST = 200_000
"""Queries or texts of a task from which on it is not split: its predictions would take gigabytes."""
CLOSE = 1e-4
"""Difference from mteb's score (five decimals) up to which a statistic of the parts is that score."""
RETRIEVES = ("Retrieval", "Reranking")
"""Task types whose predictions are documents of each query."""
Part = dict[str, Any]


class Kept:
    """The files of a system's results on a task: mteb's predictions, and the units made of them."""

    def __init__(self, output: Path, meta: Any, task: Any) -> None:
        place = Path(meta.model_name_as_path(), meta.revision or "no_revision_available")
        if meta.experiment_name:
            place = place / "experiments" / meta.experiment_name
        self.task = task
        self.relative = Path("units") / place
        self.folder = output / "predictions" / place
        self.predictions = self.folder / task.prediction_file_name
        self.units = output / self.relative / f"{task.metadata.name}.json"

    def content(self) -> dict[str, Any] | None:
        """The stored units, None where there are none of this revision of the data."""
        try:
            found = read_json(self.units) if self.units.is_file() else {}
        except ValueError:
            return None
        return found if found.get("revision") == self.task.metadata.revision else None

    def drop_torn(self) -> None:
        """Removes predictions that a killed run has not written whole, on which mteb would stumble."""
        if self.predictions.is_file():
            try:
                read_json(self.predictions)
            except ValueError:
                self.predictions.unlink()

    def forget(self) -> None:
        """Removes what is of other data than the task's."""
        for path in (self.units, self.predictions):
            path.unlink(missing_ok=True)

    def lack_predictions(self, content: Mapping[str, Any] | None) -> bool:
        """Whether documents that were retrieved are not there, and would be after another evaluation; `content` is that
        of the units."""
        retrieves = self.task.metadata.type in RETRIEVES and (content is None or content.get("predicted", True))
        return retrieves and not self.predictions.is_file()

    def write(self, result: Any, cost: Mapping[str, Any], parts_of: Sequence[Kept] = ()) -> None:
        """Writes the units of a finished task from its predictions and `result`, mteb's TaskResult; those of an
        aggregate are its parts', `parts_of`. A task whose data cannot be read so has none, and says why."""
        task = self.task
        predictions = read_json(self.predictions) if self.predictions.is_file() else {}
        score = main_score(result, task)
        parts: list[Part] = []
        kind, reason = "mean", None
        try:
            if parts_of:
                parts = [part for one in parts_of for part in (one.content() or {}).get("parts", ())]
            elif task.data_loaded:
                parts, kind = split(task, predictions, result.scores)
            if parts and not abs(np.mean([statistic(kind, part) for part in parts]) - score) <= CLOSE:
                parts = []
        except Exception as error:  # mteb's tasks hold their data in many forms, and the score stands without this
            parts, reason = [], f"{type(error).__name__}: {error}"
        seconds = result.evaluation_time
        write_json(
            self.units,
            {
                "task": task.metadata.name,
                "measure": task.metadata.main_score,
                "revision": task.metadata.revision,
                "score": score,
                "kind": kind,
                "cost": {"seconds": seconds if seconds is not None and np.isfinite(seconds) else None, **cost},
                "predicted": not too_many(task),
                "parts": parts,
                **({} if reason is None else {"reason": reason}),
            },
        )


def main_score(result: Any, task: Any) -> float:
    """The main score of a TaskResult over the splits and subsets that were asked for, rounded as mteb stores it."""
    return round(float(result.validate_and_filter_scores(task).get_score()), 6)


def too_many(task: Any) -> bool:
    """Whether a task, whose data are loaded, has more queries than can be kept one by one."""
    if not isinstance(getattr(task, "dataset", None), Mapping):
        return False
    return any(
        len(part["queries"]) > MOST
        for subset in task.dataset.values()
        if isinstance(subset, Mapping)
        for part in subset.values()
        if isinstance(part, Mapping) and "queries" in part
    )


def statistic(kind: str, part: Mapping[str, Any]) -> float:
    """The score of one part."""
    if kind == "mean":
        return float(np.mean(part["values"]))
    if kind == "spearman":
        return float(spearmanr(part["values"], part["gold"]).statistic)
    return float(average_precision_score(part["gold"], part["values"]))


def split(task: Any, predictions: Mapping[str, Any], scores: Mapping[str, Any]) -> tuple[list[Part], str]:
    """The parts of a task, whose data are loaded, and their kind; no parts where its score is no such statistic.

    `predictions` is mteb's, subset -> split -> what the task predicts, `scores` its results, split -> one for each
    subset.
    """
    kind = _READERS.get(task.metadata.type, ("", "mean"))[1]
    parts = []
    for name in task.eval_splits if task.metadata.type in _READERS else ():
        for entry in scores.get(name, ()):
            subset = entry["hf_subset"]
            if subset not in task.hf_subsets:
                continue
            part = part_of(task, predictions.get(subset, {}).get(name), entry, subset, name)
            if part is None:
                return [], kind
            parts.append(part)
    return parts, kind


def part_of(task: Any, found: Any, entry: Mapping[str, Any], subset: str, name: str) -> Part | None:
    """One subset and split of a task, from what was found (mteb's prediction) and its scores, or None."""
    part = _READERS[task.metadata.type][0](task, found, entry, subset, name)
    if part is None or not part["values"] or not np.isfinite(part["values"]).all():
        return None
    names = [str(number) for number in range(len(part["values"]))]
    return {"split": name, "subset": subset, "names": names, "gold": None, **part}


def _rows(task: Any, subset: str, name: str) -> Any:
    rows = task.dataset.get(subset, task.dataset)[name]
    packed = len(rows) == 1 and all(isinstance(value, list) for value in rows[0].values())
    return Dataset.from_dict(rows[0]) if packed else rows  # mteb's older data: all of a split in one row


def _queries(task: Any, found: Any, entry: Any, subset: str, name: str) -> Part | None:
    measure = re.fullmatch(r"(ndcg|map|recall|precision)_at_(\d+)", task.metadata.main_score)
    if found is None or measure is None:
        return None
    kind, depth = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}[measure[1]], measure[2]
    found = counted(task, found)
    relevant = task.dataset[subset][name]["relevant_docs"]
    values = pytrec_eval.RelevanceEvaluator(relevant, {f"{kind}.{depth}"}).evaluate(found)
    names = [query for query in relevant if query in values]
    first = [max(found[query], key=lambda name: (found[query][name], name), default=None) for query in names]
    return {"names": names, "values": [values[query][f"{kind}_{depth}"] for query in names], "first": first}


def counted(task: Any, found: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
    """Of what was retrieved that which counts: in some of mteb's tasks a query stands in the corpus itself, or the
    first document is left out."""
    if task.ignore_identical_ids:
        found = {q: {name: score for name, score in hits.items() if name != q} for q, hits in found.items()}
    if task.skip_first_result:
        found = {q: dict(sorted(h.items(), key=lambda hit: hit[1], reverse=True)[1:]) for q, h in found.items()}
    return found


def _similarities(task: Any, found: Any, entry: Any, subset: str, name: str) -> Part | None:
    field = {"cosine_spearman": "cosine_scores", "spearman": "similarity_scores"}.get(task.metadata.main_score)
    if found is None or field is None:
        return None
    return {"values": list(map(float, found[field])), "gold": list(map(float, _rows(task, subset, name)["score"]))}


def _pairs(task: Any, found: Any, entry: Any, subset: str, name: str) -> Part | None:
    if found is None or task.metadata.main_score not in ("max_ap", "similarity_ap", "cosine_ap"):
        return None
    gold = list(map(int, _rows(task, subset, name)[task.label_column_name]))
    for field, values in found.items():
        part = {"values": [float(v) * (-1 if field.endswith("distances") else 1) for v in values], "gold": gold}
        if len(values) == len(gold) and abs(statistic("ap", part) - entry["main_score"]) <= CLOSE:
            return part
    return None


def _labels(task: Any, found: Any, entry: Any, subset: str, name: str) -> Part | None:
    labels = np.asarray(_rows(task, subset, name)[task.label_column_name])
    if found is None or task.metadata.main_score != "accuracy" or any(len(one) != len(labels) for one in found):
        return None
    return {"values": np.mean([np.asarray(one) == labels for one in found], axis=0).tolist()}


def _draws(task: Any, found: Any, entry: Any, subset: str, name: str) -> Part | None:
    draws = entry.get("v_measures")
    if draws is None or task.metadata.main_score != "v_measure":
        return None
    levels: Sequence[Any] = list(draws.values()) if isinstance(draws, Mapping) else [draws]
    return {"values": [float(value) for level in levels for value in level]}


def _texts(task: Any, found: Any, entry: Any, subset: str, name: str) -> Part | None:
    field = {"cosine_spearman": "cosine_scores", "spearman": "similarity_scores"}.get(task.metadata.main_score)
    rows = _rows(task, subset, name)
    if found is None or field is None or len(found[field]) != len(rows):  # mteb skips texts with equal similarities
        return None
    pairs = zip(found[field], found["human_scores"], strict=True)
    return {"values": [float(spearmanr(one, two).statistic) for one, two in pairs]}


_READERS: dict[str, tuple[Any, str]] = {
    "Retrieval": (_queries, "mean"),
    "Reranking": (_queries, "mean"),
    "STS": (_similarities, "spearman"),
    "PairClassification": (_pairs, "ap"),
    "Classification": (_labels, "mean"),
    "Clustering": (_draws, "mean"),
    "Summarization": (_texts, "mean"),
}

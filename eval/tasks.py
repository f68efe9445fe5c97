"""A folder of data -> an mteb task: retrieval, reranking, STS, pair and text classification, clustering, summarisation.

    DIR[:KIND]

A folder in BEIR layout is a retrieval task, as :reranking one of its judged documents. Others hold SPLIT.jsonl(.gz),
whose fields tell the kind: `sentence1`, `sentence2` with `score` (sts) or `label` 0 and 1 (pair), `text` with `label`
(classification where there is train.jsonl, else clustering), `text`, `human_summaries`, `machine_summaries`,
`relevance` (summarization). The split evaluated is test, else
dev, else validation, else the only one there is.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.text.summarization import AbsTaskSummarization

from lens.corpus import read_beir
from lens.files import read_jsonl
from lens.identity import sha256

KINDS = ("retrieval", "reranking", "sts", "pair", "classification", "clustering", "summarization")
SPLITS = ("test", "dev", "validation")
"""Names of what is evaluated, the first of these that there is."""
DEV = ("dev", "validation")
"""Names of what settings are chosen on."""
LOCAL = "local/"
"""What the path of a folder's data set begins with in its metadata."""
SUMMARIES = 3
"""Pairs with the same first sentence from which an STS folder can be read as summaries of it."""
_TYPES = {
    "retrieval": ("Retrieval", AbsTaskRetrieval, "ndcg_at_10"),
    "reranking": ("Reranking", AbsTaskRetrieval, "map_at_1000"),
    "sts": ("STS", AbsTaskSTS, "cosine_spearman"),
    "pair": ("PairClassification", AbsTaskPairClassification, "max_ap"),
    "classification": ("Classification", AbsTaskClassification, "accuracy"),
    "clustering": ("Clustering", AbsTaskClustering, "v_measure"),
    "summarization": ("Summarization", AbsTaskSummarization, "cosine_spearman"),
}
"""mteb's name, class and main score of each kind: those that MTEB(eng, v1 and v2) report."""
_CLUSTERING = {
    "max_fraction_of_documents_to_embed": None,
    "max_document_to_embed": 8192,
    "max_documents_per_cluster": 2048,
}
"""Texts embedded at most, and drawn for each of the ten clusterings: minutes on a laptop with thousands of dimensions,
where mteb's 16,384 draws would take an hour."""


@functools.cache
def known_tasks() -> dict[str, str]:
    """mteb's own tasks: name -> type."""
    return {task.metadata.name: task.metadata.type for task in mteb.get_tasks(exclude_superseded=False)}


def local_task(given: str, splits: Sequence[str] | None = None) -> AbsTask:
    """The task of DIR or DIR:KIND; its data are read when it is evaluated, its revision is a hash of its files.

    With `splits`, such as DEV, the first of them that there is is evaluated, and its name is part of the task's.
    Raises FileNotFoundError or ValueError naming folder, file and line, what was expected and what was found.
    """
    place, colon, kind = given.partition(":") if not Path(given).exists() else (given, "", "")
    folder = Path(place).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"task folder {place} does not exist")
    if colon and kind not in KINDS:
        raise ValueError(f"{given}: {kind!r} is no kind of task; there are {', '.join(KINDS)}")
    found = _kind(folder)
    allowed = {found} | {"retrieval": {"reranking"}, "sts": {"summarization"}, "classification": {"clustering"}}.get(
        found, set()
    )
    if kind and kind not in allowed:
        raise ValueError(f"{given}: the files there are of kind {' or '.join(sorted(allowed))}, not {kind}")
    kind = kind or found
    name = folder.name if kind == found else f"{folder.name}.{kind}"
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{given}: results are kept by the folder's name, so it may hold letters, digits and ._- only")
    if name in known_tasks():
        raise ValueError(f"{given}: mteb has a task named {name}: rename the folder, so that results are not mistaken")
    split = _split(folder, kind, splits)
    return _build(folder, name if splits is None else f"{name}.{split}", kind, split)


def _build(folder: Path, name: str, kind: str, split: str) -> AbsTask:
    mteb_type, base, main_score = _TYPES[kind]
    metadata = TaskMetadata(
        name=name,
        description=f"{folder.name}, read from a local folder",
        dataset={"path": f"{LOCAL}{folder.name}", "revision": _revision(folder)},
        type=mteb_type,
        category="t2c" if kind in ("classification", "clustering") else "t2t",
        eval_splits=[split],
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )

    def load_data(self: Any, num_proc: int | None = None, **_: Any) -> None:
        if not self.data_loaded:
            for field, value in _READERS[kind](folder, split).items():
                setattr(self, field, value)
            self.data_loaded = True

    judged = folder / "qrels" / f"{split}.tsv" if "corpus" in _files(folder) else _files(folder)[split]
    members = {
        "metadata": metadata,
        "load_data": load_data,
        "judged": judged,
        **(_CLUSTERING if kind == "clustering" else {}),
    }
    if kind == "summarization":
        members |= {"min_score": 0, "max_score": 5}
    return type("LocalTask", (base,), members)()


def _files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.name.endswith((".jsonl", ".jsonl.gz"))):
        split = path.name.split(".jsonl")[0]
        if split in found:
            raise ValueError(f"{folder} has both {found[split].name} and {path.name}: remove one")
        found[split] = path
    return found


def _kind(folder: Path) -> str:
    files = _files(folder)
    if "corpus" in files:
        return "retrieval"
    if not files:
        raise FileNotFoundError(f"{folder} holds neither corpus.jsonl nor SPLIT.jsonl(.gz), such as test.jsonl")
    path = files[_split(folder, "")]
    row = next((row for _, row in read_jsonl(path)), None)
    if row is None:
        raise ValueError(f"{path} is empty")
    fields = set(row)
    if {"sentence1", "sentence2"} <= fields and fields & {"score", "label"}:
        return "sts" if "score" in fields else "pair"
    if {"text", "label"} <= fields:
        return "classification" if "train" in files and len(files) > 1 else "clustering"
    if {"text", "human_summaries", "machine_summaries", "relevance"} <= fields:
        return "summarization"
    raise ValueError(f"{path}: the fields {', '.join(sorted(fields))} are of no kind of task ({', '.join(KINDS)})")


def _split(folder: Path, kind: str, splits: Sequence[str] | None = None) -> str:
    if kind in ("retrieval", "reranking"):
        names = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
        if not names:
            raise FileNotFoundError(f"{folder} has no qrels/SPLIT.tsv")
    else:
        names = list(_files(folder))
    only = names[0] if len(names) == 1 and splits is None else None
    found = next((name for name in splits or SPLITS if name in names), only)
    if found is None:
        wanted = ", ".join(splits or SPLITS)
        raise ValueError(f"{folder} has {', '.join(names)}, of which none is called {wanted}: rename one")
    return found


def _revision(folder: Path) -> str:
    paths = sorted(path for pattern in ("*.jsonl*", "qrels/*.tsv") for path in folder.glob(pattern))
    content = "\n".join(f"{path.relative_to(folder)} {sha256(path)}" for path in paths)
    return hashlib.sha256(content.encode()).hexdigest()[:40]


def _rows(path: Path, **fields: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """The rows of a file, each field checked."""
    rows = []
    for number, row in read_jsonl(path):
        for field, right in fields.items():
            if field not in row or not right(row[field]):
                raise ValueError(f"{path}:{number}: expected {field}, found {row.get(field)!r:.80}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_text, value))


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_number, value))


def _retrieval(folder: Path, split: str, rerank: bool = False) -> dict[str, Any]:
    beir = read_beir(folder, split)
    asked = [query for query, judged in beir.qrels.items() if any(score > 0 for score in judged.values())]
    if not asked:
        raise ValueError(f"{folder}: no query has a relevant document")
    if rerank:
        asked = [query for query in asked if any(score <= 0 for score in beir.qrels[query].values())]
        if not asked:
            raise ValueError(f"{folder}: no query has a judged document that is not relevant: nothing to rerank")
    data = {
        "corpus": Dataset.from_dict({"id": list(beir.corpus), "text": list(beir.corpus.values())}),
        "queries": Dataset.from_dict({"id": asked, "text": [beir.queries[query] for query in asked]}),
        "relevant_docs": {query: dict(beir.qrels[query]) for query in asked},
        "top_ranked": {query: list(beir.qrels[query]) for query in asked} if rerank else None,
    }
    return {"dataset": {"default": {split: data}}}


def _reranking(folder: Path, split: str) -> dict[str, Any]:
    return _retrieval(folder, split, rerank=True)


def _sts(folder: Path, split: str) -> dict[str, Any]:
    rows = _rows(_files(folder)[split], sentence1=_text, sentence2=_text, score=_number)
    scores = [float(row["score"]) for row in rows]
    if min(scores) == max(scores):
        raise ValueError(f"{_files(folder)[split]}: all scores are {scores[0]}: nothing to correlate with")
    columns = {name: [row[name] for row in rows] for name in ("sentence1", "sentence2")}
    data = DatasetDict({split: Dataset.from_dict({**columns, "score": scores})})
    return {"dataset": data, "min_score": min(scores), "max_score": max(scores)}


def _pair(folder: Path, split: str) -> dict[str, Any]:
    rows = _rows(_files(folder)[split], sentence1=_text, sentence2=_text, label=lambda value: value in (0, 1))
    labels = [int(row["label"]) for row in rows]
    if len(set(labels)) < 2:
        raise ValueError(f"{_files(folder)[split]}: all labels are {labels[0]}")
    columns = {name: [row[name] for row in rows] for name in ("sentence1", "sentence2")}
    return {"dataset": DatasetDict({split: Dataset.from_dict({**columns, "labels": labels})})}


def _labelled(path: Path) -> list[tuple[str, str]]:
    rows = _rows(path, text=_text, label=lambda value: isinstance(value, str | int))
    if any("title" in row for row in rows):
        _rows(path, title=lambda value: value is None or isinstance(value, str))
    return [(" ".join(filter(None, (row.get("title"), row["text"]))), str(row["label"])) for row in rows]


def _classification(folder: Path, split: str) -> dict[str, Any]:
    files = _files(folder)
    parts = {name: _labelled(files[name]) for name in ("train", split)}
    number = {label: i for i, label in enumerate(sorted({label for _, label in parts["train"]}))}
    unknown = sorted({label for _, label in parts[split]} - number.keys())
    if unknown:
        raise ValueError(f"{files[split]}: label {unknown[0]!r} does not occur in {files['train'].name}")
    if len(number) < 2:
        raise ValueError(f"{files['train']}: one label only")
    return {
        "dataset": DatasetDict(
            {
                name: Dataset.from_dict({"text": [t for t, _ in rows], "label": [number[label] for _, label in rows]})
                for name, rows in parts.items()
            }
        )
    }


def _clustering(folder: Path, split: str) -> dict[str, Any]:
    rows = _labelled(_files(folder)[split])
    if len({label for _, label in rows}) < 2:
        raise ValueError(f"{_files(folder)[split]}: one label only")
    data = Dataset.from_dict({"sentences": [text for text, _ in rows], "labels": [label for _, label in rows]})
    return {"dataset": DatasetDict({split: data})}


def _summarization(folder: Path, split: str) -> dict[str, Any]:
    path = _files(folder)[split]
    if _kind(folder) == "sts":
        return _summaries_of_pairs(folder, split)
    rows = _rows(path, text=_text, human_summaries=_texts, machine_summaries=_texts, relevance=_numbers)
    for number, row in enumerate(rows, 1):
        if len(row["relevance"]) != len(row["machine_summaries"]):
            raise ValueError(f"{path}: row {number} has {len(row['machine_summaries'])} machine summaries, "
                             f"but {len(row['relevance'])} values of relevance")  # fmt: skip
    names = ("text", "human_summaries", "machine_summaries", "relevance")
    return _graded({name: [row[name] for row in rows] for name in names}, split, path)


def _summaries_of_pairs(folder: Path, split: str) -> dict[str, Any]:
    """First sentences that stand in several pairs as texts, the second sentences as their summaries."""
    pairs = _sts(folder, split)["dataset"][split]
    groups: dict[str, dict[str, float]] = {}
    for one, two, score in zip(pairs["sentence1"], pairs["sentence2"], pairs["score"], strict=True):
        groups.setdefault(one, {})[two] = score
    kept = {one: found for one, found in groups.items() if len(found) >= SUMMARIES and len(set(found.values())) > 1}
    if not kept:
        raise ValueError(f"{folder}: no sentence1 stands in {SUMMARIES} pairs of several scores: no summaries there")
    columns = {
        "text": list(kept),
        "human_summaries": [[one] for one in kept],
        "machine_summaries": [list(found) for found in kept.values()],
        "relevance": [list(found.values()) for found in kept.values()],
    }
    return _graded(columns, split, folder)


def _graded(columns: dict[str, list[Any]], split: str, place: Path) -> dict[str, Any]:
    values = [value for row in columns["relevance"] for value in row]
    if min(values) == max(values):
        raise ValueError(f"{place}: all values of relevance are {values[0]}")
    data = DatasetDict({split: Dataset.from_dict(columns)})
    return {"dataset": data, "min_score": min(values), "max_score": max(values)}


_READERS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "retrieval": _retrieval,
    "reranking": _reranking,
    "sts": _sts,
    "pair": _pair,
    "classification": _classification,
    "clustering": _clustering,
    "summarization": _summarization,
}

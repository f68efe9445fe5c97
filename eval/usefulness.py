"""Unlabelled texts -> how useful each dimension of a model is: its mean square, and its variance.

Legend: N texts, K dimensions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mteb.abstasks import AbsTaskRetrieval
from mteb.types import PromptType
from numpy.typing import NDArray
from scipy import sparse

from eval.encoder import LensEncoder, texts_of
from eval.pruning import activity, cleaned, variances
from eval.snapshot import unload
from lens.corpus import read_texts
from lens.files import read_json, write_json
from lens.identity import sha256
from lens.vectors import rank_dims

COLUMNS = ("text", "sentences", "sentence1", "sentence2", "human_summaries", "machine_summaries")
"""Columns of mteb's tasks that hold texts, never labels."""
MOST = 10_000
"""Texts that are taken of a folder at most."""
ORDERS = ("mean square", "variance", "random")
"""Orders in which dimensions are dropped, the last a control."""


@dataclass(frozen=True)
class Usefulness:
    """What texts tell of K dimensions: `orders` maps each of ORDERS to the dimensions, most useful first;
    `active_per_text` (N,) counts a text's non-zero values, `activity` (K,) is the share of texts in which a dimension
    is not zero."""

    texts: int
    orders: dict[str, list[int]]
    active_per_text: list[int]
    activity: list[float]

    def values(self, top_n: int | None = None, dims: Sequence[int] | None = None) -> float:
        """Mean number of non-zero values of a text of which the `top_n` largest, or `dims`, are kept."""
        if dims is not None:
            return float(np.asarray(self.activity)[list(dims)].sum())
        counts = np.asarray(self.active_per_text)
        return float((counts if top_n is None else np.minimum(counts, top_n)).mean())

    @property
    def dead(self) -> int:
        """Dimensions that are zero in every text."""
        return sum(share == 0 for share in self.activity)


def usefulness(
    source: LensEncoder, tasks: Sequence[Any], calibrate: str | None, sample: int, seed: int, path: Path
) -> Usefulness:
    """Measured on `sample` texts of each mteb task, or on those of the file or folder `calibrate`, and kept in the file
    `path`, from which the same command reads it again.

    Raises what `lens.corpus.read_texts` raises, and ValueError where there are no texts or all embeddings are zero.
    """
    meta = source.mteb_model_meta
    facts: list[Any] = [meta.name, meta.revision, meta.experiment_kwargs, str(source.facts), sample, seed]
    if calibrate is None:
        facts += [[task.metadata.name, task.metadata.dataset, list(task.eval_splits)] for task in tasks]
    else:
        files = [Path(calibrate)] if Path(calibrate).is_file() else sorted(Path(calibrate).glob("corpus.jsonl*"))
        facts += [sha256(file) for file in files]
    identity = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
    if path.is_file():
        held = read_json(path)
        if held.pop("identity", None) == identity:
            return Usefulness(**held)
    rng = np.random.default_rng(seed)
    if calibrate is None:
        vectors = [_embedded(source, task, sample, rng) for task in _parts(tasks)]
    else:
        vectors = [source.model.encode_documents(_drawn(read_texts(calibrate)[1], MOST, rng), output="csr")]
    embeddings = cleaned(sparse.vstack(vectors, format="csr"))
    if not embeddings.nnz:
        raise ValueError(f"usefulness of dimensions: {embeddings.shape[0]} texts, no value that is not zero")
    found = Usefulness(
        embeddings.shape[0],
        {
            "mean square": rank_dims(embeddings),
            "variance": np.argsort(-variances(embeddings), kind="stable").tolist(),
            "random": np.random.default_rng(seed).permutation(embeddings.shape[1]).tolist(),
        },
        np.diff(embeddings.indptr).tolist(),
        activity(embeddings).tolist(),
    )
    write_json(path, {"identity": identity, **asdict(found)})
    return found


def _parts(tasks: Iterable[Any]) -> list[Any]:
    """The tasks, aggregates replaced by what they are made of."""
    return [part for task in tasks for part in getattr(task.metadata, "tasks", None) or [task]]


def _embedded(source: LensEncoder, task: Any, sample: int, rng: np.random.Generator) -> sparse.csr_matrix:
    return source.known(unlabelled(task, sample, rng), task.metadata, PromptType.document, "csr")[0]


def unlabelled(task: Any, sample: int, rng: np.random.Generator) -> list[str]:
    """Up to `sample` distinct texts of an mteb task's evaluated splits: documents where it has some, else all that it
    embeds. Labels and judgements are not looked at."""
    task.load_data()
    texts: list[str] = []
    if isinstance(task, AbsTaskRetrieval):
        task.convert_v1_dataset_format_to_v2(None)
    for subset in task.hf_subsets:
        splits = task.dataset.get(subset, task.dataset)
        for split in task.eval_splits:
            if isinstance(task, AbsTaskRetrieval):
                corpus = splits[split]["corpus"]
                some = np.sort(rng.permutation(len(corpus))[:sample])
                texts += texts_of(corpus.select(some), task.metadata, PromptType.document)
            else:
                columns = [name for name in COLUMNS if name in splits[split].column_names]
                texts += [text for name in columns for text in _flat(splits[split][name])]
    unload(task)
    return _drawn(texts, sample, rng)


def _flat(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    return (text for part in value for text in _flat(part))


def _drawn(texts: Iterable[str], count: int, rng: np.random.Generator) -> list[str]:
    """Up to `count` of the distinct texts, in the order given."""
    distinct = list(dict.fromkeys(texts))
    some: NDArray[np.int64] = np.sort(rng.permutation(len(distinct))[:count])
    return [distinct[number] for number in some]

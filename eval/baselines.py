"""BM25 and the dense backbone as mteb takes models, so that they stand beside LENS in the same run."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from scipy import sparse

import lens
from eval.encoder import RERANKING, ChunkedEncoder, texts_of
from eval.scoring import rank
from lens.dense import Dense
from lens.identity import model_files
from lens.search.bm25 import BM25

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

_OPEN = dict.fromkeys(
    (
        "release_date", "languages", "n_parameters", "memory_usage_mb", "license", "open_weights",
        "public_training_code", "public_training_data", "training_datasets",
    )
)  # fmt: skip
"""Fields of a ModelMeta that only a leaderboard wants."""


class DenseEncoder(ChunkedEncoder):
    """The mean-pooled backbone without instructions."""

    def __init__(self, model: Dense, meta: ModelMeta, work: str | os.PathLike[str] | None = None) -> None:
        super().__init__(meta, model.dimensions, None, work)
        self.model = model

    def manner(self, task: TaskMetadata, side: PromptType | None) -> Any:
        """Nothing: texts of all kinds are embedded alike."""
        return None

    def vectors(self, texts: Sequence[str], task: TaskMetadata, side: PromptType | None, output: str) -> Any:
        found = self.model.encode(texts, f"{task.name}: dense", show_progress=False)
        return sparse.csr_matrix(found) if output == "csr" else found


def dense_encoder(
    path: str | os.PathLike[str], device: str | None = None, max_length: int = 128, work: Any = None
) -> DenseEncoder:
    """The dense baseline of a backbone; `max_length` in tokens. Raises what `lens.dense.Dense` raises."""
    model = Dense(path, device, max_length=max_length)
    content = repr((model_files(path), str(path) if not Path(path).is_dir() else "", max_length))
    place = Path(path).resolve()
    name = (place.parent if place.name == "model" else place).name
    meta = ModelMeta(
        loader=functools.partial(_load_dense, path=path, max_length=max_length),
        name=f"local/dense-{name}",
        revision=hashlib.sha256(content.encode()).hexdigest()[:40],
        max_tokens=max_length,
        embed_dim=model.dimensions,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        **_OPEN,
    )
    return DenseEncoder(model, meta, work)


def _load_dense(name: str, revision: str | None = None, device: Any = None, **options: Any) -> DenseEncoder:
    return dense_encoder(device=device, **options)


class BM25Search:
    """BM25 (lens/search/bm25.py) for retrieval and reranking; it has no embeddings, so other tasks are not for it."""

    def __init__(self, **options: Any) -> None:
        """The options are those of `lens.search.bm25.BM25`."""
        self.options = options
        content = repr((sorted(options.items()), version("bm25s"), version("PyStemmer"), lens.__version__))
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name="local/bm25",
            revision=hashlib.sha256(content.encode()).hexdigest()[:40],
            max_tokens=None,
            embed_dim=None,
            framework=["NumPy"],
            similarity_fn_name=ScoringFunction.CUSTOM,
            use_instructions=False,
            model_type=["sparse"],
            **_OPEN,
        )
        self.ids: list[str] = []
        self.bm25: BM25 | None = None
        self.asked = 0

    def index(self, corpus: Any, *, task_metadata: TaskMetadata, **_: Any) -> None:
        """Indexes a corpus, which is held in memory."""
        self.ids = list(corpus["id"])
        self.bm25 = BM25(texts_of(corpus, task_metadata, PromptType.document), **self.options)

    def cost(self) -> dict[str, Any]:
        """Texts since the last call, and of the corpus indexed last dimensions, distinct words and bytes of a
        document."""
        if self.bm25 is None:
            return {}
        texts, self.asked = len(self.ids) + self.asked, 0
        size = self.bm25.held / max(1, len(self.ids))
        facts = {"dimensions": self.bm25.dimensions, "active": round(self.bm25.active_per_document, 2)}
        return {**facts, "bytes_per_document": round(size, 1), "texts": texts}

    def search(
        self,
        queries: Any,
        *,
        task_metadata: TaskMetadata,
        top_k: int,
        top_ranked: dict[str, list[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """The `top_k` best documents of each query, those of score 0 left out, or of its candidates, all of them."""
        if self.bm25 is None:
            raise ValueError(f"{task_metadata.name}: search comes after index")
        if task_metadata.type in RERANKING and top_ranked is None:
            raise ValueError(f"{task_metadata.name}: the candidates to rerank (top_ranked) are missing")
        position = {name: i for i, name in enumerate(self.ids)}
        self.asked += len(queries)
        found: dict[str, dict[str, float]] = {}
        asked: dict[str, list[str]] = {}
        for query, text in zip(queries["id"], texts_of(queries, task_metadata, PromptType.query), strict=True):
            asked.setdefault(text, []).append(query)
        for text, names in asked.items():
            scores = self.bm25.score([text])[0]
            if top_ranked is None:
                best = rank(scores, top_k, matching=True)
                hits = {self.ids[i]: float(score) for i, score in zip(best.documents, best.scores, strict=True)}
                found |= {query: dict(hits) for query in names}
                continue
            for query in names:
                missing = next((name for name in top_ranked.get(query, ()) if name not in position), None)
                if missing is not None:
                    raise ValueError(
                        f"{task_metadata.name}: candidate {missing!r} of query {query!r} is not in the corpus"
                    )
                found[query] = {name: float(scores[position[name]]) for name in top_ranked.get(query, ())}
        return found

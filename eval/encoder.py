"""Models as mteb takes them: an encoder, and a search that never holds a corpus.

Texts are embedded once however often a task repeats them. Retrieval goes through the corpus in chunks, keeps the best
documents of each query, and goes on after a kill at the chunk it had not finished.

Legend: Q queries, N texts, K dimensions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mteb._create_dataloaders import create_dataloader
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType
from numpy.typing import NDArray
from scipy import sparse
from tqdm.auto import tqdm

from eval.instructions import ASYMMETRIC, instruction_for
from eval.running import RunningTop, inner_products
from lens.encoder import LENS

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

CHUNK_VALUES = 1 << 26
"""Values of the embeddings that a chunk of a corpus may take, were they dense (256 MB)."""
PROBE = 64
"""Documents of a chunk that are embedded first, to see how sparse a model is."""
SPARSE_BELOW = 0.1
"""Share of non-zero values below which embeddings are kept sparse."""


def texts_of(rows: Any, task: TaskMetadata, side: PromptType) -> list[str]:
    """The texts of queries or documents as mteb gives them to every model: title and text, query and its own
    instruction, a conversation in one line."""
    loader = create_dataloader(rows, task_metadata=task, prompt_type=side, batch_size=1024)
    return [text for batch in loader for text in batch["text"]]


class ChunkedEncoder(AbsEncoder):
    """What models have in common: `encode` for most tasks, `index` and `search` for retrieval and reranking.

    `vectors(texts, task, side, output)` gives embeddings (N, K) of distinct texts, `output` being "numpy" or "csr".
    `work` is a folder for unfinished searches; without one a killed search begins again.
    """

    def __init__(
        self,
        meta: ModelMeta,
        dimensions: int,
        device: torch.device | None = None,
        work: str | os.PathLike[str] | None = None,
        chunk: int | None = None,
    ) -> None:
        """`chunk` is in documents; by default as many as take 256 MB."""
        self.mteb_model_meta = meta
        self.device = device
        self.work = None if work is None else Path(work)
        self.chunk = chunk or max(PROBE, CHUNK_VALUES // dimensions)
        self.corpus: Any = None
        self.searches: list[Path] = []

    def forget(self) -> None:
        """Removes the files of the searches so far, once their results are kept elsewhere."""
        for path in self.searches:
            path.unlink(missing_ok=True)
        self.searches.clear()

    @abstractmethod
    def vectors(self, texts: Sequence[str], task: TaskMetadata, side: PromptType | None, output: str) -> Any: ...

    @property
    def facts(self) -> Any:
        """What beside name and revision decides the embeddings; part of an unfinished search's identity."""
        return None

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """Embeddings (N, K) float32 of the texts of a DataLoader.

        Raises ValueError naming task and text when an embedding is not finite, or when all of them are zero.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        vectors = self._embed(texts, task_metadata, prompt_type, "numpy")
        return np.asarray(vectors, dtype=np.float32)

    def index(self, corpus: Any, **_: Any) -> None:
        """Takes a corpus; it is embedded while it is searched."""
        self.corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        top_ranked: dict[str, list[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """The `top_k` best documents of each query, or of its candidates in `top_ranked`: query id -> document id ->
        score. Raises ValueError naming the task for candidates that are not in the corpus, or for none, where the task
        reranks.
        """
        task = task_metadata
        if self.corpus is None:
            raise ValueError(f"{task.name}: search comes after index")
        if task.type == "Reranking" and top_ranked is None:
            raise ValueError(
                f"{task.name}: the candidates to rerank (top_ranked) are missing, and a search of the whole corpus "
                "would be another task: fetch the data set again, all of it"
            )
        ids = list(queries["id"])
        texts = texts_of(queries, task, PromptType.query)
        unique = list(dict.fromkeys(texts))
        row = {text: number for number, text in enumerate(unique)}
        vectors = self._embed(unique, task, PromptType.query, "csr")
        if vectors.nnz >= SPARSE_BELOW * vectors.shape[0] * vectors.shape[1]:
            vectors = vectors.toarray()
        if top_ranked is not None:
            return self._rerank(task, ids, [row[text] for text in texts], vectors, top_ranked, top_k)
        found = self._search(task, f"{task.name}-{hf_subset}-{hf_split}", unique, vectors, top_k)
        names = list(self.corpus["id"])
        answers = {}
        for query, text in zip(ids, texts, strict=True):
            hits = found.positions[row[text]], found.scores[row[text]]
            answers[query] = {names[i]: float(score) for i, score in zip(*hits, strict=True) if i >= 0}
        return answers

    def _search(self, task: TaskMetadata, name: str, queries: list[str], vectors: Any, top_k: int) -> RunningTop:
        size = len(self.corpus)
        k = min(top_k, size)
        path, found = None, RunningTop(len(queries), k)
        if self.work is not None:
            self.work.mkdir(parents=True, exist_ok=True)
            identity = self._identity(task, queries, k)
            path = self.work / f"{_plain(name)}-{identity[:12]}.safetensors"
            self.searches.append(path)
            found = RunningTop.resume(path, identity, len(queries), k)
        bar = tqdm(total=size, initial=found.seen, desc=f"{task.name}: corpus", unit="text", disable=None)
        with bar:
            while found.seen < size:
                part = self.corpus.select(range(found.seen, min(found.seen + self.chunk, size)))
                documents = self._documents(texts_of(part, task, PromptType.document), task)
                found.add(inner_products(vectors, documents, self.device), len(part))
                bar.update(len(part))
                if path is not None:
                    found.save(path, identity)
        return found

    def _rerank(
        self,
        task: TaskMetadata,
        ids: list[str],
        rows: list[int],
        vectors: Any,
        candidates: dict[str, list[str]],
        top_k: int,
    ) -> dict[str, dict[str, float]]:
        position = {document: number for number, document in enumerate(self.corpus["id"])}
        answers: dict[str, dict[str, float]] = {query: {} for query in ids}
        asked: dict[int, list[tuple[str, int]]] = {}
        for query, row in zip(ids, rows, strict=True):
            for document in candidates.get(query, ()):
                if document not in position:
                    raise ValueError(f"{task.name}: candidate {document!r} of query {query!r} is not in the corpus")
                asked.setdefault(position[document], []).append((query, row))
        wanted = sorted(asked)
        names = list(self.corpus["id"])
        for start in range(0, len(wanted), self.chunk):
            places = wanted[start : start + self.chunk]
            documents = self._documents(texts_of(self.corpus.select(places), task, PromptType.document), task)
            pairs = [(query, row, at) for at, place in enumerate(places) for query, row in asked[place]]
            for first in range(0, len(pairs), self.chunk):
                block = pairs[first : first + self.chunk]
                scores = _rowwise(vectors[[row for _, row, _ in block]], documents[[at for _, _, at in block]])
                for (query, _, at), score in zip(block, scores, strict=True):
                    answers[query][names[places[at]]] = float(score)
        return {
            query: dict(sorted(scores.items(), key=lambda item: (-item[1], position[item[0]]))[:top_k])
            for query, scores in answers.items()
        }

    def _documents(self, texts: list[str], task: TaskMetadata) -> Any:
        probe = self._embed(texts[:PROBE], task, PromptType.document, "csr")
        few = probe.nnz < SPARSE_BELOW * probe.shape[0] * probe.shape[1]
        return self._embed(texts, task, PromptType.document, "csr" if few else "numpy")

    def _embed(self, texts: list[str], task: TaskMetadata, side: PromptType | None, output: str) -> Any:
        """Embeddings (N, K), each distinct text embedded once."""
        unique = list(dict.fromkeys(texts))
        row = {text: number for number, text in enumerate(unique)}

        def embed(texts: Sequence[str]) -> Any:
            return self.vectors(texts, task, side, output)

        try:
            vectors = embed(unique)
        except FloatingPointError as error:
            raise ValueError(f"{task.name}: {error}; the first such text: {_culprit(embed, unique)!r:.80}") from error
        if not (vectors.count_nonzero() if sparse.issparse(vectors) else vectors.any()):
            words = next((text for text in unique if text.strip()), None)
            if words is not None:
                raise ValueError(f"{task.name}: all {len(unique)} embeddings are zero, even that of {words!r:.80}")
        return vectors if len(unique) == len(texts) else vectors[[row[text] for text in texts]]

    def _identity(self, task: TaskMetadata, queries: Sequence[str], k: int) -> str:
        """A hash of all that decides a search: model, queries, corpus, number of hits."""
        meta = self.mteb_model_meta
        facts = [meta.name, meta.revision, self.facts, task.name, instruction_for(task), k, self.chunk]
        digest = hashlib.sha256(json.dumps(facts, default=str).encode())
        for text in queries:
            digest.update(text.encode() + b"\0")
        digest.update(repr(getattr(self.corpus, "_fingerprint", None)).encode())
        for document in self.corpus["id"]:
            digest.update(str(document).encode() + b"\0")
        return digest.hexdigest()


class LensEncoder(ChunkedEncoder):
    """A LENS model, or a SPLADE one, for `mteb.evaluate`.

    Queries carry the task's instruction, documents of retrieval and reranking none, and in all other tasks both sides
    carry it. A model without prompts embeds the texts of such tasks as documents, whose limit is the longer one.
    """

    def __init__(
        self, model: LENS, meta: ModelMeta, work: str | os.PathLike[str] | None = None, chunk: int | None = None
    ) -> None:
        super().__init__(meta, model.config.dimensions, model.device, work, chunk)
        self.model = model

    @property
    def facts(self) -> Any:
        return self.model.config.to_dict()

    def vectors(self, texts: Sequence[str], task: TaskMetadata, side: PromptType | None, output: str) -> Any:
        plain = self.model.config.prompt == "plain"
        if side == PromptType.document or (plain and task.type not in ASYMMETRIC):
            return self.model.encode_documents(texts, output=output)
        instruction = None if plain else instruction_for(task)
        return self.model.encode_queries(texts, instruction=instruction, output=output)


def _plain(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.-]", "_", name)


def _culprit(embed: Callable[[Sequence[str]], Any], texts: Sequence[str]) -> str:
    """The first text that `embed` fails on, by halves."""
    while len(texts) > 1:
        half = texts[: len(texts) // 2]
        try:
            embed(half)
        except FloatingPointError:
            texts = half
        else:
            texts = texts[len(half) :]
    return texts[0]


def _rowwise(left: Any, right: Any) -> NDArray[np.float32]:
    """Inner products of corresponding rows: (n, K), (n, K) -> (n,)"""
    if sparse.issparse(left) or sparse.issparse(right):
        return np.asarray(sparse.csr_matrix(left).multiply(sparse.csr_matrix(right)).sum(1)).ravel()
    return np.einsum("nk,nk->n", left, right)

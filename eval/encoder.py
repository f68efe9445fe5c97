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
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from mteb._create_dataloaders import create_dataloader
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType
from numpy.typing import NDArray
from scipy import sparse
from tqdm.auto import tqdm

from eval.embeddings import KeptEmbeddings
from eval.instructions import ASYMMETRIC, instruction_for
from eval.running import BLOCK_SCORES, RunningTop, inner_products
from lens.encoder import LENS
from lens.text import Kind

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

CHUNK_VALUES = 1 << 26
"""Values of the embeddings that a chunk of a corpus may take, were they dense (256 MB)."""
PROBE = 64
"""Documents of a chunk that are embedded first, to see how sparse a model is."""
RERANKING = ("Reranking", "InstructionReranking")
"""Task types whose queries come with their candidates."""
ZEROS = 8
"""Texts from which on a model whose embeddings are all zero is taken for broken."""
SPARSE_BELOW = 0.1
"""Share of non-zero values below which embeddings are kept sparse."""


def texts_of(rows: Any, task: TaskMetadata, side: PromptType) -> list[str]:
    """The texts of queries or documents as mteb gives them to every model: title and text, query and its own
    instruction, a conversation in one line."""
    if side == PromptType.document:  # by hand, because mteb's way writes every chunk to the disk once more
        texts = rows["text"]
        titles = rows["title"] if "title" in rows.column_names else [""] * len(texts)
        return [(f"{title} {text}" if title else text).strip() for title, text in zip(titles, texts, strict=True)]
    loader = create_dataloader(rows, task_metadata=task, prompt_type=side, batch_size=1024)
    return [text for batch in loader for text in batch["text"]]


class Spent:
    """What embedding has cost since the last `read`."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.read()

    def add(
        self, texts: int, seconds: float, values: NDArray[np.float32], documents: bool, fresh: int | None = None
    ) -> None:
        """Takes in `texts` embeddings, of which only `fresh` were computed; `values` may be those above 0 only."""
        fresh = texts if fresh is None else fresh
        if fresh:
            self.texts += fresh
            self.seconds += seconds
        if documents:
            self.documents += texts
            self.active += np.count_nonzero(values)

    def read(self) -> dict[str, Any]:
        """Texts, seconds of embedding, mean non-zero values and bytes of a document (float32, with a 32-bit column each
        where that is less), and starts again."""
        found: dict[str, Any] = {"dimensions": self.dimensions}
        if getattr(self, "documents", 0):
            active = self.active / self.documents
            size = min(4 * self.dimensions, 8 * active)
            found |= {"active": round(active, 2), "bytes_per_document": round(size, 1)}
        if getattr(self, "texts", 0):
            found |= {"texts": self.texts, "embedding_seconds": round(self.seconds, 3)}
        self.texts = self.documents = self.active = 0
        self.seconds = 0.0
        return found


class ChunkedEncoder(AbsEncoder):
    """What models have in common: `encode` for most tasks, `index` and `search` for retrieval and reranking.

    `vectors(texts, task, side, output)` gives embeddings (N, K) of distinct texts, `output` being "numpy" or "csr".
    `manner(task, side)` is what decides an embedding beside the text. `work` is a folder for unfinished searches;
    without one a killed search begins again. `keep` has embeddings kept in a folder, and taken from there.
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
        self.kept: KeptEmbeddings | None = None
        self.spent = Spent(dimensions)
        self.searches: list[Path] = []

    def cost(self) -> dict[str, Any]:
        """What embedding has cost since the last call, see `Spent.read`."""
        return self.spent.read()

    def forget(self, remove: bool = True) -> None:
        """Forgets the searches so far, and removes their files once their results are kept elsewhere."""
        for path in self.searches if remove else ():
            path.unlink(missing_ok=True)
        self.searches.clear()

    @abstractmethod
    def vectors(self, texts: Sequence[str], task: TaskMetadata, side: PromptType | None, output: str) -> Any: ...

    @property
    def facts(self) -> Any:
        """What beside name and revision decides the embeddings; part of an unfinished search's identity."""
        return None

    def manner(self, task: TaskMetadata, side: PromptType | None) -> Any:
        """What decides a text's embedding beside the model, as JSON holds it."""
        return [task.name, None if side is None else side.value]

    def keep(self, folder: Path | None) -> Self:
        """Has embeddings kept in a folder (see eval/embeddings.py) and taken from there; None: no longer."""
        meta = self.mteb_model_meta
        facts = [meta.revision or meta.name, meta.experiment_kwargs, self.facts]
        self.kept = None if folder is None else KeptEmbeddings(folder, facts)
        return self

    def known(self, texts: Sequence[str], task: TaskMetadata, side: PromptType | None, output: str) -> tuple[Any, int]:
        """`vectors` of distinct texts, and how many of them were computed: those that are kept are not."""
        if self.kept is None:
            return self.vectors(texts, task, side, output), len(texts)

        def embed(new: Sequence[str]) -> Any:
            return self.vectors(new, task, side, output)

        return self.kept.vectors(texts, self.manner(task, side), output, embed)

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

        Raises ValueError naming task and text when an embedding is not finite, or when those of ZEROS texts or more are
        all zero.
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
        if task.type in RERANKING and top_ranked is None:
            raise ValueError(
                f"{task.name}: the candidates to rerank (top_ranked) are missing, and a search of the whole corpus "
                "would be another task: fetch the data set again, all of it"
            )
        ids = list(queries["id"])
        texts = texts_of(queries, task, PromptType.query)
        unique = list(dict.fromkeys(texts))
        row = {text: number for number, text in enumerate(unique)}
        vectors = self._either(unique, task, PromptType.query)
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
                documents = self._either(texts_of(part, task, PromptType.document), task, PromptType.document)
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
        names = list(self.corpus["id"])
        position = {document: number for number, document in enumerate(names)}
        places = []  # of each query's candidates in the corpus
        for query in ids:
            found = [position.get(document, -1) for document in candidates.get(query, ())]
            if -1 in found:
                missing = candidates[query][found.index(-1)]
                raise ValueError(f"{task.name}: candidate {missing!r} of query {query!r} is not in the corpus")
            places.append(np.array(found, dtype=np.int64))
        wanted = np.unique(np.concatenate(places)) if places else np.array([], dtype=np.int64)
        scores = [np.zeros(len(found), dtype=np.float32) for found in places]
        by_row = np.argsort(rows, kind="stable")
        sorted_rows = np.array(rows, dtype=np.int64)[by_row]
        for start in range(0, len(wanted), self.chunk):
            part = wanted[start : start + self.chunk]
            texts = texts_of(self.corpus.select(part), task, PromptType.document)
            product = inner_products(vectors, self._either(texts, task, PromptType.document), self.device)
            step = max(1, BLOCK_SCORES // len(part))
            for first in range(0, vectors.shape[0], step):
                block = product(slice(first, first + step))
                near = np.searchsorted(sorted_rows, [first, first + step])
                for query in by_row[slice(*near)]:
                    columns = np.searchsorted(part, places[query])
                    held = (columns < len(part)) & (part[np.minimum(columns, len(part) - 1)] == places[query])
                    scores[query][held] = block[rows[query] - first, columns[held]]
        answers = {}
        for query, found, values in zip(ids, places, scores, strict=True):
            best = np.lexsort((found, -values))[:top_k]
            answers[query] = {names[i]: float(value) for i, value in zip(found[best], values[best], strict=True)}
        return answers

    def _either(self, texts: list[str], task: TaskMetadata, side: PromptType) -> Any:
        """Embeddings, sparse where a sample of them is, else dense."""
        probe = self._embed(texts[:PROBE], task, side, "csr")
        few = probe.nnz < SPARSE_BELOW * probe.shape[0] * probe.shape[1]
        return self._embed(texts, task, side, "csr" if few else "numpy")

    def _embed(self, texts: list[str], task: TaskMetadata, side: PromptType | None, output: str) -> Any:
        """Embeddings (N, K), each distinct text embedded once."""
        unique = list(dict.fromkeys(texts))
        row = {text: number for number, text in enumerate(unique)}

        def embed(texts: Sequence[str]) -> Any:
            return self.vectors(texts, task, side, output)

        began = perf_counter()
        try:
            vectors, fresh = self.known(unique, task, side, output)
        except FloatingPointError as error:
            raise ValueError(f"{task.name}: {error}; the first such text: {_culprit(embed, unique)!r:.80}") from error
        values = vectors.data if sparse.issparse(vectors) else vectors
        self.spent.add(len(unique), perf_counter() - began, values, side != PromptType.query, fresh)
        if not np.isfinite(values).all():
            bad = next(text for text in unique if not np.isfinite(self.vectors([text], task, side, "numpy")).all())
            raise ValueError(f"{task.name}: the embedding of {bad!r:.80} is not finite")
        worded = [text for text in unique if text.strip()]
        if len(worded) >= ZEROS and not values.any():
            raise ValueError(f"{task.name}: all {len(unique)} embeddings are zero, even that of {worded[0]!r:.80}")
        return vectors if len(unique) == len(texts) else vectors[[row[text] for text in texts]]

    def _identity(self, task: TaskMetadata, queries: Sequence[str], k: int) -> str:
        """A hash of all that decides a search: model, queries, corpus, number of hits."""
        meta = self.mteb_model_meta
        facts = [
            meta.name,
            meta.revision,
            meta.experiment_kwargs,
            self.facts,
            task.name,
            instruction_for(task),
            k,
            self.chunk,
        ]
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
        return [self.model.config.to_dict(), str(self.model.model.head.weight.dtype)]

    def manner(self, task: TaskMetadata, side: PromptType | None) -> tuple[Kind, str | None]:
        """Query or document, and the instruction."""
        plain = self.model.config.prompt == "plain"
        if side == PromptType.document if task.type in ASYMMETRIC else plain:
            return "document", None
        return "query", None if plain else instruction_for(task)

    def vectors(self, texts: Sequence[str], task: TaskMetadata, side: PromptType | None, output: str) -> Any:
        kind, instruction = self.manner(task, side)
        if kind == "document":
            return self.model.encode_documents(texts, output=output)
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

"""What finds candidates: BM25, or a model that embeds queries and passages; each searches a corpus shard by shard."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.sparse

from lens.files import atomic_file, require
from lens.search.bm25 import Counts, PartialBM25
from lens.search.words import Words
from train.passages import Corpus, file_facts
from train.ranking import Best, Faiss, Floats, Ints, exact, search_dense, search_sparse

KINDS = ("bm25", "lens", "st", "sparse")
ENCODE_ROWS = 1000
"""Passages embedded in one call: shards that are multiples of it give the models the same batches."""
_WEIGHTS = (".json", ".safetensors", ".bin", ".txt", ".model", ".npy", ".pth")


@dataclass(frozen=True)
class Spec:
    """One --retriever: its kind, and the model's folder or hub id."""

    kind: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.kind}={self.path}" if self.path else self.kind


def parse(text: str) -> Spec:
    """`bm25`, `lens=MODEL`, `st=MODEL` or `sparse=MODEL`.

    Raises ValueError for anything else, naming the nearest kind, and FileNotFoundError for a folder that is none or
    holds no such model.
    """
    kind, equals, path = text.partition("=")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1, 0.3)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--retriever {text}: unknown kind {kind!r}{meant} Kinds: {', '.join(KINDS)}")
    if kind == "bm25":
        if equals:
            raise ValueError(f"--retriever {text}: bm25 takes no model: write bm25")
        return Spec(kind)
    if not path:
        raise ValueError(f"--retriever {text}: {kind} needs a model: write {kind}=FOLDER")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
            raise FileNotFoundError(f"--retriever {text}: {path} is no folder")
        return Spec(kind, path)  # a hub id
    is_lens = (folder / "lens.json").is_file()
    if kind == "lens":
        from lens.compat import is_released

        if not is_lens and not is_released(folder):
            raise FileNotFoundError(f"--retriever {text}: {path} holds no lens.json: it is no LENS model folder")
    elif is_lens:
        raise ValueError(f"--retriever {text}: {path} holds a LENS model: write lens={path}")
    elif not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"--retriever {text}: {path} holds neither modules.json nor config.json: it is no model of "
            "sentence-transformers"
        )
    return Spec(kind, path)


def identity(spec: Spec) -> dict[str, str]:
    """What tells a retriever from others in the manifest: its kind, its place, and a hash over the model's files."""
    facts = {"retriever": str(spec)}
    folder = Path(spec.path).expanduser()
    if spec.path and folder.is_dir():
        total = sha256()
        for file in sorted(folder.rglob("*")):
            inside = file.relative_to(folder)
            steps = any(part.startswith("checkpoint-") for part in inside.parts)  # of the run that made the model
            if file.is_file() and file.suffix in _WEIGHTS and not steps:
                total.update(f"{inside}\0{file_facts(file)['sha256']}\0".encode())
        facts["sha256"] = total.hexdigest()
    return facts


class Shards(Protocol):
    """What is searched."""

    def shards(self, size: int, first: int = 0) -> Iterator[tuple[int, list[str]]]:
        """As Corpus.shards."""


class Retriever(Protocol):
    """Searches a corpus for all queries at once; a query is a text and its instruction."""

    lexical: bool
    """Whether a score of 0 means that there is nothing in common."""

    def search(self, corpus: Corpus, shard: int, first: int, best: Best) -> Iterator[None]:
        """Takes the shards of the corpus, `shard` passages each, in from number `first` on; yields after each."""

    def pairs(self, queries: Ints, texts: Sequence[str]) -> Floats:
        """Scores (m,) of m pairs of a query, by number, and a text."""


Query = tuple[str, str | None]


class BM25Retriever:
    """BM25 with the statistics of the whole corpus: one pass counts, and keeps the counts of every shard in a file of
    the folder `work`; the next scores those."""

    lexical = True

    def __init__(self, queries: Sequence[Query], work: Path, **options: Any) -> None:
        self.bm25 = PartialBM25([text for text, _ in queries], **options)
        self.queries = len(queries)
        self.work = work

    def search(self, corpus: Corpus, shard: int, first: int, best: Best) -> Iterator[None]:
        for number in range(first, self._count(corpus, shard)):
            weights = self.bm25.weigh(self._load(number))
            for query in range(self.queries):
                scores = self.bm25.score(query, weights)
                places = np.flatnonzero(scores > max(best.worst(query), 0.0))
                if len(places):
                    best.add(query, places + number * shard, scores[places])
            yield

    def pairs(self, queries: Ints, texts: Sequence[str]) -> Floats:
        weights = self.bm25.weigh(self.bm25.count(texts))
        found = np.empty(len(texts), dtype=np.float32)
        for query in np.unique(queries):
            mine = np.flatnonzero(queries == query)
            found[mine] = self.bm25.score(int(query), weights)[mine]
        return found

    def _count(self, corpus: Corpus, shard: int) -> int:
        """Counts what is not counted yet, in files; returns the number of shards."""
        shards = -(-len(corpus) // shard)
        there = next((number for number in range(shards) if not self._file(number).is_file()), shards)
        for number in range(there):
            self.bm25.observe(self._load(number))
        for start, texts in corpus.shards(shard, there) if there < shards else ():
            counts = self.bm25.count(texts)
            self.bm25.observe(counts)
            parts = {name: getattr(counts.tokens, name) for name in ("data", "indices", "indptr", "shape")}
            with atomic_file(self._file(start // shard), overwrite=True) as temporary:
                np.savez(temporary, lengths=counts.lengths, **parts)
        return shards

    def _file(self, number: int) -> Path:
        return self.work / f"counts-{number:06}.npz"

    def _load(self, number: int) -> Counts:
        with np.load(self._file(number), allow_pickle=False) as file:
            parts = (file["data"], file["indices"], file["indptr"])
            return Counts(scipy.sparse.csc_matrix(parts, shape=tuple(file["shape"])), file["lengths"])


class Encoder(Protocol):
    """A model that embeds: (n, D) float32 numpy arrays or scipy CSR matrices."""

    def queries(self, texts: Sequence[Query]) -> Any: ...

    def passages(self, texts: Sequence[str]) -> Any: ...


class EmbeddingRetriever:
    """A model whose scores are inner products; `name` is for messages, `faiss` proposes passages of dense vectors."""

    def __init__(self, name: str, encoder: Encoder, queries: Sequence[Query], faiss: str | None = None) -> None:
        self.name, self.encoder, self.faiss = name, encoder, faiss
        self.queries = self._embed(encoder.queries, queries) if queries else np.zeros((0, 0), dtype=np.float32)
        self.lexical = scipy.sparse.issparse(self.queries)

    def search(self, corpus: Shards, shard: int, first: int, best: Best) -> Iterator[None]:
        for start, texts in corpus.shards(shard, first):
            if not self.queries.shape[0]:  # nothing to search for
                yield
                continue
            vectors = self._embed(self.encoder.passages, texts)
            if self.lexical:
                search_sparse(self.queries, vectors, start, best)
            else:
                proposals = Faiss(vectors, self.faiss == "gpu") if self.faiss else None
                search_dense(self.queries, vectors, start, best, proposals)
            yield

    def pairs(self, queries: Ints, texts: Sequence[str]) -> Floats:
        if not len(texts):
            return np.zeros(0, dtype=np.float32)
        vectors = self._embed(self.encoder.passages, texts)
        if self.lexical:
            return np.asarray(self.queries[queries].multiply(vectors).sum(1), dtype=np.float32).ravel()
        each = [exact(self.queries[query], vectors, np.array([row])) for row, query in enumerate(queries)]
        return np.concatenate(each)

    def _embed(self, encode: Any, texts: Sequence[Any]) -> Any:
        """Vectors of at least one text; raises ValueError where the model fails, as by memory or a NaN."""
        try:
            parts = [encode(texts[first : first + ENCODE_ROWS]) for first in range(0, len(texts), ENCODE_ROWS)]
        except (RuntimeError, FloatingPointError) as error:
            raise ValueError(f"--retriever {self.name}: the model cannot embed: {error}") from error
        for part in parts:
            if not np.isfinite(part.data if scipy.sparse.issparse(part) else part).all():
                raise ValueError(f"--retriever {self.name}: the model gives NaN or infinite values")
        return scipy.sparse.vstack(parts, format="csr") if scipy.sparse.issparse(parts[0]) else np.concatenate(parts)


class LensEncoder:
    """A LENS model in memory; queries carry their instruction."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.output = "numpy" if model.config.head == "dense" else "csr"

    def queries(self, texts: Sequence[Query]) -> Any:
        groups: dict[str | None, list[int]] = {}
        for row, (_, instruction) in enumerate(texts):
            groups.setdefault(instruction, []).append(row)
        options = {"output": self.output, "show_progress": False}
        parts = [
            self.model.encode_queries([texts[row][0] for row in rows], instruction, **options)
            for instruction, rows in groups.items()
        ]
        order = np.argsort([row for rows in groups.values() for row in rows])
        return (scipy.sparse.vstack(parts, format="csr") if self.output == "csr" else np.concatenate(parts))[order]

    def passages(self, texts: Sequence[str]) -> Any:
        return self.model.encode_documents(texts, output=self.output, show_progress=False)


class SentenceEncoder:
    """A SentenceTransformer or SparseEncoder in memory, with its own prompts; of unit length where the model compares
    by cosine. Raises ValueError for a model that compares by distances."""

    def __init__(self, model: Any, sparse: bool) -> None:
        self.model, self.sparse = model, sparse
        if model.similarity_fn_name not in (None, "cosine", "dot"):
            raise ValueError(f"the model compares by {model.similarity_fn_name}: mining needs cosine or dot")

    def queries(self, texts: Sequence[Query]) -> Any:
        return self._encode(self.model.encode_query, [text for text, _ in texts])

    def passages(self, texts: Sequence[str]) -> Any:
        return self._encode(self.model.encode_document, list(texts))

    def _encode(self, encode: Any, texts: list[str]) -> Any:
        cosine = self.model.similarity_fn_name == "cosine"
        if not self.sparse:
            vectors = np.asarray(encode(texts, convert_to_numpy=True, show_progress_bar=False), dtype=np.float32)
            return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12) if cosine else vectors
        found = encode(texts, convert_to_sparse_tensor=True, save_to_cpu=True, show_progress_bar=False).coalesce()
        places = tuple(found.indices().numpy())
        rows = scipy.sparse.csr_matrix((found.values().float().numpy(), places), shape=tuple(found.shape))
        if cosine:
            lengths = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
            rows = scipy.sparse.diags_array((1 / np.maximum(lengths, 1e-12)).astype(np.float32)).tocsr() @ rows
        return scipy.sparse.csr_matrix(rows, dtype=np.float32)


def check_installed(spec: Spec, stopwords: str, stemmer: str) -> None:
    """Raises ImportError for a library that a retriever needs, ValueError for a list or stemmer that BM25 lacks."""
    if spec.kind == "bm25":
        Words(stopwords, stemmer)
    elif spec.kind != "lens":
        require("sentence-transformers", "sentence_transformers")


def load(spec: Spec, queries: Sequence[Query], work: Path, faiss: str | None, device: str | None, **bm25: Any) -> Any:
    """The Retriever of a Spec, which `check_installed` has passed, for these queries; raises ValueError for a model
    that cannot be read."""
    if spec.kind == "bm25":
        return BM25Retriever(queries, work, **bm25)
    try:
        encoder = _read(spec, device)
    except Exception as error:  # what a damaged folder raises is up to three libraries
        raise ValueError(f"--retriever {spec}: the model cannot be read: {error}") from error
    return EmbeddingRetriever(str(spec), encoder, queries, faiss)


def _read(spec: Spec, device: str | None) -> Encoder:
    if spec.kind == "lens":
        import lens

        return LensEncoder(lens.load(spec.path, device=device))
    import sentence_transformers

    path = str(Path(spec.path).expanduser()) if Path(spec.path).expanduser().is_dir() else spec.path
    kind = sentence_transformers.SentenceTransformer if spec.kind == "st" else sentence_transformers.SparseEncoder
    return SentenceEncoder(kind(path, device=device), spec.kind == "sparse")


def choose_faiss(search: str) -> str | None:
    """What proposes passages of dense vectors for --search auto, numpy or faiss: None for numpy, "cpu" or "gpu" for
    faiss. auto takes faiss where it sees a GPU. Raises ImportError where faiss is asked for and not installed."""
    if search == "numpy":
        return None
    try:
        import faiss
    except ImportError as error:
        if search == "faiss":
            raise ImportError("--search faiss: faiss is not installed; run: pip install faiss-cpu") from error
        return None
    gpu = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    return "gpu" if gpu else "cpu" if search == "faiss" else None

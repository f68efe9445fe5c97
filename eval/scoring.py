"""Systems -> scores of all documents -> rankings -> values per query, in blocks of queries so that memory is bounded.

Shapes: n queries, N documents, K dimensions.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from tqdm.auto import tqdm

from eval.metrics import MEASURES, per_query
from eval.pruning import activity, csr_bytes
from lens.corpus import Beir
from lens.dense import Dense
from lens.search.bm25 import BM25
from lens.search.words import Words

Scores = NDArray[np.float32]
BLOCK_SCORES = 2**23
"""Scores that a block of queries may hold per system (32 MB)."""
CHUNK_VALUES = 2**26
"""Values of the embeddings that one call of a model may return (256 MB)."""
PROBE = 64
"""Documents encoded first, to see how sparse a model is."""
SPARSE_BELOW = 0.1
"""Share of non-zero values below which document embeddings are kept sparse."""


@dataclass(frozen=True)
class System:
    """A named scorer: `score(rows)` gives the scores (n, N) of a slice of the data set's queries for all documents.

    `matching`: a score of 0 means nothing in common, and such documents are not retrieved. `bounded`: scores have a
    fixed scale (a cosine) and are fused as they are; others are divided by their maximum over the documents first.
    `facts` are what the system costs: seconds of encoding and indexing, dimensions, active_per_query,
    active_per_document, flops (multiplications per query and document on average) and index_mb, 2^20 bytes of the
    documents' vectors or postings as they are held. `asking()` prepares a search and gives a function from one query's
    text to its scores (N,), which encodes and searches as a server would; without it the latency is not measured.
    """

    name: str
    score: Callable[[slice], Scores]
    matching: bool = False
    bounded: bool = True
    facts: dict[str, float] = field(default_factory=dict)
    asking: Callable[[], Callable[[str], Scores]] | None = None


@dataclass(frozen=True)
class Ranking:
    """The best documents of one query: positions in the corpus and scores, best first."""

    documents: NDArray[np.int64]
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """Values per query of every system (system -> measure -> (n,)), its seconds, those of them that scoring, ranking
    and measuring took, and its rankings where kept."""

    queries: list[str]
    values: dict[str, dict[str, NDArray[np.float64]]]
    seconds: dict[str, float]
    search_seconds: dict[str, float]
    rankings: dict[str, list[Ranking]]


def judged_queries(beir: Beir) -> list[str]:
    """Ids of the queries with a relevant document (a judgement of at least 1); others cannot be scored."""
    return [query for query in beir.queries if any(score > 0 for score in beir.qrels[query].values())]


def vector_system(
    name: str,
    queries: NDArray[np.float32] | sparse.csr_array,
    documents: NDArray[np.float32] | sparse.csr_array,
    matching: bool = False,
    seconds: float = 0.0,
    encode: Callable[[str], NDArray[np.float32] | sparse.csr_array] | None = None,
) -> System:
    """A system that scores by the inner product of embeddings (n, K) and (N, K), each a numpy array or CSR. `encode`
    gives the embedding (1, K) of one query."""

    def score(rows: slice) -> Scores:
        block = queries[rows]
        dense = block.toarray() if sparse.issparse(block) else block  # (n, K)
        scores = documents @ dense.T  # (N, n)
        return np.ascontiguousarray(scores.T, dtype=np.float32)

    facts = {
        "seconds": seconds,
        "dimensions": documents.shape[1],
        "active_per_query": active(queries),
        "active_per_document": active(documents),
        "flops": float(_shares(queries) @ _shares(documents)),
        "index_mb": (csr_bytes(documents) if sparse.issparse(documents) else documents.nbytes) / 2**20,
    }
    asking = functools.partial(_asking, encode, documents) if encode else None
    return System(name, score, matching=matching, facts=facts, asking=asking)


def _asking(
    encode: Callable[[str], NDArray[np.float32] | sparse.csr_array], documents: NDArray[np.float32] | sparse.csr_array
) -> Callable[[str], Scores]:
    """A function from a query's text to its scores (N,). Sparse documents are turned into inverted lists for it, a
    second copy of them that is held as long as the function is."""
    lists = sparse.csr_array(documents.T) if sparse.issparse(documents) else None  # (K, N)

    def ask(text: str) -> Scores:
        query = encode(text)
        if lists is not None:
            return (sparse.csr_array(query) @ lists).toarray()[0]
        return documents @ (query.toarray() if sparse.issparse(query) else query)[0]

    return ask


def query_latency(system: System, texts: Sequence[str], k: int = 10) -> dict[str, float] | None:
    """Milliseconds from a query's text to its k best documents, encoding included, one query at a time: median and 95th
    percentile over `texts`, the first of which is asked once more beforehand. `eval.pruning.latency` leaves encoding
    out. None for a system that cannot be asked one query."""
    if system.asking is None or not texts:
        return None
    ask = system.asking()
    rank(ask(texts[0]), k, system.matching)
    taken = []
    for text in texts:
        start = time.perf_counter()
        rank(ask(text), k, system.matching)
        taken.append(1000 * (time.perf_counter() - start))
    return {"median": float(np.median(taken)), "p95": float(np.percentile(taken, 95))}


def _shares(embeddings: NDArray[np.float32] | sparse.csr_array) -> NDArray[np.float64]:
    """Share of the rows (n, K) in which each dimension is not zero, (K,)."""
    return activity(embeddings) if sparse.issparse(embeddings) else (embeddings != 0).mean(0)


def active(embeddings: NDArray[np.float32] | sparse.csr_array) -> float:
    """Mean number of non-zero values per row."""
    count = embeddings.nnz if sparse.issparse(embeddings) else np.count_nonzero(embeddings)
    return float(count) / max(1, embeddings.shape[0])


def lens_system(name: str, model: Any, beir: Beir, instruction: str | None = None) -> System:
    """A LENS model as a system; documents are encoded in chunks and kept dense or sparse, whichever suits them."""
    start = time.perf_counter()
    texts = list(beir.corpus.values())
    queries = model.encode_queries(
        [beir.queries[query] for query in judged_queries(beir)], instruction=instruction, output="csr"
    )  # (n, K)
    probe = model.encode_documents(texts[:PROBE], output="csr")
    dimensions = probe.shape[1]
    chunk = max(1, CHUNK_VALUES // dimensions)  # documents
    starts = range(0, len(texts), chunk)
    documents: NDArray[np.float32] | sparse.csr_array
    if probe.nnz < SPARSE_BELOW * probe.shape[0] * dimensions:
        parts = [model.encode_documents(texts[i : i + chunk], output="csr") for i in starts]
        documents = sparse.csr_array(sparse.vstack(parts))  # (N, K)
    else:
        documents = np.empty((len(texts), dimensions), dtype=np.float32)  # (N, K)
        for i in starts:
            documents[i : i + chunk] = model.encode_documents(texts[i : i + chunk], output="numpy")
    seconds = time.perf_counter() - start
    system = vector_system(
        name,
        sparse.csr_array(queries),
        documents,
        matching=True,
        seconds=seconds,
        encode=lambda text: model.encode_queries([text], instruction=instruction, output="csr"),
    )
    return replace(system, bounded=model.config.normalize)


def dense_system(name: str, model: Dense, beir: Beir) -> System:
    """The dense baseline as a system."""
    start = time.perf_counter()
    queries = model.encode([beir.queries[query] for query in judged_queries(beir)], f"{name}: queries")  # (n, D)
    documents = model.encode(list(beir.corpus.values()), f"{name}: documents")  # (N, D)
    seconds = time.perf_counter() - start
    return vector_system(name, queries, documents, seconds=seconds, encode=lambda text: _quietly(model, text))


def _quietly(model: Dense, text: str) -> NDArray[np.float32]:
    return model.encode([text], show_progress=False)


def bm25_system(name: str, beir: Beir, **options: Any) -> System:
    """BM25 as a system; the options are those of `lens.search.bm25.BM25`."""
    start = time.perf_counter()
    index = BM25(list(beir.corpus.values()), **options)
    queries = [beir.queries[query] for query in judged_queries(beir)]
    facts = {
        "seconds": time.perf_counter() - start,
        "dimensions": index.dimensions,
        "active_per_query": float(np.mean([len(set(tokens)) for tokens in index.tokens(queries)])),
        "active_per_document": index.active_per_document,
        "flops": index.flops(queries),
        "index_mb": index.held / 2**20,
    }
    return System(
        name,
        lambda rows: index.score(queries[rows]),
        matching=True,
        bounded=False,
        facts=facts,
        asking=lambda: lambda text: index.score([text])[0],
    )


def tfidf_system(name: str, beir: Beir, stopwords: str = "english", stemmer: str = "english") -> System:
    """TF-IDF as a system: the cosine of scikit-learn's TfidfVectorizer with sublinear frequencies, over the words that
    BM25 indexes (lens/search/words.py); idf is counted on the documents."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    start = time.perf_counter()
    words = Words(stopwords, stemmer)
    documents = words(list(beir.corpus.values()))
    queries = words([beir.queries[query] for query in judged_queries(beir)])
    if not any(documents):
        raise ValueError(f"{beir.name}: no document holds a word, so there is nothing that TF-IDF could index")
    model = TfidfVectorizer(analyzer=_as_it_is, sublinear_tf=True, dtype=np.float32).fit(documents)
    vectors = sparse.csr_array(model.transform(queries)), sparse.csr_array(model.transform(documents))
    seconds = time.perf_counter() - start
    return vector_system(
        name, *vectors, matching=True, seconds=seconds, encode=lambda text: model.transform(words([text]))
    )


def _as_it_is(words: list[str]) -> list[str]:
    return words


def fuse(parts: Sequence[tuple[System, Scores]]) -> Scores:
    """Sum of scores (n, N): cosines as they are, unbounded scores divided by each query's maximum over N."""
    total = np.zeros_like(parts[0][1])
    for system, scores in parts:
        if system.bounded:
            total += scores
        else:
            highest = scores.max(axis=1, keepdims=True, initial=0)  # (n, 1)
            total += scores / np.where(highest > 0, highest, 1)
    return total


def rank(scores: Scores, k: int, matching: bool = False) -> Ranking:
    """The k best of one query's scores (N,), ties by position; -inf, and 0 where `matching`, is never retrieved."""
    candidates = np.flatnonzero(scores > 0) if matching else np.flatnonzero(scores > -np.inf)
    values = scores[candidates]
    if len(values) > k:
        best = values >= -np.partition(-values, k - 1)[k - 1]
        candidates, values = candidates[best], values[best]
    order = np.argsort(-values, kind="stable")[:k]
    return Ranking(candidates[order], values[order])


def evaluate(
    beir: Beir,
    systems: Sequence[System],
    fusions: Mapping[str, Sequence[str]] | None = None,
    measures: Sequence[str] = MEASURES,
    k: int = 1000,
    block: int | None = None,
    drop_self: bool = False,
    keep_rankings: bool = False,
) -> Evaluation:
    """Ranks the k best documents of every judged query by every system and fusion, and measures them.

    `fusions` maps a name to the names of the systems whose scores are summed over all documents. `block` is in
    queries (default: as many as BLOCK_SCORES allow). `drop_self` leaves the document with the query's own id out.
    Raises ValueError when a system gives a score that is not a number or too few of them.
    """
    fusions = fusions or {}
    queries, documents = judged_queries(beir), list(beir.corpus)
    position = {document: number for number, document in enumerate(documents)}
    block = block or max(1, BLOCK_SCORES // max(1, len(documents)))
    names = [system.name for system in systems] + list(fusions)
    parts: dict[str, list[dict[str, NDArray[np.float64]]]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    rankings: dict[str, list[Ranking]] = {name: [] for name in names}

    def add(name: str, scores: Scores, ids: list[str], matching: bool) -> None:
        ranked = [rank(row, k, matching) for row in scores]
        run = {query: [documents[i] for i in ranking.documents] for query, ranking in zip(ids, ranked, strict=True)}
        parts[name].append(per_query({query: beir.qrels[query] for query in ids}, run, measures))
        if keep_rankings:
            rankings[name].extend(ranked)

    for first in tqdm(range(0, len(queries), block), desc=f"{beir.name}: ranking", unit="block", disable=None):
        rows = slice(first, min(first + block, len(queries)))
        ids = queries[rows]
        scored: dict[str, tuple[System, Scores]] = {}
        for system in systems:
            start = time.perf_counter()
            scores = np.array(system.score(rows), dtype=np.float32)  # (n, N), a copy that may be written to
            shape = len(ids), len(documents)
            if scores.shape != shape or np.isnan(scores).any():
                found = "NaN" if scores.shape == shape else f"shape {scores.shape}"
                raise ValueError(f"{system.name} on {beir.name}: expected scores of shape {shape}, found {found}")
            if drop_self:
                own = [(row, position[query]) for row, query in enumerate(ids) if query in position]
                scores[[row for row, _ in own], [document for _, document in own]] = -np.inf
            add(system.name, scores, ids, system.matching)
            scored[system.name] = system, scores
            seconds[system.name] += time.perf_counter() - start
        for name, members in fusions.items():
            start = time.perf_counter()
            add(name, fuse([scored[member] for member in members]), ids, matching=False)
            seconds[name] += time.perf_counter() - start
    for name, members in fusions.items():
        seconds[name] += sum(seconds[member] for member in members)
    searching = dict(seconds)
    for system in systems:
        spent = system.facts.get("seconds", 0.0)
        for name in (system.name, *(name for name, members in fusions.items() if system.name in members)):
            seconds[name] += spent
    values = {name: {m: np.concatenate([part[m] for part in parts[name]]) for m in measures} for name in names}
    return Evaluation(queries, values, seconds, searching, rankings)

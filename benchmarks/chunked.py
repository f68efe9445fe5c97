"""Seconds and memory of exact search in chunks with a running top k, beside faiss Flat and scipy.

    python benchmarks/chunked.py [--documents 500000] [--dimensions 8000] [--queries 200]

The corpus is made chunk by chunk and never held: half of the values of a document are above 0 (a LENS embedding), or
2% (a sparse one). Every contender is a process of its own, sees the same chunks, and its seconds are those of search
alone, without making chunks; its memory is the process's peak, the chunk included. Dense: eval/running.py, and faiss's
IndexFlatIP filled with one chunk at a time, its hits merged. Sparse: eval/running.py, and scipy's product with each
chunk as a whole followed by argpartition. And, for both, the search of eval/encoder.py as mteb calls it, with a model
that makes these embeddings: dedup, checks of the embeddings and a restart file after each chunk included.
Writes benchmarks/results/chunked.json and a section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.preprocessing import normalize

from benchmarks import arguments
from benchmarks.measure import PAGE, load
from benchmarks.page import RESULTS, ROOT, listed, machine, versions, write_section
from eval.running import RunningTop, inner_products
from lens.files import read_json, write_json

FILE = RESULTS / "chunked.json"
SEED, TOP, SHARES = 0, 1000, {"dense": 0.5, "sparse": 0.02}
WHOLE = "eval/encoder.py, a restart file after each chunk"
NAMES = {
    "dense": ("running top k", "faiss IndexFlatIP in batches", WHOLE),
    "sparse": ("running top k", "scipy product in batches", WHOLE),
}


def made(number: int, rows: int, dimensions: int, form: str) -> Any:
    """Embeddings of unit length (rows, dimensions), the same for the same number."""
    rng = np.random.default_rng([SEED, number])
    if form == "sparse":
        active = int(SHARES[form] * dimensions)
        columns = rng.integers(0, dimensions, (rows, active), dtype=np.int32)
        values = rng.random((rows, active), dtype=np.float32)
        ends = np.arange(0, rows * active + 1, active)
        found = sparse.csr_matrix((values.ravel(), columns.ravel(), ends), shape=(rows, dimensions))
        found.sum_duplicates()
        return normalize(found, copy=False)
    found = rng.random((rows, dimensions), dtype=np.float32)
    found -= 1 - SHARES[form]
    np.maximum(found, 0, out=found)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def chunks(documents: int, size: int, dimensions: int, form: str) -> Iterator[tuple[int, Any]]:
    """(first document, embeddings) of every chunk."""
    for number, start in enumerate(range(0, documents, size)):
        yield start, made(number + 1, min(size, documents - start), dimensions, form)


def running(queries: Any, k: int) -> tuple[Callable[[int, Any], None], Callable[[], NDArray[np.int64]]]:
    """eval/running.py."""
    best = RunningTop(queries.shape[0], k)
    return lambda start, part: best.add(inner_products(queries, part), part.shape[0]), lambda: best.positions


def by_faiss(queries: Any, k: int) -> tuple[Callable[[int, Any], None], Callable[[], NDArray[np.int64]]]:
    """A flat index of one chunk at a time, its hits merged."""
    import faiss

    state = _Merged(queries.shape[0], k)
    index = faiss.IndexFlatIP(queries.shape[1])

    def add(start: int, part: Any) -> None:
        index.add(part)
        scores, places = index.search(queries, min(k, part.shape[0]))
        index.reset()
        state.merge(scores, places + start)

    return add, lambda: state.places


def by_scipy(queries: Any, k: int) -> tuple[Callable[[int, Any], None], Callable[[], NDArray[np.int64]]]:
    """The product with a whole chunk, then argpartition."""
    state = _Merged(queries.shape[0], k)

    def add(start: int, part: Any) -> None:
        scores = (queries @ part.T).toarray()
        places = np.argpartition(-scores, min(k, part.shape[0]) - 1, axis=1)[:, :k]
        state.merge(np.take_along_axis(scores, places, 1), places + start)

    return add, lambda: state.places


class _Merged:
    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.scores = np.empty((queries, 0), np.float32)
        self.places = np.empty((queries, 0), np.int64)

    def merge(self, scores: NDArray[np.float32], places: NDArray[np.int64]) -> None:
        scores, places = np.hstack([self.scores, scores]), np.hstack([self.places, places])
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.k]
        self.scores, self.places = np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)


def as_mteb_calls(form: str, options: argparse.Namespace) -> tuple[NDArray[np.int64], float]:
    """The first ten of each query and the seconds, by the search that mteb calls; its texts are the numbers of the
    documents."""
    from datasets import Dataset
    from mteb.mocks.mock_tasks import MockRetrievalTask
    from mteb.models import ModelMeta

    from eval.encoder import ChunkedEncoder

    class Made(ChunkedEncoder):
        seconds = 0.0  # of making embeddings

        def vectors(self, texts: Any, task: Any, side: Any, output: str) -> Any:
            began = time.perf_counter()
            number = 0 if texts[0].startswith("q") else int(texts[0]) // options.chunk + 1
            found = made(number, len(texts), options.dimensions, form)
            if output == "csr" and not sparse.issparse(found):
                found = sparse.csr_matrix(found)
            self.seconds += time.perf_counter() - began
            return found

    def rows(names: list[str]) -> Any:
        return Dataset.from_dict({"id": names, "text": names})

    facts = dict.fromkeys(ModelMeta.model_fields) | {"name": "made/made", "revision": "1"}
    facts |= {"framework": [], "model_type": ["dense"], "modalities": ["text"]}
    with tempfile.TemporaryDirectory() as work:
        model = Made(ModelMeta.model_construct(**facts), options.dimensions, None, work, options.chunk)
        corpus = rows([str(number) for number in range(options.documents)])
        queries = rows([f"q{number}" for number in range(options.queries)])
        began = time.perf_counter()
        model.index(corpus)
        task = MockRetrievalTask().metadata
        hits = model.search(queries, task_metadata=task, hf_split="test", hf_subset="default", top_k=TOP)
        seconds = time.perf_counter() - began - model.seconds
    best = [[int(name) for name in list(hits[query])[:10]] for query in queries["id"]]
    return np.array(best, dtype=np.int64), seconds


def contend(form: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """One contender, in this process."""
    import resource

    if NAMES[form][number] == WHOLE:
        found, seconds = as_mteb_calls(form, options)
    else:
        queries = made(0, options.queries, options.dimensions, form)
        start = (running, by_faiss if form == "dense" else by_scipy)[number]
        add, places = start(queries, TOP)
        seconds = 0.0
        for first, part in chunks(options.documents, options.chunk, options.dimensions, form):
            began = time.perf_counter()
            add(first, part)
            seconds += time.perf_counter() - began
        found = places()[:, :10]
    return {
        "seconds": round(seconds, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "first_ten": found.tolist(),
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every contender in a process of its own."""
    found = []
    for form, names in NAMES.items():
        hits = []
        for number, name in enumerate(names):
            before = load()
            sizes = ("documents", "dimensions", "queries", "chunk")
            given = [part for size in sizes for part in (f"--{size}", str(getattr(options, size)))]
            command = [sys.executable, __file__, "--contender", form, str(number), *given]
            out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
            facts = json.loads(out.splitlines()[-1])
            hits.append(facts.pop("first_ten"))
            found.append({"form": form, "name": name, **facts, "load_before": before})
            same = np.mean([set(a) == set(b) for a, b in zip(hits[0], hits[-1], strict=True)])
            found[-1]["queries_with_the_same_ten"] = round(float(same), 4)
    return found


def page(content: dict[str, Any]) -> list[str]:
    """The section of docs/performance.md."""
    sizes = content["sizes"]
    lines = [
        "## Search in chunks (CPU)",
        "",
        f"Written by `benchmarks/chunked.py`; do not edit. Machine: {listed(content['machine'])}. Versions: "
        f"{listed(content['versions'])}.",
        "",
        f"{sizes['documents']:,} made documents of {sizes['dimensions']:,} dimensions in chunks of {sizes['chunk']:,}, "
        f"{sizes['queries']:,} queries, the best {TOP:,}; held at once the whole would take "
        f"{4 * sizes['documents'] * sizes['dimensions'] / 1e9:.0f} GB. Dense: half of the values above 0; sparse: 2%. "
        "Seconds of search alone; memory is the process's peak with libraries and one chunk. Each contender ran once, "
        "in a process of its own.",
        "",
        "| embeddings | search | seconds | ratio | peak memory, MB | queries with the same first ten | load before |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    first: dict[str, float] = {}
    for run in content["runs"]:
        own = first.setdefault(run["form"], run["seconds"])
        ratio, share = run["seconds"] / own, f"{run['queries_with_the_same_ten']:.1%}"
        cells = (run["form"], run["name"], run["seconds"], f"{ratio:.2f}", f"{run['peak_rss_mb']:,}", share)
        lines.append("| " + " | ".join(map(str, (*cells, run["load_before"]))) + " |")
    return lines


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=arguments.positive, default=500_000)
    parser.add_argument("--dimensions", type=arguments.positive, default=8000)
    parser.add_argument("--queries", type=arguments.positive, default=200)
    parser.add_argument("--chunk", type=arguments.positive, default=8388, help="documents (256 MB of 8,000 dimensions)")
    parser.add_argument("--output", type=Path, default=FILE, help="file of the figures")
    parser.add_argument("--results", type=Path, default=PAGE, help="page whose section is written")
    parser.add_argument("--page", action="store_true", help="write the section from the stored figures, no more")
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.contender:
        print(json.dumps(contend(options.contender[0], int(options.contender[1]), options)))
        return
    arguments.check(parser, options, options.output)
    if not options.page:
        sizes = {name: getattr(options, name) for name in ("documents", "dimensions", "queries", "chunk")}
        facts = {"machine": machine(), "versions": versions("numpy", "scipy", "faiss-cpu"), "sizes": sizes}
        write_json(options.output, {**facts, "runs": measure(options)})
    write_section("chunked", page(read_json(options.output)), options.results)


if __name__ == "__main__":
    main()

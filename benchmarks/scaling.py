"""How cost grows: against tokens and clusters of an encode, documents of a search, and ranks of a training step.

    python benchmarks/scaling.py --beir DIR DIR --judged DIR               # CPU, about fifteen minutes on two cores
    python benchmarks/scaling.py --beir DIR DIR --judged DIR --parts ranks # one part; the others' figures stay
    python benchmarks/scaling.py --page                                    # writes the page from the stored figures

Texts and models are those of encoding.py. Documents of a search are 500 encoded texts over and over, each scaled
anew, because its cost depends on their number and active values alone; BM25 gets the folders' texts over and over.
Ranks run on this machine with one thread each and the same batch each (weak scaling), beside as many that do not
exchange anything, which tells what sharing the machine costs. An exponent is the slope of the least-squares line
through the logarithms. Memory is that of a process of its own. Writes benchmarks/results/scaling.json and a section
of docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

import lens
import train.loss
from benchmarks import arguments, encoding, step
from benchmarks.kmeans import minilm
from benchmarks.measure import PAGE, in_turn, load, peak, spread
from benchmarks.page import RESULTS, machine, versions, write_section
from benchmarks.scaling_page import page
from lens.corpus import find_file, read_texts
from lens.files import read_json, write_json
from lens.search import search
from lens.search.bm25 import BM25
from lens.search.exact import top
from lens.vectors import to_csr
from train.loss import contrastive_loss
from train.step import QueryPassageModel

FILE = RESULTS / "scaling.json"
PARTS = ("tokens", "clusters", "documents", "ranks")
ENCODED = ("LENS, vocabulary", f"LENS, {encoding.CLUSTERS:,} clusters", "SparseEncoder, batch 8")
ACTIVE = 256  # values of a sparse document
QUERIES = 100


def prefixes(lengths: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """How many of the texts of these lengths in tokens, from the first on, reach each size, or all where none do."""
    totals = list(itertools.accumulate(lengths))
    return [min(int(np.searchsorted(totals, size)) + 1, len(totals)) for size in sizes]


def in_own_process(options: argparse.Namespace, *arguments: str) -> float:
    """What `--one ARGUMENTS` prints: MB beyond the loaded model."""
    command = [sys.executable, __file__, "--beir", *map(str, options.beir), "--texts", str(options.texts)]
    command += ["--length", str(options.length), "--tokens", *map(str, options.tokens)]
    done = subprocess.run([*command, "--one", *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def tokens(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds and MB of an encode against the tokens of its texts."""
    texts = encoding.take(options.beir, options.texts)
    lengths = [len(item.ids) for item in lens.load(folder / "lens-words", device="cpu").text(texts)]
    counts = list(dict.fromkeys(prefixes(lengths, options.tokens)))
    encoders = {name: make() for name, make in encoding.contenders(folder, options.length).items() if name in ENCODED}
    found: dict[str, Any] = {"sizes": [sum(lengths[:count]) for count in counts], "texts": counts}
    rows = [
        in_turn({name: functools.partial(encode, texts[:count]) for name, encode in encoders.items()}, options.rounds)
        for count in counts
    ]
    found["seconds"] = columns(rows)
    found["memory_mb"] = {
        name: [in_own_process(options, "tokens", str(folder), name, str(count)) for count in counts] for name in ENCODED
    }
    return found


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows of one entry per name -> a list per name."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def with_clusters(folder: Path, count: int, length: int) -> lens.LENS:
    """MiniLM with so many random centroids, or with none for 0, for texts of `length` tokens at most."""
    lengths = {"query_max_length": length, "document_max_length": length}
    if not count:
        return lens.LENS.build(minilm(), device="cpu", head="dense", pooling="last", **lengths)
    place = folder / f"random-{count}"
    if not place.exists():
        place.mkdir()
        rows = torch.randn(count, 384, generator=torch.Generator().manual_seed(0)) / 384**0.5
        labels = torch.arange(30522, dtype=torch.int32) % count
        save_file({"centroids": rows, "labels": labels}, place / "clusters.safetensors")
    return lens.LENS.build(minilm(), place, device="cpu", transform="context", **lengths)


def clusters(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds and MB of an encode against K, and seconds of its backbone alone."""
    texts, counted = some_texts(options)
    models = {count: with_clusters(folder, count, options.length) for count in (0, *options.clusters)}
    runs = {str(count): functools.partial(model.encode, texts, show_progress=False) for count, model in models.items()}
    seconds = in_turn(runs, options.rounds)
    return {
        "sizes": options.clusters,
        "tokens": counted,
        "seconds": {"LENS": [seconds[str(count)] for count in options.clusters]},
        "backbone": seconds["0"],
        "memory_mb": {
            "LENS": [in_own_process(options, "clusters", str(folder), str(count)) for count in options.clusters]
        },
    }


def some_texts(options: argparse.Namespace) -> tuple[list[str], int]:
    """Texts of a quarter of the most tokens, and the tokens that they have."""
    texts = encoding.take(options.beir, options.texts)
    lengths = [len(item.ids) for item in with_clusters(Path(), 0, options.length).text(texts)]
    count = prefixes(lengths, [max(options.tokens) // 4])[0]
    return texts[:count], sum(lengths[:count])


def one(options: argparse.Namespace, part: str, folder: Path, *arguments: str) -> float:
    """MB beyond the loaded model of one encode."""
    if part == "tokens":
        name, count = arguments
        texts = encoding.take(options.beir, options.texts)[: int(count)]
        encode = encoding.contenders(folder, options.length)[name]()
    else:
        texts, _ = some_texts(options)
        encode = functools.partial(with_clusters(folder, int(arguments[0]), options.length).encode, show_progress=False)
    encode(texts[:2])
    return peak(lambda: encode(texts))


def like(rows: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    """`count` rows (count, K), drawn from `rows` (N, K) and each scaled by another factor, so that none are equal."""
    rng = np.random.default_rng(seed)
    factors = rng.uniform(0.5, 1.5, (count, 1)).astype(np.float32)
    drawn: NDArray[np.float32] = rows[rng.integers(len(rows), size=count)] * factors
    return drawn


def documents(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of searching, and of making an index where there is one, against the number of documents."""
    import faiss

    model = lens.load(folder / "lens-clusters", device="cpu")
    texts = encoding.take(options.beir, min(options.texts, 500))
    full: NDArray[np.float32] = model.encode(texts, show_progress=False)
    sparse: NDArray[np.float32] = model.encode(texts, show_progress=False, top_k=ACTIVE)
    corpus = [text for path in options.beir for text in read_texts(find_file(path, "corpus"))[1]]
    asked = [text for path in options.beir for text in read_texts(find_file(path, "queries"))[1]][:QUERIES]
    queries = like(full, QUERIES, 1), to_csr(like(sparse, QUERIES, 1))
    active = float((sparse > 0).sum(1).mean())
    found: dict[str, Any] = {"queries": QUERIES, "dimensions": full.shape[1], "active": active}
    searched, single, built = [], [], []
    for count in options.documents:
        rows, stored = like(full, count, 0), to_csr(like(sparse, count, 0))
        read = list(itertools.islice(itertools.cycle(corpus), count))
        index = faiss.IndexFlatIP(full.shape[1])
        index.add(rows)
        bm25 = BM25(read)
        runs: dict[str, Callable[[int], Any]] = {
            "LENS, sparse": lambda n, stored=stored: search(queries[1][:n], stored),
            "LENS, dense": lambda n, rows=rows: search(queries[0][:n], rows),
            "faiss, dense": lambda n, index=index: index.search(queries[0][:n], 10),
            "BM25": lambda n, bm25=bm25: top(bm25.score(asked[:n]), 10),
        }
        best = runs["LENS, dense"](QUERIES)[0]
        if float((best == runs["faiss, dense"](QUERIES)[1]).mean()) < 0.99:
            raise SystemExit("faiss finds other documents: nothing to compare")
        for number, rounds in ((QUERIES, searched), (1, single)):
            rounds.append(in_turn({name: functools.partial(run, number) for name, run in runs.items()}, options.rounds))
        makers = {"faiss, dense": functools.partial(add, rows), "BM25": functools.partial(BM25, read)}
        built.append(in_turn(makers, 1))
    found |= {"sizes": options.documents, "seconds": columns(searched)}
    return found | {"one query": columns(single), "index": columns(built)}


def add(rows: NDArray[np.float32]) -> None:
    """Makes an index of faiss."""
    import faiss

    faiss.IndexFlatIP(rows.shape[1]).add(rows)


def ranks(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of a training step against the number of processes, exchanging embeddings and gradients or nothing."""
    found: dict[str, Any] = {"sizes": options.ranks, "clusters": encoding.CLUSTERS, "batch": options.batch}
    found["seconds"] = {}
    for name, apart in (("exchanging", False), ("apart", True)):
        found["seconds"][name] = [spread(started(options, folder, count, apart)) for count in options.ranks]
    return found


def started(options: argparse.Namespace, folder: Path, count: int, apart: bool) -> list[float]:
    """The seconds that rank 0 of `count` processes measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--judged", str(options.judged), "--batch", str(options.batch)]
    command += ["--rounds", str(options.rounds), "--rank", str(folder), str(int(apart))]
    running = [
        subprocess.Popen(command, env=os.environ | meeting | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(count)
    ]
    printed = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a rank failed")
    return list(json.loads(printed[0].splitlines()[-1]))


def rank(options: argparse.Namespace, folder: Path, apart: bool) -> list[float]:
    """Seconds of steps of AdamW on this rank, from when all ranks are ready until all are done."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if apart:  # each rank's negatives are then its own
        train.loss.gather = lambda rows: rows
    encoder = lens.load(folder / "lens-clusters", device="cpu")
    model: Any = QueryPassageModel(encoder.model).train()
    model.requires_grad_(True)
    triples = step.take(options.judged, options.batch)
    inputs = [
        encoder.text.pack([item for part in parts for item in encoder.text(part)]).inputs()
        for parts in (triples[:1], triples[1:])
    ]
    # A query's documents stand in a row: first all relevant ones come, then all others, so their places are told.
    order = torch.arange(2 * options.batch).view(2, -1).T.flatten()
    if dist.get_world_size() > 1 and not apart:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run() -> None:
        queries, passages = model(*inputs)
        loss = contrastive_loss(queries, passages[order], None, 0.05, 0.0, 1.0, in_batch=True)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()

    seconds = []
    for _ in range(options.rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        run()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    dist.destroy_process_group()
    return seconds[1:]


MEASURES: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "tokens": tokens,
    "clusters": clusters,
    "documents": documents,
    "ranks": ranks,
}


def measure(options: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    """The figures of the chosen parts, beside those `before` of the others where machine and versions are the same."""
    content: dict[str, Any] = {
        "machine": machine(),
        "versions": versions("torch", "transformers", "sentence-transformers", "faiss-cpu", "bm25s", "scipy"),
        "sources": [path.name for path in options.beir],
        "judged": options.judged.name,
        "length": options.length,
        "rounds": options.rounds,
    }
    if all(before.get(name) == value for name, value in content.items()):
        content |= {part: before[part] for part in PARTS if part in before}
    with tempfile.TemporaryDirectory() as place:
        encoding.prepare(Path(place), options.length)
        for part in options.parts:
            loaded = load()
            content[part] = {**MEASURES[part](options, Path(place)), "load_before": loaded}
            print(json.dumps({part: content[part]}), file=sys.stderr, flush=True)
    return content


def main() -> None:
    """Measures, stores and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    doubled = [1000 * 2**power for power in range(7)]
    parser.add_argument("--beir", type=arguments.beir, nargs="+", help="folders to take texts from")
    parser.add_argument("--judged", type=arguments.judged, help="folder with judgements to take training triples from")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument(
        "--texts", type=arguments.positive, default=550, help="texts to take from (default: %(default)s)"
    )
    parser.add_argument("--length", type=arguments.positive, default=256, help="tokens at most (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=arguments.positive, nargs="+", default=doubled[:6], help="about these (default: %(default)s)"
    )
    parser.add_argument(
        "--clusters", type=arguments.positive, nargs="+", default=doubled[:6], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--documents", type=arguments.positive, nargs="+", default=doubled, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--ranks", type=arguments.positive, nargs="+", default=[1, 2], help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=arguments.positive, default=8, help="queries of each rank (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=arguments.positive, default=3, help="runs of each, in turn (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=FILE, help="JSON file to write (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="write the page from stored figures, no more")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    arguments.check(parser, options, options.output)
    if options.one:
        print(one(options, options.one[0], Path(options.one[1]), *options.one[2:]))
        return
    if options.rank:
        print(json.dumps(rank(options, Path(options.rank[0]), options.rank[1] == "1")))
        return
    if not options.page and not (options.beir and options.judged):
        parser.error("give --beir and --judged, or --page")
    if options.ranks[0] != 1:
        parser.error("--ranks must begin with 1, which the others are compared with")
    if not options.page:
        write_json(options.output, measure(options, read_json(options.output) if options.output.is_file() else {}))
    if options.output == FILE:
        write_section("scaling", page(read_json(FILE)), PAGE)


if __name__ == "__main__":
    main()

"""Seconds and memory of mining hard negatives from corpora of made passages with train/mine.py and BM25.

    python benchmarks/mining.py [--passages 100000 1000000] [--queries 2000]

Passages are 5 to 20 words drawn from a vocabulary by Zipf's law, queries four words of their one positive; the seed is
fixed. Each size is one process of train/mine.py, whose peak of resident memory the system counts. Writes
benchmarks/results/mining.json and a section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import arguments
from benchmarks.measure import PAGE, load
from benchmarks.page import RESULTS, ROOT, listed, machine, versions, write_section
from lens.files import read_json, write_json

FILE = RESULTS / "mining.json"
VOCABULARY, SEED = 50_000, 0
LENGTHS = (5, 21)  # words of a passage: from, below


def make(folder: Path, passages: int, queries: int) -> None:
    """Writes a BEIR folder of made passages, with a split `train` of so many queries."""
    rng = np.random.default_rng(SEED)
    chances = 1 / np.arange(1, VOCABULARY + 1)
    steps = np.cumsum(chances / chances.sum())
    judged = set(rng.choice(passages, min(queries, passages), replace=False).tolist())
    (folder / "qrels").mkdir(parents=True)
    with (
        (folder / "corpus.jsonl").open("w") as corpus,
        (folder / "queries.jsonl").open("w") as asked,
        (folder / "qrels" / "train.tsv").open("w") as qrels,
    ):
        qrels.write("query-id\tcorpus-id\tscore\n")
        for number in range(passages):
            ranks = np.searchsorted(steps, rng.random(rng.integers(*LENGTHS)))
            words = [f"w{rank:x}" for rank in ranks.tolist()]
            corpus.write(json.dumps({"_id": f"d{number}", "text": " ".join(words)}) + "\n")
            if number in judged:
                asked.write(json.dumps({"_id": f"q{number}", "text": " ".join(words[:4])}) + "\n")
                qrels.write(f"q{number}\td{number}\t1\n")


def measure(passages: int, queries: int) -> dict[str, Any]:
    """Mines from a corpus of that size in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "beir", passages, queries)
        output = folder / "mined.jsonl"
        before, start = load(), time.perf_counter()
        command = [sys.executable, "train/mine.py", "--beir", str(folder / "beir"), "--output", str(output)]
        subprocess.run(command, cwd=ROOT, check=True)
        seconds = time.perf_counter() - start
        manifest = read_json(folder / "mined.manifest.json")
        return {
            "passages": passages,
            "corpus_mb": round((folder / "beir" / "corpus.jsonl").stat().st_size / 2**20, 1),
            "queries": manifest["queries"],
            "seconds": round(seconds, 1),
            # The greatest of all processes so far: sizes are measured from the smallest on.
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
            "negatives_per_query": manifest["mean_negatives"],
            "random_negatives": manifest["random_negatives"],
            "shard": manifest["options"]["shard"],
            "load_before": before,
        }


def page(content: dict[str, Any]) -> list[str]:
    """The section of docs/performance.md."""
    runs = content["runs"]
    lines = [
        "## Mining (CPU)",
        "",
        f"Written by `benchmarks/mining.py`; do not edit. Machine: {listed(content['machine'])}. Versions: "
        f"{listed(content['versions'])}.",
        "",
        f"`train/mine.py` with BM25 on made passages of {LENGTHS[0]} to {LENGTHS[1] - 1} words, in shards of "
        f"{runs[0]['shard']:,}: the whole program, from its start to the written file. Memory is the process's peak, "
        "of which torch and the other libraries take about 0.4 GB before any passage is read.",
        "",
        "| passages | corpus, MB | queries | seconds | peak memory, MB | machine's load before |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        cells = (run["passages"], run["corpus_mb"], run["queries"], run["seconds"], run["peak_rss_mb"])
        lines.append("| " + " | ".join(f"{cell:,}" for cell in cells) + f" | {run['load_before']} |")
    return lines


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=arguments.positive, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--queries", type=arguments.positive, default=2000)
    parser.add_argument("--output", type=Path, default=FILE, help="file of the figures")
    parser.add_argument("--results", type=Path, default=PAGE, help="page whose section is written")
    parser.add_argument("--page", action="store_true", help="write the section from the stored figures, no more")
    options = parser.parse_args(given)
    arguments.check(parser, options, options.output)
    if not options.page:
        runs = [measure(passages, options.queries) for passages in sorted(set(options.passages))]
        content = {"machine": machine(), "versions": versions("numpy", "scipy", "bm25s", "PyStemmer"), "runs": runs}
        write_json(options.output, content)
    write_section("mining", page(read_json(options.output)), options.results)


if __name__ == "__main__":
    main()

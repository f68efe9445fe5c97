"""Seconds and memory of mining hard negatives from corpora of made passages with train/mine.py and BM25.

    python benchmarks/mining.py [--passages 100000 1000000] [--queries 2000]

Passages are 5 to 20 words drawn from a vocabulary by Zipf's law, queries four words of their one positive; the seed is
fixed. Each size is one process of train/mine.py, whose peak of resident memory the system counts. Writes
benchmarks/results/mining.json and a section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
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
_LAUNCHER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""Starts a process and tells its peak of resident memory in KB. A process counts what the one that started it held at
that moment, so that one which holds little has to stand between the benchmark and what is measured."""


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


def peak(*command: str) -> float:
    """MB of resident memory that train/mine.py holds at its peak, with these arguments."""
    whole = [sys.executable, "-c", _LAUNCHER, sys.executable, "train/mine.py", *command]
    done = subprocess.run(whole, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout) / 1024


def measure(passages: int, queries: int) -> dict[str, Any]:
    """Mines from a corpus of that size in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "beir", passages, queries)
        output = folder / "mined.jsonl"
        before, start = load(), time.perf_counter()
        memory = peak("--beir", str(folder / "beir"), "--output", str(output))
        seconds = time.perf_counter() - start
        manifest = read_json(folder / "mined.jsonl.manifest.json")
        return {
            "passages": passages,
            "corpus_mb": round((folder / "beir" / "corpus.jsonl").stat().st_size / 2**20, 1),
            "queries": manifest["queries"],
            "seconds": round(seconds, 1),
            "peak_rss_mb": round(memory),
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
        f"{runs[0]['shard']:,}: the whole program, from its start to the written file. Memory is the process's peak; "
        f"the same program asked for --help takes {content['libraries_mb']:,} MB, for torch and other libraries.",
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
        runs = [measure(passages, options.queries) for passages in options.passages]
        found = versions("numpy", "scipy", "bm25s", "PyStemmer")
        facts = {"machine": machine(), "versions": found, "libraries_mb": round(peak("--help")), "runs": runs}
        write_json(options.output, facts)
    write_section("mining", page(read_json(options.output)), options.results)


if __name__ == "__main__":
    main()

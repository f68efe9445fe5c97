"""Whether torch.compile pays when MiniLM encodes texts on this machine, its warm-up counted.

    python benchmarks/compiled.py --beir DIR [DIR ...]      # about three minutes on two cores
    python benchmarks/compiled.py --page                    # writes the page from the stored figures

Each way runs in a process of its own with an empty cache of compiled code, on texts taken as benchmarks/encoding.py
takes them: `eager`, and `dynamic`, layers compiled for any shape as `compile=True` does it. The first pass holds the
compiling, later ones are over other texts. Vectors are compared before anything is believed. Writes
benchmarks/results/compiled.json and a section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import lens
from benchmarks import arguments
from benchmarks.encoding import take
from benchmarks.kmeans import minilm
from benchmarks.measure import PAGE, load
from benchmarks.page import RESULTS, listed, machine, versions, write_section
from lens.attention import compile_layers
from lens.files import read_json, write_json

FILE = RESULTS / "compiled.json"
WAYS = ("eager", "dynamic")
COUNTS = (550, 5000, 50_000)
BUDGET = 2048  # tokens of a batch
CLUSTERS = 4000


def build(folder: Path, length: int) -> lens.LENS:
    """MiniLM with random clusters: what they mean makes no difference to the time."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir()
    labels = torch.arange(30_522, dtype=torch.int32) % CLUSTERS
    save_file({"centroids": torch.randn(CLUSTERS, 384), "labels": labels}, folder / "clusters.safetensors")
    return lens.LENS.build(
        minilm(), folder, device="cpu", packed=True, query_max_length=length, document_max_length=length
    )


def one(way: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one way in this process: the first pass, then each of the others."""
    model = build(folder / way, options.length)
    model.encode(["to warm up what is not compiled"] * 8, batch_tokens=BUDGET)
    if way == "dynamic":
        compile_layers(model.model.backbone, model.device)
    texts = take(options.beir, options.texts * (options.rounds + 1))
    seconds = []
    for number in range(options.rounds + 1):
        part = texts[number :: options.rounds + 1]
        start = time.perf_counter()
        vectors = model.encode(part, batch_tokens=BUDGET, show_progress=False)
        seconds.append(time.perf_counter() - start)
    np.save(folder / f"{way}.npy", vectors)
    return {"first": seconds[0], "later": seconds[1:]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    content: dict[str, Any] = {
        "machine": machine() | {"load_before": load()},
        "versions": versions("torch", "transformers"),
        "sources": [path.name for path in options.beir],
        "texts": options.texts,
        "length": options.length,
        "ways": {},
    }
    with tempfile.TemporaryDirectory() as place:
        for way in WAYS:
            command = [sys.executable, __file__, "--beir", *map(str, options.beir), "--texts", str(options.texts)]
            command += ["--length", str(options.length), "--rounds", str(options.rounds), "--one", way, place]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{place}/cache-{way}"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            content["ways"][way] = json.loads(done.stdout.splitlines()[-1])
        vectors = {way: np.load(f"{place}/{way}.npy") for way in WAYS}
    content["apart"] = {way: float(np.abs(vectors[way] - vectors["eager"]).max()) for way in WAYS[1:]}
    if max(content["apart"].values()) > 1e-4:
        raise SystemExit(f"vectors differ, nothing to compare: {content['apart']}")
    return content


def page(content: dict[str, Any]) -> list[str]:
    """The section of docs/performance.md."""
    texts, ways = content["texts"], content["ways"]
    later = {way: statistics.median(facts["later"]) for way, facts in ways.items()}
    lines = [
        "## torch.compile (CPU)",
        "",
        f"Written by `benchmarks/compiled.py`; do not edit. Machine: {listed(content['machine'])}. "
        f"Versions: {listed(content['versions'])}.",
        "",
        f"MiniLM with {CLUSTERS:,} clusters; texts of {', '.join(content['sources'])}, cut at {content['length']} "
        f"tokens, without padding in batches of {BUDGET:,} tokens. Each way has a process of its own with an empty "
        f"cache: {texts} texts first, the compiling included, then {len(ways['eager']['later'])} times {texts} others "
        "(median, least to most). Seconds for more texts follow from both. Vectors differ by at most "
        f"{max(content['apart'].values()):.0e}.",
        "",
        f"| | first {texts} | later {texts} | {' | '.join(f'{count:,} texts' for count in COUNTS)} | pays from |",
        f"| --- |{' ---: |' * (3 + len(COUNTS))}",
    ]
    for way, facts in ways.items():
        totals = [facts["first"] + (count - texts) / texts * later[way] for count in COUNTS]
        spared = (later["eager"] - later[way]) / texts  # seconds a text
        extra = facts["first"] - later[way] - (ways["eager"]["first"] - later["eager"])
        pays = "" if way == "eager" else f"{extra / spared:,.0f} texts" if spared > 0 else "never"
        span = f"{later[way]:.2f} ({min(facts['later']):.2f} to {max(facts['later']):.2f})"
        row = [way, f"{facts['first']:.1f}", span, *(f"{total:,.0f}" for total in totals), pays]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def main() -> None:
    """Measures, stores and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beir", type=arguments.beir, nargs="+", help="folders to take texts from")
    parser.add_argument("--texts", type=arguments.positive, default=550, help="of one pass (default: %(default)s)")
    parser.add_argument("--length", type=arguments.positive, default=256, help="tokens at most (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=arguments.positive, default=3, help="passes after the first (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=FILE, help="JSON file to write (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="write the page from stored figures, no more")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    arguments.check(parser, options, options.output)
    if not options.page and not options.beir:
        parser.error("give --beir, or --page")
    if options.one:
        print(json.dumps(one(options.one[0], Path(options.one[1]), options)))
        return
    if not options.page:
        write_json(options.output, measure(options))
    write_section("compiled", page(read_json(options.output)), PAGE)


if __name__ == "__main__":
    main()

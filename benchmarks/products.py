"""Float32 products by oneDNN against torch's own (MKL), alone and in encoding, on CPUs where LENS takes oneDNN's.

    python benchmarks/products.py --beir DIR [DIR ...]      # about three minutes on two cores
    python benchmarks/products.py --page                    # writes the page from the stored figures

The shapes are those of MiniLM and Mistral-7B. For encoding, MiniLM with 4,000 clusters embeds texts taken as
benchmarks/encoding.py takes them, both ways in one process and in turn, beside SentenceTransformer's dense embedding of
the same backbone. Vectors are compared first. Writes benchmarks/results/products.json and a section of
docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.nn import functional as F

import lens
from benchmarks import arguments
from benchmarks.compiled import CLUSTERS, build
from benchmarks.encoding import dense, take
from benchmarks.measure import PAGE, in_turn, load
from benchmarks.page import RESULTS, listed, machine, versions, write_section
from lens import products
from lens.files import read_json, write_json

FILE = RESULTS / "products.json"
SHAPES = ((384, 384), (384, 1536), (1536, 384), (384, CLUSTERS), (4096, 4096))
ROWS = (1, 16, 256, 2048)
BATCH = 16
PEER = f"dense SentenceTransformer, batch {BATCH}"


def alone(rounds: int) -> list[dict[str, Any]]:
    """Seconds of both products for each shape."""
    found = []
    for inner, outer in SHAPES:
        weight, bias = torch.randn(outer, inner), torch.randn(outer)
        for rows in ROWS:
            x = torch.randn(rows, inner)
            repeats = max(1, int(2e9 / (2 * rows * inner * outer)))

            def torch_own(x: Any = x, weight: Any = weight, bias: Any = bias, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    F.linear(x, weight, bias)

            def ours(x: Any = x, weight: Any = weight, bias: Any = bias, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    products.linear(x, weight, bias)

            with torch.inference_mode():
                seconds = in_turn({"torch": torch_own, "ours": ours}, rounds)
            operations = 2 * rows * inner * outer * repeats / 1e9
            speeds = {name: round(operations / spread["median"], 1) for name, spread in seconds.items()}
            found.append({"rows": rows, "inner": inner, "outer": outer, "gflops": speeds})
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures. Raises SystemExit on a machine where LENS takes torch's own product."""
    if not products.pays():
        raise SystemExit("on this machine LENS takes torch's own product: nothing to compare (see lens/products.py)")
    texts = take(options.beir, options.texts)
    content: dict[str, Any] = {
        "machine": machine() | {"threads": torch.get_num_threads(), "load_before": load()},
        "versions": versions("torch", "transformers", "sentence-transformers"),
        "sources": [path.name for path in options.beir],
        "texts": options.texts,
        "length": options.length,
        "alone": alone(options.rounds),
    }
    with tempfile.TemporaryDirectory() as place:
        model = build(Path(place) / "clusters", options.length)
        peer = dense(options.length, BATCH)
        pays = products.pays

        def encode(own: bool) -> np.ndarray[Any, Any]:
            products.pays = pays if own else lambda: False  # type: ignore[assignment]
            try:
                vectors: np.ndarray[Any, Any] = lens.LENS.encode(model, texts, show_progress=False)
                return vectors
            finally:
                products.pays = pays  # type: ignore[assignment]

        apart = float(np.abs(encode(True) - encode(False)).max())
        if apart > 1e-5:
            raise SystemExit(f"vectors differ by {apart}: nothing to compare")
        ways = {"LENS, oneDNN": lambda: encode(True), "LENS, MKL": lambda: encode(False), PEER: lambda: peer(texts)}
        content |= {"apart": apart, "encoding": in_turn(ways, options.rounds)}
    return content


def page(content: dict[str, Any]) -> list[str]:
    """The section of docs/performance.md."""
    lines = [
        "## Products in float32 (AMD CPUs with AVX-512)",
        "",
        f"Written by `benchmarks/products.py`; do not edit. Machine: {listed(content['machine'])}. "
        f"Versions: {listed(content['versions'])}.",
        "",
        "On these processors LENS multiplies by oneDNN where no gradient is wanted; torch's own is MKL. GFLOP/s of a "
        "linear layer with bias, medians in turn:",
        "",
        "| inputs x outputs | rows | torch | LENS | ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in content["alone"]:
        theirs, own = row["gflops"]["torch"], row["gflops"]["ours"]
        lines.append(
            f"| {row['inner']:,} x {row['outer']:,} | {row['rows']:,} | {theirs:,.0f} | {own:,.0f} | "
            f"{own / theirs:.2f} |"
        )
    seconds = {name: spread["median"] for name, spread in content["encoding"].items()}
    lines += [
        "",
        f"Encoding {content['texts']} texts of {', '.join(content['sources'])}, cut at {content['length']} tokens, "
        f"with MiniLM and {CLUSTERS:,} clusters; embeddings differ by at most {content['apart']:.0e}:",
        "",
        "| | seconds (least to most) | times MKL's |",
        "| --- | ---: | ---: |",
    ]
    for name, spread in content["encoding"].items():
        span = f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"
        lines.append(f"| {name} | {span} | {seconds['LENS, MKL'] / seconds[name]:.2f} |")
    return lines


def main() -> None:
    """Measures, stores and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--beir", type=arguments.beir, nargs="+", help="folders to take texts from")
    add("--texts", type=arguments.positive, default=550, help="(default: %(default)s)")
    add("--length", type=arguments.positive, default=256, help="tokens at most (default: %(default)s)")
    add("--rounds", type=arguments.positive, default=5, help="(default: %(default)s)")
    add("--output", type=Path, default=FILE, help="JSON file to write (default: %(default)s)")
    add("--page", action="store_true", help="write the page from stored figures, no more")
    options = parser.parse_args()
    arguments.check(parser, options, options.output)
    if not options.page:
        if not options.beir:
            parser.error("give --beir, or --page")
        write_json(options.output, measure(options))
    write_section("products", page(read_json(options.output)), PAGE)


if __name__ == "__main__":
    main()

"""Encoding real texts of mixed length: ours against sentence-transformers, on the same weights.

    python benchmarks/encoding.py --beir DIR [DIR ...]      # CPU, about fifteen minutes on two cores
    python benchmarks/encoding.py --model DIR [DIR ...] --judged DIR [DIR ...]      # what int8 costs, no more
    python benchmarks/encoding.py --page                    # writes the page from the stored figures

A third of the texts are queries, the rest documents, taken evenly from the folders (BEIR layout) in a fixed order and
cut at --length tokens for everybody. Two models of MiniLM's shape: MiniLM with an MLM head of its 30,522 words
(transform drawn at random, rows its word embeddings), which sentence-transformers' SparseEncoder runs too, and MiniLM
with 4,000 clusters, against its own dense embedding in SentenceTransformer. Vectors are compared before anything is
timed. int8 multiplies in 8 bits; its cost in nDCG@10 is measured on artifacts that can rank, which these are not for
lack of training. Beside them stands what the machine's matrix product allows. Writes benchmarks/results/encoding.json
and a section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import scipy.sparse
import torch

import lens
from benchmarks import arguments
from benchmarks.flops import encoder_flops
from benchmarks.kmeans import minilm
from benchmarks.measure import PAGE, in_turn, load, matmul_peak, peak
from benchmarks.page import RESULTS, ROOT, listed, machine, versions, write_section
from lens.corpus import find_file, read_texts
from lens.files import read_json, write_json

FILE = RESULTS / "encoding.json"
BATCHES = (8, 16, 32)
CLUSTERS = 4000


def take(folders: list[Path], count: int) -> list[str]:
    """`count` texts, a third of them queries, evenly from the folders and spread over each file."""
    texts: list[str] = []
    for stem, share in (("queries", count // 3), ("corpus", count - count // 3)):
        for number, folder in enumerate(folders):
            wanted = share // len(folders) + (number < share % len(folders))
            _, found = read_texts(find_file(folder, stem))
            texts += found[:: max(len(found) // wanted, 1)][:wanted]
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i] for i in order]


def prepare(folder: Path, length: int) -> None:
    """The models in `folder`: words/ (an MLM that both sides load), lens-words/ and lens-clusters/ (artifacts)."""
    from safetensors.torch import save_file
    from sklearn.cluster import MiniBatchKMeans
    from transformers import AutoTokenizer, BertForMaskedLM

    torch.manual_seed(0)
    model, info = BertForMaskedLM.from_pretrained(minilm(), output_loading_info=True)
    assert all(name.startswith("cls.") for name in info["missing_keys"])
    model.save_pretrained(folder / "words")
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder / "words")
    rows = model.get_input_embeddings().weight.detach().numpy()
    found = MiniBatchKMeans(CLUSTERS, init="random", n_init=1, max_iter=3, random_state=0).fit(rows)
    (folder / "centroids").mkdir()
    labels = torch.tensor(found.labels_, dtype=torch.int32)
    centroids = torch.tensor(found.cluster_centers_)
    save_file({"centroids": centroids, "labels": labels}, folder / "centroids" / "clusters.safetensors")
    lengths = {"query_max_length": length, "document_max_length": length}
    build = functools.partial(lens.LENS.build, device="cpu", **lengths)
    # SpladePooling takes [CLS] and [SEP] into the maximum too
    build(folder / "words", positions="all", normalize=False).save(folder / "lens-words")
    build(minilm(), folder / "centroids", whiten=True, transform="context").save(folder / "lens-clusters")


Encode = Callable[[list[str]], Any]


def ours(folder: Path, name: str, eight: bool) -> Encode:
    """lens.encode: CSR for words, an array for clusters."""
    model = lens.load(folder / f"lens-{name}", device="cpu", quantization="int8" if eight else None)
    output: Any = "csr" if name == "words" else "numpy"
    return lambda texts: model.encode(texts, output=output, show_progress=False)


def sparse(folder: Path, length: int, batch: int) -> Encode:
    """sentence-transformers' SparseEncoder."""
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(folder / "words"), device="cpu")
    model.max_seq_length = length
    return lambda texts: model.encode(texts, batch_size=batch, show_progress_bar=False)


def dense(length: int, batch: int) -> Encode:
    """sentence-transformers' SentenceTransformer."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(minilm(), device="cpu")
    model.max_seq_length = length
    return lambda texts: model.encode(texts, batch_size=batch, normalize_embeddings=True, show_progress_bar=False)


def contenders(folder: Path, length: int) -> dict[str, Callable[[], Encode]]:
    """How to load each contender, by name."""
    found: dict[str, Callable[[], Encode]] = {
        "LENS, vocabulary": functools.partial(ours, folder, "words", False),
        "LENS, vocabulary, int8": functools.partial(ours, folder, "words", True),
        f"LENS, {CLUSTERS:,} clusters": functools.partial(ours, folder, "clusters", False),
        f"LENS, {CLUSTERS:,} clusters, int8": functools.partial(ours, folder, "clusters", True),
    }
    for batch in BATCHES:
        found[f"SparseEncoder, batch {batch}"] = functools.partial(sparse, folder, length, batch)
    for batch in BATCHES:
        found[f"dense SentenceTransformer, batch {batch}"] = functools.partial(dense, length, batch)
    return found


def to_array(embeddings: Any) -> np.ndarray[Any, Any]:
    """Any of the output forms as (N, K) float32."""
    if isinstance(embeddings, torch.Tensor):
        return embeddings.to_dense().numpy()
    return embeddings.toarray() if scipy.sparse.issparse(embeddings) else np.asarray(embeddings)


def check(loaded: dict[str, Encode], folder: Path, texts: list[str]) -> dict[str, float]:
    """Greatest difference of vectors that must be the same: ours and SparseEncoder's, chunked and eager clusters."""
    texts = texts[:40]
    mine = to_array(loaded["LENS, vocabulary"](texts))
    theirs = to_array(loaded[f"SparseEncoder, batch {BATCHES[0]}"](texts))
    model = lens.load(folder / "lens-clusters", device="cpu")
    blocks = model.encode(texts)
    model.model.head.backend = "eager"
    apart = {
        "vocabulary, LENS to SparseEncoder": float(np.abs(mine - theirs).max()),
        "clusters, blocks to eager": float(np.abs(blocks - model.encode(texts)).max()),
    }
    if max(apart.values()) > 1e-4:
        raise SystemExit(f"vectors differ, nothing to compare: {apart}")
    return apart


def utilisation(folder: Path, texts: list[str], rounds: int) -> dict[str, Any]:
    """Share of the measured sgemm peak that our vocabulary head reaches on the longest texts, median of rounds."""
    model = lens.load(folder / "lens-words", device="cpu")
    longest = sorted(texts, key=len)[-64:]
    lengths = [len(item.ids) for item in model.text(longest)]
    work = sum(encoder_flops(read_json(Path(minilm()) / "config.json"), lengths, 30522, transform=True).values())
    shares, peaks = [], []
    for _ in range(rounds):
        peaks.append(matmul_peak())
        start = time.perf_counter()
        model.encode(longest, output="csr", show_progress=False)
        shares.append(work / (time.perf_counter() - start) / 1e9 / peaks[-1])
    return {
        "texts": len(longest),
        "tokens": sum(lengths),
        "sgemm_gflops": float(np.median(peaks)),
        "share": float(np.median(shares)),
        "shares": shares,
    }


def judged(model: Path, folders: list[Path]) -> dict[str, dict[str, float]]:
    """nDCG@10 of a trained artifact in float32 and int8 on each folder, by eval/run.py."""
    scores: dict[str, dict[str, float]] = {}
    for kind in ("float32", "int8"):
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "eval/run.py", "--model", f"LENS={model}", "--beir", *map(str, folders)]
            command += ["--split", "test", "--device", "cpu", "--output", f"{place}/eval"]
            command += ["--quantization", "int8"] if kind == "int8" else []
            subprocess.run(command, cwd=ROOT, check=True)
            for name, data in read_json(Path(place) / "eval" / "results.json")["datasets"].items():
                scores.setdefault(name, {})[kind] = data["systems"]["LENS"]["nDCG@10"]
    return scores


def memory(name: str, folder: Path, options: argparse.Namespace) -> float:
    """MB beyond the loaded model that one contender takes, in a process of its own."""
    command = [sys.executable, __file__, "--beir", *map(str, options.beir), "--texts", str(options.texts)]
    command += ["--length", str(options.length), "--one", name, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    prepare(folder, options.length)
    texts = take(options.beir, options.texts)
    content: dict[str, Any] = {
        "machine": machine() | {"load_before": load()},
        "versions": versions("torch", "transformers", "sentence-transformers", "tokenizers"),
        "sources": [path.name for path in options.beir],
        "texts": len(texts),
        "length": options.length,
        "rounds": options.rounds,
    }
    loaded = {name: make() for name, make in contenders(folder, options.length).items()}
    content["apart"] = check(loaded, folder, texts)
    lengths = [len(item.ids) for item in lens.load(folder / "lens-words", device="cpu").text(texts)]
    content["tokens"] = sum(lengths)
    content["lengths"] = {f"p{p}": int(np.percentile(lengths, p)) for p in (5, 25, 50, 75, 95)}
    runs = {name: functools.partial(encode, texts) for name, encode in loaded.items()}
    content["seconds"] = in_turn(runs, options.rounds)
    content["utilisation"] = utilisation(folder, texts, options.rounds)
    content["memory_mb"] = {name: memory(name, folder, options) for name in loaded}
    return content


def stored(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the output file, nothing where there is none."""
    return read_json(options.output) if options.output.is_file() else {}


def page(content: dict[str, Any]) -> list[str]:
    """The section of docs/performance.md."""
    lengths = content["lengths"]
    seconds = content["seconds"]
    best = {
        kind: min((name for name in seconds if kind in name), key=lambda name: seconds[name]["median"])
        for kind in ("SparseEncoder", "dense")
    }
    lines = [
        "## Encoding (CPU)",
        "",
        f"Written by `benchmarks/encoding.py`; do not edit. Machine: {listed(content['machine'])}. "
        f"Versions: {listed(content['versions'])}. Medians of {content['rounds']} rounds in turn (least to most).",
        "",
        f"{content['texts']} texts ({', '.join(content['sources'])}; a third queries), cut at {content['length']} "
        f"tokens: {content['tokens']:,} tokens, half the texts between {lengths['p25']} and {lengths['p75']}. Models "
        "and weights are the same on both sides; vectors differ by at most "
        f"{max(content['apart'].values()):.0e}. MB is what is held beyond the loaded model at the peak.",
        "",
        f"| | seconds | texts/s | against {best['SparseEncoder']} | against {best['dense']} | MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, facts in seconds.items():
        ratios = [f"{seconds[best[kind]]['median'] / facts['median']:.2f}" for kind in ("SparseEncoder", "dense")]
        span = f"{facts['median']:.2f} ({facts['min']:.2f} to {facts['max']:.2f})"
        speed = content["texts"] / facts["median"]
        lines.append(f"| {name} | {span} | {speed:.1f} | {' | '.join(ratios)} | {content['memory_mb'][name]:,.0f} |")
    use = content["utilisation"]
    lines += [
        "",
        f"On the {use['texts']} longest texts ({use['tokens']:,} tokens) the vocabulary model reaches "
        f"{100 * use['share']:.0f}% of the machine's float32 matrix product ({use['sgemm_gflops']:.0f} GFLOP/s, "
        "measured in the same minutes), all else counted as loss.",
    ]
    if "ndcg" in content:
        lines += [
            "",
            "What int8 costs, nDCG@10 of models that can rank, by the number of rows of their heads:",
            "",
            "| rows | | float32 | int8 | difference |",
            "| ---: | --- | ---: | ---: | ---: |",
        ]
        for rows, found in content["ndcg"].items():
            for name, scores in found.items():
                change = scores["int8"] - scores["float32"]
                figures = f"{scores['float32']:.4f} | {scores['int8']:.4f} | {change:+.4f}"
                lines.append(f"| {int(rows):,} | {name} | {figures} |")
    return lines


def main() -> None:
    """Measures, stores and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beir", type=arguments.beir, nargs="+", help="folders to take texts from")
    parser.add_argument("--texts", type=arguments.positive, default=550, help="(default: %(default)s)")
    parser.add_argument("--length", type=arguments.positive, default=256, help="tokens at most (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=arguments.positive, default=5, help="runs of each, in turn (default: %(default)s)"
    )
    parser.add_argument("--model", type=arguments.artifact, nargs="+", help="artifacts that rank, for what int8 costs")
    parser.add_argument(
        "--judged", type=arguments.judged, nargs="+", help="folders with judgements, for what int8 costs"
    )
    parser.add_argument("--output", type=Path, default=FILE, help="JSON file to write (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="write the page from stored figures, no more")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    arguments.check(parser, options, options.output)
    if not options.page and not options.beir and not options.model:
        parser.error("give --beir, --model, or --page")
    if bool(options.model) != bool(options.judged):
        parser.error("--model and --judged go together")
    if options.one:
        encode = contenders(Path(options.one[1]), options.length)[options.one[0]]()
        texts = take(options.beir, options.texts)
        encode(texts[:2])
        print(peak(lambda: encode(texts)))
        return
    if not options.page:
        with tempfile.TemporaryDirectory() as folder:
            content = stored(options) | (measure(options, Path(folder)) if options.beir else {})
        for model in options.model or []:
            scores = judged(model.resolve(), [path.resolve() for path in options.judged])
            content.setdefault("ndcg", {})[str(read_json(model / "lens.json")["dimensions"])] = scores
        write_json(options.output, content)
    if options.output == FILE:
        write_section("encoding", page(json.loads(FILE.read_text(encoding="utf-8"))), PAGE)


if __name__ == "__main__":
    main()

"""Where the time goes: one `lens.encode` and one training step by kind of operation, beside the matrix product's peak.

    python benchmarks/where.py --beir DIR DIR --judged DIR   # CPU, float32 and int8, about eight minutes on two cores
    python benchmarks/where.py --beir DIR DIR --judged DIR --device cuda     # GPU: encode in bfloat16, step in autocast
    python benchmarks/where.py --page                        # writes the page from the stored figures

Texts, models and the step are those of encoding.py and step.py. torch.profiler tells every operation's own time and
what it was called from; on a GPU the time is that of the kernels. Shares are of the profiled run, which is a little
slower than the medians without profiler that stand beside it. The FLOPs of the matrix products follow from the texts'
lengths (benchmarks/flops.py), the peak from products of large matrices. Writes
benchmarks/results/where.json (where-cuda.json on a GPU) and a section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import lens
import lens.dropped
import lens.head
import lens.int8
from benchmarks import arguments, encoding, step
from benchmarks.flops import encoder_flops
from benchmarks.kmeans import minilm
from benchmarks.measure import PAGE, bars, in_turn, int8_peak, load, matmul_peak, wait
from benchmarks.page import RESULTS, listed, machine, versions, write_section
from lens.files import read_json, write_json
from lens.head import LexicalHead
from lens.text import TextProcessor, Tokens

LINEAR, HEAD, ATTENTION = "linear layers", "product with the head's rows", "attention"
POOL, QUANTISE, GELU, DROPOUT = "pooling", "quantising", "GELU", "dropout"
OTHER, TOKENISE, REST = "norms, additions, copies", "tokenisation", "Python between operations"
IDLE = "GPU idle"
KINDS = (LINEAR, HEAD, ATTENTION, POOL, QUANTISE, GELU, DROPOUT, OTHER, TOKENISE, REST, IDLE)
WHOLE, POOLED, QUANTISED, TOKENISED = "where: whole", "where: pooled", "where: quantised", "where: tokenised"
"""Labels of what a profiled run calls."""
LABELLED = (
    (lens.head, "lexical_pool", POOLED),
    (LexicalHead, "_pool_int8", POOLED),
    (lens.int8, "_quantised", QUANTISED),
    (TextProcessor, "__call__", TOKENISED),
    (lens.dropped, "_attend", "where: attention"),
    (lens.dropped, "draw", "where: dropout"),
    (lens.dropped.Dropout, "forward", "where: dropout"),
)
PRODUCTS = {"mm", "addmm", "matmul", "linear", "addmm_", "_linear_pointwise", "qlinear_pointwise", "_embedding_bag"}
ATTENDING = ("scaled_dot_product", "scaleddotproduct", "attn", "attention")
WITHIN_ATTENTION = {"bmm", "baddbmm", "_softmax", "_softmax_backward_data", "_safe_softmax"}
VIEWS = {"view", "_unsafe_view", "reshape", "slice", "select", "as_strided", "t", "transpose", "permute", "expand"}
VIEWS |= {"unsqueeze", "squeeze", "detach", "alias", "split", "empty", "empty_strided", "empty_like", "resize_", "to"}


def kind_of(name: str, callers: Sequence[str]) -> str:
    """The kind of an operation called from `callers`, all by their names in the profile."""
    space, _, operation = name.rpartition("::")
    if name == TOKENISED or TOKENISED in callers:
        return TOKENISE
    pooled = any(caller == POOLED or caller in ("_MaxLogitsBackward", "_SumWeightsBackward") for caller in callers)
    if space == "lens":  # a kernel of our own, which multiplies and pools at once
        return HEAD
    if not space or space.startswith("autograd") or operation in VIEWS:
        return REST
    if QUANTISED in callers:
        return QUANTISE
    names = [text.lower() for text in (name, *callers)]
    if "bernoulli" in operation or any("dropout" in text for text in names):
        return DROPOUT
    if operation in WITHIN_ATTENTION or any(part in text for text in names for part in ATTENDING):
        return ATTENTION
    if operation in PRODUCTS and not (operation == "_embedding_bag" and not pooled):
        return HEAD if pooled else LINEAR
    if pooled:
        return POOL
    return GELU if "gelu" in operation else OTHER


def by_kind(events: Iterable[Any], device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Own seconds within WHOLE of each kind, and of the operations that take most, from a profile's events.

    On a GPU those of the kernels that an operation started, and what is left of WHOLE is the GPU's idle time.
    """
    known: dict[int, tuple[str, ...]] = {}

    def callers(event: Any) -> tuple[str, ...]:
        if event is None:
            return ()
        if id(event) not in known:
            known[id(event)] = (event.name, *callers(event.cpu_parent))
        return known[id(event)]

    gpu = device.type == "cuda"
    kinds: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    whole = 0.0
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        if event.name == WHOLE:
            whole += event.cpu_time_total / 1e6
        above = callers(event.cpu_parent)
        if gpu:  # a backward pass runs in a thread of its own, outside WHOLE
            seconds = event.self_device_time_total / 1e6
        elif event.name == WHOLE or WHOLE in above:
            seconds = event.self_cpu_time_total / 1e6
        else:
            continue
        kind = kind_of(event.name, above)
        kinds[HEAD if gpu and kind == REST and POOLED in (event.name, *above) else kind] += seconds
        operations[f"{event.name} ({kind})"] += seconds
    if gpu:
        kinds[IDLE] = max(whole - kinds.total(), 0.0)
    ordered = {kind: kinds[kind] for kind in KINDS if kinds[kind] > 0}
    return ordered, dict(operations.most_common(20))


@contextmanager
def labelled() -> Iterator[None]:
    """Names, for the profile, the functions of LABELLED."""

    def under(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            with record_function(label):
                return function(*arguments, **options)

        return run

    with ExitStack() as stack:
        for owner, name, label in LABELLED:
            stack.enter_context(patch.object(owner, name, under(getattr(owner, name), label)))
        yield


def profiled(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Seconds of one run by kind and by operation."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with labelled(), profile(activities=activities) as found, record_function(WHOLE):
        run()
        wait(device)
    kinds, operations = by_kind(found.events(), device)
    return {"kinds": kinds, "operations": operations}


def encode_flops(tokens: Sequence[Tokens], rows: int, transform: bool) -> dict[str, float]:
    """FLOPs of the matrix products of an encode."""
    config = read_json(Path(minilm()) / "config.json")
    pooled = [item.end - item.start for item in tokens]
    return encoder_flops(config, [len(item.ids) for item in tokens], rows, transform, pooled)


def step_flops(tokens: Sequence[Tokens], rows: int) -> dict[str, float]:
    """The same of a training step: a product has two in its backward pass, but the head's touches few rows."""
    forward = encode_flops(tokens, rows, transform=True)
    return {"linear": 3 * forward["linear"], "attention": 3 * forward["attention"], "head": forward["head"]}


def at_peak(run: dict[str, Any], peaks: dict[str, float]) -> float:
    """Seconds that a run's FLOPs take at the peaks in GFLOP/s; in int8 attention stays in float32."""
    flops, kind = run["flops"], run["products"]
    attention = peaks["float32" if kind == "int8" else kind]
    return (flops["attention"] / attention + (flops["linear"] + flops["head"]) / peaks[kind]) / 1e9


def runs_of(
    options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, Callable[[], Any], dict[str, float], str]]:
    """Every run: its name, the run, its FLOPs, and the dtype of its products. One model is loaded at a time."""
    texts = encoding.take(options.beir, options.texts)
    encoding.prepare(folder, options.length)
    kinds = ["bfloat16"] if options.device == "cuda" else ["float32", "int8"]
    for kind in kinds:
        for name, output in (("words", "csr"), ("clusters", "numpy")):
            eight = "int8" if kind == "int8" else None
            model = lens.load(
                folder / f"lens-{name}",
                options.device,
                None if eight else kind,
                quantization=eight,  # type: ignore[arg-type]
            )
            rows = model.config.dimensions
            title = "encode, vocabulary" if name == "words" else f"encode, {rows:,} clusters"
            run = functools.partial(lens.encode, texts, model, output=output, show_progress=False)
            yield f"{title}, {kind}", run, encode_flops(model.text(texts), rows, name == "words"), kind
    short = folder / "step"
    short.mkdir()
    encoding.prepare(short, step.LENGTH)
    triples = step.take(options.judged, options.batch)
    tokens = [item for part in triples for item in lens.load(short / "lens-words", device="cpu").text(part)]
    kind = "bfloat16" if options.device == "cuda" else "float32"
    run_step = step.ours(short, triples, dropout=True, cached=False, device=options.device)
    yield f"training step, vocabulary, {kind}", run_step, step_flops(tokens, 30522), kind


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    device = torch.device(options.device)
    content: dict[str, Any] = {
        "machine": machine() | {"load_before": load()},
        "versions": versions("torch", "transformers", "sentence-transformers", "tokenizers"),
        "texts": options.texts,
        "sources": [path.name for path in options.beir],
        "length": options.length,
        "judged": options.judged.name,
        "batch": options.batch,
        "rounds": options.rounds,
        "runs": {},
    }
    peaks: dict[str, float] = {}
    for name, run, flops, kind in runs_of(options, folder):
        note_peaks(peaks, kind, device)
        seconds = in_turn({name: run}, options.rounds, device)[name]
        content["runs"][name] = {"products": kind, "seconds": seconds, "flops": flops, **profiled(run, device)}
        note_peaks(peaks, kind, device)
        print(json.dumps({name: content["runs"][name]}, indent=1), file=sys.stderr, flush=True)
    content["peak_gflops"] = peaks
    return content


def note_peaks(peaks: dict[str, float], kind: str, device: torch.device) -> None:
    """Keeps the greatest GFLOP/s measured so far of the products of a run of this kind, and of its attention's."""
    if kind == "int8":
        peaks[kind] = max(peaks.get(kind, 0.0), int8_peak())
        kind = "float32"
    peaks[kind] = max(peaks.get(kind, 0.0), matmul_peak(device, getattr(torch, kind)))


def page(content: dict[str, Any], kind: str) -> list[str]:
    """The section of docs/performance.md."""
    runs = content["runs"]
    shares = {
        name: {part: 100 * s / sum(run["kinds"].values()) for part, s in run["kinds"].items()}
        for name, run in runs.items()
    }
    lines = [
        f"## Where the time goes ({'GPU' if kind == 'cuda' else 'CPU'})",
        "",
        f"Written by `benchmarks/where.py`; do not edit. Machine: {listed(content['machine'])}. "
        f"Versions: {listed(content['versions'])}. Medians of {content['rounds']} rounds (least to most); percent are "
        "of one profiled run.",
        "",
        f"Encoding: {content['texts']} texts ({', '.join(content['sources'])}; a third queries), cut at "
        f"{content['length']} tokens. Training step: {content['batch']} queries of {content['judged']}, each with two "
        f"documents, cut at {step.LENGTH} tokens, as in `benchmarks/step.py`.",
        "",
        "| % | " + " | ".join(runs) + " |",
        "| --- |" + " ---: |" * len(runs),
    ]
    for part in KINDS:
        if any(own.get(part, 0) >= 0.05 for own in shares.values()):
            cells = [f"{own[part]:.1f}" if own.get(part, 0) >= 0.05 else "" for own in shares.values()]
            lines.append(f"| {part} | {' | '.join(cells)} |")
    lines += [
        "",
        "Pooling is all that the head does beside its product, GELU and dropout stand alone, and Python between "
        "operations includes views and the profiler's own cost.",
        "",
        bars(f"where-{kind}", shares, "% of the time"),
        "",
        "Against the roofline: FLOPs of the matrix products, attention's included, over the product of large matrices "
        "in the same dtype on this machine, the best measured before and after the runs: "
        + "; ".join(f"{kind} {peak:,.0f} GFLOP/s" for kind, peak in content["peak_gflops"].items())
        + ". Everything else counts as loss.",
        "",
        "| | seconds | profiled | GFLOP | seconds at the peak | share |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, run in runs.items():
        own = run["seconds"]
        span = f"{own['median']:.2f} ({own['min']:.2f} to {own['max']:.2f})"
        least = at_peak(run, content["peak_gflops"])
        lines.append(
            f"| {name} | {span} | {sum(run['kinds'].values()):.2f} | {sum(run['flops'].values()) / 1e9:,.0f} "
            f"| {least:.2f} | {100 * least / own['median']:.0f}% |"
        )
    lines += [
        "",
        "In int8 the peak is that of 8-bit products, while attention, which stays in float32, is held against "
        "float32's. A training step counts three products for each of the backbone's and one for the head's, whose "
        "backward pass touches active clusters alone.",
    ]
    return lines


def main() -> None:
    """Measures, stores and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beir", type=arguments.beir, nargs="+", help="folders to take the texts to encode from")
    parser.add_argument(
        "--judged", type=arguments.judged, help="folder with judgements to take the step's triples from"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--texts", type=arguments.positive, default=550, help="to encode (default: %(default)s)")
    parser.add_argument("--length", type=arguments.positive, default=256, help="tokens at most (default: %(default)s)")
    parser.add_argument(
        "--batch", type=arguments.positive, default=32, help="queries of the step (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=arguments.positive, default=3, help="runs without profiler (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write (default: benchmarks/results/where*.json)")
    parser.add_argument("--page", action="store_true", help="write the page from stored figures, no more")
    options = parser.parse_args()
    files = {kind: RESULTS / f"where{'-cuda' if kind == 'cuda' else ''}.json" for kind in ("cpu", "cuda")}
    arguments.check(parser, options, *files.values())
    if not options.page and not (options.beir and options.judged):
        parser.error("give --beir and --judged, or --page")
    if not options.page:
        with tempfile.TemporaryDirectory() as folder:
            write_json(options.output or files[options.device], measure(options, Path(folder)))
        if options.output:
            return
    for kind, file in files.items():
        if file.is_file():
            write_section(f"where-{kind}", page(read_json(file), kind), PAGE)


if __name__ == "__main__":
    main()

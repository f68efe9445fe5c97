"""The head alone: seconds and memory of ours, of the eager formula and of sentence-transformers' SpladePooling.

    python benchmarks/head.py                                  # CPU, float32, about ten minutes on two cores
    python benchmarks/head.py --device cuda --dtype bfloat16   # adds the triton backend and torch.compile
    python benchmarks/head.py --page                           # writes the page from the stored figures

From hidden states (B, L, D) to embeddings (B, K), the product with the K rows included for everybody, without and
with the backward pass to hidden states and rows. Values and gradients are compared before anything is timed. Beside
them stands the product alone, forward, as one call that writes all logits. Writes benchmarks/results/head.json
(head-cuda.json on a GPU) and a section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import arguments
from benchmarks.measure import PAGE, exponent, in_turn, load, peak, plot
from benchmarks.page import RESULTS, listed, machine, versions, write_section
from lens.files import write_json
from lens.head import lexical_pool

Shape = tuple[int, int, int, int]  # texts B, positions L, hidden size D, rows K
REFERENCE: dict[str, Shape] = {"cpu": (16, 256, 384, 30522), "cuda": (512, 512, 768, 30522)}
SWEEPS: dict[str, dict[str, list[int]]] = {
    "cpu": {"L": [32, 64, 128, 256, 512, 1024], "K": [1000, 4000, 8000, 16000, 30522], "B": [1, 4, 16, 64]},
    "cuda": {"L": [64, 128, 256, 512, 1024, 2048], "K": [4000, 8000, 30522, 128256], "B": [1, 8, 64, 512]},
}
SWEPT: dict[str, Shape] = {"cpu": (16, 256, 384, 8000), "cuda": (128, 512, 768, 30522)}
AXES = {"B": 0, "L": 1, "K": 3}
Embed = Callable[[Tensor, Tensor, Tensor], Tensor]


def product(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product alone, as one matrix multiplication that writes all logits to memory."""
    return hidden.flatten(0, 1) @ weight.t()


def ours(backend: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """lens.head."""
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    return lexical_pool(hidden, weight, bias, mask=mask, backend=backend)


def formula(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The formula as it stands, on padded texts of one length."""
    return torch.log1p(torch.relu(F.linear(hidden, weight, bias))).amax(1).float()


def splade(chunk: int | None, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sentence-transformers: the decoder's logits, then its pooling."""
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    pooling = SpladePooling("max", chunk_size=chunk).train(hidden.requires_grad)
    mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    features = {"token_embeddings": F.linear(hidden, weight, bias), "attention_mask": mask}
    embeddings: Tensor = pooling(features)["sentence_embedding"]
    return embeddings.float()


def contenders(device: torch.device) -> dict[str, Embed]:
    """All contenders by name, the product first."""
    found: dict[str, Embed] = {
        "product alone": product,
        "LENS": functools.partial(ours, "auto"),
        "eager formula": formula,
        "SpladePooling": functools.partial(splade, None),
        "SpladePooling, chunk_size=32": functools.partial(splade, 32),
    }
    if device.type == "cuda":
        found["LENS, chunked"] = functools.partial(ours, "chunked")
        found["torch.compile of the formula"] = torch.compile(formula)
    return found


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, rows and bias from a fixed seed; about half of the logits are positive."""
    texts, length, width, rows = shape
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    return (
        draw(texts, length, width).to(dtype),
        (draw(rows, width) / math.sqrt(width)).to(dtype),
        (draw(rows) / 4).to(dtype),
    )


def step(embed: Embed, tensors: tuple[Tensor, Tensor, Tensor], backward: bool) -> list[Tensor]:
    """One forward pass, and gradients of hidden states, rows and bias when `backward`."""
    if not backward:
        with torch.inference_mode():
            return [embed(*tensors)]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = embed(*leaves)
    gradients = torch.autograd.grad(out.square().mean(), leaves, allow_unused=True)
    return [out.detach(), *(g for g in gradients if g is not None)]


def check(found: dict[str, Embed], tensors: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Greatest difference of each contender's values and gradients from the formula's, in parts of the greatest."""
    wanted = step(formula, tensors, True)
    apart = {}
    for name, embed in found.items():
        if name == "product alone":
            continue
        found_here = step(embed, tensors, True)
        pairs = [(a.float(), b.float()) for a, b in zip(found_here, wanted, strict=True)]
        apart[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        if tensors[0].dtype == torch.float32 and apart[name] > 1e-4:
            raise SystemExit(f"{name} is {apart[name]:.1e} away from the formula: nothing to compare")
        values, *gradients = pairs
        # In half precision two positions may tie in one order of additions and not in another, and then another wins.
        alike = min(float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in gradients)
        if float((values[0] - values[1]).abs().max()) > 0.02 * float(values[1].abs().max()) or alike < 0.95:
            raise SystemExit(f"{name}'s values or gradients are not the formula's: nothing to compare")
    return apart


def one(name: str, shape: Shape, device: torch.device, dtype: torch.dtype, backward: bool) -> float:
    """MB beyond the inputs that one contender takes."""
    tensors = inputs(shape, device, dtype)
    embed = contenders(device)[name]
    # On a GPU kernels are tuned for their shape at the first call, which takes memory of its own.
    step(embed, tensors if device.type == "cuda" else (tensors[0][:1, :8], *tensors[1:]), backward)
    return peak(lambda: step(embed, tensors, backward), device)


def memory(name: str, shape: Shape, options: argparse.Namespace, backward: bool) -> float:
    """The median of `one` in three processes of their own: what an allocator keeps differs from run to run."""
    arguments = ["--one", name, *map(str, shape), str(int(backward))]
    if options.device == "cuda":
        torch.cuda.empty_cache()  # the child needs the room
    command = [sys.executable, __file__, "--device", options.device, "--dtype", options.dtype, *arguments]
    found = []
    for _ in range(3):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(float(done.stdout.splitlines()[-1]))
    return statistics.median(found)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    reference = tuple(options.shape) if options.shape else REFERENCE[device.type]
    found = contenders(device)
    tensors = inputs(reference, device, dtype)
    content: dict[str, Any] = {
        "machine": machine() | {"load_before": load()},
        "versions": versions("torch", "sentence-transformers", "triton"),
        "dtype": options.dtype,
        "shape": reference,
        "rounds": options.rounds,
        "apart": check(found, tensors),
    }
    for way, backward in (("forward", False), ("forward and backward", True)):
        runs = {
            name: functools.partial(step, embed, tensors, backward)
            for name, embed in found.items()
            if not (backward and name == "product alone")
        }
        seconds = in_turn(runs, options.rounds, device)
        content[way] = {
            name: {**facts, "memory_mb": memory(name, reference, options, backward)} for name, facts in seconds.items()
        }
        print(json.dumps({way: content[way]}, indent=1), file=sys.stderr, flush=True)
    content["sweeps"] = {} if options.no_sweeps else {axis: sweep(axis, options) for axis in AXES}
    return content


def sweep(axis: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Median seconds of ours and SpladePooling's forward and backward passes over the sizes of one axis."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    sizes = SWEEPS[device.type][axis]
    columns: dict[str, list[float]] = {axis: [float(size) for size in sizes], "LENS": [], "SpladePooling": []}
    for size in sizes:
        shape = list(SWEPT[device.type])
        shape[AXES[axis]] = size
        tensors = inputs((shape[0], shape[1], shape[2], shape[3]), device, dtype)
        named = {name: contenders(device)[name] for name in ("LENS", "SpladePooling")}
        runs = {name: functools.partial(step, embed, tensors, True) for name, embed in named.items()}
        for name, facts in in_turn(runs, 3, device).items():
            columns[name].append(facts["median"])
    return columns


def page(content: dict[str, Any], kind: str) -> list[str]:
    """The section of docs/performance.md."""
    texts, length, width, rows = content["shape"]
    lines = [
        f"## The head alone ({'GPU' if kind == 'cuda' else 'CPU'})",
        "",
        f"Written by `benchmarks/head.py`; do not edit. Machine: {listed(content['machine'])}. "
        f"Versions: {listed(content['versions'])}. {content['dtype']}, medians of {content['rounds']} rounds in turn "
        "(least to most).",
        "",
        f"From hidden states of {texts} texts of {length} positions, {width} wide, to {rows:,} rows, the product with "
        "them included. Ratios are to LENS; memory is what is held beyond inputs at the peak.",
        "",
    ]
    for way in ("forward", "forward and backward"):
        own = content[way]["LENS"]
        lines += [f"| {way} | seconds | ratio | MB | ratio |", "| --- | ---: | ---: | ---: | ---: |"]
        for name, facts in content[way].items():
            span = f"{facts['median']:.3f} ({facts['min']:.3f} to {facts['max']:.3f})"
            ratios = facts["median"] / own["median"], facts["memory_mb"] / own["memory_mb"]
            lines.append(f"| {name} | {span} | {ratios[0]:.2f} | {facts['memory_mb']:,.0f} | {ratios[1]:.1f} |")
        lines.append("")
    if content["sweeps"]:
        lines += ["Forward and backward pass over one size, the others kept: seconds, LENS against SpladePooling.", ""]
    for axis, columns in content["sweeps"].items():
        name = f"head-{kind}-{axis}"
        series = {who: (columns[axis], columns[who]) for who in ("LENS", "SpladePooling")}
        grown = exponent(columns[axis], columns["LENS"])
        lines += [plot(name, series, axis, "seconds"), "", f"LENS's cost grows as {axis} to the power {grown:.2f}.", ""]
    return lines[:-1]


def main() -> None:
    """Measures, stores and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--rounds", type=arguments.positive, default=5, help="runs of each, in turn (default: %(default)s)"
    )
    parser.add_argument(
        "--shape", type=arguments.positive, nargs=4, metavar=("B", "L", "D", "K"), help="another reference size"
    )
    parser.add_argument("--no-sweeps", action="store_true", help="the reference size only")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: benchmarks/results/head*.json)")
    parser.add_argument("--page", action="store_true", help="write the page from stored figures, no more")
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    files = {kind: RESULTS / f"head{'-cuda' if kind == 'cuda' else ''}.json" for kind in ("cpu", "cuda")}
    arguments.check(parser, options, *files.values())
    if options.one:
        name, *sizes, backward = options.one
        shape: Shape = tuple(map(int, sizes))  # type: ignore[assignment]
        print(one(name, shape, torch.device(options.device), getattr(torch, options.dtype), backward == "1"))
        return
    if not options.page:
        output = options.output or files[options.device]
        write_json(output, measure(options))
        if options.output:
            return
    for kind, file in files.items():
        if file.is_file():
            write_section(f"head-{kind}", page(json.loads(file.read_text(encoding="utf-8")), kind), PAGE)


if __name__ == "__main__":
    main()

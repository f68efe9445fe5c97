"""One training step of SPLADE with MiniLM and its 30,522 words: ours against sentence-transformers.

    python benchmarks/step.py --beir DIR                      # CPU, about fifteen minutes on two cores
    python benchmarks/step.py --beir DIR --memory-gb 1 2      # only the largest batches, about ten minutes more
    python benchmarks/step.py --page                          # writes the page from the stored figures

32 times a query, a relevant and another document of a BEIR folder, cut at 128 tokens; forward and backward pass
through all weights in float32, without tokenisation and optimizer. Everybody gets the same weights, texts and loss:
sentence-transformers' own SpladeLoss (in-batch negatives and FLOPS), which on our side takes the embeddings that
lens.head gave. Gradients are compared, without dropout, before anything is timed with it. Memory is that of a process
of its own, for several batch sizes. With --memory-gb a line through these figures, and through what is measured at the
sizes that it names, leads to the largest batch that fits. Writes benchmarks/results/step.json and a section of
docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn

import lens
from benchmarks import arguments
from benchmarks.encoding import prepare
from benchmarks.measure import PAGE, in_turn, line, load, peak
from benchmarks.page import RESULTS, listed, machine, versions, write_section
from lens.corpus import read_beir
from lens.files import read_json, write_json
from lens.text import token_batches
from train.step import QueryPassageModel

FILE = RESULTS / "step.json"
LENGTH = 128
CACHED_TOKENS = 2048
Triples = tuple[list[str], list[str], list[str]]  # queries, relevant documents, other documents
Step = Callable[[], dict[str, Tensor]]


def take(folder: Path, count: int, repeat: bool = False) -> Triples:
    """`count` queries, each with a relevant document and one that is not judged for it.

    Where there are too few, they come over and over if `repeat`, and otherwise the program ends.
    """
    beir = read_beir(folder)
    rng = np.random.default_rng(0)
    documents = sorted(beir.corpus)
    triples = []
    for query in sorted(beir.qrels):
        relevant = [name for name, grade in beir.qrels[query].items() if grade > 0 and name in beir.corpus]
        if relevant and len(triples) < count:
            other = next(name for name in rng.permutation(documents) if name not in beir.qrels[query])
            triples.append((beir.queries[query], beir.corpus[relevant[0]], beir.corpus[other]))
    if len(triples) < (1 if repeat else count):
        raise SystemExit(f"{folder} has {len(triples)} judged queries, and {count} are needed")
    triples = [triples[number % len(triples)] for number in range(count)]
    queries, relevant_texts, others = zip(*triples, strict=True)
    return list(queries), list(relevant_texts), list(others)


def without_dropout(model: nn.Module) -> None:
    """Turns dropout off, in modules and in attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def theirs(folder: Path, triples: Triples, dropout: bool, cached: bool) -> Step:
    """sentence-transformers' step; gradients by the names of the transformers model's parameters."""
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(folder / "words"), device="cpu").train()
    model.max_seq_length = LENGTH
    if not dropout:
        without_dropout(model)
    loss = splade(model, cached)
    features = [model.preprocess(texts) for texts in triples]

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        found = loss([dict(part) for part in features], None)
        total = sum(found.values()) if isinstance(found, dict) else found
        if total.requires_grad:
            total.backward()
        return _gradients(model)

    return step


def splade(model: Any, cached: bool) -> Any:
    """SpladeLoss, or with gradient caching CachedSpladeLoss, with sentence-transformers' usual weights."""
    from sentence_transformers.sparse_encoder import losses

    inner = losses.SparseMultipleNegativesRankingLoss(model)
    weights = {"document_regularizer_weight": 3e-5, "query_regularizer_weight": 5e-5}
    if cached:
        return losses.CachedSpladeLoss(model, inner, **weights, mini_batch_num_tokens=CACHED_TOKENS)
    return losses.SpladeLoss(model, inner, **weights)


def ours(folder: Path, triples: Triples, dropout: bool, cached: bool, device: str = "cpu") -> Step:
    """Our step on packed texts, in one pass or in mini-batches by gradient caching; on a GPU in bfloat16's autocast."""
    from sentence_transformers import SparseEncoder

    encoder = lens.load(folder / "lens-words", device=device, dtype="float32")
    model = QueryPassageModel(encoder.model).train()
    model.requires_grad_(True)
    # The rows of the head are the word embeddings, as in BERT: one tensor, one gradient.
    encoder.model.head.weight = encoder.model.backbone.get_input_embeddings().weight  # type: ignore[operator]
    if not dropout:
        without_dropout(model)
    loss = splade(SparseEncoder(str(folder / "words"), device="cpu"), cached=False)
    tokens = [item for texts in triples for item in encoder.text(texts)]
    budget = CACHED_TOKENS if cached else sum(len(item.ids) for item in tokens)
    batches = token_batches([len(item.ids) for item in tokens], budget, packed=True)
    places = torch.empty(len(tokens), dtype=torch.long)
    places[[i for batch in batches for i in batch]] = torch.arange(len(tokens))
    places = places.to(encoder.device)
    parts = [encoder.text.pack([tokens[i] for i in batch]).inputs(encoder.device) for batch in batches]
    count = len(triples[0])

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            queries, passages = model(places[:count], places[count:], parts)
        embeddings = [queries, passages[:count], passages[count:]]
        total = loss.loss.compute_loss_from_embeddings(embeddings, None)
        documents = loss.document_regularizer.compute_loss_from_embeddings(passages)
        asked = loss.query_regularizer.compute_loss_from_embeddings(queries)
        total = total + documents * loss.document_regularizer_weight + asked * loss.query_regularizer_weight
        total.backward()
        return _gradients(model)

    return step


_NAMES = (  # of ours and of a BertForMaskedLM's parameters -> what both are called here
    (r".*backbone\.", ""),
    (r".*\bbert\.", ""),
    (r".*head\.transform\.", "transform."),
    (r".*predictions\.transform\.", "transform."),
    (r"transform\.LayerNorm\.", "transform.norm."),
    (r".*head\.bias|.*predictions\.(decoder\.)?bias", "bias"),
)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """All gradients, by a name that both sides share."""
    found = {}
    for name, parameter in model.named_parameters():
        for pattern, shared in _NAMES:
            name = re.sub(f"^(?:{pattern})", shared, name)
        if parameter.grad is not None:
            found[name] = parameter.grad
    return found


CONTENDERS = {
    "LENS": functools.partial(ours, cached=False),
    f"LENS, {CACHED_TOKENS:,} tokens at a time": functools.partial(ours, cached=True),
    "SpladeLoss": functools.partial(theirs, cached=False),
    f"CachedSpladeLoss, {CACHED_TOKENS:,} tokens at a time": functools.partial(theirs, cached=True),
}


def check(folder: Path, triples: Triples) -> dict[str, float]:
    """Greatest difference of each contender's gradients from SpladeLoss's, in parts of the greatest of its tensor.

    A key's bias shifts all of a row's attention alike: its gradient is zero but for rounding, and left out.
    """
    wanted = {name: gradient.clone() for name, gradient in CONTENDERS["SpladeLoss"](folder, triples, False)().items()}
    apart = {}
    for name, make in CONTENDERS.items():
        found = make(folder, triples, False)()
        if set(found) != set(wanted):
            raise SystemExit(f"{name} has gradients of other weights: {sorted(set(found) ^ set(wanted))[:5]}")
        apart[name] = max(
            float((found[key] - gradient).abs().max() / gradient.abs().max())
            for key, gradient in wanted.items()
            if not key.endswith("key.bias")
        )
        if apart[name] > 1e-3:
            raise SystemExit(f"{name}'s gradients are {apart[name]:.1e} away: nothing to compare")
    return apart


def memory(name: str, folder: Path, options: argparse.Namespace, batch: int) -> float:
    """MB beyond the loaded model that one step takes, in a process of its own."""
    command = [sys.executable, __file__, "--beir", str(options.beir), "--batch", str(batch), "--one", name, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def next_batch(points: Mapping[int, float], limit: float, cap: int) -> int:
    """The batch, 1 to `cap`, that a least-squares line through (batch, MB) puts at the limit in MB or just below."""
    slope, base = line(list(points), list(points.values()))
    if slope <= 0:
        return cap
    return min(max(math.floor((limit - base) / slope), 1), cap)


def largest_batch(
    measured: Callable[[int], float], points: dict[int, float], limit: float, cap: int, tries: int = 3
) -> int | None:
    """The largest batch that was measured to fit `limit` MB; None where none was.

    Measures where a line meets the limit and adds that to `points`, `tries` times at most, until the largest batch
    that fits and the smallest that does not are 2% or one query apart. The line goes through these two, or through all
    points while the limit lies beyond them.
    """
    for _ in range(tries):
        fitting = max((batch for batch, held in points.items() if held <= limit), default=0)
        above = min((batch for batch, held in points.items() if held > limit), default=cap + 1)
        if above - fitting <= max(1, 0.02 * fitting):
            break
        around = {batch: points[batch] for batch in (fitting, above) if batch in points}
        batch = next_batch(around if len(around) == 2 else points, limit, cap)
        batch = min(max(batch, fitting + 1), above - 1)
        points[batch] = measured(batch)
    return max((batch for batch, held in points.items() if held <= limit), default=None)


def largest(options: argparse.Namespace, folder: Path, memory_mb: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The largest batch of each contender for each memory, from the figures in `memory_mb` on."""
    prepare(folder, LENGTH)
    found: dict[str, Any] = {"load_before": load(), "cap": options.cap, "largest": {}, "memory_mb": {}}
    for name in CONTENDERS:
        points = {int(batch): held for batch, held in memory_mb[name].items()}
        if len(points) < 2:
            raise SystemExit(f"the stored figures of {name} have one batch size, and a line needs two: see --batches")
        measured = functools.partial(memory, name, folder, options)
        found["largest"][name] = {
            str(limit): largest_batch(measured, points, 1024 * limit, options.cap)
            for limit in sorted(options.memory_gb)
        }
        found["memory_mb"][name] = {str(batch): points[batch] for batch in sorted(points)}
        print(json.dumps({name: found["largest"][name], "MB": found["memory_mb"][name]}), file=sys.stderr, flush=True)
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures but the largest batches."""
    prepare(folder, LENGTH)
    triples = take(options.beir, options.batch)
    encoder = lens.load(folder / "lens-words", device="cpu")
    content: dict[str, Any] = {
        "machine": machine() | {"load_before": load()},
        "versions": versions("torch", "transformers", "sentence-transformers"),
        "source": options.beir.name,
        "batch": options.batch,
        "tokens": sum(len(item.ids) for texts in triples for item in encoder.text(texts)),
        "rounds": options.rounds,
        "apart": check(folder, triples),
    }
    steps = {name: make(folder, triples, True) for name, make in CONTENDERS.items()}
    content["seconds"] = in_turn(steps, options.rounds)
    content["memory_mb"] = {
        name: {batch: memory(name, folder, options, batch) for batch in options.batches} for name in CONTENDERS
    }
    return content


def page(content: dict[str, Any]) -> list[str]:
    """The section of docs/performance.md."""
    batches = list(next(iter(content["memory_mb"].values())))
    base = content["seconds"]["SpladeLoss"]["median"]
    lines = [
        "## A training step (CPU)",
        "",
        f"Written by `benchmarks/step.py`; do not edit. Machine: {listed(content['machine'])}. "
        f"Versions: {listed(content['versions'])}. Medians of {content['rounds']} rounds in turn (least to most).",
        "",
        f"{content['batch']} queries of {content['source']}, each with two documents, cut at {LENGTH} tokens: "
        f"{content['tokens']:,} tokens. MiniLM with 30,522 words, all weights trained in float32, forward and backward "
        f"pass. Gradients differ by at most {max(content['apart'].values()):.0e} of the greatest of their tensor. MB "
        "beyond the loaded model at the peak, by batch size.",
        "",
        "| | seconds | against SpladeLoss | " + " | ".join(f"MB at {batch}" for batch in batches) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(batches),
    ]
    for name, facts in content["seconds"].items():
        span = f"{facts['median']:.2f} ({facts['min']:.2f} to {facts['max']:.2f})"
        held = " | ".join(f"{content['memory_mb'][name][batch]:,.0f}" for batch in batches)
        lines.append(f"| {name} | {span} | {base / facts['median']:.2f} | {held} |")
    return lines + (largest_page(content["largest"]) if "largest" in content else [])


def largest_page(content: dict[str, Any]) -> list[str]:
    """The table of the largest batches."""
    limits = list(next(iter(content["largest"].values())))
    lines = [
        "",
        "Largest batch, in queries, whose step was measured to fit a memory beyond the loaded model; a line through "
        f"the figures led to it. {content['cap']} is the most that was tried.",
        "",
        "| | " + " | ".join(f"{float(limit):g} GB" for limit in limits) + " | MB per query |",
        "| --- |" + " ---: |" * (len(limits) + 1),
    ]
    for name, found in content["largest"].items():
        points = content["memory_mb"][name]
        slope, _ = line([int(batch) for batch in points], list(points.values()))
        sizes = [_at_most(found[limit], content["cap"]) for limit in limits]
        lines.append(f"| {name} | {' | '.join(sizes)} | {slope:,.1f} |")
    return lines


def _at_most(batch: int | None, cap: int) -> str:
    if batch is None:
        return "none"
    return f"{batch} or more" if batch == cap else str(batch)


def main() -> None:
    """Measures, stores and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beir", type=arguments.judged, help="folder with judgements to take triples from")
    parser.add_argument(
        "--batch", type=arguments.positive, default=32, help="queries of the timed step (default: %(default)s)"
    )
    parser.add_argument(
        "--batches", type=arguments.positive, nargs="+", default=[8, 16, 32], help="batches to take memory of"
    )
    parser.add_argument(
        "--rounds", type=arguments.positive, default=5, help="runs of each, in turn (default: %(default)s)"
    )
    parser.add_argument(
        "--memory-gb",
        type=arguments.above_zero,
        nargs="+",
        help="add to the stored figures, no more, the largest batches that fit these",
    )
    parser.add_argument(
        "--cap", type=arguments.positive, default=256, help="largest batch to try (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=FILE, help="JSON file to write (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="write the page from stored figures, no more")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    arguments.check(parser, options, options.output)
    if not options.page and not options.beir:
        parser.error("give --beir, or --page")
    if options.memory_gb and not options.page and not options.output.is_file():
        parser.error(f"--memory-gb adds to {options.output}, which does not exist: run without it first")
    if options.one:
        triples = take(options.beir, options.batch, repeat=True)
        small: Triples = (triples[0][:2], triples[1][:2], triples[2][:2])
        make = CONTENDERS[options.one[0]]
        make(Path(options.one[1]), small, True)()  # what is set up once does not count
        step = make(Path(options.one[1]), triples, True)
        print(peak(step))
        return
    if not options.page:
        with tempfile.TemporaryDirectory() as folder:
            if options.memory_gb:
                content = read_json(options.output)
                content["largest"] = largest(options, Path(folder), content["memory_mb"])
            else:
                content = measure(options, Path(folder))
            write_json(options.output, content)
    if options.output == FILE:
        write_section("step", page(json.loads(FILE.read_text(encoding="utf-8"))), PAGE)


if __name__ == "__main__":
    main()

"""The paper's analyses on mteb's tasks and on local folders: what pruning dimensions costs, models side by side (number
of clusters, pooling, attention), LENS joined with a dense model.

    python eval/analyse.py pruning --model runs/mini --local data/nfcorpus data/sts-b --output runs/pruning
    python eval/analyse.py variants --model 1000=runs/k1000 2000=runs/k2000 --local data/nfcorpus --output runs/sizes
    python eval/analyse.py hybrid --model runs/mini --local data/nfcorpus --dev data/nfcorpus --output runs/hybrid

Each writes OUTPUT/results.json, report.md and plot.svg, with sentences of what they show. A task's texts are embedded
once for all its points. Results lie in mteb's layout, OUTPUT/results, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mteb
import numpy as np

from eval import findings
from eval.baselines import dense_encoder
from eval.benchmark import add_embeddings_option, add_task_options, check_arithmetic, chosen_tasks, quiet, use_snapshot
from eval.board import evaluated
from eval.cache import WholeCache
from eval.encoder import LensEncoder
from eval.findings import Findings
from eval.fusion import dev_tasks
from eval.meta import open_model
from eval.run import machine, versions
from eval.shared_layers import SharedLayers
from eval.snapshot import unload
from eval.tasks import KINDS
from eval.usefulness import ORDERS, usefulness
from eval.variants import Store, Variant, named, pruning, unchanged, weighted
from lens.files import read_json, require, write_json
from lens.locks import alone
from lens.program import interruptible
from lens.vectors import check_count

WEIGHTS = tuple(step / 10 for step in range(11))
"""Weights of LENS beside the dense model."""


@dataclass(frozen=True)
class Point:
    """One system of an analysis: what mteb evaluates, and what results.json says of it."""

    system: Any
    facts: dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="eval/analyse.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")
    prune = kinds.add_parser("pruning", help="scores of embeddings of which few values or dimensions are kept")
    prune.add_argument("--model", required=True, metavar="[NAME=]DIR", help="a LENS or SPLADE folder")
    add = prune.add_argument
    add("--top-n", type=int, nargs="*", metavar="N", help="values kept of each text; unset: 8, 16, ... while fewer")
    add("--drop", type=float, nargs="*", default=[0.1, 0.25, 0.5, 0.75, 0.9], metavar="SHARE", help="of all dimensions")
    add("--calibrate", metavar="PATH", help="texts that tell which dimensions are useful, as `lens encode` reads them")
    add("--sample", type=int, default=256, metavar="N", help="without --calibrate: texts of each task, no labels (256)")
    add("--seed", type=int, default=0, help="of the sample and of the random order of dropping")
    many = kinds.add_parser("variants", help="models side by side, such as numbers of clusters, pooling, attention")
    many.add_argument("--model", required=True, nargs="+", metavar="NAME=DIR", help="the first is compared with")
    many.add_argument(
        "--axis", metavar="dimensions|none", help="what the plot's axis is; unset: dimensions where all differ in them"
    )
    joined = kinds.add_parser("hybrid", help="LENS and dense embeddings joined with a weight")
    joined.add_argument("--model", required=True, metavar="[NAME=]DIR", help="a LENS folder")
    joined.add_argument("--dense-model", metavar="PATH", help="backbone of the dense baseline (the model's own)")
    joined.add_argument("--dense-length", type=int, default=128, metavar="TOKENS", help="texts are cut for dense (128)")
    joined.add_argument("--dev", nargs="+", default=[], metavar="DIR[:KIND]", help="folders whose dev split chooses")
    for command in (prune, many, joined):
        add = command.add_argument
        add_task_options(command)
        add("--snapshot", metavar="DIR", help="read mteb's data from this folder of scripts/fetch_benchmarks.py")
        add("--local", nargs="+", default=[], metavar="DIR[:KIND]", help=f"folders as tasks; kinds: {', '.join(KINDS)}")
        add("--output", type=Path, required=True, metavar="DIR", help="folder of all results")
        add(
            "--results", type=Path, metavar="DIR", help="output of eval/run.py or another analysis to share scores with"
        )
        add_embeddings_option(command)
        add("--device", help="cuda, mps or cpu; unset: the accelerator where there is one")
        add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the models' weights (as they are)")
        held = "states of layers that the models share" if command is many else "embeddings"
        add("--memory-mb", type=int, default=2000, metavar="MB", help=f"{held}, held of one task (2000)")
    return parser


def run_pruning(options: argparse.Namespace, tasks: Sequence[Any]) -> tuple[dict[str, Any], list[str]]:
    """Top-n values of each text, and dimensions dropped by usefulness; results and names of plot lines."""
    for n in options.top_n or ():
        check_count("--top-n", n)
    bad = next((share for share in options.drop if not 0 < share < 1), None)
    if bad is not None:
        raise ValueError(f"--drop takes shares between 0 and 1, found {bad:g}")
    if options.top_n == [] and not options.drop:
        raise ValueError("nothing to prune: give --top-n or --drop")
    check_count("--sample", options.sample)
    name, source = _opened(options.model, options)
    try:
        config, meta = source.model.config, source.mteb_model_meta
        if config.head == "dense":
            raise ValueError(f"--model {options.model} has head='dense': only sparse embeddings are pruned")
        wide = next((n for n in options.top_n or () if n >= config.dimensions), None)
        if wide is not None:
            raise ValueError(f"--top-n {wide} keeps everything: the model has {config.dimensions} dimensions")
        check_arithmetic(results_of(options) / "systems.json", {name: source})
        path = options.output / "dimensions.json"
        useful = usefulness(source, tasks, options.calibrate, options.sample, options.seed, path)
        store = Store(source, "csr", options.memory_mb * 1_000_000)
        facts = {"method": "none", "values": useful.values(), "dimensions": config.dimensions}
        points = {"unpruned": Point(Variant(meta, [store], unchanged), facts)}
        powers = [n for n in (1 << power for power in range(3, 20)) if n < useful.values()]
        for n in sorted(set(powers if options.top_n is None else options.top_n)):
            change = pruning(top_k=n, normalize=config.normalize)
            system = Variant(named(meta, config.dimensions, top_n=n), [store], change)
            facts = {"method": "top", "top_n": n, "values": useful.values(n), "dimensions": config.dimensions}
            points[f"top {n}"] = Point(system, facts)
        for method in ORDERS:
            for share in sorted(set(options.drop)):
                dims = np.array(useful.orders[method][: max(1, round((1 - share) * config.dimensions))])
                kept = hashlib.sha256(np.sort(dims).tobytes()).hexdigest()[:12]
                renamed = named(meta, len(dims), dropped=share, order=method, kept=kept)
                system = Variant(renamed, [store], pruning(dims, normalize=config.normalize))
                facts = {
                    "method": method,
                    "dropped": share,
                    "values": useful.values(dims=dims),
                    "dimensions": len(dims),
                }
                points[f"drop {share:.0%}, {method}"] = Point(system, facts)
        scores, failures = scored(points, tasks, options, [store])
    finally:
        source.model.close()
    found = Findings(_facts(tasks), {name: point.facts for name, point in points.items()}, scores)
    said = findings.pruning_sentences(found, name, config.dimensions, useful.values(), useful.dead)
    lines: dict[str, list[tuple[float, float]]] = {}
    for point, facts in found.points.items() if found.compared else ():
        if point != found.first:
            label = "largest values" if facts["method"] == "top" else f"dropped: {facts['method']}"
            lines.setdefault(label, []).append((facts["values"], found.mean(point)))
    x = "non-zero values of a text on average"
    plot = findings.curves(lines, x, found.mean(found.first), logarithmic=True) if lines else None
    labels = {"values": "values a text", "dimensions": "dimensions"}
    source_of = f"{useful.texts:,} texts of " + (options.calibrate or "the evaluated tasks, without labels")
    notes = [
        f"Usefulness: measured on {source_of}. `mean square` drops the dimensions of least mean square "
        "(lens.vectors.rank_dims), `variance` those of least variance (eval.pruning.variances), `random` any, in one "
        f"order of seed {options.seed}. Queries and documents are pruned alike"
        + (", and get length one again." if config.normalize else "."),
        *store.notes,
    ]
    return _written("pruning", "Pruning", options, found, said, labels, plot, notes, failures)


def run_variants(options: argparse.Namespace, tasks: Sequence[Any]) -> tuple[dict[str, Any], list[str]]:
    """Models side by side."""
    if len(options.model) < 2:
        raise ValueError("--model: at least two models are compared")
    if options.axis not in (None, "dimensions", "none"):
        raise ValueError(f"--axis is dimensions or none, found {options.axis!r}")
    points: dict[str, Point] = {}
    notes: list[str] = []
    try:
        for given in options.model:
            name, source = _opened(given, options)
            if name in points:
                source.model.close()
                raise ValueError(f"two models are named {name!r}: tell them apart with --model NAME=DIR")
            config = source.model.config
            attention = "bidirectional" if config.bidirectional else "causal"
            facts = {"dimensions": config.dimensions, "pooling": config.pooling, "attention": attention}
            points[name] = Point(source, {**facts, "head": config.head})
        several = len({point.facts["dimensions"] for point in points.values()}) == len(points)
        if options.axis == "dimensions" and not several:
            raise ValueError("--axis dimensions: two models have the same number of dimensions")
        check_arithmetic(
            (options.results or options.output) / "systems.json", {name: point.system for name, point in points.items()}
        )
        encoders = [point.system for point in points.values()]
        common = SharedLayers([encoder.model.model.backbone for encoder in encoders], options.memory_mb * 1_000_000)
        if common.layers:
            chunk = min(encoder.chunk for encoder in encoders)  # so that all of them meet the same batches
            for encoder in encoders:
                encoder.chunk = chunk
        scores, failures = scored(points, tasks, options, [common])
        if common.batches:
            notes.append(
                f"The models have {common.layers} layers in common, whose states were held, up to "
                f"{options.memory_mb:,} MB a task: of {common.batches:,} batches, {common.hits:,} took them from there."
            )
        common.close()
    finally:
        for point in points.values():
            point.system.model.close()
    found = Findings(_facts(tasks), {name: point.facts for name, point in points.items()}, scores)
    axis = options.axis or ("dimensions" if several else "none")
    said = findings.variants_sentences(found, axis)
    plot = None
    if found.compared and axis == "dimensions":
        line = [(facts["dimensions"], found.mean(name)) for name, facts in found.points.items()]
        plot = findings.curves({"models": line}, "clusters K", logarithmic=True)
    elif found.compared:
        plot = findings.bars(found)
    labels = {"dimensions": "K", "pooling": "pooling", "attention": "attention", "head": "head"}
    return _written("variants", "Models side by side", options, found, said, labels, plot, notes, failures)


def run_hybrid(options: argparse.Namespace, tasks: Sequence[Any]) -> tuple[dict[str, Any], list[str]]:
    """LENS joined with the dense baseline, at every weight."""
    dev = dev_tasks(options.dev, tasks)
    name, source = _opened(options.model, options)
    try:
        config, meta = source.model.config, source.mteb_model_meta
        if config.head == "dense" or not config.normalize:
            how = "head='dense'" if config.head == "dense" else "embeddings without unit length"
            raise ValueError(f"--model {options.model} has {how}: cosines of LENS are joined with those of a dense one")
        check_arithmetic(results_of(options) / "systems.json", {name: source})
        dense = dense_encoder(options.dense_model or config.base, options.device, options.dense_length)
        dense.keep(options.embeddings)
        limit = options.memory_mb * 1_000_000
        stores = [Store(source, "csr", limit), Store(dense, "numpy", limit)]
        beside = f"{dense.mteb_model_meta.name}@{dense.mteb_model_meta.revision}"
        points = {}
        for weight in WEIGHTS:
            if weight in (0, 1):
                store = stores[0 if weight else 1]
                system = Variant(store.source.mteb_model_meta, [store], unchanged)
            else:
                width = config.dimensions + dense.model.dimensions
                system = Variant(named(meta, width, dense=beside, weight=weight), stores, weighted(weight))
            label = {0: "dense", 1: "LENS"}.get(weight, f"LENS {weight:g} + dense")
            points[label] = Point(system, {"weight": weight})
        dev_scores, failures = scored(points, dev, options, stores)
        scores, more = scored(points, tasks, options, stores)
    finally:
        source.model.close()
    facts = {name: point.facts for name, point in points.items()}
    chosen, notes = "LENS 0.5 + dense", []
    on_dev = Findings(_facts(dev), facts, dev_scores)
    if dev and not on_dev.compared:
        raise ValueError("no --dev task has a score at every weight, so none can be chosen: " + "; ".join(failures))
    if dev:
        chosen = on_dev.best(sorted(facts, key=lambda name: abs(facts[name]["weight"] - 0.5)))
        notes.append(
            "The weight was chosen by the mean over the dev splits of "
            + ", ".join(on_dev.compared)
            + ": "
            + ", ".join(f"{facts[name]['weight']:g} {100 * on_dev.mean(name):.2f}" for name in facts)
            + "."
        )
    found = Findings(_facts(tasks), facts, scores)
    said = findings.hybrid_sentences(found, facts[chosen]["weight"], chosen, len(on_dev.compared))
    plot = None
    if found.compared:
        lines = {"tasks": [(row["weight"], found.mean(name)) for name, row in facts.items()]}
        if dev:
            lines["dev splits"] = [(row["weight"], on_dev.mean(name)) for name, row in facts.items()]
        plot = findings.curves(lines, "weight of LENS", mark=facts[chosen]["weight"])
    notes += [
        f"Embeddings are [√w · LENS, √(1-w) · dense], so that cosines are summed with weights w and 1-w; dense is the "
        f"mean-pooled backbone {dense.mteb_model_meta.name}, texts cut to {options.dense_length} tokens.",
        *(note for store in stores for note in store.notes),
    ]
    seen = {"tasks": dict(on_dev.tasks), "points": on_dev.rows()} if dev else None
    extra = {"weight": facts[chosen]["weight"], "dev": seen}
    return _written(
        "hybrid", "LENS + dense", options, found, said, {"weight": "weight"}, plot, notes, failures + more, extra
    )


def _opened(given: str, options: argparse.Namespace) -> tuple[str, LensEncoder]:
    name, model, meta = open_model(given, options.device, dtype=options.dtype)
    return name, LensEncoder(model, meta, options.output / "work").keep(options.embeddings)


def _facts(tasks: Sequence[Any]) -> dict[str, dict[str, str]]:
    return {task.metadata.name: {"type": task.metadata.type, "measure": task.metadata.main_score} for task in tasks}


def scored(
    points: Mapping[str, Point],
    tasks: Sequence[Any],
    options: argparse.Namespace,
    stores: Sequence[Store | SharedLayers],
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Main scores, point -> task -> score, and what failed; task after task, so that one's embeddings are held."""
    cache = WholeCache(results_of(options))
    scores: dict[str, dict[str, float]] = {name: {} for name in points}
    failures: list[str] = []
    for task in tasks:
        failed: set[str] = set()
        for part in [*(getattr(task.metadata, "tasks", None) or []), task]:
            for name, point in points.items():
                if name in failed:
                    continue
                score, reasons = evaluated(point.system, part, cache, split=False)
                for reason in reasons:
                    failed.add(name)
                    failures.append(f"{name} on {reason}")
                    print(f"failed: {failures[-1]}", file=sys.stderr, flush=True)
                if score is not None and part is task:
                    scores[name][task.metadata.name] = score
                    print(f"{task.metadata.name}  {name}  {score:.4f}", flush=True)
        for store in stores:
            store.forget()
        unload(task)
    return scores, failures


def _written(
    analysis: str,
    title: str,
    options: argparse.Namespace,
    found: Findings,
    said: list[str],
    labels: Mapping[str, str],
    plot: str | None,
    notes: Sequence[str],
    failures: list[str],
    extra: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Writes results.json, report.md and plot.svg; returns the first's content and the failures."""
    results = {
        "analysis": analysis,
        "sentences": said,
        "tasks": dict(found.tasks),
        "compared": found.compared,
        **(extra or {}),
        "points": found.rows(),
        "notes": list(notes),
        "failures": failures,
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "versions": {**versions(), "mteb": mteb.__version__},
        "machine": machine(),
    }
    parts = [f"# {title}", *said, *(["![Mean score](plot.svg)"] if plot else []), found.overview(labels).markdown()]
    parts += ["## Tasks", found.by_task().markdown(), "## How this was measured"]
    parts.append("\n".join(f"- {line}" for line in (findings.INTERVALS, *notes)))
    if failures:
        parts += ["## Failures", "\n".join(f"- {line}" for line in failures)]
    write_json(options.output / "results.json", results)
    (options.output / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8", errors="replace")
    if plot:
        (options.output / "plot.svg").write_text(plot, encoding="utf-8")
    return results, failures


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Runs an analysis; returns the content of results.json and what failed. Raises OSError, ValueError or ImportError
    with one clear line."""
    require("eval", "matplotlib")
    if options.memory_mb < 1:
        raise ValueError(f"--memory-mb must be at least 1, found {options.memory_mb}")
    tasks = chosen_tasks(options)
    if options.snapshot is not None:
        use_snapshot(options.snapshot, tasks)
    path = options.output / "results.json"
    other = read_json(path).get("analysis") if path.is_file() else None
    if (path.is_file() and other != options.analysis) or (options.output / "summary.json").is_file():
        raise ValueError(f"{options.output} holds the report of another program or analysis: choose another --output")
    runs = {"pruning": run_pruning, "variants": run_variants, "hybrid": run_hybrid}
    return runs[options.analysis](options, tasks)


def results_of(options: argparse.Namespace) -> Path:
    """The folder whose results/ holds the scores."""
    return Path(options.results or options.output)


def shared(options: argparse.Namespace) -> AbstractContextManager[None]:
    """Holds the lock of the folder whose scores are shared, where that is another one than the output.

    Raises FileNotFoundError for one that holds none.
    """
    place = results_of(options)
    if place.resolve() == options.output.resolve():
        return nullcontext()
    if not (place / "results").is_dir():
        raise FileNotFoundError(f"--results {place} holds no folder results of an evaluation")
    return alone(place / "results")


@interruptible("eval/analyse.py", "the same command goes on where it stopped")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code: 0, 1 where a point failed on a task, 2 with one line for bad input."""
    options = parser().parse_args(arguments)
    quiet()
    try:
        with alone(options.output / "results"), shared(options):
            results, failures = run(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(results["sentences"]))
    print(f"report: {options.output / 'report.md'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""What sparse embeddings of a data set in BEIR layout cost, and what pruning the stored corpus to a budget loses.

Writes a folder: results.json, report.md, plot.svg. Figures are described in docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from tqdm.auto import tqdm

import lens
from eval import pruning
from eval.metrics import MEASURES, compare
from eval.page import Table, number, p_value
from eval.pruning import METHODS, Csr
from eval.run import machine, model_folders, named, read_datasets, versions
from eval.scoring import CHUNK_VALUES, evaluate, judged_queries, vector_system
from lens.corpus import Beir
from lens.files import atomic_folder, check_output, require, write_json
from lens.program import interruptible
from lens.vectors import load_embeddings

MAIN = MEASURES[0]
WHOLE = "unpruned"


@dataclass(frozen=True)
class Embedded:
    """Embeddings of the judged queries (n, K) and of all documents (N, K) of a data set, in its order."""

    queries: Csr
    documents: Csr


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="eval/sparsity.py",
        description="FLOPS, active dimensions, index sizes and latency of sparse embeddings, and static pruning of the "
        "stored corpus to budgets with its loss in nDCG@10.",
        epilog="examples: python eval/sparsity.py --model runs/mini --beir data/nfcorpus --output runs/sparsity; "
        "python eval/sparsity.py --documents corpus.npz --queries queries.npz --beir data/nfcorpus",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--beir", required=True, metavar="DIR", help="folder with corpus.jsonl(.gz), queries.jsonl(.gz), qrels/")
    add("--split", help="judgements qrels/SPLIT.tsv; unset: test, else dev, else the first there is")
    add("--skip-unknown", action="store_true", help="leave out judgements of unknown queries and documents")
    add("--model", nargs="+", default=[], metavar="[NAME=]DIR", help="LENS models, which encode queries and documents")
    add(
        "--documents",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="embeddings of the corpus as `lens encode` writes them, .npz or .safetensors, one file a system",
    )
    add(
        "--queries",
        nargs="+",
        default=[],
        metavar="FILE",
        help="embeddings of the queries (`lens encode --kind query`), one file for each of --documents; unset: the "
        "one --model encodes the queries of one stored corpus",
    )
    add("--instruction", metavar="TEXT", help="task instruction put before the queries that --model encodes")
    add("--methods", nargs="*", choices=tuple(METHODS), default=list(METHODS), help="how the corpus is pruned")
    add(
        "--budgets",
        type=int,
        nargs="+",
        default=[8, 16, 32, 64, 128, 256],
        metavar="VALUES",
        help="non-zero values a document on average; those that prune nothing are left out",
    )
    add(
        "--renormalise",
        action=argparse.BooleanOptionalAction,
        help="pruned documents get length one again; unset: where they all had it",
    )
    add("--latency-queries", type=int, default=200, metavar="N", help="queries that are timed, 0 for no timing")
    add("--resamples", type=int, default=10_000, help="sign flips of the significance tests")
    add("--seed", type=int, default=0, help="seed of the significance tests")
    add("--output", default="runs/sparsity", metavar="DIR", help="folder to write")
    add("--overwrite", action="store_true", help="replace the folder of an earlier run")
    add("--device", help="cuda, mps or cpu; unset: the accelerator where there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the models' weights; unset: theirs")
    return parser


def check(args: argparse.Namespace) -> dict[str, str]:
    """The folders of the models by name; raises OSError, ValueError or ImportError with one clear line."""
    require("eval", "ir_measures", "matplotlib")
    if not args.model and not args.documents:
        raise ValueError("nothing to measure: give --model, or --documents with --queries")
    if args.queries and len(args.queries) != len(args.documents):
        raise ValueError(f"--queries names {len(args.queries)} files for {len(args.documents)} of --documents")
    if args.documents and not args.queries and (len(args.model), len(args.documents)) != (1, 1):
        raise ValueError("--documents needs --queries, or one --model to encode the queries of one stored corpus")
    if min(args.budgets) < 1 or len(set(args.budgets)) != len(args.budgets):
        raise ValueError(f"--budgets must be distinct numbers of at least 1, found {args.budgets}")
    for name, least in (("latency_queries", 0), ("resamples", 100)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: at least {least} is needed")
    output = check_output(args.output, args.overwrite, "results.json")
    if output.resolve() in [Path(args.beir).resolve(), *Path(args.beir).resolve().parents]:
        raise ValueError(f"--output {output} is or holds the data set that is read: choose another place")
    return model_folders(args.model)


def encode(model: Any, beir: Beir, instruction: str | None = None) -> Embedded:
    """A LENS model's embeddings of a data set."""
    return Embedded(encode_queries(model, beir, instruction), encode_documents(model, beir))


def encode_queries(model: Any, beir: Beir, instruction: str | None = None) -> Csr:
    """(n, K), the judged queries in order."""
    texts = [beir.queries[query] for query in judged_queries(beir)]
    return pruning.cleaned(model.encode_queries(texts, instruction=instruction, output="csr"))


def encode_documents(model: Any, beir: Beir) -> Csr:
    """(N, K), in the order of the corpus, encoded in chunks."""
    texts = list(beir.corpus.values())
    first = model.encode_documents(texts[:1], output="csr")
    chunk = max(1, CHUNK_VALUES // first.shape[1])
    parts = [model.encode_documents(texts[i : i + chunk], output="csr") for i in range(0, len(texts), chunk)]
    return pruning.cleaned(sparse.vstack(parts, format="csr"))


def stored(path: str, wanted: Sequence[str], exact: bool = False) -> Csr:
    """The embeddings of those ids, in order; raises ValueError naming one that the file lacks or, where `exact`, one
    that it has beyond them."""
    embeddings, ids = load_embeddings(path)
    row = {name: number for number, name in enumerate(ids)}
    if len(row) != len(ids):
        raise ValueError(f"{path} holds an id twice: encode the texts again")
    missing = next((name for name in wanted if name not in row), None)
    if missing is not None:
        raise ValueError(f"{path} has no embedding of {missing!r}: encode the same data set again")
    if exact and len(ids) != len(wanted):
        known = set(wanted)
        raise ValueError(f"{path} holds {next(i for i in ids if i not in known)!r}, which the corpus lacks")
    return pruning.cleaned(embeddings[[row[name] for name in wanted]])


def systems(args: argparse.Namespace, folders: Mapping[str, str], beir: Beir) -> dict[str, Embedded]:
    """The embeddings of every system by name; raises ValueError for those that do not fit together."""
    found: dict[str, Embedded] = {}
    corpus, queries = list(beir.corpus), judged_queries(beir)
    kept = {}
    for argument in args.documents:
        name, separator, path = argument.partition("=")
        if not separator or Path(argument).exists():
            name, path = Path(argument).stem, argument
        if name in kept or name in folders:
            raise ValueError(f"two systems are named {name!r}: tell them apart with --documents NAME={path}")
        kept[name] = stored(path, corpus, exact=True)
    options = {"device": args.device, "dtype": args.dtype}
    for name, path in zip(kept, args.queries, strict=False):
        found[name] = Embedded(stored(path, queries), kept[name])
    for name, folder in folders.items():
        model = lens.load(folder, **options)
        with named(name):
            if args.documents and not args.queries:
                found = {label: Embedded(encode_queries(model, beir, args.instruction), kept[label]) for label in kept}
            else:
                found[name] = encode(model, beir, args.instruction)
    for name, embedded in found.items():
        for part, matrix in (("queries", embedded.queries), ("documents", embedded.documents)):
            if not np.isfinite(matrix.data).all():
                raise ValueError(f"{name} on {beir.name}: the embeddings of the {part} hold NaN or infinite values")
            if matrix.nnz == 0:
                raise ValueError(f"{name} on {beir.name}: every embedding of the {part} is zero")
        sizes = embedded.queries.shape[1], embedded.documents.shape[1]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{name}: queries have {sizes[0]} dimensions and documents {sizes[1]}: use one model")
    return found


def pruned(documents: Csr, methods: Sequence[str], budgets: Sequence[int], renormalise: bool | None) -> dict[str, Csr]:
    """Documents by "METHOD BUDGET", `unpruned` first; budgets that leave every value are left out."""
    unit = pruning.is_unit(documents) if renormalise is None else renormalise
    found = {WHOLE: documents}
    for method in methods:
        for budget in sorted(budgets):
            smaller = METHODS[method](documents, budget)
            if smaller.nnz < documents.nnz:
                found[f"{method} {budget}"] = pruning.with_unit_rows(smaller) if unit else smaller
    return found


def cost(queries: Csr, documents: Csr, timed: int) -> dict[str, Any]:
    """FLOPS, active dimensions a document, bytes, and milliseconds a query (None where none is timed)."""
    return {
        "flops": pruning.flops(queries, documents),
        "active_per_document": documents.nnz / documents.shape[0],
        "csr_bytes": pruning.csr_bytes(documents),
        "inverted_bytes": pruning.inverted_bytes(documents),
        "milliseconds": pruning.latency(queries[:timed], documents) if timed else None,
    }


def measure(name: str, embedded: Embedded, beir: Beir, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one system as results.json holds them."""
    variants = pruned(embedded.documents, args.methods, args.budgets, args.renormalise)
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    costs = {}
    for label, documents in tqdm(variants.items(), desc=f"{name}: pruning", unit="corpus", disable=None):
        system = vector_system(label, embedded.queries, documents, matching=True)
        values |= evaluate(beir, [system], measures=(MAIN,), k=10).values
        costs[label] = cost(embedded.queries, documents, args.latency_queries)
    pairs = [(label, WHOLE) for label in variants if label != WHOLE]
    tested = {row.system: row for row in compare(values, pairs, args.resamples, args.seed)}
    whole = float(values[WHOLE][MAIN].mean())
    rows = []
    for label, row in tested.items():
        method, budget = label.split()
        mean = float(values[label][MAIN].mean())
        facts = {"method": method, "budget": int(budget), MAIN: mean, "difference": row.difference}
        kept = mean / whole if whole else None
        rows.append({**facts, "share_kept": kept, "p": row.p, "p_holm": row.p_holm, **costs[label]})
    return {
        "dimensions": embedded.documents.shape[1],
        MAIN: whole,
        "active_queries": pruning.active_dimensions(embedded.queries),
        "active_documents": pruning.active_dimensions(embedded.documents),
        **costs[WHOLE],
        "pruned": rows,
    }


def plot(systems: Mapping[str, Mapping[str, Any]], x: str = "flops", label: str = "FLOPS per pair") -> str:
    """SVG: nDCG@10 against a cost, a line for each system and way of pruning, a diamond for the corpus as it is.

    `systems` maps names to figures as `measure` gives them; `x` is the figure on the logarithmic axis.
    """
    require("eval", "matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "lens", "svg.fonttype": "none"}):
        axes = Figure(figsize=(7.2, 4.2), layout="constrained").add_subplot()
        for place, (name, facts) in enumerate(systems.items()):
            colour = f"C{place % 10}"
            axes.plot(facts[x], facts[MAIN], marker="D", color=colour, linestyle="", label=name)
            for style, method in zip(("-", "--", ":"), METHODS, strict=True):
                points = sorted((row[x], row[MAIN]) for row in facts["pruned"] if row["method"] == method)
                if points:
                    across, up = zip(*points, (facts[x], facts[MAIN]), strict=True)
                    axes.plot(across, up, color=colour, linestyle=style, marker=".", label=f"{name}, {method}")
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel(MAIN)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        buffer = io.StringIO()
        axes.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def report(results: Mapping[str, Any]) -> str:
    """The content of results.json in markdown."""
    header = ["system", MAIN, "FLOPS", "active, query", "active, document", "dead", "CSR MB", "inverted MB", "ms"]
    rows = []
    for name, facts in results["systems"].items():
        active = [facts["active_queries"], facts["active_documents"]]
        shown = [f"{number(part['mean'], 1)} (p95 {number(part['p95'], 0)})" for part in active]
        dead = f"{active[1]['dead']:.1%}"
        rows.append([name, number(facts[MAIN]), number(facts["flops"], 2), *shown, dead, *_sizes(facts)])
    parts = [
        "# Sparsity",
        f"{results['dataset']}: {results['documents']:,} documents, {results['queries']:,} judged queries.",
        Table(header, rows).markdown(),
    ]
    for name, facts in results["systems"].items():
        table = []
        for row in facts["pruned"]:
            kept = "–" if row["share_kept"] is None else f"{row['share_kept']:.1%}"
            quality = [number(row[MAIN]), f"{row['difference']:+.3f}", kept, p_value(row["p_holm"])]
            costs = [number(row["active_per_document"], 1), number(row["flops"], 2), *_sizes(row)]
            table.append([f"{row['method']} {row['budget']}", *quality, *costs])
        header = ["pruned to", MAIN, "Δ", "kept", "p (Holm)", "active", "FLOPS", "CSR MB", "inverted MB", "ms"]
        parts += [f"## {name}, pruned", Table(header, table).markdown() if table else "Every budget leaves all values."]
    parts += [
        f"![{MAIN} against FLOPS](plot.svg)",
        "FLOPS: expected multiplications per query-document pair. Budgets are non-zero values a document on average. "
        "Δ is against the unpruned corpus, p of the paired randomisation test with Holm's correction. ms: median and "
        "95th percentile of exact search for one embedded query on one core.",
    ]
    return "\n\n".join(parts) + "\n"


def _sizes(facts: Mapping[str, Any]) -> list[str]:
    spent = facts["milliseconds"]
    shown = "–" if spent is None else f"{spent['median']:.2f} (p95 {spent['p95']:.2f})"
    return [number(facts["csr_bytes"] / 1e6, 2), number(facts["inverted_bytes"] / 1e6, 2), shown]


def run(args: argparse.Namespace, folders: Mapping[str, str]) -> dict[str, Any]:
    """Measures every system and writes the output folder; returns the content of results.json."""
    (beir,), notes = read_datasets([args.beir], args.split, args.skip_unknown)
    found = systems(args, folders, beir)
    results = {
        "dataset": beir.name,
        "documents": len(beir.corpus),
        "queries": len(judged_queries(beir)),
        "warnings": notes[beir.name],
        "systems": {name: measure(name, embedded, beir, args) for name, embedded in found.items()},
        "config": vars(args),
        "versions": versions(),
        "machine": machine(),
    }
    with atomic_folder(args.output, args.overwrite, "results.json") as folder:
        write_json(folder / "results.json", results)
        (folder / "report.md").write_text(report(results), encoding="utf-8", errors="replace")
        (folder / "plot.svg").write_text(plot(results["systems"]), encoding="utf-8")
    return results


@interruptible("eval/sparsity.py")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code: 0, or 2 with one line on standard error for bad input."""
    args = parser().parse_args(arguments)
    try:
        results = run(args, check(args))
    except (OSError, ValueError, ImportError) as error:
        print(f"eval/sparsity.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, facts in results["systems"].items():
        print(
            f"{name}: {MAIN} {facts[MAIN]:.4f}, FLOPS {facts['flops']:.2f}, {facts['active_per_document']:.1f} active"
        )
    print(f"report: {Path(args.output) / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

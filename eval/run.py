"""Evaluates LENS models, lexical systems (BM25, TF-IDF, DeepCT, SparTerm) and the dense backbone on BEIR folders.

Writes a folder: results.json, per_query/DATASET.tsv, report.md, report.html, and with --save-runs
runs/DATASET.SYSTEM.trec. Files are described in docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import lens
from eval.beir_report import Details, html, markdown
from eval.lexical import lexical_folders, lexical_system, load_lexical
from eval.metrics import MEASURES, compare
from eval.scoring import (
    Evaluation,
    System,
    bm25_system,
    dense_system,
    evaluate,
    judged_queries,
    lens_system,
    query_latency,
    tfidf_system,
)
from lens.corpus import Beir, read_beir
from lens.dense import Dense
from lens.files import atomic_folder, check_output, require, write_json
from lens.layout import is_splade
from lens.program import interruptible
from lens.search.words import Words

MTEB_OPTIONS = ("--benchmark", "--tasks", "--types", "--local")
"""Options that only the evaluation by mteb has (eval/benchmark.py)."""
COSTS = ("dimensions", "active_per_query", "active_per_document", "flops", "index_mb")
BASELINES = ("bm25", "dense", "tfidf")
FUSED = ("dense", "bm25")
EXTRAS = ("bm25s", "Stemmer", "ir_measures", "matplotlib")
PACKAGES = ("lens-embeddings", "torch", "transformers", "bm25s", "ir-measures", "pytrec-eval-terrier", "numpy", "scipy")


@dataclass(frozen=True)
class Loaded:
    """What is evaluated: LENS models and lexical ones (DeepCT, SparTerm) by name, the dense baseline, the data sets,
    and what was odd about them."""

    models: dict[str, Any]
    lexical: dict[str, Any]
    dense: Dense | None
    datasets: list[Beir]
    notes: dict[str, list[str]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="eval/run.py",
        description="Evaluate LENS models, BM25 and the dense backbone on retrieval data sets in BEIR layout.",
        epilog="example: python eval/run.py --model runs/mini --beir data/nfcorpus data/cisi "
        "--baselines bm25 dense --fuse --output runs/eval. With --benchmark, --tasks or --local the program evaluates "
        "by mteb: see --help --benchmark",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR",
        help="LENS models; the name is the folder's unless given",
    )
    add(
        "--lexical",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR[:MODE]",
        help="folders of train/deepct.py and train/sparterm.py, the latter with the mode to use where it is another",
    )
    add(
        "--beir",
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders with corpus.jsonl(.gz), queries.jsonl(.gz), qrels/",
    )
    add("--skip-unknown", action="store_true", help="leave out judgements of unknown queries and documents")
    add("--split", help="judgements qrels/SPLIT.tsv; unset: test, else dev, else the first there is")
    add("--baselines", nargs="*", choices=BASELINES, default=[], help="systems to compare with")
    add(
        "--fuse",
        action="store_true",
        help="also sum the scores of each model with those of dense, and with those of dense and BM25",
    )
    add(
        "--against", metavar="NAME", help="system that all others are tested against; unset: the first, with all others"
    )
    add("--output", default="runs/eval", metavar="DIR", help="folder to write")
    add("--overwrite", action="store_true", help="replace the folder of an earlier evaluation")
    add("--save-runs", action="store_true", help="also write the rankings as TREC run files")
    add("--instruction", metavar="TEXT", help="task instruction put before the queries of LENS models")
    add("--base", metavar="PATH", help="backbone of the LENS models where it has moved since they were saved")
    add("--dense-model", metavar="PATH", help="backbone of the dense baseline; unset: the first model's own")
    add("--dense-length", type=int, default=128, metavar="TOKENS", help="texts are cut to this length for dense")
    add("--bm25-k1", type=float, default=1.2, help="BM25 saturation of term frequency, >= 0")
    add("--bm25-b", type=float, default=0.75, help="BM25 length normalisation, 0 to 1")
    add("--bm25-stopwords", default="english", metavar="LANGUAGE", help="stopword list of bm25s, or none")
    add("--bm25-stemmer", default="english", metavar="LANGUAGE", help="Snowball stemmer, or none for plain words")
    add("--deepct-k1", type=float, default=10.0, help="the same over DeepCT's frequencies, which run to 100")
    add("--deepct-scale", type=float, default=100.0, help="DeepCT's frequencies are round(scale * weight)")
    add("--deepct-b", type=float, default=0.75, help="the same over DeepCT's frequencies")
    add("--depth", type=int, default=1000, metavar="DOCUMENTS", help="documents ranked per query, at least 100")
    add("--block", type=int, metavar="QUERIES", help="queries scored at a time; unset: 32 MB of scores per system")
    add("--drop-self", action="store_true", help="never retrieve the document whose id is the query's own")
    add("--resamples", type=int, default=10_000, help="sign flips and bootstrap samples of the significance tests")
    add("--seed", type=int, default=0, help="seed of the significance tests")
    add("--latency-queries", type=int, default=50, metavar="N", help="queries that are timed one by one, 0 for none")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--device", help="cuda, mps or cpu; unset: the accelerator where there is one")
    device.add_argument(
        "--devices", nargs="+", metavar="DEVICE", help="several for the LENS models, the first for dense: cuda:0 cuda:1"
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the models' weights; unset: theirs, dense float32",
    )
    add("--quantization", choices=("4bit", "8bit", "int8"), help="of the models, as lens.load takes it; unset: none")
    return parser


def load(args: argparse.Namespace) -> Loaded:
    """Checks every input before any long work; raises OSError, ValueError or ImportError with one clear line."""
    require("eval", *EXTRAS)
    if not (args.model or args.lexical or args.baselines):
        raise ValueError("nothing to evaluate: give --model, --lexical or --baselines")
    if args.fuse and not (args.model and set(FUSED) & set(args.baselines)):
        raise ValueError("--fuse sums a model with baselines: give --model and --baselines dense, bm25 or both")
    limits = {"depth": 100, "dense_length": 3, "block": 1, "resamples": 100, "latency_queries": 0}
    limits |= dict.fromkeys(("bm25_k1", "bm25_b", "deepct_k1", "deepct_b"), 0.0) | {"deepct_scale": 1.0}
    for field, least in limits.items():
        value = getattr(args, field)
        if value is not None and not value >= least:
            raise ValueError(f"--{field.replace('_', '-')} is {value}: at least {least} is needed")
    for field in ("bm25_b", "deepct_b"):
        if not getattr(args, field) <= 1:
            raise ValueError(f"--{field.replace('_', '-')} is {getattr(args, field)}: it lies between 0 and 1")
    output = check_output(args.output, args.overwrite, "results.json")
    if output.is_dir() and any(output.iterdir()) and not (output / "results.json").is_file():
        raise FileExistsError(f"{output} holds no results.json of an evaluation, so it is not overwritten")
    if "tfidf" in args.baselines:
        require("eval", "sklearn")
    if {"bm25", "tfidf"} & set(args.baselines):
        Words(args.bm25_stopwords, args.bm25_stemmer)
    folders = model_folders(args.model)
    lexical = lexical_folders(args.lexical, {*folders, *BASELINES})
    names = [*folders, *lexical, *args.baselines]
    if args.against is not None and args.against not in names:
        raise ValueError(f"--against {args.against}: no system has that name; there are {', '.join(names)}")
    datasets, notes = read_datasets(args.beir, args.split, args.skip_unknown)
    if args.save_runs:
        for beir in datasets:
            spaced = next((name for name in [*beir.corpus, *beir.queries] if re.search(r"\s", name)), None)
            if spaced is not None:
                raise ValueError(f"{beir.name}: TREC runs cannot hold the id {spaced!r}: leave out --save-runs")
    options = {"device": args.devices or args.device, "dtype": args.dtype, "quantization": args.quantization}
    options |= {"base": args.base} if args.base else {}
    models = {name: lens.load(folder, **options) for name, folder in folders.items()}
    device = args.devices[0] if args.devices else args.device
    others = {name: load_lexical(folder, device) for name, folder in lexical.items()}
    dense = None
    if "dense" in args.baselines:
        if not models and not args.dense_model:
            raise ValueError("the dense baseline needs --dense-model, or --model to take its backbone")
        path = args.dense_model or args.base or next(iter(models.values())).config.base
        try:
            dense = Dense(path, device, args.dtype, args.dense_length)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(
                f"cannot load the dense baseline {path} ({reason}); choose another with --dense-model"
            ) from error
    return Loaded(models, others, dense, datasets, notes)


def model_folders(arguments: Sequence[str]) -> dict[str, str]:
    """Names and folders (or hub ids) of the models; raises FileNotFoundError or ValueError for one that is no model."""
    folders: dict[str, str] = {}
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        if not separator or Path(argument).exists():
            name, folder = Path(argument).resolve().name, argument
        if not Path(folder).is_dir() and not on_hub(folder):
            raise FileNotFoundError(f"model {folder} is neither a folder nor on the hub")
        if Path(folder).is_dir() and not ((Path(folder) / "lens.json").is_file() or is_splade(Path(folder))):
            raise FileNotFoundError(f"{folder} is no LENS model: it has no lens.json")
        if name in folders or name in BASELINES:
            raise ValueError(f"two systems are named {name!r}: tell them apart with --model NAME={folder}")
        folders[name] = folder
    return folders


def on_hub(name: str) -> bool:
    """Whether a name OWNER/MODEL can be had from the hub or its local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return False
    for file in ("lens.json", "modules.json", "config.json"):  # the latter two: SPLADE checkpoints
        try:
            hf_hub_download(name, file)
        except (OSError, HfHubHTTPError, HFValidationError):
            continue
        return True
    return False


def read_datasets(
    paths: Sequence[str], split: str | None, skip_unknown: bool = False
) -> tuple[list[Beir], dict[str, list[str]]]:
    """Reads the BEIR folders, and the warnings that each gave; raises ValueError for two of the same name."""
    datasets: list[Beir] = []
    notes: dict[str, list[str]] = {}
    for path in paths:
        folder = Path(os.path.abspath(path))
        if folder.name in notes:
            raise ValueError(f"two --beir folders are named {folder.name!r}: rename one, results are kept by name")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            beir = read_beir(folder, split, skip_unknown)
        if not judged_queries(beir):
            raise ValueError(f"{folder}: no query has a relevant document (a judgement of at least 1)")
        datasets.append(beir)
        notes[beir.name] = [str(warning.message) for warning in caught]
        for note in notes[beir.name]:
            print(f"warning: {note}", file=sys.stderr)
    return datasets, notes


@contextmanager
def named(system: str) -> Iterator[None]:
    """Turns FloatingPointError, which models raise for NaN and infinite values, into ValueError naming the system."""
    try:
        yield
    except FloatingPointError as error:
        raise ValueError(f"{system}: {error}") from error


def systems(loaded: Loaded, beir: Beir, args: argparse.Namespace) -> tuple[list[System], dict[str, list[str]]]:
    """The systems of a data set, encoded, and the fusions of each model: with dense, then with BM25 too."""
    built: list[System] = []
    for name, model in loaded.models.items():
        with named(name):
            built.append(lens_system(name, model, beir, args.instruction))
    for name, model in loaded.lexical.items():
        with named(name):
            built.append(lexical_system(name, model, beir, args.deepct_k1, args.deepct_b, args.deepct_scale))
    if loaded.dense:
        built.append(dense_system("dense", loaded.dense, beir))
    if "bm25" in args.baselines:
        options = {"stopwords": args.bm25_stopwords, "stemmer": args.bm25_stemmer, "k1": args.bm25_k1, "b": args.bm25_b}
        built.append(bm25_system("bm25", beir, **options))
    if "tfidf" in args.baselines:
        built.append(tfidf_system("tfidf", beir, args.bm25_stopwords, args.bm25_stemmer))
    baselines = [system.name for system in built if system.name in FUSED]
    fusions = {}
    for name in loaded.models if args.fuse else ():
        for count in range(1, len(baselines) + 1):
            members = [name, *baselines[:count]]
            fusions[" + ".join(members)] = members
    return built, fusions


def summary(
    evaluation: Evaluation,
    built: Sequence[System],
    fusions: dict[str, list[str]],
    asked: Mapping[str, dict[str, float] | None],
) -> dict[str, dict[str, Any]]:
    """Means and costs of every system, as results.json holds them; `asked` holds the latencies."""
    facts = {system.name: system.facts for system in built}
    return {
        name: {
            **{measure: float(values.mean()) for measure, values in measured.items()},
            "seconds": evaluation.seconds[name],
            "search_seconds": evaluation.search_seconds[name],
            **{key: facts.get(name, {}).get(key) for key in COSTS},
            "milliseconds": asked.get(name),
            "parts": fusions.get(name, []),
        }
        for name, measured in evaluation.values.items()
    }


def pairs(built: Sequence[System], fusions: dict[str, list[str]], against: str | None = None) -> list[tuple[str, str]]:
    """What is compared: the first system with each other one, or each other one with `against`; and each fusion with
    its parts."""
    names = [system.name for system in built]
    first = [(names[0], other) for other in names[1:]]
    chosen = first if against is None else [(other, against) for other in names if other != against]
    return chosen + [(name, part) for name, parts in fusions.items() for part in parts]


def write_queries(folder: Path, beir: Beir, evaluation: Evaluation, save_runs: bool) -> None:
    """Writes per_query/DATASET.tsv, and runs/DATASET.SYSTEM.trec on request."""
    lines = ["\t".join(["query-id", "system", *MEASURES])]
    for row, query in enumerate(evaluation.queries):
        for name, values in evaluation.values.items():
            lines.append("\t".join([query, name, *(f"{values[measure][row]:.6f}" for measure in MEASURES)]))
    (folder / "per_query").mkdir(exist_ok=True)
    (folder / "per_query" / f"{beir.name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not save_runs:
        return
    documents = list(beir.corpus)
    (folder / "runs").mkdir(exist_ok=True)
    for name, rankings in evaluation.rankings.items():
        tag = re.sub(r"[^\w.+-]+", "_", name)
        with (folder / "runs" / f"{beir.name}.{tag}.trec").open("w", encoding="utf-8") as file:
            for query, ranking in zip(evaluation.queries, rankings, strict=True):
                for place, (i, score) in enumerate(zip(ranking.documents, ranking.scores, strict=True), 1):
                    file.write(f"{query} Q0 {documents[i]} {place} {score:.7g} {tag}\n")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The machine that the seconds are of."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": name}


def run(args: argparse.Namespace, loaded: Loaded) -> dict[str, Any]:
    """Evaluates and writes the output folder; returns the content of results.json."""
    results: dict[str, Any] = {"datasets": {}, "config": vars(args), "versions": versions(), "machine": machine()}
    details = {}
    with atomic_folder(args.output, args.overwrite, "results.json") as folder:
        for beir in loaded.datasets:
            built, fusions = systems(loaded, beir, args)
            evaluation = evaluate(
                beir,
                built,
                fusions,
                k=args.depth,
                block=args.block,
                drop_self=args.drop_self,
                keep_rankings=args.save_runs,
            )
            texts = [beir.queries[query] for query in evaluation.queries]
            asked = {system.name: query_latency(system, texts[: args.latency_queries]) for system in built}
            comparisons = compare(evaluation.values, pairs(built, fusions, args.against), args.resamples, args.seed)
            results["datasets"][beir.name] = {
                "queries": len(evaluation.queries),
                "queries_without_relevant": len(beir.queries) - len(evaluation.queries),
                "documents": len(beir.corpus),
                "warnings": loaded.notes[beir.name],
                "systems": summary(evaluation, built, fusions, asked),
                "comparisons": [asdict(comparison) for comparison in comparisons],
            }
            write_queries(folder, beir, evaluation, args.save_runs)
            details[beir.name] = Details(evaluation.queries, texts, evaluation.values)
            for name, values in evaluation.values.items():
                print(
                    f"{beir.name}  {name}  " + "  ".join(f"{m} {v.mean():.4f}" for m, v in values.items()), flush=True
                )
        write_json(folder / "results.json", results)
        (folder / "report.md").write_text(markdown(results), encoding="utf-8", errors="replace")
        (folder / "report.html").write_text(html(results, details), encoding="utf-8", errors="replace")
    return results


@interruptible("eval/run.py")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code: 0, or 2 with one line on standard error for bad input."""
    given = sys.argv[1:] if arguments is None else arguments
    if any(argument.partition("=")[0] in MTEB_OPTIONS for argument in given):
        require("mteb", "mteb")
        words = [word for argument in given for word in argument.split("=", 1)]
        if ("--benchmark", "air-bench") in pairwise(words):
            from eval.airbench import main as air_bench

            return air_bench(given)
        from eval.benchmark import main as benchmark

        return benchmark(given)
    args = parser().parse_args(given)
    try:
        loaded = load(args)
        try:
            run(args, loaded)
        finally:
            for model in loaded.models.values():
                model.close()
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"report: {Path(args.output) / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes synthetic queries for passages (doc2query): training examples, and the corpus with its queries appended.

    python train/generate.py --model T5_OR_CAUSAL_LM --corpus BEIR_DIR_OR_FILE --output DIR [--queries 5]

Example: python train/generate.py --model doc2query/msmarco-t5-base-v1 --corpus data/scifact --output runs/queries
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lens
from lens.corpus import find_file, read_texts
from lens.devices import resolve_device
from lens.files import atomic_folder, check_output, read_json, read_jsonl, write_json
from lens.identity import model_files
from lens.locks import alone
from lens.program import interruptible
from lens.text import check_texts
from train.doc2query import Settings, read_shard, write_shards

MANIFEST_FILE, EXAMPLES_FILE, EXPANDED_FOLDER = "manifest.json", "examples.jsonl", "expanded"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train/generate.py"
    )
    defaults = {field.name: field.default for field in fields(Settings)}
    add = parser.add_argument

    def known(name: str, kind: type, text: str, **options: Any) -> None:
        add(f"--{name.replace('_', '-')}", type=kind, default=defaults[name], help=text + " (%(default)s)", **options)

    add("--model", required=True, metavar="PATH", help="sequence-to-sequence model, or causal one, folder or hub id")
    add("--corpus", required=True, metavar="PATH", help="folder in BEIR layout, or passages as .jsonl(.gz) or .txt")
    add("--output", required=True, metavar="DIR", help="folder to write; OUTPUT.shards holds what is done so far")
    add("--overwrite", action="store_true", help="replace an earlier output")
    known("queries", int, "queries per passage, before filtering")
    known("top_k", int, "sample among so many tokens; 0: all")
    known("top_p", float, "sample among the tokens that hold this probability")
    known("temperature", float, "of sampling")
    known("beams", int, "beam search in place of sampling; 0: sampling")
    add("--prompt", help="what the model reads, with {text} for the passage; unset: the passage, or for a causal LM a "
        "request for a query")  # fmt: skip
    known("passage_length", int, "tokens that a passage is cut to")
    known("query_length", int, "tokens of a query at most")
    known("batch_tokens", int, "tokens that are written at a time; fewer need less memory")
    known("dtype", str, "of the model's weights", choices=("float32", "bfloat16", "float16"))
    known("shard_size", int, "passages between two points that a killed run goes on from")
    known("seed", int, "of the sampling")
    scorer = parser.add_mutually_exclusive_group()
    scorer.add_argument("--cross-encoder", metavar="PATH", help="filter by the scores of this reranker")
    scorer.add_argument("--bi-encoder", metavar="PATH", help="filter by the similarities of this LENS or dense model")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--keep-share", type=float, metavar="SHARE", help="keep this share of all queries, the best")
    limit.add_argument("--min-score", type=float, metavar="SCORE", help="keep the queries that score at least this")
    add("--instruction", help="instruction written into every example")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--device", help="cpu, cuda or mps; unset: the first GPU there is, else the CPU")
    device.add_argument("--devices", nargs="+", metavar="DEVICE", help="a process on each: cuda:0 cuda:1")
    return parser


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings of a command line; raises ValueError naming the option that contradicts."""
    limits = {"queries": 1, "top_k": 0, "beams": 0, "passage_length": 1, "query_length": 1, "batch_tokens": 1}
    for name, least in {**limits, "shard_size": 1}.items():
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, found {getattr(options, name)}")
    if not (options.temperature > 0 and math.isfinite(options.temperature)):
        raise ValueError(f"--temperature must be above 0, found {options.temperature}")
    if not 0 < options.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, found {options.top_p}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 4294967295, found {options.seed}")
    if options.prompt is not None and "{text}" not in options.prompt:
        raise ValueError(f"--prompt must hold {{text}}, where the passage goes; found {options.prompt!r}")
    check_texts([text for text in (options.prompt, options.instruction) if text is not None])
    scorer = options.cross_encoder or options.bi_encoder
    if (options.keep_share is not None or options.min_score is not None) and scorer is None:
        raise ValueError("--keep-share and --min-score need scores: give --cross-encoder or --bi-encoder")
    if scorer is not None and options.keep_share is None and options.min_score is None:
        raise ValueError("a scorer alone filters nothing: give --keep-share or --min-score")
    if options.keep_share is not None and not 0 < options.keep_share <= 1:
        raise ValueError(f"--keep-share must be above 0 and at most 1, found {options.keep_share}")
    if options.min_score is not None and not math.isfinite(options.min_score):
        raise ValueError(f"--min-score must be a finite number, found {options.min_score}")
    names = {field.name for field in fields(Settings)} & vars(options).keys()
    kind: Any = {"scorer": scorer, "scorer_kind": "cross" if options.cross_encoder else "bi"}
    return Settings(**{name: getattr(options, name) for name in names}, **kind)


def threshold_of(scores: Sequence[float], keep_share: float) -> float:
    """The score that the best `keep_share` of all queries reach, at least one; ties at it are all kept."""
    if not scores:
        return -math.inf
    ranked = sorted(scores, reverse=True)
    return ranked[max(1, math.floor(keep_share * len(ranked) + 1e-9)) - 1]


def corpus_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The corpus as BEIR rows in order, other fields kept: of a folder, a jsonl file, or a txt file's lines."""
    file = find_file(path, "corpus") if path.is_dir() else path
    if ".jsonl" in file.suffixes:
        for _, row in read_jsonl(file):
            name = str(row.pop("_id") if "_id" in row else row.pop("id"))
            yield {"_id": name, **row}
    else:
        for name, text in zip(*read_texts(file), strict=True):
            yield {"_id": name, "title": "", "text": text}


def write_output(
    folder: Path, options: argparse.Namespace, settings: Settings, shards: Sequence[dict[str, Any]], digest: str
) -> dict[str, int]:
    """Writes examples, the expanded corpus and the manifest from the shards' rows; returns the counts."""
    threshold = options.min_score if options.min_score is not None else -math.inf
    if options.keep_share is not None:
        threshold = threshold_of([score for row in shards for score in row["scores"]], options.keep_share)
    kept: dict[str, list[str]] = {}
    for row in shards:
        scores = row["scores"] or [math.inf] * len(row["queries"])
        kept[row["_id"]] = [q for q, score in zip(row["queries"], scores, strict=True) if score >= threshold]
    source = Path(options.corpus)
    ids, texts = read_texts(source)
    examples: dict[str, dict[str, None]] = {}
    for name, text in zip(ids, texts, strict=True):
        for query in kept.get(name, []):
            examples.setdefault(query, {})[text] = None  # passages of one query become positives of one example
    with (folder / EXAMPLES_FILE).open("w", encoding="utf-8") as file:
        for query, passages in examples.items():
            row = {"query": query, "pos": list(passages), "neg": [], "pos_scores": None, "neg_scores": None}
            row |= {"prompt": options.instruction, "type": "retrieval"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    expanded = folder / EXPANDED_FOLDER
    expanded.mkdir()
    with (expanded / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for row in corpus_rows(source):
            text = " ".join([row.get("text") or "", *kept.get(row["_id"], [])]).strip()
            file.write(json.dumps({**row, "text": text}, ensure_ascii=False) + "\n")
    if source.is_dir():
        copy_rest(source, expanded)
    counts = {
        "passages": len(ids),
        "blank_passages": sum(not text.strip() for text in texts),
        "written": sum(row["written"] for row in shards),
        "distinct": sum(len(row["queries"]) for row in shards),
        "kept": sum(map(len, kept.values())),
        "examples": len(examples),
    }
    manifest = {
        "lens_version": lens.__version__,
        "settings": asdict(settings),
        "corpus_sha256": digest,
        "filter": {"keep_share": options.keep_share, "min_score": options.min_score},
        "threshold": threshold if math.isfinite(threshold) else None,
        "instruction": options.instruction,
        "counts": counts,
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return counts


def copy_rest(source: Path, expanded: Path) -> None:
    """Copies queries and qrels of a BEIR folder, where there are any."""
    for name in ("queries.jsonl", "queries.jsonl.gz"):
        if (source / name).is_file():
            shutil.copyfile(source / name, expanded / name)
    if (source / "qrels").is_dir():
        (expanded / "qrels").mkdir()
        for file in sorted((source / "qrels").glob("*.tsv")):
            shutil.copyfile(file, expanded / "qrels" / file.name)


def run(options: argparse.Namespace) -> dict[str, int]:
    """Writes the output; raises OSError, ValueError or ImportError with one clear line."""
    settings = settings_of(options)
    output = check_output(options.output, options.overwrite, MANIFEST_FILE)
    source = Path(options.corpus)
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--output {output} lies in the folder --corpus that is read: choose another place")
    if source.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"--output {output} holds the --corpus that is read: choose another place")
    devices = options.devices or [options.device]
    for device in devices:
        resolve_device(device)
    ids, texts = read_texts(source)
    check_texts(texts)
    if not any(text.strip() for text in texts):
        raise ValueError(f"{source} holds no passage that is not blank")
    file = find_file(source, "corpus") if source.is_dir() else source
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    work = output.absolute().with_name(f"{output.name}.shards")
    with alone(work):
        models = {"model_files": model_files(settings.model), "scorer_files": model_files(settings.scorer or "")}
        begin(work, {**asdict(settings), **models, "corpus_sha256": digest})
        count = math.ceil(len(ids) / settings.shard_size)
        write_shards(settings, str(source), work, count, devices)
        shards = [row for shard in range(count) for row in read_shard(work, shard)]
        with atomic_folder(output, options.overwrite, MANIFEST_FILE) as folder:
            counts = write_output(folder, options, settings, shards, digest)
        shutil.rmtree(work)
    return counts


def begin(work: Path, wanted: dict[str, Any]) -> None:
    """Makes the folder of shards, or takes up that of a run of the same settings and models; raises ValueError for
    another's."""
    for torn in work.glob(".settings.json.*"):  # a run killed while it wrote them
        torn.unlink()
    if work.is_dir() and any(work.iterdir()):
        before = read_json(work / "settings.json") if (work / "settings.json").is_file() else {}
        changed = sorted(name for name in wanted if before.get(name) != wanted[name])
        if changed:
            raise ValueError(f"{work} holds shards of other settings ({', '.join(changed)}): remove it to start anew")
        for torn in work.glob(".shard-*"):  # written when the run before was killed
            torn.unlink()
    work.mkdir(exist_ok=True)
    write_json(work / "settings.json", wanted)


@interruptible("train/generate.py", "the same command goes on from the last shard")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        counts = run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"train/generate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(
        f"{counts['kept']:,} of {counts['written']:,} queries kept for {counts['passages']:,} passages, "
        f"{counts['examples']:,} examples in {options.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Scores positives and negatives with a teacher, or with several together.

    python train/score.py --model [KIND=]PATH_OR_ID [--model ...] --data FILE --output FILE.jsonl[.gz]

KIND is `cross` (a cross-encoder), `llm` (a language model asked by --prompt), `bi` (a bi-encoder: a LENS model, a
sentence-transformers model, or any encoder with mean pooling) or `lens` (what lens.load reads, SPLADE too). A bare
PATH_OR_ID is a cross-encoder where its config.json says that it is a sequence classifier of one label, a LENS model
where it holds lens.json, else a bi-encoder with mean pooling. A run that was killed goes on when it is started again.

Examples:
  python train/score.py --model sentence-transformers/all-MiniLM-L6-v2 --data mined.jsonl --output train.jsonl
  python train/score.py --model cross=cross-encoder/ms-marco-MiniLM-L6-v2 --data mined.jsonl --output train.jsonl
  python train/score.py --model cross=DIR --model llm=DIR --weights 1 2 --data mined.jsonl --output train.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import lens
from lens.devices import resolve_device
from lens.files import atomic_file, check_output, write_json
from lens.locks import alone
from lens.program import interruptible
from train.mine import open_text
from train.shards import Shards, Statistics, moved
from train.sources import DataSet, read_examples
from train.teacher_pool import Here, Processes
from train.teachers import PROMPTS, Options, Teacher, digest, parse_prompt, parse_teacher

SHARD, SHARD_BI = 1024, 32768
"""Examples of a shard; bi-encoders take larger ones, because each text is embedded once in a shard."""
DECIMALS = 6


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train/score.py"
    )
    add = parser.add_argument
    add("--model", action="append", required=True, metavar="[KIND=]PATH", help="teacher; again for several")
    add("--data", required=True, help="examples in the bge format, .jsonl(.gz), .json or .parquet")
    add("--output", required=True, help=".jsonl(.gz) to write: the examples with pos_scores and neg_scores")
    add("--embeddings", help="also write the embeddings of all texts, .safetensors; one teacher with mean pooling")
    add("--weights", type=float, nargs="+", metavar="W", help="of the teachers in their mean, one each (equal)")
    add(
        "--standardise",
        action=argparse.BooleanOptionalAction,
        help="before averaging, take from each teacher's scores their mean over the file and divide by their standard "
        "deviation (yes with several teachers, no with one)",
    )
    add("--max-length", type=int, help="tokens of a pair or, for bi, a text (cross 512, llm 1024, mean pooling 256)")
    add("--activation", choices=("none", "model"), default="none", help="cross: the bare logit, or as predict gives it")
    add(
        "--prompt",
        help=f"llm: {', '.join(PROMPTS)}, @FILE, or a text with {{query}}, {{passage}} and perhaps {{instruction}}, "
        "which is the example's own (bge)",
    )
    add("--yes", metavar="WORD", help="llm: the answer, one token, whose logit is the score (the prompt's, else Yes)")
    add(
        "--no",
        metavar="WORD",
        help='llm: the answer whose logit is taken from it, "" for none (the prompt\'s, else No)',
    )
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--device", help="cpu, cuda or mps; default: the first GPU there is, else the CPU")
    device.add_argument("--devices", nargs="+", metavar="DEVICE", help="several, a process for each: cuda:0 cuda:1")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (float32; llm and LENS models on a GPU bfloat16)",
    )
    add("--batch-tokens", type=int, help="tokens of a batch, padding included (a CPU 2048, a GPU 32768)")
    add("--shard", type=int, help=f"examples of a shard ({SHARD}; with bi-encoders alone {SHARD_BI})")
    add("--overwrite", action="store_true", help="replace an existing output, and unfinished work that does not fit")
    return parser


def check(options: argparse.Namespace) -> list[Teacher]:
    """The teachers; raises OSError, ValueError or ImportError for options that cannot work, before any work."""
    for name in ("max_length", "batch_tokens", "shard"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, found {value}")
    if not options.output.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"--output must end in .jsonl or .jsonl.gz, found {options.output}")
    for name, file in (("output", options.output), ("embeddings", options.embeddings)):
        if file and Path(file).is_dir():
            raise IsADirectoryError(f"--{name} {file} is a folder: name a file")
    check_output(options.output, options.overwrite)
    named = ("data", "output", "embeddings")
    places = [Path(getattr(options, name)).resolve() for name in named if getattr(options, name)]
    if len(set(places)) != len(places):
        raise ValueError("--data, --output and --embeddings must be different files")
    if options.embeddings:
        if not options.embeddings.endswith(".safetensors"):
            raise ValueError(f"--embeddings must end in .safetensors, found {options.embeddings}")
        check_output(options.embeddings, options.overwrite or moved(work_of(options), Path(options.embeddings)))
    prompt = parse_prompt(options.prompt or "bge", options.yes, options.no)
    how = Options(options.max_length, options.dtype, options.batch_tokens, options.activation == "model", prompt)
    teachers = [parse_teacher(argument, how) for argument in options.model]
    names = [teacher.name for teacher in teachers]
    kinds = {teacher.kind for teacher in teachers}
    for option, kind, given in (
        ("--prompt, --yes and --no", "llm", (options.prompt, options.yes, options.no) != (None, None, None)),
        ("--activation", "cross", options.activation == "model"),
    ):
        if given and kind not in kinds:
            raise ValueError(f"teachers that take {option} are {kind}=PATH; found {', '.join(names)}")
    if len(set(names)) != len(names):
        raise ValueError(f"--model names the same teacher twice: {', '.join(names)}")
    weights = options.weights or [1.0] * len(teachers)
    if len(weights) != len(teachers) or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"--weights must be {len(teachers)} numbers above 0, one for each --model; found {weights}")
    if options.embeddings and [teacher.kind for teacher in teachers] != ["mean"]:
        raise ValueError(f"--embeddings needs a single bi-encoder with mean pooling; found {', '.join(names)}")
    return teachers


def work_of(options: argparse.Namespace) -> Path:
    """The folder of unfinished work."""
    return Path(f"{options.output}.parts")


def versions() -> dict[str, str]:
    """Versions that the scores may depend on."""
    found = {"python": platform.python_version(), "lens": lens.__version__}
    for package in ("torch", "transformers", "sentence-transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def score(options: argparse.Namespace, teachers: list[Teacher], examples: DataSet) -> dict[str, Any]:
    """Scores the shards that are missing, then writes the outputs; returns the manifest."""
    facts = {"sha256": digest(Path(options.data)), "examples": len(examples)}
    size = options.shard or (SHARD_BI if all(t.kind in ("mean", "sentence", "lens") for t in teachers) else SHARD)
    described = [teacher.facts() for teacher in teachers]
    shards = Shards(work_of(options), examples, size)
    state = {
        "data": facts,
        "models": described,
        "versions": versions(),
        "shard": size,
        "embeddings": bool(options.embeddings),
    }
    said = shards.open(state, options.overwrite)
    if said:
        print(said, file=sys.stderr)
    finished = False
    try:
        missing = shards.missing()
        if missing:
            compute(options, teachers, shards, missing)
        manifest = write(options, teachers, examples, shards, {"data": facts, "models": described})
        finished = True
    finally:
        shards.close(finished)
    return manifest


def compute(options: argparse.Namespace, teachers: list[Teacher], shards: Shards, missing: list[int]) -> None:
    """Scores the missing shards on the devices asked for."""
    devices = [resolve_device(name) for name in options.devices or [options.device]]
    pool = Here(teachers, devices[0]) if len(devices) == 1 else Processes(teachers, devices)
    total = len(shards.examples)
    bar = tqdm(total=total, desc="score", unit="example", disable=None)
    bar.update(total - sum(len(shards.rows(number)) for number in missing))
    try:
        for number in missing:
            shards.compute(number, teachers, pool, bool(options.embeddings), bar.refresh)
            bar.update(len(shards.rows(number)))
    finally:
        bar.close()
        pool.close()


def write(
    options: argparse.Namespace, teachers: list[Teacher], examples: DataSet, shards: Shards, facts: dict[str, Any]
) -> dict[str, Any]:
    """Writes embeddings, manifest and, last, the output from finished shards; returns the manifest."""
    weights = options.weights or [1.0] * len(teachers)
    standardise = len(teachers) > 1 if options.standardise is None else options.standardise
    if options.embeddings:
        embeddings, keys = shards.embeddings()
        tensors = {"embeddings": torch.from_numpy(embeddings), "keys": torch.from_numpy(keys)}
        place = Path(options.embeddings)
        with atomic_file(place, options.overwrite or moved(shards.folder, place)) as temporary:
            save_file(tensors, temporary, {"format": "pt", "teacher": teachers[0].path})
            shards.move(place)
    total: dict[str, Statistics] = {}
    counts = {"examples": len(examples), "positives": 0, "negatives": 0, "examples_without_negatives": 0}
    names = [teacher.name for teacher in teachers]
    with atomic_file(options.output, options.overwrite) as temporary:
        with open_text(temporary, options.output.endswith(".gz")) as file:
            for number, example, scores in shards.combined(names, weights, standardise, total):
                row, rounded = examples.row(number), [round(float(value), DECIMALS) for value in scores]
                row["pos_scores"], row["neg_scores"] = rounded[: len(example.pos)], rounded[len(example.pos) :]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                counts["positives"] += len(example.pos)
                counts["negatives"] += len(example.neg)
                counts["examples_without_negatives"] += not example.neg
        figures = {name: found.result() for name, found in total.items()}
        manifest = {
            "program": "train/score.py",
            "data": {"file": Path(options.data).name, **facts["data"]},
            "output": {"file": Path(options.output).name, "sha256": digest(temporary)},
            "teachers": [
                {**fact, "weight": weight, "statistics": figures[name]}
                for fact, weight, name in zip(facts["models"], weights, names, strict=True)
            ],
            "standardised": standardise,
            "counts": counts,
            "statistics": figures["combined"],
            "versions": versions(),
        }
        write_json(f"{options.output}.manifest.json", manifest)
    return manifest


@interruptible("train/score.py", "start it again with the same options to go on")
def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        teachers = check(options)
        examples = read_examples(options.data)
        with alone(Path(options.output)):
            manifest = score(options, teachers, examples)
    except (ValueError, OSError, ImportError) as error:
        print(f"train/score.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    above = manifest["statistics"]["negatives_above_the_best_positive"]
    print(f"{len(examples):,} examples scored in {options.output}")
    if above is not None:
        print(f"{above:.1%} of the negatives score above the best positive of their query")
    return 0


if __name__ == "__main__":
    sys.exit(main())

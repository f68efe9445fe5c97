"""LENS on a tiny decoder trained from scratch: attention x pooling, held-out and zero-shot retrieval.

    python benchmarks/decoder.py [--data DIR] [--work DIR] [--seeds 2]
    python benchmarks/decoder.py --page                 # the section of docs/results.md from the stored figures only

A Mistral of a few million weights is trained as a causal LM on text of the shared data sets, its vocabulary clustered
by clustering/run.py, hard negatives mined by train/mine.py, and each variant trained by train/run.py with LoRA: same
pairs, batches, steps and seed. eval/run.py scores them beside the untrained model, BM25 and the mean of the decoder's
hidden states. Every finished step stays in the folder --work; the same command goes on from there.
Writes benchmarks/results/decoder.json and a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import yaml

import lens
from benchmarks.decoder_base import Settings, make_pairs, need_data, pretrain
from benchmarks.page import PAGE, RESULTS, ROOT, listed, machine, p_value, versions, write_section
from eval.metrics import compare
from lens.files import atomic_folder, read_json, write_json
from train.progress import LOG_FILE, read_log

OUTPUT = RESULTS / "decoder.json"
LENS_NAME = "bidirectional max"
VARIANTS: dict[str, dict[str, Any]] = {
    LENS_NAME: {"bidirectional": True, "pooling": "max"},
    "causal max": {"bidirectional": False, "pooling": "max"},
    "bidirectional last": {"bidirectional": True, "pooling": "last"},
    "causal last": {"bidirectional": False, "pooling": "last"},
    "bidirectional sum": {"bidirectional": True, "pooling": "sum"},
    "causal sum": {"bidirectional": False, "pooling": "sum"},
}
UNTRAINED = "untrained"
MEASURE = "nDCG@10"


def program(*command: str | Path) -> None:
    """Runs one of the project's programs; raises CalledProcessError when it fails."""
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def slug(variant: str, seed: int) -> str:
    """The folder of one trained variant."""
    return f"{variant.replace(' ', '-')}-{seed}"


def recipe(settings: Settings, work: Path) -> dict[str, Any]:
    """What every variant's training shares."""
    return {
        "base": str(work / "base"),
        "clusters": str(work / "clusters"),
        "data": [str(work / f"mined-{name}.jsonl") for name in settings.pairs],
        "backbone": "lora",
        "train_head": False,
        "lora_dropout": 0.0,
        "query_max_length": settings.query_max_length,
        "document_max_length": settings.document_max_length,
        "group_size": settings.group_size,
        "batch_size": settings.batch_size,
        "temperature": settings.temperature,
        "kd_weight": 0.0,
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "warmup_steps": settings.steps // 10,
        "scheduler": "cosine",
        "precision": settings.precision,
        "save_steps": max(settings.steps // 4, 1),
        "logging_steps": max(settings.steps // 24, 1),
        "save_total_limit": 1,
        "report_to": [],
    }


class Steps:
    """Runs each step once: a step whose output is there is left out. Seconds are kept in `work`/seconds.json."""

    def __init__(self, work: Path) -> None:
        self.path = work / "seconds.json"
        self.seconds: dict[str, float] = read_json(self.path) if self.path.is_file() else {}

    def __call__(self, name: str, output: Path, run: Any) -> None:
        if output.exists():
            return
        print(f"== {name}", flush=True)
        started = time.monotonic()
        run()
        self.seconds[name] = round(time.monotonic() - started, 1)
        write_json(self.path, self.seconds)


def run_steps(data: Path, work: Path, settings: Settings, seeds: int, variants: list[str], device: str | None) -> Steps:
    """Everything up to the evaluations, each step only when its output is not there yet."""
    steps = Steps(work)
    pairs, base, clusters = work / "pairs", work / "base", work / "clusters"
    steps("pairs", pairs, lambda: make_pairs(data, pairs, settings))
    steps("pretrain", base, lambda: pretrain(data, pairs, base, work / "lm", settings))
    shutil.rmtree(work / "lm", ignore_errors=True)
    cluster = ("clustering/run.py", "--model", base, "--k", str(settings.k), "--map", "pca", "--output", clusters)
    steps("cluster", clusters, lambda: program(*cluster))
    for name in settings.pairs:
        mined = work / f"mined-{name}.jsonl"
        mine = ("train/mine.py", "--beir", pairs / name, "--output", mined, "--negatives", "4", "--depth", "50")
        steps(f"mine {name}", mined, lambda mine=mine: program(*mine))
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe(settings, work), sort_keys=False), encoding="utf-8")
    lengths = {name: getattr(settings, name) for name in ("query_max_length", "document_max_length")}
    where = ("--device", device) if device else ()

    def build() -> None:
        lens.LENS.build(base, clusters, device="cpu", **lengths).save(work / UNTRAINED)

    steps(UNTRAINED, work / UNTRAINED, build)
    for seed in range(seeds):
        for variant in variants:
            folder = work / slug(variant, seed)
            fields = [
                part
                for name, value in {**VARIANTS[variant], "seed": seed, "output": folder}.items()
                for part in (f"--{name}", str(value).lower() if isinstance(value, bool) else value)
            ]
            train = ("train/run.py", work / "recipe.yaml", *map(str, fields), *where)
            steps(f"train {variant} {seed}", folder / "lens.json", lambda train=train: program(*train))
    folders = [pairs / "heldout", *(data / name for name in settings.zero_shot)]
    for seed in range(seeds):
        trained = [f"{variant}={work / slug(variant, seed)}" for variant in variants]
        extra = [f"{UNTRAINED}={work / UNTRAINED}", "--baselines", "bm25", "dense"] if seed == 0 else []
        evaluate = ("eval/run.py", "--model", *trained, *extra, "--beir", *folders, "--split", "test", *where)
        output = work / f"eval-{seed}"
        common = ("--output", output, "--resamples", "1000", "--dense-length", str(settings.document_max_length))
        steps(f"evaluate {seed}", output, lambda evaluate=evaluate, common=common: program(*evaluate, *common))
    return steps


def per_query(work: Path, seeds: int, dataset: str) -> dict[str, dict[int, dict[str, float]]]:
    """system -> seed -> query -> nDCG@10, from the evaluations' per_query files."""
    found: dict[str, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for seed in range(seeds):
        with (work / f"eval-{seed}" / "per_query" / f"{dataset}.tsv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                found[row["system"]][seed][row["query-id"]] = float(row[MEASURE])
    return found


def summarise(work: Path, seeds: int, dataset: str, sets: tuple[str, ...] = ()) -> dict[str, Any]:
    """Means of each system by seed, and paired differences from LENS on each query's mean over the seeds.

    `sets` names parts of the data set by the start of their query ids; their means come with it.
    """
    values = per_query(work, seeds, dataset)
    queries = list(values[LENS_NAME][0])
    means = {
        system: np.mean([[runs[seed][query] for query in queries] for seed in sorted(runs)], axis=0)
        for system, runs in values.items()
    }
    others = [(LENS_NAME, system) for system in means if system != LENS_NAME]
    tested = compare({system: {MEASURE: value} for system, value in means.items()}, others)
    return {
        "queries": len(queries),
        "systems": {
            system: {
                "mean": round(float(means[system].mean()), 4),
                "seeds": [round(statistics.fmean(runs[seed][query] for query in queries), 4) for seed in sorted(runs)],
                "parts": {
                    name: round(
                        float(np.mean([m for q, m in zip(queries, means[system], strict=True) if q.startswith(name)])),
                        4,
                    )
                    for name in sets
                },
            }
            for system, runs in values.items()
        },
        "comparisons": [
            {name: getattr(row, name) for name in ("system", "other", "difference", "low", "high", "p", "p_holm")}
            for row in tested
        ],
    }


def training(folder: Path, last: float = 0.25) -> dict[str, float]:
    """In-batch accuracy at the start and over the last quarter of a run, and its last loss, activity and seconds."""
    rows = [row for row in read_log(folder / LOG_FILE) if "accuracy" in row]
    tail = rows[-max(round(len(rows) * last), 1) :]
    return {
        "accuracy_at_start": round(rows[0]["accuracy"], 4),
        "accuracy": round(statistics.fmean(row["accuracy"] for row in tail), 4),
        "loss": round(statistics.fmean(row["contrastive"] for row in tail), 4),
        "active_per_query": round(tail[-1]["active_per_query"], 1),
        "active_per_passage": round(tail[-1]["active_per_passage"], 1),
        "seconds": rows[-1]["seconds"],
    }


def collect(work: Path, settings: Settings, seeds: int, variants: list[str], steps: Steps, note: str) -> dict[str, Any]:
    """All figures of a finished work folder."""
    first = read_json(work / "eval-0" / "results.json")
    trained = {variant: [training(work / slug(variant, seed)) for seed in range(seeds)] for variant in variants}
    # A training that was interrupted knows its seconds better than its last start does.
    logged = {f"train {name} {seed}": run["seconds"] for name, runs in trained.items() for seed, run in enumerate(runs)}
    sizes = {name: {"documents": data["documents"]} for name, data in first["datasets"].items()}
    datasets = {"heldout": summarise(work, seeds, "heldout", settings.pairs)}
    datasets |= {name: summarise(work, seeds, name) for name in sizes if name != "heldout"}
    return {
        "note": note,
        "settings": dataclasses.asdict(settings),
        "recipe": {
            name: value for name, value in recipe(settings, work).items() if name not in ("base", "clusters", "data")
        },
        "base": read_json(work / "base" / "figures.json"),
        "training": trained,
        "datasets": {name: {**sizes[name], **figures} for name, figures in datasets.items()},
        "seconds": steps.seconds | logged,
        "machine": machine(),
        "versions": versions("lens-embeddings", "torch", "transformers", "peft", "tokenizers", "bm25s"),
    }


def page(content: dict[str, Any]) -> list[str]:
    """The section of docs/results.md."""
    settings, base, sets = content["settings"], content["base"], content["datasets"]
    heldout = sets["heldout"]
    seeds = len(next(iter(content["training"].values())))
    zero_shot = [name for name in sets if name != "heldout"]
    parts = list(heldout["systems"][LENS_NAME]["parts"])
    lines = [
        "## A tiny decoder from scratch: attention and pooling",
        "",
        "Written by `benchmarks/decoder.py` from `benchmarks/results/decoder.json`; do not edit.",
        "",
        f"Machine: {listed(content['machine'])}. Versions: {listed(content['versions'])}.",
        "",
        f"A Mistral of {base['parameters'] / 1e6:.1f} million weights ({settings['layers']} layers, width "
        f"{settings['width']}, byte-level BPE of {settings['vocabulary']:,} tokens), trained as a causal LM on "
        f"{base['tokens'] / 1e6:.1f} million tokens of textbooks, Wikipedia and training passages in "
        f"{base['seconds'] / 60:.0f} minutes (held-out loss {base['loss_per_token']:.2f} nats per token); its "
        f"vocabulary in {settings['k']:,} clusters; then LoRA for {settings['steps']} steps of "
        f"{settings['batch_size']} queries x {settings['group_size']} passages, centroids frozen. All variants share "
        f"data, batches, steps and seeds; figures are means over {seeds} seeds, each seed in brackets. In-batch "
        "accuracy is over the last quarter of the steps, on batches not seen before; guessing gives "
        f"{1 / (settings['batch_size'] * settings['group_size']):.3f}. `untrained` is {LENS_NAME} before training, "
        "`dense` the mean of the decoder's hidden states as they come. Passages are cut to "
        f"{settings['passage_characters']} characters for every system.",
        "",
        f"Held-out part: {heldout['queries']:,} queries over {heldout['documents']:,} passages, none of whose "
        "queries, passages or subjects training saw. Zero-shot sets: nothing of them was seen.",
        "",
        f"| {MEASURE} | in-batch accuracy | held-out | " + " | ".join(zero_shot) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(zero_shot),
    ]
    for system in heldout["systems"]:
        runs = content["training"].get(system)
        accuracy = f"{statistics.fmean(run['accuracy'] for run in runs):.3f}" if runs else ""
        cells = [sets[name]["systems"][system] for name in ("heldout", *zero_shot)]
        lines.append(f"| {system} | {accuracy} | " + " | ".join(map(cell, cells)) + " |")
    lines += [
        "",
        f"Parts of the held-out set, {MEASURE} (each query against all held-out passages):",
        "",
        "| | " + " | ".join(parts) + " |",
        "| --- |" + " ---: |" * len(parts),
    ]
    for system, figures in heldout["systems"].items():
        lines.append(f"| {system} | " + " | ".join(f"{figures['parts'][part]:.3f}" for part in parts) + " |")
    lines += [
        "",
        f"Paired differences of {MEASURE} on the held-out part, of each query's mean over the seeds (randomisation "
        "test with Holm's correction, bootstrap interval):",
        "",
        "| system | against | difference | 95% interval | p |",
        "| --- | --- | ---: | --- | ---: |",
    ]
    for row in heldout["comparisons"]:
        between = f"{row['low']:+.3f} to {row['high']:+.3f}"
        lines.append(
            f"| {row['system']} | {row['other']} | {row['difference']:+.3f} | {between} | {p_value(row['p_holm'])} |"
        )
    if content["note"]:
        lines += ["", content["note"]]
    total = sum(content["seconds"].values())
    return [*lines, "", f"The whole run took {total / 60:.0f} minutes on these cores, shared with other work."]


def cell(figures: dict[str, Any]) -> str:
    """A mean with its seeds in brackets."""
    seeds = figures["seeds"]
    return f"{figures['mean']:.3f}" + (f" ({', '.join(f'{value:.3f}' for value in seeds)})" if len(seeds) > 1 else "")


def prepare(work: Path, settings: Settings) -> None:
    """Makes `work`, or checks that it was made with the same settings; raises ValueError naming those that differ."""
    facts = json.loads(json.dumps(dataclasses.asdict(settings)))
    if not (work / "settings.json").is_file():
        if work.is_dir() and any(work.iterdir()):
            raise FileExistsError(f"{work} is not empty and holds no settings.json of this benchmark: choose another")
        with atomic_folder(work) as staged:
            write_json(staged / "settings.json", facts)
        return
    before = read_json(work / "settings.json")
    changed = [f"{name}: {before.get(name)!r} -> {facts[name]!r}" for name in facts if before.get(name) != facts[name]]
    if changed:
        raise ValueError(f"{work} was made with other settings ({', '.join(changed)}): choose another --work")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/decoder.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "decoder", help="folder that keeps finished steps")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each variant (2)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="beside LENS itself")
    parser.add_argument("--device", help="cuda, mps or cpu (the first there is)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file to write")
    parser.add_argument("--results", type=Path, default=PAGE, help="page whose section is written")
    parser.add_argument("--note", help="a sentence for the page (default: the stored one)")
    parser.add_argument("--page", action="store_true", help="write the section from the stored figures, no more")
    for item in dataclasses.fields(Settings):
        default: Any = item.default
        kind = str if isinstance(default, tuple) else type(default)
        many = {"nargs": "*"} if isinstance(default, tuple) else {}
        parser.add_argument(f"--{item.name}", type=kind, default=default, **many)
    options = parser.parse_args(arguments)
    try:
        if not options.page:
            values = {item.name: getattr(options, item.name) for item in dataclasses.fields(Settings)}
            settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
            if options.seeds < 1:
                raise ValueError(f"--seeds must be at least 1, found {options.seeds}")
            data, work = options.data.resolve(), options.work.resolve()
            need_data(data, settings)
            prepare(work, settings)
            variants = list(dict.fromkeys([LENS_NAME, *options.variants]))
            steps = run_steps(data, work, settings, options.seeds, variants, options.device)
            stored = read_json(options.output)["note"] if options.output.is_file() else ""
            note = stored if options.note is None else options.note
            write_json(options.output, collect(work, settings, options.seeds, variants, steps, note))
        elif options.note is not None:
            write_json(options.output, {**read_json(options.output), "note": options.note})
        write_section("decoder", page(read_json(options.output)), options.results)
    except (ValueError, OSError, ImportError, subprocess.CalledProcessError) as error:
        print(f"benchmarks/decoder.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The paper's analyses on small trained models over all local tasks: pruning, LENS + dense, K, pooling, attention.

    python benchmarks/analyses.py --data DATA --quickstart runs/quickstart --work runs/analyses [--decoder runs/decoder]
    python benchmarks/analyses.py --page                # the section of docs/results.md from the stored figures only

From a finished quick start the recipe lens-mini is trained again with other numbers of clusters and other pooling, on
the same examples; --decoder is the --work folder of a finished benchmarks/decoder.py, whose models differ in attention
too. Each analysis is one call of eval/analyse.py, the comparison of systems one of eval/run.py. What is there is not
made again, and the same command goes on where it stopped. Writes benchmarks/results/analyses.json, plots, and the
section.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments
from benchmarks.decoder import VARIANTS, slug
from benchmarks.page import PAGE, RESULTS, ROOT, listed, machine, p_value, versions, write_section
from eval.findings import mean_difference
from eval.tasks import DEV, local_task
from eval.usefulness import ORDERS
from lens.files import read_json, write_json

OUTPUT = RESULTS / "analyses.json"
PLOTS = PAGE.parent / "plots"
RECIPE = "train/recipes/lens-mini.yaml"
CLUSTERS = (1000, 8000)
POOLINGS = ("sum", "last")
MODEL = "LENS"
WHOLE = "unpruned"
KINDS = ("reranking", "summarization")
"""Second kinds in which a folder is a task too, where it has enough for that."""
LEAST = 200
"""Texts from which on a folder is taken as a task of summarisation: mteb's own has 100 of 16 summaries each."""
CAVEATS = {
    "attention": "The six variants of benchmarks/decoder.py, seed 0, on the same pairs, batches and steps; texts are "
    "cut at 64 tokens. Their pairs hold sentences of SQuAD, of which squad-xquad-en and qnli-dev are made; as all six "
    "saw them, differences between the six stand."
}
"""What is to be known of an analysis beside its notes."""
TITLES = {
    "run": "Systems",
    "pruning": "Pruning",
    "hybrid": "LENS + dense",
    "clusters": "Number of clusters",
    "pooling": "Pooling",
    "attention": "Attention and pooling of a tiny decoder",
}
PRUNED = ("--top-n", "16", "64", "256", "1024", "--drop", "0.5", "0.9")


def tasks_in(data: Path) -> tuple[list[str], list[str]]:
    """The folders of `data` that are tasks, as DIR or DIR:KIND, and those of them that have a dev split."""
    found, dev = [], []
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        given = [str(folder), *(f"{folder}:{kind}" for kind in KINDS)]
        for place in given:
            try:
                task = local_task(place)
                task.load_data()
            except (OSError, ValueError):  # text to train on, or too little for this kind
                continue
            few = task.metadata.type == "Summarization" and len(task.dataset[task.eval_splits[0]]) < LEAST
            task.unload_data()
            if not few:
                found.append(place)
        try:
            local_task(str(folder), DEV)
        except (OSError, ValueError):
            continue
        if str(folder) in found and local_task(str(folder)).eval_splits == ["test"]:
            dev.append(str(folder))
    return found, dev


def program(*command: str | Path) -> None:
    """Runs one of the project's programs; raises CalledProcessError when it fails, or some of its tasks do."""
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def train(options: argparse.Namespace) -> dict[str, Path]:
    """The models by name: the quick start's, and those that are trained here."""
    work, quick = options.work, options.quickstart
    facts = read_json(quick / "model" / "lens.json")
    base, k = facts["base"], facts["dimensions"]
    models = {MODEL: quick / "model"}
    wanted = {f"{size:,} clusters": (size, "max") for size in CLUSTERS if size != k}
    wanted |= {f"{pooling} pooling": (k, pooling) for pooling in POOLINGS}
    for name, (size, pooling) in wanted.items():
        clusters = quick / "clusters" if size == k else work / f"clusters-{size}"
        if not (clusters / "clusters.json").is_file():
            program("clustering/run.py", "--model", base, "--k", str(size), "--output", clusters)
        models[name] = work / f"{pooling}-{size}"
        if not (models[name] / "lens.json").is_file():
            data = ("--data", quick / "train" / "examples.jsonl")
            teacher = ("--teacher_embeddings", quick / "train" / "teacher.safetensors")
            fields = ("--base", base, "--clusters", clusters, *data, *teacher, "--pooling", pooling)
            program("train/run.py", RECIPE, *fields, "--output", models[name])
    return models


def analyse(options: argparse.Namespace) -> None:
    """Runs the programs, each into a folder of its own in `options.work`."""
    models = train(options)
    tasks, dev = tasks_in(options.data)
    ranked = [place for place in dev if local_task(place).metadata.type == "Retrieval"]
    local, whole = ("--local", *tasks), ("--model", f"{MODEL}={models[MODEL]}")
    sizes = [f"{name}={models[name]}" for name in models if "clusters" in name]
    pooled = [f"{name}={models[name]}" for name in models if "pooling" in name]
    others = [f"{name}={options.decoder / slug(name, 0)}" for name in VARIANTS] if options.decoder else []
    fused = ("--baselines", "bm25", "dense", "--hybrids", f"{MODEL}+dense", f"{MODEL}+bm25", "--dev", *ranked)
    kept = ("--embeddings", options.work / "embeddings")
    side_by_side = ("eval/analyse.py", "variants", *whole)
    read = ("--results", options.work / "models")
    commands: dict[str, tuple[Any, ...]] = {
        "run": ("eval/run.py", *whole, *local, *fused, *kept),
        "pruning": ("eval/analyse.py", "pruning", *whole, *local, *PRUNED, *kept),
        "hybrid": ("eval/analyse.py", "hybrid", *whole, *local, "--dev", *dev, *kept),
        "models": (*side_by_side, *sizes, *pooled, *local, "--axis", "none", *kept),
        "clusters": (*side_by_side, *sizes, *local, "--axis", "dimensions", *read),
        "pooling": (*side_by_side, *pooled, *local, "--axis", "none", *read),
    }
    if others:
        commands["attention"] = ("eval/analyse.py", "variants", "--model", *others, *local, "--axis", "none")
    only = {*options.only, *(["models"] if {"clusters", "pooling"} & {*options.only} else [])}
    for name, command in commands.items():
        if name in only:
            program(*command, "--device", "cpu", "--output", options.work / name)


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the analyses that are finished, and their plots into docs/plots."""
    content: dict[str, Any] = {"machine": machine(), "versions": versions("lens-embeddings", "torch", "mteb")}
    content["analyses"] = {}
    for name in TITLES:
        place = options.work / name
        file = place / ("report.json" if name == "run" else "results.json")
        if not file.is_file():
            continue
        held = read_json(file)
        if held["failures"]:
            raise ValueError(f"{file} tells of tasks that failed: {held['failures'][0]}")
        if name == "run":
            kept = ("overview", "tasks", "comparisons", "costs")
            content["analyses"][name] = {key: held[key] for key in kept}
            content["analyses"][name]["hybrids"] = read_json(place / "hybrids.json")
            continue
        points = [
            {**point, "scores": {task: round(score, 5) for task, score in point["scores"].items()}}
            for point in held["points"]
        ]
        kept = [key for key in ("sentences", "tasks", "notes", "weight") if key in held]
        content["analyses"][name] = {**{key: held[key] for key in kept}, "points": points}
        if (place / "plot.svg").is_file():
            shutil.copyfile(place / "plot.svg", PLOTS / f"analysis-{name}.svg")
    return content


@dataclass(frozen=True)
class Claim:
    """A statement of the paper: in an analysis `point` is better than `other`, or, with `harmless`, loses no more than
    a point. `paper` is what it found; `kind` narrows the tasks to a type."""

    text: str
    paper: str
    analysis: str
    point: str
    other: str
    kind: str | None = None
    harmless: bool = False


def claims(analyses: Mapping[str, Any]) -> list[Claim]:
    """What can be held against these analyses; figures are of MTEB(eng, v1), the ablation's of 7 of its tasks."""
    found = [
        Claim("LENS is better than the dense embedding of its backbone", "71.62 : 71.24", "hybrid", MODEL, "dense"),
        Claim("8,000 clusters are better than 4,000", "71.62 : 71.22", "clusters", "8,000 clusters", MODEL),
        *(
            Claim(
                f"Dimensions can be pruned after training: here half, {how}", there, "pruning", point, WHOLE, None, True
            )
            for how, there, point in (
                ("by mean square", "yes", f"drop 50%, {ORDERS[0]}"),
                ("by variance", "yes", f"drop 50%, {ORDERS[1]}"),
                ("at random, for comparison", "–", f"drop 50%, {ORDERS[2]}"),
            )
        ),
        Claim("Maximum pooling is better than sum pooling", "69.07 : 68.38", "pooling", MODEL, "sum pooling"),
        Claim("Maximum pooling is better than the last position", "69.07 : 68.15", "pooling", MODEL, "last pooling"),
    ]
    if "hybrid" in analyses:
        joined = next(p["name"] for p in analyses["hybrid"]["points"] if p["weight"] == analyses["hybrid"]["weight"])
        for member in (MODEL, "dense"):
            text = f"LENS + dense is better than {member} in retrieval"
            found.append(Claim(text, "yes (BEIR)", "hybrid", joined, member, "Retrieval"))
    ablation = {"max": ("69.07", "64.15"), "sum": ("68.38", "62.48"), "last": ("68.15", "67.73")}
    for pooling, scores in ablation.items():
        text = f"Bidirectional attention is better than causal, {pooling} pooling"
        pair = f"bidirectional {pooling}", f"causal {pooling}"
        found.append(Claim(text, " : ".join(scores), "attention", *pair))
    for pooling in ("sum", "last"):
        text = f"Maximum pooling is better than {pooling} pooling, bidirectional"
        pair = "bidirectional max", f"bidirectional {pooling}"
        found.append(Claim(text, f"{ablation['max'][0]} : {ablation[pooling][0]}", "attention", *pair))
    return [claim for claim in found if claim.analysis in analyses]


def verdicts(analyses: Mapping[str, Any]) -> list[str]:
    """A table of the paper's statements and whether they held here."""
    lines = [
        "| the paper's statement | there | here | tasks | Δ | 95% interval | p | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for claim in claims(analyses):
        held = analyses[claim.analysis]
        scores = {point["name"]: point["scores"] for point in held["points"]}
        tasks = [name for name, facts in held["tasks"].items() if claim.kind in (None, facts["type"])]
        one, other = ([scores[point][task] for task in tasks] for point in (claim.point, claim.other))
        found = mean_difference(one, other)
        p = found.p_loss if claim.harmless else found.p
        if claim.harmless:
            verdict = "held" if found.harmless else "not shown"
        else:
            verdict = "undecided" if not found.told else "held" if found.mean > 0 else "reversed"
        cells = [f"{fmean(one) * 100:.2f} : {fmean(other) * 100:.2f}", str(len(tasks)), *difference(asdict(found))]
        lines.append(
            f"| {claim.text} | {claim.paper} | {' | '.join(cells)} | {'–' if p is None else p_value(p)} | {verdict} |"
        )
    return lines


def section(content: Mapping[str, Any]) -> list[str]:
    """The section of docs/results.md."""
    lines = [
        "## The paper's analyses on small models",
        "",
        "Written by `benchmarks/analyses.py` from `benchmarks/results/analyses.json`; do not edit. "
        f"Machine: {listed(content['machine'])}. Versions: {listed(content['versions'])}.",
        "",
        "LENS is the quick start's model (MiniLM, trained on Python's documentation), which saw nothing of these sets; "
        "the other models share its recipe, examples and steps. Tasks are all folders of `--data` that are one; scores "
        "are their main measures times 100, and a mean gives every task the same weight. Intervals of the analyses are "
        "over tasks, those of the systems over queries, pairs, texts and draws of these tasks.",
        "",
        "### What held of the paper",
        "",
        "Mean scores over the tasks of an analysis, of the paper's models and of these. Held or reversed: the "
        "randomisation test over tasks tells the difference from chance (p < .05, two-sided); for pruning, a loss of "
        "more than a point is excluded (p < .05, one-sided). Not corrected for the number of statements. The decoder "
        "is another model, tiny and trained from scratch (below).",
        "",
        *verdicts(content["analyses"]),
    ]
    for name, held in content["analyses"].items():
        lines += ["", f"### {TITLES[name]}", ""]
        lines += systems(held) if name == "run" else analysis(name, held)
    return lines


def analysis(name: str, held: Mapping[str, Any]) -> list[str]:
    """One analysis: its sentences, table and plot."""
    kinds = [*dict.fromkeys(facts["type"] for facts in held["tasks"].values()), "all"]
    first = held["points"][0]["name"]
    lines = ["\n".join(f"- {sentence}" for sentence in held["sentences"]), ""]
    if (PLOTS / f"analysis-{name}.svg").is_file():
        lines += [f"![Mean score](plots/analysis-{name}.svg)", ""]
    lines += [
        f"| point | {' | '.join(kinds)} | Δ to {first} | 95% interval |",
        "| --- |" + " ---: |" * (len(kinds) + 2),
    ]
    for point in held["points"]:
        found = point["difference"]
        cells = [score(point["means"][kind]) for kind in kinds] + (["–", "–"] if found is None else difference(found))
        lines.append(f"| {point['name']} | {' | '.join(cells)} |")
    notes = [*held["notes"], *([CAVEATS[name]] if name in CAVEATS else [])]
    return [*lines, *([""] if notes else []), *(f"- {note}" for note in notes)]


def systems(held: Mapping[str, Any]) -> list[str]:
    """LENS beside the baselines and hybrids."""
    overview = held["overview"]
    kinds = list(overview["tasks"])
    lines = [
        "| system | " + " | ".join(f"{kind} ({overview['tasks'][kind]})" for kind in kinds) + " |",
        "| --- |" + " ---: |" * len(kinds),
    ]
    for name, means in overview["systems"].items():
        lines.append(f"| {name} | " + " | ".join(score(means[kind]) for kind in kinds) + " |")
    lines += ["", "| mean over the tasks of both | tasks | Δ | 95% interval | p (Holm) |", "| --- |" + " ---: |" * 4]
    for row in held["comparisons"]:
        mean = row["mean"]
        if mean is not None:
            cells = [str(mean["tasks"]), *difference({**mean, "mean": mean["difference"]}), p_value(mean["p_holm"])]
            lines.append(f"| {row['system']} vs. {row['other']} | " + " | ".join(cells) + " |")
    chosen = ", ".join(f"{name} {facts['weight']:g}" for name, facts in held["hybrids"].items())
    return [*lines, "", f"Weights of the first member, chosen on dev splits: {chosen}."]


def score(value: float | None) -> str:
    """A score for a table, times 100."""
    return "–" if value is None else f"{100 * value:.2f}"


def difference(found: Mapping[str, float | None]) -> list[str]:
    """A difference and its interval for a table, times 100."""
    low, high, mean = found["low"], found["high"], found["mean"]
    shown = "–" if low is None or high is None else f"{100 * low:+.2f} to {100 * high:+.2f}"
    return ["–" if mean is None else f"{100 * mean:+.2f}", shown]


def decoders(text: str) -> Path:
    """The work folder of a finished benchmarks/decoder.py."""
    for name in VARIANTS:
        arguments.artifact(str(Path(text) / slug(name, 0)))
    return Path(text).resolve()


def finished(text: str) -> Path:
    """A folder with a finished quick start."""
    folder = Path(text)
    for part in ("model/lens.json", "clusters/clusters.json", "train/examples.jsonl", "train/teacher.safetensors"):
        if not (folder / part).is_file():
            raise argparse.ArgumentTypeError(f"{folder} is no finished quick start: it has no {part}")
    return folder.resolve()


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of folders, as eval/run.py --local takes each")
    add("--quickstart", type=finished, help="output folder of a finished quick start")
    add("--decoder", type=decoders, help="work folder of a finished benchmarks/decoder.py")
    add("--work", type=Path, default=Path("runs/analyses"), help="folder of all models and results (runs/analyses)")
    add("--only", nargs="+", choices=TITLES, default=list(TITLES), help="analyses to run; those there are all shown")
    add("--page", action="store_true", help="write the section from the stored figures, no more")
    options = parser.parse_args(given)
    arguments.check(parser, options, OUTPUT)
    if not options.page:
        if options.data is None or options.quickstart is None:
            parser.error("give --data and --quickstart, or --page")
        options.data, options.work = options.data.resolve(), options.work.resolve()
        options.work.mkdir(parents=True, exist_ok=True)
        analyse(options)
        write_json(OUTPUT, collect(options))
    write_section("analyses", section(read_json(OUTPUT)))


if __name__ == "__main__":
    main()

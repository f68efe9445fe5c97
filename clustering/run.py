"""Clusters a model's vocabulary: `python clustering/run.py --model PATH_OR_ID --k 4000 --output DIR`.

Reads one tensor of the checkpoint, splits its rows into K clusters, and writes clusters.safetensors, clusters.json
and clusters.html. Also carries the `.npy` heads of the original release in and out.

Legend: V rows of the head (vocabulary entries), D hidden size, K clusters.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on the path
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait by spinning are slow on busy cores

import numpy as np
import torch
from safetensors.torch import save

from clustering import report, weights
from clustering.kmeans import ALGORITHMS, INITS, Clustering, check_options, kmeans, nearest, sum_of_squares
from lens import __version__
from lens.files import atomic_file, atomic_folder, check_output, read_json, read_tensors, write_json
from lens.program import interruptible

EXAMPLE = """examples:
  python clustering/run.py --model mistralai/Mistral-7B-v0.1 --k 4000 --output runs/clusters
  python clustering/run.py --model FOLDER --import-npy lm_head/4000.npy --output runs/released
  python clustering/run.py --clusters runs/clusters --export-npy 4000.npy
"""
ROWS = 4096  # rows of the head whose distances are taken at once
EXCLUDABLE = ("special", "unused", "unnamed")


def parser() -> argparse.ArgumentParser:
    """The command line, with units and examples."""
    parser = argparse.ArgumentParser(
        prog="clustering/run.py",
        description="Cluster the vocabulary of a language model by k-means over the rows of its head.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", metavar="PATH_OR_ID", help="folder of a Hugging Face model, or a hub id such as org/name")
    add("--revision", help="branch, tag or commit of a hub id (default: its main branch)")
    add("--tensor", metavar="NAME", help="tensor to cluster (default: the output head, else the word embeddings)")
    add("--k", type=int, help="clusters, 2 to the number of vocabulary rows (the paper uses 4000 and 8000)")
    add("--every-token", action="store_true", help="no clusters: each row stays a dimension of its own")
    add(
        "--output",
        metavar="DIR",
        help="folder to write: clusters.safetensors, clusters.json and, of clusters, clusters.html",
    )
    add("--overwrite", action="store_true", help="replace what is at --output or --export-npy, once the new is whole")
    add("--seed", type=int, default=0, help="seed of the start (default: %(default)s)")
    add(
        "--algorithm",
        choices=ALGORITHMS,
        default=ALGORITHMS[0],
        help="who does the rounds: lloyd (here, until nothing moves), faiss, or sklearn as the slow reference "
        "(default: %(default)s)",
    )
    add("--init", choices=INITS, default=INITS[0], help="how the centroids start (default: %(default)s)")
    add("--iterations", type=int, default=100, help="rounds, at most (default: %(default)s)")
    add("--spherical", action="store_true", help="compare directions (cosine) rather than distances")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: cuda for lloyd where there is one)")
    add(
        "--exclude",
        nargs="+",
        choices=EXCLUDABLE,
        default=[],
        help="rows to leave out, which get label -1: special tokens, [unused] placeholders, rows without a token "
        "(default: none is left out)",
    )
    add("--map", choices=("tsne", "pca"), default="tsne", help="the page's map; pca is instant (default: %(default)s)")
    add("--import-npy", metavar="FILE", help="take the centroids from a (K, D) .npy head of the original release")
    add("--clusters", metavar="DIR", help="a folder written by this program, for --export-npy alone")
    add("--export-npy", metavar="FILE", help="write the centroids as a float32 (K, D) .npy head")
    return parser


@interruptible("clustering/run.py")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code, 2 after a user's error, which takes one line on stderr."""
    options = parser().parse_args(arguments)
    try:
        if options.clusters is not None:
            export_folder(options)
        else:
            cluster(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def cluster(options: argparse.Namespace) -> None:
    """Clusters a model, or imports a head for it, and writes the folder."""
    check(options)
    started = time.perf_counter()

    def log(message: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {message}", file=sys.stderr, flush=True)

    source = weights.Source(options.model, options.revision)
    imported = read_npy(options.import_npy) if options.import_npy else None
    head = weights.read_head(source, options.tensor)
    rows, width = head.weight.shape
    log(f"{head.kind} {head.tensor} ({rows} x {width}, {head.dtype}) from {head.file}")
    names, roles = report.read_tokens(source.tokenizer_folder(), rows)
    kept = np.flatnonzero([role not in options.exclude for role in roles])
    if options.every_token:
        rows_kept = head.weight[kept].astype(np.float32)
        result = Clustering(rows_kept, np.arange(len(kept), dtype=np.int32), 0.0, 0, True, 0.0)
    elif imported is not None:
        result = import_centroids(imported, head.weight[kept], options.import_npy)
    else:
        check_options(options.k, len(kept))
        result = kmeans(
            head.weight[kept],
            options.k,
            seed=options.seed,
            iterations=options.iterations,
            init=options.init,
            algorithm=options.algorithm,
            spherical=options.spherical,
            device=options.device,
            log=log,
        )
    labels = np.full(rows, -1, dtype=np.int32)
    labels[kept] = result.labels
    log(f"{len(result.centroids)} clusters, inertia {result.inertia:.1f}, converged: {result.converged}")
    with atomic_folder(options.output, options.overwrite, "clusters.json") as folder:
        write(folder, options, head, result, labels, names, roles)
        log("folder written")
    if options.export_npy:
        write_npy(options.export_npy, result.centroids, options.overwrite)
    log(f"wrote {options.output}")


def check(options: argparse.Namespace) -> None:
    """Refuses what cannot work, before anything is read; resolves the device."""
    if not options.model:
        raise ValueError("--model is missing: give a folder or a hub id (or --clusters with --export-npy)")
    if not options.output:
        raise ValueError("--output is missing: give the folder to write")
    if options.device == "auto":
        options.device = "cuda" if options.algorithm == "lloyd" and torch.cuda.is_available() else "cpu"
    if (options.k is not None) + (options.import_npy is not None) + options.every_token != 1:
        raise ValueError(
            "give either --k (to cluster), --import-npy (to take centroids from a file) or --every-token (for a head "
            "of the whole vocabulary)"
        )
    if options.k is not None:
        check_options(
            options.k,
            iterations=options.iterations,
            init=options.init,
            algorithm=options.algorithm,
            spherical=options.spherical,
            device=options.device,
        )
    if options.seed < 0 or options.seed >= 2**32:
        raise ValueError(f"--seed is {options.seed}: choose 0 to {2**32 - 1}")
    report.check_libraries()
    check_output(options.output, options.overwrite, "clusters.json")
    if options.export_npy:
        check_output(options.export_npy, options.overwrite)


def write(
    folder: Path,
    options: argparse.Namespace,
    head: weights.Head,
    result: Clustering,
    labels: np.ndarray,
    names: list[str | None],
    roles: list[str],
) -> None:
    """Fills a clusters folder: tensors, facts and page."""
    k, width = result.centroids.shape
    tensors = {"centroids": torch.from_numpy(result.centroids), "labels": torch.from_numpy(labels)}
    (folder / "clusters.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    sizes = np.bincount(labels[labels >= 0], minlength=k)
    made = options.k is not None
    facts: dict[str, Any] = {
        "format_version": 1,
        "lens_version": __version__,
        "base_model": head.model,
        "revision": head.revision,
        "tensor": head.tensor,
        "file": head.file,
        "kind": head.kind,
        "hidden_size": width,
        "vocab_size": len(labels),
        "k": k,
        "seed": options.seed if made else None,
        "algorithm": options.algorithm if made else "imported" if options.import_npy else "none",
        "init": options.init if made else None,
        "iterations": result.iterations,
        "converged": result.converged,
        "spherical": options.spherical and made,
        "inertia": result.inertia,
        "seconds": round(result.seconds, 3),
        "excluded": int((labels < 0).sum()),
        "empty": int((sizes == 0).sum()),
        "variants": report.variants(names, labels, seed=0),
        "configuration": vars(options),
        "sizes": sizes.tolist(),
    }
    write_json(folder / "clusters.json", facts)
    if options.every_token:  # a page of single tokens has nothing to tell
        return
    distance = np.zeros(len(labels))
    for start in range(0, len(labels), ROWS):
        part = slice(start, start + ROWS)
        offset = head.weight[part] - result.centroids[np.maximum(labels[part], 0)]
        distance[part] = np.linalg.norm(offset, axis=1)
    page = report.page(facts, names, roles, labels, result.centroids, distance, options.map)
    (folder / "clusters.html").write_text(page, encoding="utf-8")


def read_npy(path: str) -> np.ndarray:
    """Reads a (K, D) .npy head as float32; raises FileNotFoundError, or ValueError for what is no such matrix."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: expected a .npy file with a (K, D) array")
    try:
        centroids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a whole .npy file of numbers: {error}") from error
    if not isinstance(centroids, np.ndarray) or centroids.ndim != 2 or centroids.dtype.kind != "f":
        found = getattr(centroids, "shape", type(centroids).__name__)
        raise ValueError(f"{path}: expected a (K, D) array of floats, found {found}")
    if len(centroids) < 2:
        raise ValueError(f"{path}: expected at least 2 centroids, found {len(centroids)}")
    if not np.isfinite(centroids).all():
        raise ValueError(f"{path} holds NaN or infinite values: get the file again")
    return centroids.astype(np.float32)


def import_centroids(centroids: np.ndarray, rows: np.ndarray, path: str) -> Clustering:
    """Gives each row (V, D) the label of its nearest centroid (K, D); the centroids stay as the file has them."""
    started = time.perf_counter()
    if centroids.shape[1] != rows.shape[1]:
        raise ValueError(
            f"{path}: centroids have width {centroids.shape[1]}, the model's head {rows.shape[1]}: "
            "give the model that the head was made for"
        )
    check_options(len(centroids), len(rows))
    labels = nearest(rows, centroids)
    inertia = sum_of_squares(rows, labels, centroids)
    return Clustering(centroids, labels, inertia, 0, False, time.perf_counter() - started)


def write_npy(path: str, centroids: np.ndarray, overwrite: bool) -> None:
    """Writes centroids (K, D) in the form of the original release, atomically."""
    with atomic_file(path, overwrite) as temporary, temporary.open("wb") as file:
        np.save(file, centroids, allow_pickle=False)


def export_folder(options: argparse.Namespace) -> None:
    """Writes the centroids of an existing clusters folder as .npy."""
    others = (options.model, options.output, options.k, options.import_npy, options.every_token)
    if options.export_npy is None or any(others):
        raise ValueError("--clusters goes with --export-npy alone")
    check_output(options.export_npy, options.overwrite)
    folder = Path(options.clusters)
    facts = read_json(folder / "clusters.json")
    shape = (facts.get("k"), facts.get("hidden_size"))
    centroids = read_tensors(folder / "clusters.safetensors", {"centroids": shape})["centroids"]
    write_npy(options.export_npy, centroids.numpy(), options.overwrite)
    print(f"wrote {options.export_npy} {tuple(centroids.shape)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

"""K-means over the rows of a head: (V, D) -> (K, D) centroids and a label for every row.

Made for many clusters of few points (V / K below ten). There the start decides the result, so seeding is the greedy
form of k-means++; and after a few rounds most centroids stand still, so a round scores points only against those
that moved, and against all of them only where a bound says that another centroid may have come nearest.

Legend: V points (rows of the head), U distinct points, D hidden size, K clusters, S candidates, T centroids that moved.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ALGORITHMS = ("lloyd", "faiss", "sklearn")
INITS = ("k-means++", "random")
CHUNK = 2048  # points scored at once
COLUMNS = 256  # hidden dimensions averaged at once, in float64
TRIALS = 6  # candidates drawn for each centre that seeding keeps
BATCH = 16  # centres kept from one draw of candidates

Log = Callable[[str], None]


@dataclass(frozen=True)
class Clustering:
    """K clusters of V points: every cluster has a member, and every centroid is the mean of its members.

    When `converged`, every label is also the nearest centroid, to float32 rounding of the distances. When the rounds
    ran out first, the means hold, and a few points may have a nearer centroid than their own.
    """

    centroids: np.ndarray  # (K, D) float32
    labels: np.ndarray  # (V,) int32
    inertia: float  # sum over points of the squared distance to their centroid
    iterations: int
    converged: bool
    seconds: float


def check_options(
    k: int,
    rows: int | None = None,
    *,
    iterations: int = 1,
    init: str = INITS[0],
    algorithm: str = ALGORITHMS[0],
    spherical: bool = False,
    device: str = "cpu",
) -> None:
    """Refuses options that cannot work: ValueError with value, limit and remedy, ImportError for a missing library."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r} is unknown: choose one of {', '.join(ALGORITHMS)}")
    if init not in INITS:
        raise ValueError(f"init {init!r} is unknown: choose one of {', '.join(INITS)}")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: choose 1 or more rounds")
    if k < 2:
        raise ValueError(f"k is {k}, but at least 2 clusters are needed: choose 2 <= k <= number of rows")
    if rows is not None and k > rows:
        raise ValueError(f"k is {k}, but there are only {rows} rows to cluster: choose k <= {rows}")
    _check_device(device)
    if algorithm == "faiss":
        faiss = _import("faiss", "faiss-cpu")
        if device != "cpu" and not (hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus()):
            raise ValueError(
                f"device {device!r}: this faiss sees no GPU; choose cpu, algorithm lloyd, or install faiss-gpu"
            )
    elif algorithm == "sklearn":
        _import("sklearn", "scikit-learn")
        if spherical:
            raise ValueError("scikit-learn has no spherical k-means: choose --algorithm lloyd or faiss")
        if device != "cpu":
            raise ValueError(
                f"device {device!r}: scikit-learn runs on cpu only; choose --device cpu or another algorithm"
            )


def kmeans(
    points: np.ndarray,
    k: int,
    *,
    seed: int = 0,
    iterations: int = 100,
    init: str = INITS[0],
    algorithm: str = ALGORITHMS[0],
    spherical: bool = False,
    device: str = "cpu",
    log: Log = lambda message: None,
) -> Clustering:
    """Splits points (V, D) into k clusters, none of them empty, and leaves the input as it is.

    The same points, seed and machine give the same bits, in whatever order the rows come; equal rows count as one
    point with a weight, so they share a cluster. "lloyd" runs until nothing moves, at most `iterations` rounds, on
    any torch device; "faiss" and "sklearn" run those libraries for as many, then one round of ours, which repairs
    empty clusters. `spherical` compares directions: rows are scaled to length 1, the inertia is that of the scaled
    rows, and each centroid has the mean direction of its members at their mean length.

    Raises ValueError naming value, limit and remedy for k outside 2..V, fewer than k distinct rows, points that are
    not a finite matrix, and unknown options; ImportError naming the pip command where a library is missing.
    Source: Arthur and Vassilvitskii 2007 (greedy k-means++); Hamerly 2010 (the bound).
    """
    if points.ndim != 2:
        raise ValueError(f"points should be a matrix (V, D), found shape {points.shape}")
    check_options(
        k, len(points), iterations=iterations, init=init, algorithm=algorithm, spherical=spherical, device=device
    )
    started = time.perf_counter()
    rows = np.ascontiguousarray(points, dtype=np.float32) + 0.0  # a copy, in which -0.0 is 0.0
    if not np.isfinite(rows).all():
        raise ValueError("points hold NaN or infinite values: repair or leave out those rows")
    scaled = _unit(rows) if spherical else rows
    distinct, inverse, counts = _distinct(scaled)
    if len(distinct) < k:
        raise ValueError(
            f"k is {k}, but only {len(distinct)} of the {len(rows)} rows are distinct: choose k <= {len(distinct)}"
        )
    if not spherical:  # distances do not depend on the origin, their rounding does
        distinct -= np.average(distinct, axis=0, weights=counts).astype(np.float32)
    x = torch.from_numpy(distinct).to(device)
    weight = torch.from_numpy(counts.astype(np.float32)).to(device)
    if algorithm == "lloyd":
        start, rounds = x[_start(x, weight, k, seed, init, log)], iterations
    else:
        library = _faiss if algorithm == "faiss" else _sklearn
        start, rounds = library(x, weight, k, seed, iterations, init, spherical, log).to(device), 1
    state = _Lloyd(x, weight, start, spherical)
    ran, converged = state.run(rounds, log if algorithm == "lloyd" else lambda message: None)
    labels = state.label.cpu().numpy().astype(np.int32)[inverse]
    centroids = cluster_means(scaled, labels, k)
    inertia = sum_of_squares(scaled, labels, _unit(centroids) if spherical else centroids)
    if spherical:
        lengths = np.linalg.norm(rows, axis=1)
        mean_length = np.bincount(labels, lengths, minlength=k) / np.bincount(labels, minlength=k)
        centroids = _unit(centroids) * mean_length[:, None]
    ran = ran if algorithm == "lloyd" else iterations
    return Clustering(centroids.astype(np.float32), labels, inertia, ran, converged, time.perf_counter() - started)


def nearest(points: np.ndarray, centroids: np.ndarray, device: str = "cpu") -> np.ndarray:
    """The index of each point's nearest centroid; points (V, D), centroids (K, D) -> (V,) int32."""
    origin = points.mean(axis=0, dtype=np.float64).astype(np.float32)
    c = torch.from_numpy((centroids - origin).astype(np.float32)).to(device)  # (K, D)
    half = c.square().sum(1) / 2  # (K,)
    labels = np.empty(len(points), dtype=np.int32)
    for start in range(0, len(points), CHUNK):
        x = torch.from_numpy(points[start : start + CHUNK] - origin).to(device)  # (CHUNK, D)
        labels[start : start + CHUNK] = (x @ c.T - half).argmax(1).cpu().numpy()
    return labels


def cluster_means(points: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """The mean of each cluster's points, summed in float64; (V, D), (V,) -> (k, D); no cluster may be empty."""
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels, minlength=k)
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    means = np.empty((k, points.shape[1]))
    for column in range(0, points.shape[1], COLUMNS):
        part = points[order, column : column + COLUMNS].astype(np.float64)
        means[:, column : column + COLUMNS] = np.add.reduceat(part, first, axis=0) / sizes[:, None]
    return means


class _Lloyd:
    """Lloyd's rounds over weighted distinct points, each round at the cost of what still moves.

    The nearest centroid is the one of the highest score x.c - |c|^2 / 2. `best` (U,) is a point's score with its own
    centroid, `other` (U,) a bound from above on its score with every other one.
    """

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, centroids: torch.Tensor, spherical: bool) -> None:
        self.x, self.weight, self.spherical = x, weight, spherical  # (U, D), (U,)
        self.c = centroids.clone()  # (K, D)
        self.half = self.c.square().sum(1) / 2  # (K,)
        self.k = len(centroids)
        self.label = torch.zeros(len(x), dtype=torch.long, device=x.device)  # (U,)
        self.best = torch.empty(len(x), device=x.device)  # (U,)
        self.other = torch.empty(len(x), device=x.device)  # (U,)
        self.buffer = torch.empty(min(CHUNK, len(x)) * self.k, device=x.device)
        self._score_all(torch.arange(len(x), device=x.device))

    def run(self, rounds: int, log: Log) -> tuple[int, bool]:
        """Runs until no label changes or the rounds are used up; returns (rounds run, nothing moves any more).

        Ends with a repaired assignment whose means are not yet taken.
        """
        moved = torch.ones(self.k, dtype=torch.bool, device=self.x.device)  # (K,)
        moved |= self._repair()
        for number in range(1, rounds + 1):
            self._move_centroids(moved)
            before = self.label.clone()
            self._relabel(moved)
            changed = self.label != before  # (U,)
            count = int(changed.sum())
            if not count:
                log(f"round {number}: nothing moves")
                return number, True
            moved.zero_()
            moved[before[changed]] = True
            moved[self.label[changed]] = True
            moved |= self._repair()
            log(f"round {number}: {count} of {len(self.x)} points moved, {int(moved.sum())} centroids to follow")
        return rounds, False

    def _score(self, x: torch.Tensor, centroids: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
        out = self.buffer[: len(x) * len(centroids)].view(len(x), len(centroids))
        return torch.mm(x, centroids.T, out=out).sub_(half)

    def _score_all(self, points: torch.Tensor) -> None:
        for part in points.split(CHUNK):
            scores = self._score(self.x[part], self.c, self.half)  # (CHUNK, K)
            self.best[part], label = scores.max(1)
            self.label[part] = label
            self.other[part] = scores.scatter_(1, label[:, None], -torch.inf).amax(1)

    def _score_moved(self, moved: torch.Tensor) -> None:
        """Compares all points with the moved centroids alone; the score with their own, `best`, is up to date."""
        which = moved.nonzero()[:, 0]  # (T,)
        column = torch.full((self.k,), -1, device=which.device)  # (K,): place of each moved centroid in `which`
        column[which] = torch.arange(len(which), device=which.device)
        centroids, half = self.c[which], self.half[which]
        for start in range(0, len(self.x), CHUNK):
            part = slice(start, start + CHUNK)
            best, other, label = self.best[part], self.other[part], self.label[part]  # views
            scores = self._score(self.x[part], centroids, half)  # (CHUNK, T)
            own = column[label]
            has = (own >= 0).nonzero()[:, 0]
            scores[has, own[has]] = -torch.inf
            top = scores.amax(1)
            torch.maximum(other, top, out=other)
            better = (top > best).nonzero()[:, 0]
            best[better] = top[better]
            label[better] = which[scores[better].argmax(1)]

    def _relabel(self, moved: torch.Tensor) -> None:
        own = moved[self.label].nonzero()[:, 0]
        for part in own.split(CHUNK):
            label = self.label[part]
            self.best[part] = (self.x[part] * self.c[label]).sum(1) - self.half[label]
        self._score_moved(moved)
        self._score_all(own[self.best[own] < self.other[own]])

    def _move_centroids(self, moved: torch.Tensor) -> None:
        """Puts each moved centroid at the weighted mean of its members, summed in float64 in a fixed order."""
        which = moved.nonzero()[:, 0]
        members = moved[self.label].nonzero()[:, 0]
        members = members[self.label[members].argsort(stable=True)]
        sizes = torch.bincount(self.label[members], minlength=self.k)[which]
        weight = self.weight[members].double()[:, None]
        total = torch.segment_reduce(weight, "sum", lengths=sizes, axis=0)
        for column in range(0, self.x.shape[1], COLUMNS):
            part = self.x[:, column : column + COLUMNS][members].double() * weight
            mean = torch.segment_reduce(part, "sum", lengths=sizes, axis=0) / total
            self.c[which, column : column + COLUMNS] = mean.float()
        if self.spherical:
            self.c[which] = torch.nn.functional.normalize(self.c[which], dim=1)
        self.half[which] = self.c[which].square().sum(1) / 2

    def _repair(self) -> torch.Tensor:
        """Gives every empty cluster the point farthest from its centroid among clusters of two or more; (K,) touched.

        There is always one: the points are distinct and at least K.
        """
        touched = torch.zeros(self.k, dtype=torch.bool, device=self.x.device)
        sizes = torch.bincount(self.label, minlength=self.k).tolist()
        empty = [cluster for cluster, size in enumerate(sizes) if size == 0]
        if not empty:
            return touched
        distance = (self.x.square().sum(1) - 2 * self.best) * self.weight
        farthest = iter(distance.argsort(descending=True, stable=True).tolist())
        for cluster in empty:
            point = next(point for point in farthest if sizes[int(self.label[point])] > 1)
            donor = int(self.label[point])
            sizes[donor] -= 1
            sizes[cluster] = 1
            touched[donor] = touched[cluster] = True
            self.label[point] = cluster
        return touched


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct rows in the order of their bytes (U, D), each row's index among them (V,), and their counts (U,)."""
    keys = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0]
    _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    return rows[first], inverse, counts


def _start(x: torch.Tensor, weight: torch.Tensor, k: int, seed: int, init: str, log: Log) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    if init == "random":
        return torch.from_numpy(generator.permutation(len(x))[:k]).to(x.device)
    return torch.tensor(_plus_plus(x, weight, k, generator, log), device=x.device)


def _plus_plus(x: torch.Tensor, weight: torch.Tensor, k: int, generator: np.random.Generator, log: Log) -> list[int]:
    """Greedy k-means++: draws candidates by squared distance and keeps those that lower the inertia most.

    BATCH centres are kept of BATCH x TRIALS candidates, so that distances come from one matrix product; the gains of
    the rest are brought up to date after each choice, on the points that it changed.
    """
    squares = x.square().sum(1)  # (U,)
    chosen = [int(generator.integers(len(x)))]
    distance = (squares - 2 * (x @ x[chosen[0]]) + squares[chosen[0]]).clamp_(min=0)  # (U,)
    distance[chosen[0]] = 0
    ones = torch.ones_like(squares)[:, None]
    left = torch.cat([x, ones, ones], dim=1)  # (U, D + 2)
    while len(chosen) < k:
        total = np.cumsum((distance * weight).double().cpu().numpy())
        drawn = np.searchsorted(total, generator.random(BATCH * TRIALS) * total[-1], side="right")
        candidates = torch.from_numpy(np.unique(drawn[drawn < len(x)])).to(x.device)  # (S,)
        left[:, -1] = distance - squares
        right = torch.cat([2 * x[candidates], -squares[candidates, None], ones[candidates]], dim=1)  # (S, D + 2)
        gains = torch.mm(left, right.T).relu_()  # (U, S): how much nearer each candidate is than the nearest centre
        nearer = (gains > 0).T.contiguous()  # (S, U)
        gain = weight @ gains  # (S,)
        kept = len(chosen)
        for _ in range(min(BATCH, k - kept)):
            best = int(gain.argmax()) if len(gain) else -1
            if best < 0 or gain[best] <= 0:
                break
            rows = nearer[best].nonzero()[:, 0]
            old = gains[rows]
            step = old[:, best]
            new = (old - step[:, None]).relu_()
            gain -= weight[rows] @ (old - new)
            gain[best] = -torch.inf
            gains[rows] = new
            distance[rows] -= step
            point = int(candidates[best])
            distance[point] = 0
            chosen.append(point)
        distance.clamp_(min=0)
        if len(chosen) == kept:  # what is left lies within rounding of the centres
            rest = np.setdiff1d(np.arange(len(x)), chosen)
            chosen += generator.permutation(rest)[: k - kept].tolist()
        if len(chosen) // 1000 > kept // 1000:
            log(f"seeding: {len(chosen)} of {k} centres")
    return chosen


def _faiss(
    x: torch.Tensor, weight: torch.Tensor, k: int, seed: int, iterations: int, init: str, spherical: bool, log: Log
) -> torch.Tensor:
    faiss = _import("faiss", "faiss-cpu")
    start = x[_start(x, weight, k, seed, init, log)].cpu().numpy()
    model = faiss.Kmeans(
        x.shape[1],
        k,
        niter=iterations,
        seed=seed,
        spherical=spherical,
        gpu=x.device.type == "cuda",
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),
    )
    model.train(x.cpu().numpy(), weights=weight.cpu().numpy(), init_centroids=start)
    return torch.from_numpy(model.centroids)


def _sklearn(
    x: torch.Tensor, weight: torch.Tensor, k: int, seed: int, iterations: int, init: str, spherical: bool, log: Log
) -> torch.Tensor:
    cluster = _import("sklearn.cluster", "scikit-learn")
    model = cluster.KMeans(k, init=init, n_init=1, max_iter=iterations, tol=0, random_state=seed, algorithm="lloyd")
    return torch.from_numpy(model.fit(x.numpy(), sample_weight=weight.numpy()).cluster_centers_)


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


def sum_of_squares(points: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> float:
    """The sum of squared distances to the own centroid, in float64; points (V, D), labels (V,), centroids (K, D)."""
    total = 0.0
    for start in range(0, len(points), CHUNK):
        part = slice(start, start + CHUNK)
        total += float(np.square(points[part].astype(np.float64) - centroids[labels[part]]).sum())
    return total


def _check_device(device: str) -> None:
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is unknown here: choose cpu or cuda (means are summed in float64)")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this torch sees no CUDA device; choose --device cpu")


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {package}: run `pip install {package}`") from error

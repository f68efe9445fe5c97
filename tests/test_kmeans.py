"""k-means properties: repeatable, never an empty cluster, equal to scikit-learn where the answer is plain."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from cluster_helpers import blobs, noise, same_partition

from clustering import kmeans as km
from clustering.kmeans import ALGORITHMS, INITS, kmeans, nearest


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("init", INITS)
def test_repeats_bit_for_bit_and_leaves_the_input_alone(algorithm: str, init: str) -> None:
    points = noise()
    before = points.copy()
    first, second = (kmeans(points, 90, seed=3, init=init, algorithm=algorithm) for _ in range(2))
    assert np.array_equal(points, before)
    assert first.centroids.tobytes() == second.centroids.tobytes()
    assert first.labels.tobytes() == second.labels.tobytes()
    other = kmeans(points, 90, seed=4, init=init, algorithm=algorithm)
    assert not np.array_equal(first.labels, other.labels)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("init", INITS)
def test_agrees_with_scikit_learn_on_separated_groups(algorithm: str, init: str) -> None:
    from sklearn.cluster import KMeans

    points, truth = blobs()
    reference = KMeans(6, n_init=20, random_state=0).fit(points)
    assert same_partition(reference.labels_, truth)
    # a random start can leave two groups together in any Lloyd: take the best of some seeds there, not of k-means++
    seeds = range(20) if init == "random" else range(1)
    result = min((kmeans(points, 6, seed=s, init=init, algorithm=algorithm) for s in seeds), key=lambda r: r.inertia)
    assert same_partition(result.labels, reference.labels_)
    assert result.inertia == pytest.approx(reference.inertia_, rel=1e-5)
    order = result.labels[np.unique(truth, return_index=True)[1]]
    expected = reference.cluster_centers_[reference.labels_[np.unique(truth, return_index=True)[1]]]
    np.testing.assert_allclose(result.centroids[order], expected, atol=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_means_labels_and_inertia_are_what_they_say(algorithm: str) -> None:
    points = noise(1) + 50  # far from the origin, where float32 distances would round coarsely
    result = kmeans(points, 80, algorithm=algorithm)
    wide = points.astype(np.float64)
    means = np.stack([wide[result.labels == cluster].mean(axis=0) for cluster in range(80)])
    np.testing.assert_array_equal(result.centroids, means.astype(np.float32))
    distance = np.square(wide[:, None] - means).sum(axis=2)
    assert result.inertia == pytest.approx(distance[np.arange(len(points)), result.labels].sum(), rel=1e-9)
    assert result.converged
    assert np.array_equal(distance.argmin(axis=1), result.labels)
    assert result.labels.dtype == np.int32
    assert result.centroids.dtype == np.float32


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # scikit-learn's own result, before the repair
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("init", INITS)
def test_no_cluster_is_empty_with_duplicates_and_outliers(algorithm: str, init: str) -> None:
    generator = np.random.default_rng(0)
    points = np.concatenate(
        [
            np.zeros((200, 5)),
            np.repeat(generator.normal(size=(30, 5)), 10, axis=0),
            1e4 * np.eye(5),
            1e-3 * generator.normal(size=(20, 5)),
        ]
    ).astype(np.float32)
    distinct = len(np.unique(points, axis=0))
    assert distinct == 56
    for k in (2, 30, distinct):
        result = kmeans(points, k, algorithm=algorithm, init=init)
        assert np.bincount(result.labels, minlength=k).min() >= 1
        for start in range(200, 500, 10):  # equal rows share a cluster
            assert len(set(result.labels[start : start + 10])) == 1
    assert result.inertia == pytest.approx(0, abs=1e-6)


def test_repair_gives_each_empty_cluster_the_farthest_point() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [30.0]])
    state = km._Lloyd(x, torch.ones(5), torch.tensor([[1.0], [500.0], [600.0]]), spherical=False)
    assert state.label.tolist() == [0, 0, 0, 0, 0]
    touched = state._repair()
    assert state.label.tolist() == [0, 0, 0, 2, 1]
    assert touched.all()


def test_the_order_of_rows_does_not_matter() -> None:
    points = noise(2)
    order = np.random.default_rng(0).permutation(len(points))
    straight, shuffled = kmeans(points, 70), kmeans(points[order], 70)
    assert np.array_equal(straight.labels[order], shuffled.labels)
    np.testing.assert_allclose(straight.centroids, shuffled.centroids, rtol=0, atol=1e-6)


def test_skipping_still_centroids_changes_nothing() -> None:
    points = torch.from_numpy(noise(5, rows=900)).double().float()
    start = points[torch.randperm(900, generator=torch.Generator().manual_seed(0))[:120]].clone()
    c, rounds = start.double(), 0
    label = torch.cdist(points.double(), c).argmin(1)
    while True:
        rounds += 1
        c = torch.stack([points[label == j].double().mean(0) for j in range(120)])
        previous, label = label, torch.cdist(points.double(), c).argmin(1)
        if torch.equal(previous, label):
            break
    state = km._Lloyd(points, torch.ones(900), start, spherical=False)
    assert state.run(200, lambda message: None) == (rounds, True)
    assert rounds > 5
    assert torch.equal(state.label, label)


def test_seeding_beats_a_random_start_and_finds_every_group() -> None:
    points = noise(3, rows=1500)
    plus, random = (np.mean([kmeans(points, 200, seed=s, init=init).inertia for s in range(3)]) for init in INITS)
    assert plus < random
    grouped, truth = blobs(k=8)
    for seed in range(5):
        x = torch.from_numpy(grouped)
        chosen = km._plus_plus(x, torch.ones(len(x)), 8, np.random.default_rng(seed), lambda message: None)
        assert sorted(truth[chosen]) == list(range(8))


def test_rounds_can_run_out() -> None:
    result = kmeans(noise(4), 60, iterations=1, init="random")
    assert not result.converged
    assert result.iterations == 1
    assert np.bincount(result.labels, minlength=60).min() >= 1


@pytest.mark.parametrize("algorithm", ["lloyd", "faiss"])
def test_spherical_ignores_lengths(algorithm: str) -> None:
    points = noise(6)
    scale = 2.0 ** np.random.default_rng(0).integers(-3, 4, size=(len(points), 1)).astype(np.float32)
    plain = kmeans(points, 50, spherical=True, algorithm=algorithm)
    scaled = kmeans(points * scale, 50, spherical=True, algorithm=algorithm)
    assert np.array_equal(plain.labels, scaled.labels)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    for cluster in (0, 17, 49):
        own = plain.labels == cluster
        direction = unit[own].mean(axis=0)
        direction /= np.linalg.norm(direction)
        expected = direction * np.linalg.norm(points[own], axis=1).mean()
        np.testing.assert_allclose(plain.centroids[cluster], expected, rtol=1e-4, atol=1e-5)
    centres = plain.centroids / np.linalg.norm(plain.centroids, axis=1, keepdims=True)
    assert plain.inertia == pytest.approx(2 * (1 - (unit * centres[plain.labels]).sum(axis=1)).sum(), rel=1e-4)
    assert np.array_equal((unit @ centres.T).argmax(axis=1), plain.labels)


def test_spherical_survives_a_row_of_zeros() -> None:
    points = np.concatenate([noise(7, rows=50), np.zeros((3, 12), np.float32)])
    result = kmeans(points, 20, spherical=True)
    assert np.isfinite(result.centroids).all()
    assert len(set(result.labels[50:])) == 1


def test_nearest_is_the_nearest() -> None:
    points, centroids = noise(8) + 100, noise(9, rows=40) + 100
    expected = np.square(points[:, None].astype(np.float64) - centroids).sum(axis=2).argmin(axis=1)
    assert np.array_equal(nearest(points, centroids), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0.*at least 2"),
        ({"k": 1}, "k is 1.*at least 2"),
        ({"k": -4}, "k is -4"),
        ({"k": 41}, "k is 41.*only 40 rows.*k <= 40"),
        ({"k": 11, "points": np.tile(noise(rows=10), (4, 1))}, "only 10 of the 40 rows are distinct.*k <= 10"),
        ({"points": np.full((40, 3), np.nan, np.float32)}, "NaN or infinite"),
        ({"points": np.zeros(40, np.float32)}, r"matrix \(V, D\), found shape \(40,\)"),
        ({"algorithm": "magic"}, "algorithm 'magic' is unknown: choose one of lloyd, faiss, sklearn"),
        ({"init": "best"}, r"init 'best' is unknown: choose one of k-means\+\+, random"),
        ({"iterations": 0}, "iterations is 0: choose 1 or more"),
        ({"device": "quantum"}, "device 'quantum' is unknown"),
        ({"algorithm": "sklearn", "spherical": True}, "no spherical k-means"),
    ],
)
def test_bad_options_name_value_limit_and_remedy(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"points": noise(rows=40), "k": 5} | change
    with pytest.raises(ValueError, match=message):
        kmeans(**arguments)


def test_a_missing_library_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        kmeans(noise(rows=40), 5, algorithm="faiss")

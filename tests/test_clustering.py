"""k-means properties, the search for the head tensor, the clusters folder and its page, and bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models

from clustering import kmeans as km
from clustering import report, run, weights
from clustering.kmeans import ALGORITHMS, INITS, kmeans, nearest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden" / "official-tiny"
TINY = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
NASTY = [
    "<script>alert(1)</script>",
    "</script>",
    "<!--",
    "&amp;",
    "\u2028",
    '"',
    "\\",
    "\n",
    "\x00",
    "<img src=x onerror=alert(2)>",
]


def blobs(seed: int = 0, k: int = 6, each: int = 30, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = np.repeat(np.arange(k), each)
    return (20 * np.eye(width)[truth] + generator.normal(size=(k * each, width))).astype(np.float32), truth


def noise(seed: int = 0, rows: int = 700, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    return len(np.unique(np.stack([a, b]), axis=1).T) == len(np.unique(a)) == len(np.unique(b))


# ---------------------------------------------------------------------------------------------------------- k-means


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


# ------------------------------------------------------------------------------------------------ the one head tensor

ENCODERS = {
    "BertForMaskedLM": transformers.BertConfig(**TINY),
    "RobertaForMaskedLM": transformers.RobertaConfig(**TINY, pad_token_id=1),
    "DistilBertForMaskedLM": transformers.DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=20),
    "ModernBertForMaskedLM": transformers.ModernBertConfig(
        **TINY, pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2
    ),
}


def save(name: str, config: Any, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("tied", [True, False])
def test_heads_of_masked_language_models(name: str, tied: bool, tmp_path: Path) -> None:
    config = ENCODERS[name].__class__(**ENCODERS[name].to_dict() | {"tie_word_embeddings": tied})
    model = save(name, config, tmp_path)
    head = weights.read_head(weights.Source(tmp_path))
    expected = model.get_output_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(head.weight, expected)
    assert head.kind == ("tied embeddings" if tied else "output head")
    if not tied:
        assert not np.array_equal(expected, model.get_input_embeddings().weight.detach().numpy())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["4KB", "1GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_decoders(tied: bool, shard: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = transformers.MistralConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / weights.INDEX).exists() == (shard == "4KB")
    head = weights.read_head(weights.Source(tmp_path))
    np.testing.assert_array_equal(head.weight, model.get_output_embeddings().weight.detach().float().numpy())
    assert head.weight.dtype == np.float32
    for file in tmp_path.glob("model-*.safetensors"):  # the other shards are not even opened
        if file.name != head.file:
            file.write_bytes(b"")
    np.testing.assert_array_equal(weights.read_head(weights.Source(tmp_path)).weight, head.weight)


def test_plain_encoders_give_their_word_embeddings(tmp_path: Path) -> None:
    model = save("BertModel", transformers.BertConfig(**TINY), tmp_path)
    head = weights.read_head(weights.Source(tmp_path))
    assert (head.kind, head.tensor) == ("word embeddings", "embeddings.word_embeddings.weight")
    np.testing.assert_array_equal(head.weight, model.get_input_embeddings().weight.detach().numpy())
    named = weights.read_head(weights.Source(tmp_path), "embeddings.position_embeddings.weight")
    np.testing.assert_array_equal(named.weight, model.embeddings.position_embeddings.weight.detach().numpy())


def fake_checkpoint(folder: Path, rows: int = 32_000, width: int = 4096, filler: int = 3 * 2**30) -> None:
    """A sharded checkpoint of sparse files: a bf16 head in the middle of one shard, gigabytes of filler around it."""
    head, size = "lm_head.weight", rows * width * 2
    spans = {"a": (0, filler), head: (filler, filler + size), "z": (filler + size, 2 * filler + size)}
    layout = {
        name: {"dtype": "BF16", "shape": [rows, width] if name == head else [filler // 2], "data_offsets": span}
        for name, span in spans.items()
    }
    header = json.dumps(layout).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model-00002-of-00002.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * filler + size)
    files = dict.fromkeys(spans, "model-00002-of-00002.safetensors") | {"b": "model-00001-of-00002.safetensors"}
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"], "vocab_size": rows}))


def test_a_7b_head_is_read_in_under_a_gigabyte(tmp_path: Path) -> None:
    fake_checkpoint(tmp_path)
    script = (
        "import resource, sys; from clustering.weights import Source, read_head; head = read_head(Source(sys.argv[1]));"
        "print(head.weight.shape, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shape, peak = done.stdout.rsplit(" ", 1)
    assert shape == "(32000, 4096)"
    assert int(peak) < 2**20  # KiB, the interpreter and torch included


def served(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Serves a folder as the hub's cache would; returns the list of files that were asked for and found."""
    from huggingface_hub.errors import EntryNotFoundError

    asked: list[str] = []

    def download(repo: str, name: str, revision: str | None = None) -> str:
        assert repo == "org/tiny"
        assert revision in (None, "main", "0123abcd")
        if not (folder / name).is_file():
            raise EntryNotFoundError(name)
        asked.append(name)
        return str(folder / name)

    monkeypatch.setattr(weights, "hf_hub_download", download)
    return asked


def test_the_hub_is_asked_for_one_shard_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "models--org--tiny" / "snapshots" / "0123abcd"
    config = transformers.MistralConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=False)
    model = save("MistralForCausalLM", config, folder, max_shard_size="4KB")
    asked = served(monkeypatch, folder)
    head = weights.read_head(weights.Source("org/tiny", "main"))
    np.testing.assert_array_equal(head.weight, model.lm_head.weight.detach().numpy())
    assert head.revision == "0123abcd"
    assert asked == ["config.json", weights.INDEX, head.file]
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def test_an_unreachable_hub_is_said_to_be_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"org/none-such has no config.json.*hub was not reached"):
        weights.read_head(weights.Source("org/none-such"))


def spoil(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "config not JSON":
        (folder / "config.json").write_text("{")
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "foreign":
        file.write_text("this is no safetensors file")
    elif how == "no weights":
        file.unlink()
    elif how == "pickle only":
        file.rename(folder / "pytorch_model.bin")
    elif how in ("NaN", "infinite"):
        tensors["lm_head.weight"][7, 3] = float("nan") if how == "NaN" else -float("inf")
        save_file(tensors, file)
    elif how == "quantised":
        tensors["lm_head.weight"] = torch.zeros(60, 16, dtype=torch.int8)
        save_file(tensors, file)
    elif how == "clustered head":
        tensors["lm_head.weight"] = torch.zeros(10, 16)
        save_file(tensors, file)
    elif how == "vector":
        tensors["lm_head.weight"] = torch.zeros(60)
        save_file(tensors, file)
    elif how == "headless":
        del tensors["lm_head.weight"]
        save_file(tensors, file)
    elif how == "two heads":
        tensors["other.lm_head.weight"] = torch.zeros(60, 16)
        tensors["one.lm_head.weight"] = tensors.pop("lm_head.weight")
        save_file(tensors, file)
    elif how == "nothing known":
        save_file({"a.b": torch.zeros(2, 2)}, file)
        (folder / "config.json").write_text("{}")
    else:
        names = {
            "lm_head.weight": {"missing shard": "gone.safetensors", "outside": "../x.safetensors"}.get(how, file.name)
        }
        index = {"empty index": {}, "wrong index": {"weight_map": {"cls.predictions.decoder.weight": file.name}}}
        (folder / weights.INDEX).write_text(json.dumps(index.get(how, {"weight_map": names})))


BAD_CHECKPOINTS = [
    ("no config", FileNotFoundError, r"has no config.json"),
    ("config not JSON", ValueError, r"config.json is not valid JSON"),
    ("truncated", ValueError, r"model.safetensors is not a whole safetensors file \(\d+ bytes"),
    ("foreign", ValueError, r"model.safetensors is not a whole safetensors file"),
    ("no weights", FileNotFoundError, r"has no model.safetensors"),
    ("pickle only", ValueError, r"only pytorch_model.bin, a pickle.*save_pretrained"),
    ("NaN", ValueError, r"lm_head.weight holds NaN or infinite weights \(first in row 7"),
    ("infinite", ValueError, r"lm_head.weight holds NaN or infinite weights \(first in row 7"),
    ("quantised", ValueError, r"stored as I8, a quantised form.*F32"),
    ("clustered head", ValueError, r"lm_head.weight has 10 rows, config.json says vocab_size 60.*--tensor"),
    ("vector", ValueError, r"lm_head.weight should be a matrix \(V, D\), found shape \(60,\)"),
    ("headless", ValueError, r"tie_word_embeddings false, but no output head"),
    ("two heads", ValueError, r"one.lm_head.weight and other.lm_head.weight could each be the head.*--tensor"),
    ("nothing known", ValueError, r"no output head and no word embeddings among 1 tensors \(a.b\).*--tensor"),
    ("missing shard", FileNotFoundError, r"has no gone.safetensors"),
    ("outside", ValueError, r"leaves the folder"),
    ("empty index", ValueError, r"index.json: expected an object `weight_map`"),
    ("wrong index", ValueError, r"says it holds cls.predictions.decoder.weight, but it does not"),
]


@pytest.mark.parametrize(("how", "error", "message"), BAD_CHECKPOINTS, ids=[case[0] for case in BAD_CHECKPOINTS])
def test_bad_checkpoints_are_named(how: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    config = transformers.MistralConfig(**TINY, num_key_value_heads=1, tie_word_embeddings=False)
    save("MistralForCausalLM", config, tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    spoil(tmp_path, how)
    with pytest.raises(error, match=message):
        weights.read_head(weights.Source(tmp_path))


# --------------------------------------------------------------------------------------------------------- the program


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with a vocabulary of words, variants, nasty tokens and rows without a token."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    words = ["[PAD]", "[UNK]", "[unused0]", "[unused1]", "run", "running", "##run", "tree", "trees", "Tree", "##s", "7"]
    vocabulary = {word: index for index, word in enumerate([*words, *NASTY])}
    vocabulary |= {f"w{index}": index for index in range(len(vocabulary), 55)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]"])
    save("BertModel", transformers.BertConfig(**TINY), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def command(*arguments: object) -> int:
    quick = ["--map", "pca"] if "--k" in arguments or "--import-npy" in arguments else []
    return run.main([*map(str, arguments), *quick])


def test_the_folder_holds_what_the_design_says(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "clusters"
    assert command("--model", tiny, "--k", 9, "--output", output, "--seed", 5, "--export-npy", tmp_path / "c.npy") == 0
    tensors = load_file(output / "clusters.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "centroids": ((9, 16), torch.float32),
        "labels": ((60,), torch.int32),
    }
    facts = json.loads((output / "clusters.json").read_text())
    rows = weights.read_head(weights.Source(tiny)).weight
    expected = kmeans(rows, 9, seed=5)
    np.testing.assert_array_equal(tensors["centroids"].numpy(), expected.centroids)
    np.testing.assert_array_equal(tensors["labels"].numpy(), expected.labels)
    np.testing.assert_array_equal(np.load(tmp_path / "c.npy"), expected.centroids)
    assert facts["sizes"] == np.bincount(expected.labels).tolist()
    assert facts["inertia"] == expected.inertia
    found = {name: facts[name] for name in ("format_version", "base_model", "tensor", "k", "seed", "vocab_size")}
    assert found == {
        "format_version": 1,
        "base_model": str(tiny),
        "tensor": "embeddings.word_embeddings.weight",
        "k": 9,
        "seed": 5,
        "vocab_size": 60,
    }
    assert facts["configuration"]["output"] == str(output)
    assert sorted(path.name for path in output.iterdir()) == ["clusters.html", "clusters.json", "clusters.safetensors"]
    assert len({oct(path.stat().st_mode) for path in output.iterdir()}) == 1


def test_the_page_holds_every_token_and_no_markup_of_theirs(tiny: Path, tmp_path: Path) -> None:
    assert command("--model", tiny, "--k", 9, "--output", tmp_path / "out") == 0
    page = (tmp_path / "out" / "clusters.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    for bad in ("alert(1)</", "<!--", "<img", "\u2028", "http://", "https://"):
        assert bad not in page.replace("http://www.w3.org/2000/svg", "")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))
    vocabulary = json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"]
    assert [data["tokens"][index] for index in vocabulary.values()] == list(vocabulary)
    assert data["tokens"][55:] == [None] * 5
    labels = load_file(tmp_path / "out" / "clusters.safetensors")["labels"].tolist()
    assert sorted((c, row) for c, rows in enumerate(data["members"]) for row in rows) == sorted(
        (label, row) for row, label in enumerate(labels)
    )
    assert all(len(near) == 6 and c not in near for c, near in enumerate(data["near"]))
    assert np.shape(data["map"]) == (9, 2)
    assert np.min(data["map"]) == 0
    assert np.max(data["map"]) == 1000


def test_excluded_rows_get_no_cluster(tiny: Path, tmp_path: Path) -> None:
    assert (
        command("--model", tiny, "--k", 9, "--output", tmp_path / "out", "--exclude", "special", "unused", "unnamed")
        == 0
    )
    labels = load_file(tmp_path / "out" / "clusters.safetensors")["labels"].numpy()
    assert np.flatnonzero(labels == -1).tolist() == [0, 1, 2, 3, 55, 56, 57, 58, 59]
    assert set(labels[4:55]) == set(range(9))
    assert json.loads((tmp_path / "out" / "clusters.json").read_text())["excluded"] == 9


def test_overwrite_replaces_and_its_absence_protects(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert command("--model", tiny, "--k", 9, "--output", output) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert command("--model", tiny, "--k", 4, "--output", output) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert command("--model", tiny, "--k", 9, "--output", output, "--overwrite") == 0
    assert (output / "clusters.safetensors").read_bytes() == before["clusters.safetensors"]
    assert command("--model", tiny, "--k", 4, "--output", output, "--overwrite") == 0
    assert json.loads((output / "clusters.json").read_text())["k"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


BAD_COMMANDS = [
    ("--k 9 --output OUT", "--model is missing"),
    ("--model TINY --k 9", "--output is missing"),
    ("--model TINY --output OUT", "either --k"),
    ("--model TINY --k 9 --import-npy a.npy --output OUT", "either --k"),
    ("--model TINY --k 0 --output OUT", "k is 0"),
    ("--model TINY --k 1 --output OUT", "k is 1"),
    ("--model TINY --k 61 --output OUT", "k is 61, but there are only 60 rows"),
    ("--model TINY --k 9 --output OUT --iterations 0", "iterations is 0"),
    ("--model TINY --k 9 --output OUT --seed -1", "--seed is -1"),
    ("--model TINY --k 9 --output OUT --device tpu", "device 'tpu' is unknown"),
    ("--model TINY --k 9 --output OUT --revision main", "local folder"),
    ("--model TINY --k 9 --output OUT --tensor nope.weight", "has no tensor nope.weight"),
    ("--model TINY --k 9 --output TINY/config.json/out", "is a file, not a folder"),
    ("--model TINY --k 9 --output TINY", "--overwrite"),
    ("--model OUT/none --k 9 --output OUT", "does not exist"),
    ("--model TINY/config.json --k 9 --output OUT", "is a file"),
    ("--model a b --k 9 --output OUT".replace("a b", "a:b"), "neither a folder nor a hub id"),
    ("--model TINY --import-npy none.npy --output OUT", "none.npy is missing"),
    ("--clusters OUT", "goes with --export-npy"),
    ("--clusters OUT --export-npy OUT.npy", "clusters.json is missing"),
]


@pytest.mark.parametrize(("line", "message"), BAD_COMMANDS)
def test_bad_commands_get_one_line_and_write_nothing(
    line: str, message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in tiny.iterdir())
    words = [w.replace("TINY", str(tiny)).replace("OUT", str(tmp_path / "out")) for w in line.split()]
    assert command(*words) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert message in last
    assert not list(tmp_path.iterdir())
    assert sorted(path.name for path in tiny.iterdir()) == before


def test_an_unwritable_output_is_refused_before_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr(weights, "read_head", never)
    monkeypatch.setattr("lens.files.os.access", lambda *_: False)  # root may write everywhere
    assert command("--model", tiny, "--k", 9, "--output", tmp_path / "out") == 2


def test_the_program_runs_as_a_script_from_anywhere(tiny: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "clustering" / "run.py")]
    arguments = ["--model", str(tiny), "--k", "5", "--output", "out", "--map", "pca"]
    done = subprocess.run([*script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[ +\d+\.\d s\] wrote out", done.stderr)
    assert (tmp_path / "out" / "clusters.html").is_file()


def test_help_has_an_example_and_a_line_for_every_option() -> None:
    shown = run.parser().format_help()
    assert "python clustering/run.py --model mistralai/Mistral-7B-v0.1 --k 4000 --output runs/clusters" in shown
    assert all(action.help for action in run.parser()._actions)


@pytest.mark.parametrize("method", ["tsne", "pca"])
@pytest.mark.parametrize("shape", [(40, 12), (10, 3), (2, 1)])
def test_the_map_fits_its_frame(method: str, shape: tuple[int, int]) -> None:
    places = report.layout(noise(rows=shape[0], width=shape[1]), method)
    assert places.shape == (shape[0], 2)
    assert (places.min(), places.max()) == (0, 1000)
    assert len(np.unique(places, axis=0)) == shape[0]


def test_a_bpe_vocabulary_is_made_readable() -> None:
    assert report.readable("Ġthe", True) == " the"
    assert report.readable("cafÃ©", True) == "café"
    assert report.readable("Ã", True) == "Ã"  # half a character stays as the tokenizer writes it
    assert report.readable("▁the", False) == " the"
    assert report.readable("##ing", False) == "##ing"


# ------------------------------------------------------------------------------------------------------ word variants


def test_variants_by_hand() -> None:
    names = ["run", " running", "Runs", "##run", "tree", "trees", "7", "7 ", ",", " Dog", "cat", None]
    forms = report.normal_forms(names)
    assert forms[:4] == ["run"] * 4
    assert forms[4:6] == ["tree"] * 2
    assert forms[6:9] == [None] * 3
    assert forms[11] is None
    #                   run -------  tree  7     ,  dog cat none
    labels = np.array([0, 0, 0, 1, 2, 2, 3, 3, 1, 4, 4, 3])
    found = report.variants(names, labels)
    # clusters 0 and 2 of the five unite variants; of the families run and tree, tree lies in one cluster
    assert found["clusters_of_two_or_more"] == 5
    assert found["clusters_uniting_variants"] == pytest.approx(2 / 5)
    assert found["families"] == 2
    assert found["families_in_one_cluster"] == pytest.approx(1 / 2)
    assert 0 <= found["clusters_uniting_variants_by_chance"] < 1
    excluded = report.variants(names, np.where(np.arange(12) == 5, -1, labels))
    assert excluded["families"] == 1
    assert excluded["families_in_one_cluster"] == 0


# ----------------------------------------------------------------------------------------------- heads of the release


def test_npy_round_trip(tiny: Path, tmp_path: Path) -> None:
    assert command("--model", tiny, "--k", 9, "--output", tmp_path / "a") == 0
    assert command("--clusters", tmp_path / "a", "--export-npy", tmp_path / "a.npy") == 0
    assert command("--model", tiny, "--import-npy", tmp_path / "a.npy", "--output", tmp_path / "b") == 0
    first, second = (load_file(tmp_path / name / "clusters.safetensors") for name in "ab")
    assert torch.equal(first["centroids"], second["centroids"])
    assert torch.equal(first["labels"], second["labels"])
    facts = json.loads((tmp_path / "b" / "clusters.json").read_text())
    assert (facts["algorithm"], facts["seed"]) == ("imported", None)
    before = (tmp_path / "a.npy").read_bytes()
    assert command("--clusters", tmp_path / "a", "--export-npy", tmp_path / "a.npy") == 2
    assert (tmp_path / "a.npy").read_bytes() == before
    assert command("--clusters", tmp_path / "a", "--export-npy", tmp_path / "a.npy", "--overwrite") == 0


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="shared/golden/official-tiny is not beside this checkout")
def test_the_released_head_is_imported(tmp_path: Path) -> None:
    assert command("--model", GOLDEN / "base", "--import-npy", GOLDEN / "200.npy", "--output", tmp_path / "out") == 0
    tensors = load_file(tmp_path / "out" / "clusters.safetensors")
    released = np.load(GOLDEN / "200.npy")
    np.testing.assert_array_equal(tensors["centroids"].numpy(), released)
    rows = load_file(GOLDEN / "base" / "model.safetensors")["lm_head.weight"].double()
    assert torch.equal(tensors["labels"].long(), torch.cdist(rows, torch.from_numpy(released).double()).argmin(1))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((9, 17), np.float32), "width 17, the model's head 16"),
        (np.zeros(9, np.float32), "expected a (K, D) array of floats"),
        (np.zeros((9, 16), np.int64), "expected a (K, D) array of floats"),
        (np.zeros((1, 16), np.float32), "at least 2 centroids"),
        (np.zeros((61, 16), np.float32), "k is 61, but there are only 60 rows"),
        (np.full((9, 16), np.inf, np.float32), "NaN or infinite"),
        (np.array([[{}]], dtype=object), "not a whole .npy file"),
        (b"\x93NUMPY", "not a whole .npy file"),
        (b"", "not a whole .npy file"),
    ],
)
def test_bad_npy_heads(
    array: Any, message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "head.npy"
    if isinstance(array, bytes):
        file.write_bytes(array)
    else:
        np.save(file, array)
    assert command("--model", tiny, "--import-npy", file, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_folder_that_contradicts_itself(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--model", tiny, "--k", 9, "--output", tmp_path / "a") == 0
    facts = json.loads((tmp_path / "a" / "clusters.json").read_text()) | {"k": 8}
    (tmp_path / "a" / "clusters.json").write_text(json.dumps(facts))
    assert command("--clusters", tmp_path / "a", "--export-npy", tmp_path / "a.npy") == 2
    assert "should have shape (8, 16), found (9, 16)" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "a")
    assert not list(tmp_path.iterdir())

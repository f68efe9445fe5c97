"""The clusters folder, its page, word variants, released heads, and bad input."""

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
from cluster_helpers import GOLDEN, NASTY, ROOT, TINY, noise, save
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models

from clustering import report, run, weights
from clustering.kmeans import kmeans


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


def test_every_token_may_stay_a_dimension_of_its_own(tiny: Path, tmp_path: Path) -> None:
    assert command("--model", tiny, "--every-token", "--output", tmp_path / "out", "--exclude", "special") == 0
    found = load_file(tmp_path / "out" / "clusters.safetensors")
    rows = weights.read_head(weights.Source(str(tiny), None), None).weight
    labels = found["labels"].numpy()
    kept = labels >= 0
    assert 0 < (~kept).sum() < 10
    assert labels[kept].tolist() == list(range(kept.sum()))
    assert np.array_equal(found["centroids"].numpy(), rows[kept].astype(np.float32))
    facts = json.loads((tmp_path / "out" / "clusters.json").read_text())
    assert (facts["k"], facts["algorithm"], facts["seed"], facts["inertia"]) == (kept.sum(), "none", None, 0.0)
    assert not (tmp_path / "out" / "clusters.html").exists()


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
    ("--model TINY --k 9 --every-token --output OUT", "either --k"),
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

"""A model that was rebuilt at its old path is another model to the runs that began with it."""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lens import identity
from lens.identity import digest, model_files
from train.lexical import begun


def retrain(folder: Path) -> None:
    """Changes one number in the middle of the weights, as large and as old as before."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[0] += 1
    size = path.stat().st_size
    save_file(tensors, path, {"format": "pt"})
    assert path.stat().st_size == size


def test_configuration_tokenizer_and_weights_count(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "base"))
    (folder / "README.md").write_text("no part of the model")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "model.safetensors").write_bytes(b"nor this")
    before = model_files(folder)
    assert before == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    }
    retrain(folder)
    after = model_files(folder)
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors"]
    assert model_files("sentence-transformers/all-MiniLM-L6-v2") == {}


def test_of_large_files_size_and_ends_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_WHOLE", 8)
    monkeypatch.setattr(identity, "_END", 4)
    contents = {"one": b"abcd--wxyz", "middle": b"abcd++wxyz", "first": b"Abcd--wxyz", "last": b"abcd--wxyZ"}
    contents["longer"] = b"abcd---wxyz"
    found = {}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        found[name] = digest(tmp_path / name)
    assert found["one"] == found["middle"]
    assert len(set(found.values())) == 4


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_whose_base_was_rebuilt_is_refused(bert: Path, tmp_path: Path, finished: bool) -> None:
    base, output = Path(shutil.copytree(bert, tmp_path / "base")), tmp_path / "out"
    options = argparse.Namespace(base=str(base), output=str(output))
    with begun(options, [], "marker") as done:
        assert not done
    if finished:
        (output / "marker").touch()
    with begun(options, [], "marker") as done:
        assert done == finished
    retrain(base)
    refused = pytest.raises(ValueError, match=r"a run with other options \(base_files\): choose another --output")
    with refused, begun(options, [], "marker"):
        pass

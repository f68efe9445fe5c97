"""Embeddings kept in a folder, against embeddings computed anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SENTENCES
from mteb.types import PromptType
from safetensors import SafetensorError
from safetensors.numpy import load_file
from scipy import sparse
from test_analyse import analyse, counted, data, model, plain, points  # noqa: F401
from test_variants import DOCUMENT, QUERY, WIDTH, Made, task

import lens
from eval import embeddings
from eval.embeddings import KeptEmbeddings
from eval.encoder import LensEncoder
from eval.meta import artifact_meta


def dense_rows(found: Any) -> np.ndarray:
    return found.toarray() if sparse.issparse(found) else found


@pytest.mark.parametrize("density", [0.1, 0.9])
@pytest.mark.parametrize("output", ["csr", "numpy"])
def test_what_was_computed_is_read_again(density: float, output: str, tmp_path: Path) -> None:
    calls = [
        (["a", "b"], DOCUMENT, 2),
        (["c", "b", "d", "a"], DOCUMENT, 2),
        (["a", "e"], QUERY, 2),  # another side is another embedding
        (["d", "c"], DOCUMENT, 0),
        ([], DOCUMENT, 0),
        (["\ud800", ""], DOCUMENT, 2),  # not even UTF-8
    ]
    for round_number in range(2):
        made = Made(density)
        made.one = lambda text, side: Made.one(Made(density), ascii(text), side)  # type: ignore[method-assign]
        made.keep(tmp_path)
        for texts, side, new in calls:
            found, fresh = made.known(texts, task(), side, output)
            assert sparse.issparse(found) == (output == "csr")
            assert dense_rows(found).dtype == np.float32
            assert np.array_equal(
                dense_rows(found), np.stack([made.one(text, side) for text in texts]) if texts else np.zeros((0, WIDTH))
            )
            assert fresh == (0 if round_number else new)
        assert bool(made.calls) == (round_number == 0)


def test_processes_may_share_a_folder(tmp_path: Path) -> None:
    one, other = Made().keep(tmp_path), Made().keep(tmp_path)
    one.known(["a"], task(), DOCUMENT, "csr")
    other.known(["a", "b"], task(), DOCUMENT, "csr")
    other.known(["a"], task(), DOCUMENT, "csr")
    assert [text for _, text in other.calls] == ["b"]  # it looks when it first asks
    one.known(["b", "a"], task(), DOCUMENT, "csr")
    assert [text for _, text in one.calls] == ["a", "b"]
    assert np.array_equal(
        Made().keep(tmp_path).known(["b", "a"], task(), DOCUMENT, "numpy")[0],
        np.stack([one.one(text, DOCUMENT) for text in "ba"]),
    )


def test_what_is_being_written_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process, or by one that was killed."""
    write = embeddings.save_file
    seen: list[int] = []

    def looking(tensors: Any, path: Any, metadata: Any) -> None:
        write(tensors, path, metadata)
        if not seen:
            seen.append(0)
            seen[0] = Made().keep(tmp_path).known(["a"], task(), DOCUMENT, "csr")[1]
            shutil.copy(path, path.with_name(f".killed.{path.name}"))
            path.with_name(".empty.safetensors").write_bytes(b"")

    monkeypatch.setattr(embeddings, "save_file", looking)
    Made().keep(tmp_path).known(["a", "b"], task(), DOCUMENT, "csr")
    assert seen == [1]
    assert Made().keep(tmp_path).known(["b", "a"], task(), DOCUMENT, "csr")[1] == 0


def test_files_may_be_deleted(tmp_path: Path) -> None:
    made = Made().keep(tmp_path)
    made.known(["a", "b"], task(), DOCUMENT, "csr")
    made.known(["c"], task(), DOCUMENT, "csr")
    (path,) = (path for path in tmp_path.rglob("*.safetensors") if len(load_file(path)["texts"]) == 2)
    path.unlink()
    for new in (2, 0):
        found, fresh = made.known(["b", "c", "a"], task(), DOCUMENT, "numpy")
        assert fresh == new
        assert np.array_equal(found, np.stack([made.one(text, DOCUMENT) for text in "bca"]))
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert made.known(["a", "c"], task(), DOCUMENT, "csr")[1] == 2


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(embeddings, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*safetensors: .*No space left"):
        Made().keep(tmp_path).known(["a"], task(), DOCUMENT, "csr")
    assert not [path for path in tmp_path.rglob("*") if "safetensors" in path.name]


def test_other_versions_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Made().keep(tmp_path).known(["a"], task(), DOCUMENT, "csr")
    monkeypatch.setattr("transformers.__version__", "99")
    assert Made().keep(tmp_path).known(["a"], task(), DOCUMENT, "csr")[1] == 1
    monkeypatch.undo()
    assert Made().keep(tmp_path).known(["a"], task(), DOCUMENT, "csr")[1] == 0
    monkeypatch.setattr(embeddings, "FORMAT", 2)
    assert Made().keep(tmp_path).known(["a"], task(), DOCUMENT, "csr")[1] == 1


def test_a_value_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    kept = KeptEmbeddings(tmp_path, "model")
    bad = np.array([[1, np.nan]], dtype=np.float32)
    for _ in range(2):
        found, fresh = kept.vectors(["a"], None, "numpy", lambda texts: bad)
        assert fresh == 1
        assert np.isnan(found).any()
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "value", "rows"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    Made(0.9).keep(tmp_path).known(["a", "b"], task(), DOCUMENT, "csr")
    Made(0.9).keep(tmp_path).known(["c"], task(), DOCUMENT, "csr")
    (path,) = (path for path in tmp_path.rglob("*.safetensors") if len(load_file(path)["texts"]) == 2)
    held, content = load_file(path), path.read_bytes()
    if damage == "value":
        place = content.index(held["values"].tobytes())
        path.write_bytes(content[:place] + b"\0" * 4 + content[place + 4 :])
    elif damage == "rows":
        embeddings.save_file({**held, "values": held["values"][:1]}, path)
    else:
        path.write_bytes({"cut": content[:-5], "text": b"nothing", "empty": b""}[damage])
    made = Made(0.9).keep(tmp_path)
    for _ in range(2):  # also when asked again
        with pytest.raises(ValueError, match=f"{path.name} is damaged .*: remove it"):
            made.known(["a"], task(), DOCUMENT, "csr")
    path.unlink()
    assert Made(0.9).keep(tmp_path).known(["a", "c"], task(), DOCUMENT, "csr")[1] == 1


def test_a_whole_folder_need_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Made().keep(tmp_path).known(["a", "b"], task(), DOCUMENT, "csr")

    def refused(*_: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(embeddings, "write_json", refused)
    monkeypatch.setattr(embeddings, "atomic_file", refused)
    assert Made().keep(tmp_path).known(["b"], task(), DOCUMENT, "csr")[1] == 0
    with pytest.raises(OSError, match=r"--embeddings .*other: read-only; name a folder that can be written"):
        Made().keep(tmp_path / "other")


def test_they_are_kept_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", 2)
    made, texts = Made().keep(tmp_path), list("abcde")
    embed, calls = made.vectors, []

    def killed(texts: Any, *rest: Any) -> Any:
        calls.append(list(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(texts, *rest)

    monkeypatch.setattr(made, "vectors", killed)
    with pytest.raises(KeyboardInterrupt):
        made.known(texts, task(), DOCUMENT, "csr")
    assert calls == [["a", "b"], ["c", "d"], ["e"]]
    again = Made().keep(tmp_path)
    found, fresh = again.known(texts, task(), DOCUMENT, "numpy")
    assert fresh == 1
    assert np.array_equal(found, np.stack([made.one(text, DOCUMENT) for text in texts]))


def test_what_decides_an_embedding_keeps_it_apart(model: Path, tmp_path: Path) -> None:  # noqa: F811
    loaded = lens.load(model, device="cpu")
    half = lens.load(model, device="cpu", dtype="bfloat16")
    meta = artifact_meta(loaded, model)
    retrieval, sts = task("NFCorpus"), task("STS12", "STS")
    for number, (one, options, where, side) in enumerate(
        [
            (loaded, {}, retrieval, DOCUMENT),
            (loaded, {}, retrieval, QUERY),
            (half, {}, retrieval, DOCUMENT),
            (loaded, {"compat": "official"}, retrieval, DOCUMENT),
        ]
    ):
        named = meta.model_copy(update={"experiment_kwargs": options or None})
        encoder = LensEncoder(one, named).keep(tmp_path)
        for again in range(2):
            assert encoder.known(SENTENCES[:2], where, side, "numpy")[1] == (0 if again else 2), number
    encoder = LensEncoder(loaded, meta.model_copy(update={"name": "local/renamed"})).keep(tmp_path)
    assert encoder.known(SENTENCES[:2], sts, PromptType.query, "numpy")[1] == 0  # a document of the same model
    assert len(list(tmp_path.rglob("model.json"))) == 3


def test_instructions_keep_embeddings_apart(mistral: Path, mistral_clusters: Path, tmp_path: Path) -> None:
    built = lens.LENS.build(mistral, mistral_clusters, device="cpu")
    built.save(tmp_path / "model")
    encoder = LensEncoder(built, artifact_meta(built, tmp_path / "model")).keep(tmp_path / "kept")
    first, second = task("NFCorpus"), task("SciFact")
    for where, side, new in ((first, QUERY, 1), (second, QUERY, 1), (first, DOCUMENT, 1), (second, DOCUMENT, 0)):
        found, fresh = encoder.known(SENTENCES[:1], where, side, "numpy")
        assert fresh == new
        assert np.allclose(found, encoder.vectors(SENTENCES[:1], where, side, "numpy"), atol=1e-6)


def test_runs_and_analyses_share_them(
    model: Path,  # noqa: F811
    data: dict[str, str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = ["--local", data["beir"], data["sts"], data["labels"]]
    run = [*local, "--baselines", "dense", "--explain", "0"]
    wanted = plain(model, tmp_path / "plain", *run)
    kept = ["--embeddings", str(tmp_path / "kept")]
    assert plain(model, tmp_path / "first", *run, *kept) == wanted
    embedded = counted(monkeypatch)
    assert plain(model, tmp_path / "second", *run, *kept) == wanted
    assert not embedded
    costs = json.loads((tmp_path / "second" / "costs.json").read_text())
    assert "texts" not in costs["tiny"]["beir"]  # none was computed, so none had a speed
    assert costs["tiny"]["beir"]["active"] > 0
    assert json.loads((tmp_path / "first" / "costs.json").read_text())["tiny"]["beir"]["texts"] > 0
    assert analyse("pruning", tmp_path / "pruned", *local, "--model", model, "--top-n", 3, "--drop", 0.5, *kept) == 0
    assert analyse("hybrid", tmp_path / "joined", *local, "--model", model, *kept) == 0
    assert not embedded
    joined = points(tmp_path / "joined")
    for name, point in (("tiny", "LENS"), ("dense", "dense")):
        assert joined[point]["scores"] == pytest.approx(wanted[name], abs=1e-6)


def test_a_folder_that_cannot_be_written(model: Path, data: dict[str, str], tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    (tmp_path / "file").write_text("")
    given = ["--model", model, "--local", data["sts"], "--embeddings", tmp_path / "file"]
    assert analyse("pruning", tmp_path / "out", *given) == 2
    assert "--embeddings" in (told := capsys.readouterr().err)
    assert "name a folder that can be written" in told

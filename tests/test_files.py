"""Atomic outputs, checked inputs, and the layouts of texts."""

from __future__ import annotations

import gzip
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from lens.corpus import read_beir, read_texts
from lens.files import atomic_file, atomic_folder, check_output, read_jsonl, read_tensors, require


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")

    def fail():
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_a_failed_folder_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a").write_text("old")

    def fail():
        with atomic_folder(folder, overwrite=True) as temporary:
            (temporary / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]
    with atomic_folder(folder, overwrite=True) as temporary:
        (temporary / "b").write_text("new")
    assert [file.name for file in folder.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [folder]


def test_outputs_are_checked_first(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert check_output(tmp_path / "empty") == tmp_path / "empty"
    assert check_output(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    with pytest.raises(FileExistsError, match="file exists and is not empty"):
        check_output(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="is a file, not a folder"):
        check_output(tmp_path / "file" / "below")
    if os.geteuid() != 0:
        (tmp_path / "empty").chmod(0o500)
        with pytest.raises(PermissionError, match="no permission to write"):
            check_output(tmp_path / "empty" / "x")


def test_tensors_are_checked(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.zeros(2, 3)}, path)
    assert read_tensors(path, {"a": (None, 3)})["a"].shape == (2, 3)
    with pytest.raises(ValueError, match=r"a should have shape \(any, 4\), found \(2, 3\)"):
        read_tensors(path, {"a": (None, 4)})
    with pytest.raises(ValueError, match="expected tensors a, b; b missing, found a"):
        read_tensors(path, {"a": (2, 3), "b": (1,)})


def test_missing_extras_name_the_command():
    require("train", "json")
    with pytest.raises(ImportError, match=r"pip install 'lens-embeddings\[train\]'"):
        require("train", "json", "a_module_that_is_not_there")


def test_plain_text_and_jsonl(tmp_path):
    (tmp_path / "t.txt").write_text("one\n\nthree\n")
    assert read_texts(tmp_path / "t.txt") == (["1", "2", "3"], ["one", "", "three"])
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        file.write('{"_id": 7, "title": "T", "text": "x"}\n\n{"_id": "b", "text": "y"}\n')
    assert read_texts(tmp_path / "t.jsonl.gz") == (["7", "b"], ["T x", "y"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken", "bad.jsonl:1: not valid JSON"),
        ("[1]", "bad.jsonl:1: expected a JSON object, found list"),
        ('{"text": "x"}', "bad.jsonl:1: no usable `_id`"),
        ('{"_id": "a", "text": 3}', "bad.jsonl:1: `text` .* must be strings"),
        ('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}', "bad.jsonl:2: `_id` 'a' was already used in line 1"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / "bad.jsonl")


def test_undecodable_and_damaged_files(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"ok\ncaf\xe9\n")
    with pytest.raises(ValueError, match="latin.txt:2: not UTF-8 text"):
        read_texts(tmp_path / "latin.txt")
    data = gzip.compress(b'{"_id": "a", "text": "x"}\n' * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(data[: len(data) - 12])
    with pytest.raises(ValueError, match="cut.jsonl.gz"):
        list(read_jsonl(tmp_path / "cut.jsonl.gz"))


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": f"d{i}", "text": f"t{i}"}) + "\n" for i in "123"))
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "x"}\n{"_id": "q2", "text": "y"}\n')
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    return folder


def test_beir(beir):
    data = read_beir(beir)
    assert (data.name, data.queries, data.qrels) == ("set", {"q1": "x"}, {"q1": {"d1": 2, "d2": 0}})
    assert len(data.corpus) == 3
    with pytest.raises(FileNotFoundError, match="no test.tsv; found dev"):
        read_beir(beir, "test")


def test_beir_with_unknown_ids(beir):
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td9\t1\nq7\td1\t1\n")
    with pytest.raises(ValueError, match="dev.tsv:3: unknown document 'd9': complete the folder, or remove the line$"):
        read_beir(beir)
    with pytest.raises(ValueError, match=r"complete the folder, or leave such judgements out \(--skip-unknown\)$"):
        read_beir(beir, skip_unknown=False)
    with pytest.warns(UserWarning, match="names 2 unknown queries or documents"):
        assert read_beir(beir, skip_unknown=True).qrels == {"q1": {"d1": 1}}
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq7\td1\t1\n")
    with pytest.raises(ValueError, match="no judgement names"), pytest.warns(match="names 1"):
        read_beir(beir, skip_unknown=True)
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1 d1 1\n")
    with pytest.raises(ValueError, match="dev.tsv:2: expected query-id<TAB>corpus-id<TAB>integer score"):
        read_beir(beir)
    (beir / "qrels" / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="has no .tsv"):
        read_beir(beir)


def test_wheel_holds_only_lens(tmp_path):
    hatchling = pytest.importorskip("hatchling.build", reason="needs hatchling, of the dev extra")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        name = hatchling.build_wheel(str(tmp_path))
    finally:
        os.chdir(before)
    names = zipfile.ZipFile(tmp_path / name).namelist()
    assert "lens/__init__.py" in names
    assert "lens/py.typed" in names
    assert {entry.split("/")[0] for entry in names} == {"lens", name.removesuffix("-py3-none-any.whl") + ".dist-info"}


def test_no_module_shadows_another():
    """`python eval/run.py` puts eval/ first on sys.path."""
    known = {*sys.stdlib_module_names, "torch", "transformers", "peft", "datasets", "mteb", "faiss", "deepspeed"}
    for program in ("clustering", "train", "eval", "scripts", "benchmarks"):
        for path in (ROOT / program).rglob("*.py"):
            assert path.stem not in known - {"__init__"}, path

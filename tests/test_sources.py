"""Training data from every place and form gives the same examples, mapped or streamed."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT, SENTENCES, row, write_rows

from train.config import Recipe
from train.data import Example
from train.run import main as train
from train.sources import local_files, open_sources, read_examples, read_sources

ROWS = [
    row(query=f"q {i}", pos=[f"p {i}", "p"], neg=[f"n {j}" for j in range(i % 3 + 1)], prompt=None if i % 4 else "find",
        pos_scores=[1.5, 2], neg_scores=None if i % 5 == 0 else [0.5] * (i % 3 + 1))
    for i in range(23)
]  # fmt: skip


def recipe(*data, **changes):
    return Recipe(**{"base": "b", "output": "o", "data": list(map(str, data)), "group_size": 2, **changes})


def expected(rows=ROWS):
    fields = ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type")
    return [Example(*(item.get(name) for name in fields)) for item in rows]


def write(path, rows=ROWS):
    """The rows in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(item) + "\n" for item in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.parquet"])
def test_every_format_gives_the_same_examples(name, tmp_path, datasets_cache):
    path = write(tmp_path / name)
    (mapped,) = read_sources(recipe(path))
    assert list(mapped) == expected()
    assert mapped[17] == expected()[17]
    assert pickle.loads(pickle.dumps(mapped))[3] == expected()[3]
    assert set(mapped.prompts) == {("find", False)}
    write(path, ROWS[:9])  # a changed file is read anew, not taken from a cache
    assert list(read_sources(recipe(path))[0]) == expected()[:9]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.parquet"])
def test_streams_give_the_same_examples_in_any_order(name, tmp_path, datasets_cache):
    (stream,) = read_sources(recipe(write(tmp_path / name), streaming=True, shuffle_buffer=5))
    assert stream.blocks == [[5, 5, 5, 5, 3]]
    assert list(stream) == expected()
    for index in (22, 0, 11, 4, 5, 21, 7):
        assert stream[index] == expected()[index]
    assert pickle.loads(pickle.dumps(stream))[13] == expected()[13]
    assert not datasets_cache.exists()  # nothing is stored


def test_plain_lines_need_no_datasets_library(tmp_path):
    path = write(tmp_path / "d.jsonl")
    code = (
        "import sys; from train.sources import read_examples; read_examples(sys.argv[1]); "
        "sys.exit('datasets' in sys.modules or 'pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT).returncode == 0


def folder_of(tmp_path):
    """A folder like a copy of the hub's repository, with a file and a sub-folder of one's own."""
    folder = tmp_path / "folder"
    write(folder / "data" / "fever-00000-of-00002.parquet", ROWS[:10])
    write(folder / "data" / "fever-00001-of-00002.parquet", ROWS[10:])
    write(folder / "data" / "nq-00000-of-00001.parquet", ROWS[:4])
    write(folder / "own.jsonl", ROWS[:6])
    write(folder / "many" / "a.jsonl", ROWS[:3])
    write(folder / "many" / "deep" / "b.jsonl", ROWS[3:5])
    (folder / "README.md").write_text("nothing to train on")
    (folder / ".cache").mkdir()
    write(folder / ".cache" / "x.jsonl", ROWS[:1])
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_holds_a_data_set_in_every_file_and_sub_folder(streaming, tmp_path, datasets_cache):
    folder = folder_of(tmp_path)
    found = {s.name: s for s in read_sources(recipe(folder, streaming=streaming, data_weights=[2.5]))}
    sizes = {"data/fever": 23, "data/nq": 4, "own": 6, "many": 5}
    assert {name: len(s) for name, s in found.items()} == {f"{folder}/{name}": n for name, n in sizes.items()}
    assert list(found[f"{folder}/data/fever"]) == expected()
    assert list(found[f"{folder}/many"]) == expected()[:5]
    assert all(s.weight == 2.5 for s in found.values())
    assert len(local_files(str(folder))) == 6


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_of_the_hub(streaming, tmp_path, datasets_cache, monkeypatch):
    """The hub is a folder here: every call goes to the library, with the repository's name replaced by its place."""
    import datasets

    folder = folder_of(tmp_path)
    names = []

    def local(call, repo, *arguments, revision=None):
        names.append((repo, revision))
        return call(str(folder / "data"), *arguments)

    for function in ("load_dataset", "load_dataset_builder", "get_dataset_config_names"):
        monkeypatch.setattr(datasets, function, partial(local, getattr(datasets, function)))
    # As on the hub, the card maps the files to splits.
    (folder / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: fever\n    path: fever-*\n"
        "  - split: nq\n    path: nq-*\n- config_name: small\n  data_files:\n  - split: train\n    path: nq-*\n---\n"
    )
    found = {s.name: list(s) for s in read_sources(recipe("org/name@v1", streaming=streaming))}
    assert found == {"org/name:fever": expected(), "org/name:nq": expected()[:4]}
    assert set(names) == {("org/name", "v1")}
    for subset, name in (("nq", "org/name:nq"), ("small", "org/name:train")):
        (only,) = read_sources(recipe(f"org/name:{subset}", streaming=streaming))
        assert (only.name, list(only)) == (name, expected()[:4])
    with pytest.raises(ValueError, match="org/name has no subset 'msmarco': it has .*fever, nq"):
        read_sources(recipe("org/name:msmarco", streaming=streaming))


def test_sources_that_are_none(tmp_path, datasets_cache):
    with pytest.raises(FileNotFoundError, match="gone.jsonl does not exist"):
        read_sources(recipe(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match="no/such is no file or folder here, and reading it from the hub failed"):
        read_sources(recipe("no/such"))
    (tmp_path / "d.csv").write_text("query,pos\n")
    for read in (read_sources, open_sources):
        with pytest.raises(ValueError, match=r"d.csv is none of .jsonl, .jsonl.gz, .json, .parquet: convert it"):
            read(recipe(tmp_path / "d.csv"))
    with pytest.raises(ValueError, match="d.csv is none of"):
        read_examples(tmp_path / "d.csv")
    with pytest.raises(ValueError, match="training data /dev/null is neither a file nor a folder"):
        read_sources(recipe("/dev/null"))
    with pytest.raises(ValueError, match="a.json is one JSON array, which cannot be streamed: write an object a line"):
        read_sources(recipe(write(tmp_path / "a.json"), streaming=True))
    (tmp_path / "void").mkdir()
    with pytest.raises(FileNotFoundError, match="void holds no training files"):
        read_sources(recipe(tmp_path / "void"))
    for name, message in (("bad.parquet", "bad.parquet cannot be read"), ("cut.jsonl.gz", "cut.jsonl.gz:.*: damaged")):
        path = write(tmp_path / name)
        path.write_bytes(path.read_bytes()[:-9])
        for streaming in (False, True):
            with pytest.raises(ValueError, match=message):
                read_sources(recipe(path, streaming=streaming))


@pytest.mark.parametrize(("name", "place"), [("d.jsonl", ":8"), ("d.jsonl.gz", ":8"), ("d.parquet", ": row 7")])
def test_a_bad_row_is_named_by_its_place(name, place, tmp_path, datasets_cache):
    bad = [*ROWS[:6], row(query="q", pos=["p"], neg=["n"], type="symmetric_sts"), *ROWS[6:]]
    path = write(tmp_path / name, bad)
    if name != "d.parquet":  # a blank line counts as a line and is no row
        text = "".join(json.dumps(item) + "\n" for item in bad).replace("\n", "\n\n", 1).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    with pytest.raises(ValueError, match=f"{path}{place}: the data set mixes types that train differently"):
        read_sources(recipe(path))
    (stream,) = read_sources(recipe(path, streaming=True, shuffle_buffer=4))
    assert stream[5] == expected()[5]
    with pytest.raises(ValueError, match=f"{path}{place}: the data set mixes types"):
        stream[6]


def test_scores_and_types_of_the_published_data(tmp_path):
    path = write_rows(
        tmp_path / "d.jsonl",
        row(type="normal"),
        row(pos_scores=[], neg_scores=[]),
        row(pos_scores=[None], neg_scores=[1, None], category="more fields do no harm"),
    )
    one, two, three = read_examples(path, 2)
    assert (one.type, two.pos_scores, three.neg_scores) == ("retrieval", None, [1, None])


def test_own_negatives_need_a_group(tmp_path):
    path = write_rows(tmp_path / "d.jsonl", row(type="symmetric_class"))
    with pytest.raises(ValueError, match=r"d.jsonl:1: `type` symmetric_class takes own negatives only, and group_size"):
        read_sources(recipe(path, group_size=1))
    assert len(read_sources(recipe(path, group_size=1, type_group_size={"symmetric_class": 2}))) == 1
    assert len(open_sources(recipe(path, group_size=1))) == 1
    assert len(read_examples(path)) == 1


def test_a_streamed_run_goes_on_with_the_very_next_batch(bert, bert_clusters, tmp_path):
    """Two data sets of different types and weights, streamed by two workers, stopped and continued."""
    one = write(tmp_path / "one.jsonl", [{**item, "query": f"{SENTENCES[i % 7]} {i}"} for i, item in enumerate(ROWS)])
    two = write(tmp_path / "two.jsonl", [{**item, "type": "symmetric_sts"} for item in ROWS])
    arguments = {
        "base": bert, "clusters": bert_clusters, "batch_size": 4, "group_size": 3, "data_weights": [1, 2], "workers": 2,
        "type_batch_size": "symmetric_sts=6", "streaming": "true", "shuffle_buffer": 7, "save_steps": 3, "max_steps": 9,
        "cache_hidden": "false", "backbone": "frozen", "train_head": "true", "logging_steps": 1, "warmup_steps": 1,
        "report_to": "[]", "device": "cpu", "learning_rate": 0.01, "save_total_limit": 9, "seed": 5,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text("mask_false_negatives: teacher\n")

    def go(output):
        values = {**arguments, "output": output}
        command = [str(tmp_path / "recipe.yaml"), "--data", str(one), str(two)]
        for name, value in values.items():
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        assert train(command) == 0
        lines = (output / "training_log.jsonl").read_text().splitlines()
        return [(line["step"], line["loss"]) for line in map(json.loads, lines)]

    whole = go(tmp_path / "whole")
    assert [step for step, _ in whole] == list(range(1, 10))
    cut = tmp_path / "cut"
    go(cut)
    (cut / "lens.json").unlink()
    for step in (6, 9):
        shutil.rmtree(cut / f"checkpoint-{step}")
    assert go(cut) == whole

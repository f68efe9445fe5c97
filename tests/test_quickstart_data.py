"""The quick start's data: what is a query, what is a passage, and that nothing held out is seen in training."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lens.corpus import read_beir, read_texts

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


data = load("quickstart_data")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quickstart") / "data"
    assert data.main(["--output", str(output)]) == 0
    return output


def rows(path: Path) -> dict[str, str]:
    return {row["_id"]: row["text"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def wordings(texts: Any) -> set[str]:
    return {data.wording(text) for text in texts}


def test_counts_are_in_a_sensible_range(built: Path) -> None:
    summary = json.loads((built / "data.json").read_text())
    assert summary["docstrings"] > 1500
    assert summary["train"]["documents"] > 1000
    assert summary["train"]["queries"] > 1.5 * summary["train"]["documents"]
    assert summary["heldout"]["documents"] > summary["train"]["documents"]
    assert summary["heldout"]["splits"]["test"]["queries"] > 200
    parts = summary["modules"]
    total = sum(map(len, parts.values()))
    assert 0.55 < len(parts["train"]) / total < 0.85
    assert len(set().union(*parts.values())) == total


def test_nothing_held_out_is_seen_in_training(built: Path) -> None:
    train, heldout = rows(built / "train" / "corpus.jsonl"), rows(built / "heldout" / "corpus.jsonl")
    modules = json.loads((built / "data.json").read_text())["modules"]
    assert {data.family_of(name.partition(":")[0]) for name in train} <= set(modules["train"])
    assert train.items() <= heldout.items()
    assert not wordings(train.values()) & wordings(text for name, text in heldout.items() if name not in train)
    asked = rows(built / "heldout" / "queries.jsonl")
    assert not wordings(asked.values()) & wordings(rows(built / "train" / "queries.jsonl").values())
    for split in ("dev", "test"):
        beir = read_beir(built / "heldout", split)
        assert {data.family_of(name.partition(":")[0]) for name in beir.queries} <= set(modules[split])
        assert not {name for judged in beir.qrels.values() for name in judged} & set(train)


def test_no_passage_contains_its_query(built: Path) -> None:
    for folder, split in (("train", "train"), ("heldout", "test")):
        beir = read_beir(built / folder, split)
        for query, judged in beir.qrels.items():
            if not query.endswith("#name") and len(judged) == 1:
                (passage,) = judged
                if passage == query:
                    assert beir.queries[query].lower() not in " ".join(beir.corpus[passage].split()).lower()


def test_the_same_python_gives_the_same_data(built: Path, tmp_path: Path) -> None:
    data.build(tmp_path / "again", None, data.SEED)
    for path in sorted(built.rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(built)).read_bytes()


def test_docstrings_are_read_without_importing(tmp_path: Path) -> None:
    body = "The body tells in at least eight words what happens here."
    source = f'''"""Summary of the module.

{body}
"""
raise SystemExit

class Reader:
    def close(self):
        """Close the whole reader.

        {body} Also {{braces}}.
        """

    def open(self):
        """Only a summary here."""
'''
    (tmp_path / "test").mkdir()
    (tmp_path / "_pyio.py").write_text(source)
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test" / "io.py").write_text(source)
    found = data.read_standard_library(tmp_path)
    assert [(item.id, item.family, item.summary) for item in found] == [
        ("_pyio", "io", "Summary of the module."),
        ("_pyio:Reader.close", "io", "Close the whole reader."),
    ]
    assert found[0].body == body
    assert found[1].name == "pyio reader close"


def test_names_become_words() -> None:
    assert data.split_name("queue.LifoQueue.full") == "queue lifo queue full"
    assert data.split_name("xml.sax.XMLReader._do_it2") == "xml sax xml reader do it2"
    assert [data.family_of(name) for name in ("_py_abc", "_collections_abc", "__future__", "os.path", "_strptime")] == [
        "abc",
        "collections",
        "__future__",
        "os",
        "strptime",
    ]


def test_near_duplicates_are_one_passage() -> None:
    text = "Return the number of items in the queue, which may be off by one when threads race for it."
    other = "Wait until every worker has finished its part of the job and say which ones failed."
    assert data.merge_near_duplicates([other, text, text.replace("Return", "Returns"), other.upper()]) == [0, 1, 1, 0]


def test_without_sources_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no Python source"):
        data.read_standard_library(tmp_path)


LONG = "and then it goes on for quite a while about {} so that it counts as a passage."


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": f"Title number {i}", "text": LONG.format(i)} for i in range(5)]
    corpus.append({"_id": "d5", "text": "A first sentence without title. " + LONG.format("it")})
    corpus.append({"_id": "d6", "text": "Too short."})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    queries = [{"_id": f"q{i}", "text": f"Question {i}"} for i in range(5)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td1\t0\n")
    return folder


def test_own_folder_without_training_judgements(own: Path, tmp_path: Path) -> None:
    summary = data.build(tmp_path / "out", own, 0)
    train = read_beir(tmp_path / "out" / "train", "train")
    assert train.queries["d1"] == "Title number 1"
    assert train.corpus["d1"] == LONG.format(1)
    assert train.queries["d5"] == "A first sentence without title."
    assert train.corpus["d5"] == LONG.format("it")
    assert set(train.corpus) == {"d1", "d2", "d3", "d4", "d5"}  # d0 is asked for, d6 makes no pair
    heldout = read_beir(tmp_path / "out" / "heldout", "test")
    assert (len(heldout.corpus), heldout.queries) == (7, {"q0": "Question 0"})
    assert summary["pairs"] == "made from the corpus"


def test_own_folder_with_training_judgements(own: Path, tmp_path: Path) -> None:
    (own / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\td4\t1\nq1\td0\t1\nq2\td0\t1\nq2\td2\t2\nq3\td3\t0\nq4\td4\t1\n"
    )
    data.build(tmp_path / "out", own, 0)
    train = read_beir(tmp_path / "out" / "train", "train")
    assert train.qrels == {"q2": {"d2": 2}, "q4": {"d4": 1}}
    assert "d0" not in train.corpus
    assert train.corpus["d2"] == f"Title number 2 {LONG.format(2)}"


@pytest.mark.parametrize("judged", [True, False])
def test_own_folder_with_nothing_to_evaluate_on_holds_a_part_out(own: Path, tmp_path: Path, judged: bool) -> None:
    (own / "qrels" / "test.tsv").unlink()
    if judged:
        (own / "qrels" / "train.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(5)))
    data.build(tmp_path / "out", own, 3)
    train = read_beir(tmp_path / "out" / "train", "train")
    heldout = read_beir(tmp_path / "out" / "heldout", "test")
    assert train.queries
    assert heldout.queries
    assert not set(train.queries) & set(heldout.queries)
    assert not {name for row in heldout.qrels.values() for name in row} & set(train.corpus)


def test_training_pairs_are_limited(own: Path) -> None:
    train, _, _ = data.own_folder(own, 0, limit=2)
    assert len(train.queries) == 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "d0", "text": "x"}\nno json\n', r"corpus\.jsonl:2: not valid JSON"),
        ("queries.jsonl", '{"text": "x"}\n', r"queries\.jsonl:1: no usable `_id`"),
        ("qrels/test.tsv", "q0\td0\tx\n", r"test\.tsv:1: expected query-id"),
        ("qrels/test.tsv", "q0\td0\t0\n", "no judgement has a positive score"),
        ("corpus.jsonl", '{"_id": "d0", "text": "x"}\n{"_id": "d1", "text": "short"}\n', "too little to train on"),
    ],
)
def test_bad_input_gets_one_line(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str, message: str
) -> None:
    (own / file).write_text(content)
    assert data.main(["--output", str(tmp_path / "out"), "--data", str(own)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_an_output_in_the_way_is_kept(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert data.main(["--output", str(tmp_path / "out"), "--data", str(own)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert read_texts(own)[0] == [f"d{i}" for i in range(7)]

"""train/mine.py from files to files: against naive loops, for any shard, killed and restarted, with bad input."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256

import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import ROOT, SENTENCES, write_rows
from safetensors.torch import load_file, save_file

import train.retrievers
from lens.search.bm25 import BM25, PartialBM25
from train.mine import main as mine
from train.ranking import Best
from train.sources import read_examples

WORDS = ["river", "stone", "amber", "falcon", "copper", "violin", "meadow", "lantern", "harbour", "cedar", "marble"]
KINDS = {"bm25": ["bm25"], "dense": ["st=MODEL"], "sparse": ["sparse=MODEL"], "fused": ["bm25", "st=MODEL"],
         "three": ["sparse=MODEL", "bm25", "st=MODEL"]}  # fmt: skip


def sentence(rng, most=6):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def write_beir(folder, corpus, queries, qrels, split="train", packed=False):
    """A BEIR folder: corpus and queries by id, qrels as (query, document, score)."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", corpus), ("queries", queries)):
        path = write_rows(folder / f"{name}.jsonl", *({"_id": key, "text": text} for key, text in texts.items()))
        if packed:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{document}\t{score}" for query, document, score in qrels)]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def made(folder, seed=0, size=60, questions=12, **options):
    """A random BEIR folder with copies among passages, of positives and of queries, and blank passages."""
    rng = random.Random(seed)
    texts = [sentence(rng) for _ in range(size)]
    queries = [sentence(rng, 4) for _ in range(questions)]
    queries[1] = queries[0]  # two names of one query
    best = {f"q{q}": 5 * q + 1 for q in range(questions) if 5 * q + 1 < size}
    for q, place in best.items():
        texts[place] = f"{queries[int(q[1:])]} {rng.choice(WORDS)}"
    for place in range(0, size, 5):
        texts[place] = rng.choice([*queries, texts[place - 1], texts[place - 2].replace(" ", "  ") + " ", " ", ""])
    filled = [place for place, text in enumerate(texts) if text.strip()]
    qrels = []
    for q in range(questions):
        places = {*rng.sample(filled, rng.randint(1, 3)), best.get(f"q{q}", filled[0])}
        qrels += [(f"q{q}", f"d{place}", rng.choice([1, 2])) for place in sorted(places)]
    qrels += [(f"q{q}", f"d{place}", 0) for q in range(questions) for place in range(3)
              if not any(row[:2] == (f"q{q}", f"d{place}") for row in qrels)]  # fmt: skip
    named = {f"d{place}": text for place, text in enumerate(texts)}
    return write_beir(folder, named, {f"q{q}": text for q, text in enumerate(queries)}, qrels, **options)


def contents(folder, split="train"):
    """Passages, queries and relevant passages of a BEIR folder, read by hand."""
    corpus = {row["_id"]: row["text"] for row in map(json.loads, (folder / "corpus.jsonl").read_text().splitlines())}
    queries = {row["_id"]: row["text"] for row in map(json.loads, (folder / "queries.jsonl").read_text().splitlines())}
    relevant = {}
    for line in (folder / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]:
        query, document, score = line.split("\t")
        if int(score) > 0:
            relevant.setdefault(query, []).append(document)
    return corpus, queries, relevant


def plain(text):
    return " ".join(text.split())


def dense_vector(text):
    """Small whole numbers, so that sums are exact and ties are many."""
    total = np.zeros(5)
    for word in text.split():
        total += [byte % 5 - 2 for byte in sha256(word.encode()).digest()[:5]]
    return total


def sparse_vector(text):
    return np.array([text.split().count(word) for word in WORDS], dtype=float)


class FakeEncoder:
    def __init__(self, kind):
        self.kind = kind

    def queries(self, texts):
        return self.passages([text for text, _ in texts])

    def passages(self, texts):
        vector = dense_vector if self.kind == "st" else sparse_vector
        rows = np.array([vector(text) for text in texts], dtype=np.float32)
        return rows if self.kind == "st" else scipy.sparse.csr_matrix(rows)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder that passes for a model; what is read from it embeds words as whole numbers."""
    monkeypatch.setattr(train.retrievers, "_read", lambda spec, device: FakeEncoder(spec.kind))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def run(*arguments):
    assert mine([str(argument) for argument in arguments]) == 0


def read(path):
    content = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()]


def matrix(kind, queries, passages):
    """All scores of a retriever, by loops."""
    if kind == "bm25":
        return BM25(passages).score(queries)
    vector = dense_vector if kind == "st" else sparse_vector
    return np.array([[float(vector(query) @ vector(passage)) for passage in passages] for query in queries])


def reference(folder, kinds, how, depth, skip, wanted, limit_of):
    """For each judged query, by loops over full score matrices: the negatives with their scores that no chance is part
    of, and the scores of its positives. `limit_of` gives what a score must lie below from the positives' scores."""
    corpus, queries, relevant = contents(folder)
    names, passages = list(corpus), list(corpus.values())
    matrices = [matrix(kind, list(queries.values()), passages) for kind in kinds]
    answer = []
    for number, query in enumerate(queries):
        total, own = {}, np.zeros(len(relevant[query]))
        for kind, scores in zip(kinds, matrices, strict=True):
            row = scores[number]
            ranked = sorted(range(len(row)), key=lambda place, row=row: (-row[place], place))[:depth]
            if kind != "st":
                ranked = [place for place in ranked if row[place] > 0]
            low = row[ranked[-1]] if len(ranked) == depth or (kind == "st" and ranked) else 0
            high = max((row[place] for place in ranked), default=0)

            def part(score, rank, low=low, high=high):
                if len(kinds) == 1:
                    return score
                if how == "rrf":
                    return 1 / (60 + rank)
                return 1.0 if high == low else (score - low) / (high - low)

            for rank, place in enumerate(ranked, 1):
                total[place] = total.get(place, 0) + part(row[place], rank)
            for i, name in enumerate(relevant[query]):
                score = row[names.index(name)]
                inside = score >= low if len(ranked) == depth else (score > 0 or kind == "st")
                if len(kinds) == 1 or (ranked and inside):
                    own[i] += part(score, 1 + sum(row[place] > score for place in ranked))
        order = sorted(total, key=lambda place: (-total[place], place))[:depth]
        same = [other for other in queries if plain(queries[other]) == plain(queries[query])]
        never = {plain(queries[query]), ""} | {plain(corpus[name]) for other in same for name in relevant[other]}
        seen, found = set(never), []
        for rank, place in enumerate(order):
            text = plain(passages[place])
            if text not in seen and rank >= skip and total[place] < limit_of(own):
                found.append((passages[place], total[place]))
            seen.add(text)
        answer.append((found[:wanted], own))
    return answer


@pytest.mark.parametrize("shard", [1, 7, 90])
@pytest.mark.parametrize("name", KINDS)
def test_equal_to_naive_loops_for_any_shard(name, shard, model, tmp_path):
    for case, how in enumerate(("rrf", "sum")):
        beir = made(tmp_path / f"beir{case}", seed=case, size=90)
        kinds = [part.partition("=")[0] for part in KINDS[name]]
        retrievers = [part.replace("MODEL", str(model)) for part in KINDS[name]]
        output = tmp_path / f"mined{case}.jsonl"
        run("--beir", beir, "--output", output, "--retriever", *retrievers, "--fuse", how, "--shard", shard, "--scores",
            "--sample", "top", "--negatives", 4, "--depth", 20, "--skip", 2, "--max-share", 0.9)  # fmt: skip

        def limit(own):
            return max(own) * (0.9 if max(own) >= 0 else 1.1)

        expected = reference(beir, kinds, how, 20, 2, 4, limit)
        rows = read(output)
        assert len(rows) == len(expected)
        ranked = 0
        for row, (found, own) in zip(rows, expected, strict=True):
            kept = [
                (text, score) for text, score in zip(row["neg"], row["neg_scores"], strict=True) if score is not None
            ]
            assert [text for text, _ in kept] == [text for text, _ in found]
            assert [score for _, score in kept] == pytest.approx([score for _, score in found], abs=1e-6)
            assert max(row["pos_scores"]) == pytest.approx(max(own), abs=1e-6)
            ranked += len(kept)
        assert ranked > 15


def test_the_same_file_for_any_shard(model, tmp_path):
    beir = made(tmp_path / "beir", seed=5)
    options = ["--beir", beir, "--retriever", "bm25", f"st={model}", "--negatives", 6, "--random-share", 0.34,
               "--margin", 0.001, "--scores"]  # fmt: skip
    outputs = [tmp_path / f"shard{shard}.jsonl" for shard in (1, 7, 13, 60)]
    for output in outputs:
        run(*options, "--output", output, "--shard", output.stem.removeprefix("shard"))
    first = outputs[0].read_bytes()
    assert all(output.read_bytes() == first for output in outputs)
    run(*options, "--output", tmp_path / "other.jsonl", "--seed", 7)
    assert (tmp_path / "other.jsonl").read_bytes() != first


def test_faiss_and_numpy_give_the_same_file(model, tmp_path):
    pytest.importorskip("faiss")
    beir = made(tmp_path / "beir", seed=6)
    for search in ("faiss", "numpy"):
        run("--beir", beir, "--retriever", f"st={model}", "--output", tmp_path / f"{search}.jsonl", "--depth", 8,
            "--shard", 25, "--scores", "--search", search)  # fmt: skip
    assert (tmp_path / "faiss.jsonl").read_bytes() == (tmp_path / "numpy.jsonl").read_bytes()


@pytest.mark.parametrize("seed", range(12))
def test_never_a_positive_the_query_or_a_copy_and_as_many_as_there_are(seed, model, tmp_path):
    beir = made(tmp_path / "beir", seed=seed, size=25, questions=8, packed=bool(seed % 2))
    if seed % 2:
        for name in ("corpus", "queries"):  # for `contents`
            (beir / f"{name}.jsonl").write_bytes(gzip.decompress((beir / f"{name}.jsonl.gz").read_bytes()))
    corpus, queries, relevant = contents(beir)
    retrievers = [part.replace("MODEL", str(model)) for part in list(KINDS.values())[seed % len(KINDS)]]
    wanted = (3, 30)[seed % 2]
    output = tmp_path / "mined.jsonl"
    run("--beir", beir, "--output", output, "--retriever", *retrievers, "--negatives", wanted, "--seed", seed,
        "--depth", 10, "--random-share", (0, 0.5)[seed // 2 % 2])  # fmt: skip
    rows = read(output)
    assert [row["query"] for row in rows] == list(queries.values())
    for query, row in zip(queries, rows, strict=True):
        same = [other for other in queries if plain(queries[other]) == plain(queries[query])]
        never = {plain(queries[query]), ""} | {plain(corpus[name]) for other in same for name in relevant[other]}
        negatives = [plain(text) for text in row["neg"]]
        assert not never & set(negatives)
        assert len(set(negatives)) == len(negatives)
        assert set(row["neg"]) <= set(corpus.values())
        assert len(negatives) == min(wanted, len({plain(text) for text in corpus.values()} - never))
        assert {plain(text) for text in row["pos"]} == {plain(corpus[name]) for name in relevant[query]}
        assert row["pos_scores"] is None
        assert row["neg_scores"] is None
        assert row["type"] == "retrieval"


def test_the_manifest_counts(tmp_path):
    corpus = {"a": "river stone", "b": "river  stone ", "c": "river amber", "d": "river", "e": "cedar", "f": ""}
    queries = {"1": "river stone", "2": " ", "3": "cedar", "4": "amber", "5": "unjudged"}
    qrels = [("1", "c", 1), ("2", "a", 1), ("3", "f", 1), ("4", "c", 0)]
    beir = write_beir(tmp_path / "beir", corpus, queries, qrels)
    output = tmp_path / "out" / "mined.jsonl"
    run("--beir", beir, "--output", output, "--negatives", 3, "--depth", 10, "--prompt", "Find.")
    (row,) = read(output)
    assert (row["query"], row["pos"], row["prompt"]) == ("river stone", ["river amber"], "Find.")
    assert row["neg"] == ["river", "cedar"]
    manifest = json.loads((tmp_path / "out" / "mined.jsonl.manifest.json").read_text())
    assert manifest["left_out"] == {"blank query": 1, "blank positives": 1, "no positive": 1}
    counted = {name: manifest[name] for name in ("queries", "examples", "negatives", "passages", "random_negatives")}
    assert counted == {"queries": 4, "examples": 1, "negatives": 2, "passages": 6, "random_negatives": 1}
    assert manifest["examples_with_fewer_negatives"] == 1
    assert manifest["candidates_filtered"] == {"positive, query or blank": 3}  # a, b: the query itself; c
    assert manifest["output"]["sha256"] == sha256(output.read_bytes()).hexdigest()
    corpus_facts = manifest["inputs"][str(beir / "corpus.jsonl")]
    assert corpus_facts["sha256"] == sha256((beir / "corpus.jsonl").read_bytes()).hexdigest()
    assert manifest["retrievers"] == [{"retriever": "bm25"}]
    assert manifest["options"]["negatives"] == 3
    assert sorted(path.name for path in output.parent.iterdir()) == ["mined.jsonl", "mined.jsonl.manifest.json"]


def test_pairs_alone_and_with_a_corpus(tmp_path):
    pairs = write_rows(
        tmp_path / "pairs.jsonl",
        {"query": "river stone", "pos": ["river amber", "stone"], "type": "symmetric_sts", "prompt": "Own."},
        {"query": "cedar", "pos": ["cedar marble"], "neg": ["river falcon", "cedar river"], "type": "symmetric_sts"},
        {"query": "river stone", "pos": ["stone falcon"], "type": "symmetric_sts"},
    )
    output = tmp_path / "mined.jsonl.gz"
    run("--pairs", pairs, "--output", output, "--negatives", 9)
    rows = read(output)
    assert [(row["type"], row["prompt"]) for row in rows] == [("symmetric_sts", "Own.")] + [("symmetric_sts", None)] * 2
    assert sorted(rows[0]["neg"]) == ["cedar marble", "cedar river", "river falcon"]  # not line 3's positive
    assert sorted(rows[1]["neg"]) == ["cedar river", "river amber", "river falcon", "stone", "stone falcon"]
    assert read_examples(output, 3)[2].pos == ["stone falcon"]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("river amber\nriver lantern\nstone lantern\nlantern\n")
    run("--pairs", pairs, "--corpus", corpus, "--output", tmp_path / "m.jsonl", "--scores", "--max-share", 1,
        "--sample", "top", "--negatives", 2)  # fmt: skip
    rows = read(tmp_path / "m.jsonl")
    # line 3's positive is not in the corpus: scored with the corpus's statistics, by hand
    rarity = np.log(1 + (4 - 1 + 0.5) / (1 + 0.5))  # stone stands in 1 of 4 passages, falcon in none
    mean = 7 / 4
    expected = rarity * 1 / (1 + 1.2 * (1 - 0.75 + 0.75 * 2 / mean))
    assert rows[2]["pos_scores"] == pytest.approx([expected], abs=1e-6)
    assert rows[2]["neg"][0] == "river lantern"  # stone lantern scores as much as the positive, which is not below
    assert rows[1]["neg_scores"] == [None, None]


class Killed(Exception):
    """Stands for kill -9."""


def kill_at(monkeypatch, owner, name, call):
    """Makes the call of that number of `owner.name` raise before it does anything."""
    calls, real = [], getattr(owner, name)

    def dying(*arguments, **options):
        calls.append(0)
        if len(calls) == call:
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(PartialBM25, "count", 1), (PartialBM25, "count", 4), (Best, "save", 1), (Best, "save", 3), (Best, "save", 9),
     (FakeEncoder, "passages", 3), (train.retrievers.BM25Retriever, "pairs", 1), (train.mine, "write_json", 1)],
)  # fmt: skip
def test_killed_anywhere_and_restarted_is_the_same(owner, name, call, model, tmp_path, monkeypatch):
    beir = made(tmp_path / "beir", seed=9)
    options = ["--beir", beir, "--retriever", "bm25", f"st={model}", "--shard", 10, "--margin", 0.001, "--negatives", 5]
    run(*options, "--output", tmp_path / "whole" / "mined.jsonl")
    output = tmp_path / "broken" / "mined.jsonl"
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(Killed):
            mine([str(option) for option in [*options, "--output", output]])
    assert not output.exists()
    begun = call > 1 or name in ("pairs", "save", "write_json")
    assert (tmp_path / "broken" / "mined.jsonl.work").exists() == begun
    run(*options, "--output", output)
    assert output.read_bytes() == (tmp_path / "whole" / "mined.jsonl").read_bytes()
    texts = [(tmp_path / folder / "mined.jsonl.manifest.json").read_text() for folder in ("whole", "broken")]
    assert texts[0].replace("/whole/", "/broken/") == texts[1]
    assert not (tmp_path / "broken" / "mined.jsonl.work").exists()


def test_done_shards_are_not_searched_again(model, tmp_path, monkeypatch, capsys):
    beir = made(tmp_path / "beir", seed=9)
    options = ["--beir", beir, "--retriever", f"st={model}", "--shard", 10, "--output", tmp_path / "mined.jsonl"]
    with monkeypatch.context() as patch:
        kill_at(patch, Best, "save", 5)
        with pytest.raises(Killed):
            mine([str(option) for option in options])
    embedded = []
    real = FakeEncoder.passages

    def counting(self, texts):
        embedded.extend(texts)
        return real(self, texts)

    monkeypatch.setattr(FakeEncoder, "passages", counting)
    capsys.readouterr()
    run(*options)
    assert "4 of 6 shards are done; going on" in capsys.readouterr().err
    assert len(embedded) == 20 + 11  # the last two shards, and the queries that differ


def test_a_run_with_other_options_or_files_does_not_go_on(tmp_path, monkeypatch, capsys):
    beir = made(tmp_path / "beir", seed=9)
    output = tmp_path / "mined.jsonl"
    options = ["--beir", str(beir), "--output", str(output), "--shard", "10"]
    with monkeypatch.context() as patch:
        kill_at(patch, Best, "save", 3)
        with pytest.raises(Killed):
            mine(options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "mined.jsonl.work").iterdir()}
    for more, named in ((["--depth", "9"], "--depth"), (["--shard", "9"], "--shard"), (["--prompt", "x"], "--prompt")):
        assert mine([*options, *more]) == 2
        error = capsys.readouterr().err
        assert f"unfinished run with other {named}: " in error
        assert "mined.jsonl.work" in error
    with (beir / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "more", "text": "river"}) + "\n")
    assert mine(options) == 2
    assert "unfinished run with other input files: " in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "mined.jsonl.work").iterdir()} == before
    assert not output.exists()


def test_killed_by_a_signal_and_restarted(tmp_path):
    beir = made(tmp_path / "beir", seed=3, size=3000, questions=40)
    options = ["--beir", str(beir), "--shard", "10", "--negatives", "5"]
    run(*options, "--output", tmp_path / "whole.jsonl")
    output = tmp_path / "broken.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "train/mine.py", *options, "--output", str(output)], cwd=ROOT, env=environment
    )
    state, end = tmp_path / "broken.jsonl.work" / "best-0.npz", time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    with np.load(state) as file:
        assert 0 < int(file["shards"]) < 300
    run(*options, "--output", output)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_manifests_are_no_training_data(tmp_path):
    from train.config import Recipe
    from train.sources import open_sources

    beir = made(tmp_path / "beir")
    run("--beir", beir, "--output", tmp_path / "data" / "mined.jsonl")
    (tmp_path / "data" / "more").mkdir()
    (tmp_path / "data" / "mined.jsonl.manifest.json").rename(tmp_path / "data" / "more" / "mined.jsonl.manifest.json")
    run("--beir", beir, "--output", tmp_path / "data" / "other.jsonl")
    recipe = Recipe(base="x", data=[str(tmp_path / "data")], output="y")
    assert sorted(source.name for source in open_sources(recipe)) == [
        f"{tmp_path}/data/{n}" for n in ("mined", "other")
    ]


def test_a_corpus_with_one_passage_and_queries_whose_every_candidate_is_a_positive(tmp_path, capsys):
    alone = write_beir(tmp_path / "alone", {"a": "river"}, {"1": "river stone"}, [("1", "a", 1)])
    assert mine(["--beir", str(alone), "--output", str(tmp_path / "x.jsonl")]) == 2
    assert "no query has a negative (no negative 1)" in capsys.readouterr().err
    corpus = {"a": "river", "b": "river stone", "c": "cedar"}
    queries = {"1": "river", "2": "stone"}
    beir = write_beir(tmp_path / "all", corpus, queries, [("1", "b", 1), ("1", "c", 1), ("2", "b", 1)])
    run("--beir", beir, "--output", tmp_path / "y.jsonl")
    (row,) = read(tmp_path / "y.jsonl")
    assert (row["query"], sorted(row["neg"])) == ("stone", ["cedar", "river"])  # random: nothing else has its word
    assert "1 queries left out: no negative" in capsys.readouterr().out


def test_bad_input_is_named_in_one_line(tmp_path, capsys):
    good = made(tmp_path / "good")
    broken = {}
    for name, file, line in (
        ("corpus", "corpus.jsonl", '{"_id": "x"'), ("text", "corpus.jsonl", '{"_id": "x", "text": 3}'),
        ("twice", "corpus.jsonl", '{"_id": "d3", "text": "x"}'), ("noid", "corpus.jsonl", '{"text": "x"}'),
        ("queries", "queries.jsonl", "[]"), ("qrels", "qrels/train.tsv", "q1\td1"),
        ("document", "qrels/train.tsv", "q1\tnone\t1"), ("query", "qrels/train.tsv", "none\td1\t1"),
        ("latin", "corpus.jsonl", None),
    ):  # fmt: skip
        broken[name] = made(tmp_path / name)
        path = broken[name] / file
        path.write_bytes(path.read_bytes() + (b"\xe9\n" if line is None else f"{line}\n".encode()))
    none = write_beir(tmp_path / "none", {"a": "x", "b": "y"}, {"1": "x"}, [("1", "a", 0)])
    empty = write_beir(tmp_path / "empty", {}, {"1": "x"}, [("1", "a", 1)])
    pairs = write_rows(tmp_path / "p.jsonl", {"query": "river", "pos": ["stone"]}, {"query": " ", "pos": ["x"]})
    no_pos = write_rows(tmp_path / "n.jsonl", {"query": "river", "pos": []})
    blank = write_rows(tmp_path / "blank.jsonl", {"query": "river", "pos": ["", "x"]})
    labelled = write_rows(
        tmp_path / "labelled.jsonl",
        {"query": "river", "pos": ["stone"], "type": "only_1neg"},
        {"query": "cedar", "pos": ["marble"], "neg": ["amber"], "type": "symmetric_class"},
    )
    grouped = write_rows(
        tmp_path / "grouped.jsonl", {"query": "x", "pos": ["y"], "neg": ["z"], "type": "symmetric_clustering"}
    )
    (tmp_path / "void.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "lens").mkdir()
    (tmp_path / "lens" / "lens.json").write_text("{}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    out = str(tmp_path / "out.jsonl")
    rows = (good / "corpus.jsonl").read_text().count("\n")
    folder = ["--beir", str(good), "--output", out]
    cases = [
        *((["--beir", str(broken[name]), "--output", out], message) for name, message in (
            ("corpus", f"corpus.jsonl:{rows + 1}: not valid JSON"), ("text", f"corpus.jsonl:{rows + 1}: `text`"),
            ("twice", f"corpus.jsonl:{rows + 1}: `_id` 'd3' was already used in line 4"),
            ("noid", f"corpus.jsonl:{rows + 1}: no usable `_id`"),
            ("queries", "queries.jsonl:13: expected a JSON object"),
            ("qrels", "expected query-id<TAB>corpus-id"), ("latin", f"corpus.jsonl:{rows + 1}: not UTF-8"),
            ("document", "unknown document 'none': complete the folder, or remove the line\n"),
            ("query", "unknown query 'none': complete the folder, or remove the line\n"),
        )),
        (["--beir", str(none), "--output", out], "judges no document relevant"),
        (["--beir", str(empty), "--output", out], "corpus.jsonl holds no passages"),
        (["--pairs", str(pairs), "--output", out], "p.jsonl:2: `query` must be a text that is not empty"),
        (["--pairs", str(no_pos), "--output", out], "n.jsonl:1: `pos` must hold at least one text"),
        (["--pairs", str(blank), "--output", out], "blank.jsonl:1: `pos` holds an empty text"),
        (["--pairs", str(labelled), "--output", out], "labelled.jsonl:2: passages of other rows may bear this row's"),
        (["--pairs", str(grouped), "--output", out], "grouped.jsonl:1: passages of other rows may bear this row's"),
        (["--beir", str(good), "--output", str(tmp_path / "m.parquet")], "is written as .jsonl or .jsonl.gz: name it"),
        (["--pairs", str(tmp_path / "void.jsonl"), "--output", out], "void.jsonl holds no rows"),
        (["--pairs", str(tmp_path / "gone.jsonl"), "--output", out], "gone.jsonl does not exist"),
        (["--pairs", str(good), "--output", out], "good does not exist: --pairs takes a .jsonl"),
        (["--pairs", str(pairs), "--output", str(pairs), "--overwrite"], "p.jsonl:2: `query`"),
        (["--pairs", str(no_pos), "--corpus", str(tmp_path / "gone"), "--output", out], "n.jsonl:1"),
        ([*folder, "--corpus", str(pairs)], "--corpus goes with --pairs"),
        (["--beir", str(good), "--output", str(tmp_path / "folder")], "folder is a folder: name a file in it"),
        (["--beir", str(good), "--output", str(good / "m.jsonl")], "lies in the folder --beir that is read"),
        ([*folder, "--retriever", "bm52"], "unknown kind 'bm52'; did you mean bm25? Kinds: bm25, lens, st, sparse"),
        ([*folder, "--retriever", "splade=x"], "unknown kind 'splade'"),
        ([*folder, "--retriever", "bm25=x"], "bm25 takes no model"),
        ([*folder, "--retriever", "lens"], "lens needs a model: write lens=FOLDER"),
        ([*folder, "--retriever", "bm25", "bm25"], "names one twice"),
        ([*folder, "--retriever", f"lens={tmp_path / 'gone'}"], "gone is no folder"),
        ([*folder, "--retriever", f"lens={tmp_path / 'folder'}"], "holds no lens.json"),
        ([*folder, "--retriever", f"st={tmp_path / 'folder'}"], "holds neither modules.json nor config.json"),
        ([*folder, "--retriever", f"st={tmp_path / 'lens'}"], f"holds a LENS model: write lens={tmp_path / 'lens'}"),
        ([*folder, "--retriever", f"lens={tmp_path / 'lens'}"], "the model cannot be read"),
        ([*folder, "--retriever", f"st={tmp_path / 'damaged'}"], "the model cannot be read"),
        ([*folder, "--weights", "1", "2"], "--weights takes a number above 0 for each of the 1 retrievers"),
        ([*folder, "--weights", "nan"], "--weights takes a number above 0"),
        ([*folder, "--negatives", "0"], "must be at least 1"),
        ([*folder, "--skip", "100"], "--skip from 0 to below --depth"),
        ([*folder, "--random-share", "1.5"], "--random-share must be from 0 to 1, found 1.5"),
        ([*folder, "--random-share", "nan"], "--random-share must be"),
        ([*folder, "--margin", "-1"], "--margin must be a number of at least 0, found -1"),
        ([*folder, "--max-share", "0"], "--max-share must be above 0 and at most 1"),
        ([*folder, "--shard", "0"], "--shard must be at least 1"),
        ([*folder, "--bm25-stemmer", "klingon"], "unknown stemmer 'klingon'"),
        ([*folder, "--prompt", "\ud800"], "lone surrogate"),
    ]  # fmt: skip
    for arguments, message in cases:
        capsys.readouterr()
        assert mine(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, error
        assert len(error.strip().splitlines()) == 1, error
        assert error.startswith("train/mine.py: ")
        assert not (tmp_path / "out.jsonl").exists()
        assert not (tmp_path / "out.jsonl.work").exists(), arguments


def test_an_output_that_is_read_is_refused(tmp_path, capsys):
    pairs = write_rows(tmp_path / "p.jsonl", {"query": "river", "pos": ["stone"]}, {"query": "cedar", "pos": ["x"]})
    before = pairs.read_bytes()
    assert mine(["--pairs", str(pairs), "--output", str(pairs), "--overwrite"]) == 2
    assert "is a file that is read" in capsys.readouterr().err
    assert pairs.read_bytes() == before


@pytest.mark.parametrize("where", ["passages", "queries"])
def test_a_model_that_gives_nan_is_named(where, model, tmp_path, monkeypatch, capsys):
    real = getattr(FakeEncoder, where)
    monkeypatch.setattr(FakeEncoder, where, lambda self, texts: real(self, texts) * float("nan"))
    beir = made(tmp_path / "beir")
    assert mine(["--beir", str(beir), "--output", str(tmp_path / "x.jsonl"), "--retriever", f"st={model}"]) == 2
    assert f"--retriever st={model}: the model gives NaN or infinite values" in capsys.readouterr().err


def test_a_model_that_fails_is_named_in_one_line(model, tmp_path, monkeypatch, capsys):
    def failing(self, texts):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(FakeEncoder, "passages", failing)
    beir = made(tmp_path / "beir")
    assert mine(["--beir", str(beir), "--output", str(tmp_path / "x.jsonl"), "--retriever", f"st={model}"]) == 2
    expected = f"--retriever st={model}: the model cannot embed: CUDA out of memory. Tried to allocate 2 GiB\n"
    assert capsys.readouterr().err == f"train/mine.py: {expected}"


def test_a_lens_model_that_gives_nan_is_named_in_one_line(bert, bert_clusters, tmp_path, capsys):
    import lens

    with lens.LENS.build(shutil.copytree(bert, tmp_path / "base"), bert_clusters) as built:
        built.save(tmp_path / "lens")
    head = load_file(tmp_path / "lens" / "head.safetensors")
    large = {name: tensor.sign() * 3e38 if tensor.is_floating_point() else tensor for name, tensor in head.items()}
    save_file(large, tmp_path / "lens" / "head.safetensors", {"format": "pt"})  # finite, but its products are not
    beir = made(tmp_path / "beir")
    retriever = f"lens={tmp_path / 'lens'}"
    assert mine(["--beir", str(beir), "--output", str(tmp_path / "x.jsonl"), "--retriever", retriever]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"train/mine.py: --retriever {retriever}: the model cannot embed: ")
    assert "NaN" in error


def test_nothing_to_search_for_finds_nothing():
    texts = ["river stone", "cedar"]
    for kind in ("st", "sparse"):
        retriever = train.retrievers.EmbeddingRetriever(kind, FakeEncoder(kind), [])
        best = Best(0, 3)
        assert len(list(retriever.search(Two(texts), 1, 0, best))) == 2
        assert retriever.pairs(np.zeros(0, dtype=np.int64), []).shape == (0,)
        asked = train.retrievers.EmbeddingRetriever(kind, FakeEncoder(kind), [("river", None)])
        assert asked.pairs(np.zeros(0, dtype=np.int64), []).shape == (0,)


class Two:
    """Stands for a corpus of two shards."""

    def __init__(self, texts):
        self.texts = texts

    def shards(self, size, first=0):
        yield from ((start, self.texts[start : start + size]) for start in range(first, len(self.texts), size))


@pytest.mark.parametrize("kind", ["bm25", "st=MODEL", "sparse=MODEL"])
def test_no_question_that_is_left_is_said_in_one_line(kind, model, tmp_path, capsys):
    retriever = kind.replace("MODEL", str(model))
    corpus = {"a": "river", "b": " ", "c": "cedar"}
    blank = write_beir(tmp_path / "queries", corpus, {"1": " ", "2": ""}, [("1", "a", 1), ("2", "a", 1)])
    empty = write_beir(tmp_path / "positives", corpus, {"1": "river", "2": "cedar"}, [("1", "b", 1), ("2", "a", 0)])
    for folder, reasons in ((blank, "blank query 2"), (empty, "blank positives 1, no positive 1")):
        arguments = ["--beir", str(folder), "--output", str(tmp_path / "x.jsonl"), "--retriever", retriever]
        assert mine([*arguments, "--margin", "0"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"train/mine.py: no query has a negative ({reasons}): "), error
        assert error.count("\n") == 1
        assert not (tmp_path / "x.jsonl.work").exists()


def test_models_of_every_kind_are_read_and_ranked_as_they_rank_themselves(bert, bert_mlm, bert_clusters, tmp_path):
    import sentence_transformers

    import lens

    texts = [*SENTENCES, *(" ".join(reversed(text.split())) for text in SENTENCES)]
    queries = [" ".join(text.split()[:4]) for text in SENTENCES[:5]]
    qrels = [(f"q{number}", f"d{number}", 1) for number in range(5)]
    named = {f"d{place}": text for place, text in enumerate(texts)}
    beir = write_beir(tmp_path / "beir", named, {f"q{n}": text for n, text in enumerate(queries)}, qrels)
    with lens.LENS.build(bert, bert_clusters) as model:
        model.save(tmp_path / "lens")
    loaded = lens.load(tmp_path / "lens")
    dense, sparse = (getattr(sentence_transformers, name) for name in ("SentenceTransformer", "SparseEncoder"))
    dense(str(bert)).save(str(tmp_path / "st"))
    sparse(str(bert_mlm)).save(str(tmp_path / "sparse"))
    units = dense(str(tmp_path / "st")).encode([*queries, *texts], normalize_embeddings=True)
    splade = sparse(str(tmp_path / "sparse"))
    scores = {
        "lens": loaded.similarity(loaded.encode_queries(queries, "Find."), loaded.encode_documents(texts)),
        "st": units[:5] @ units[5:].T,
        "sparse": (splade.encode_query(queries).to_dense() @ splade.encode_document(texts).to_dense().T).numpy(),
    }
    for kind, expected in scores.items():
        output = tmp_path / f"{kind}.jsonl"
        run("--beir", beir, "--output", output, "--retriever", f"{kind}={tmp_path / kind}", "--scores", "--sample",
            "top", "--negatives", 20, "--shard", 4, "--prompt", "Find.", "--margin", 0)  # fmt: skip
        manifest = json.loads((tmp_path / f"{kind}.jsonl.manifest.json").read_text())
        assert len(manifest["retrievers"][0]["sha256"]) == 64
        for row in read(output):
            number = queries.index(row["query"])  # one whose positive ranks last has no negative, and no row
            own = expected[number, number]
            assert row["pos_scores"] == [pytest.approx(own, rel=1e-4, abs=1e-4)]
            found = {
                text: score for text, score in zip(row["neg"], row["neg_scores"], strict=True) if score is not None
            }
            assert list(found.values()) == sorted(found.values(), reverse=True)
            for place, text in enumerate(texts):
                below = own - expected[number, place]
                if abs(below) > 1e-3 * abs(own):  # rounding decides about the others
                    assert (text in found) == (below > 0 and not (kind != "st" and expected[number, place] <= 0))
                if text in found:
                    assert found[text] == pytest.approx(float(expected[number, place]), rel=1e-4, abs=1e-4)


def test_the_benchmark_at_toy_size(tmp_path):
    from benchmarks import mining

    places = ["--output", str(tmp_path / "mining.json"), "--results", str(tmp_path / "page.md")]
    ballast = np.ones(100_000_000)  # 763 MB that the measured process does not hold
    mining.main(["--passages", "300", "--queries", "5", *places])
    (found,) = json.loads((tmp_path / "mining.json").read_text())["runs"]
    assert (found["passages"], found["queries"], found["negatives_per_query"]) == (300, 5, 15.0)
    libraries = json.loads((tmp_path / "mining.json").read_text())["libraries_mb"]
    assert 20 < libraries < found["peak_rss_mb"] < min(libraries + 500, ballast.nbytes / 2**20)
    before = (tmp_path / "page.md").read_text()
    assert f"| 300 | {found['corpus_mb']:,} | 5 | {found['seconds']:,} |" in before
    mining.main(["--page", *places])
    assert (tmp_path / "page.md").read_text() == before

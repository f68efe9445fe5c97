"""DeepCT: targets, windows and frequencies by hand; training that learns, goes on after a kill, and is evaluated."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, row, write_rows
from test_eval_program import write_beir
from tokenizers import Regex, normalizers
from train_helpers import weights_of

from eval import run as evaluation
from eval.lexical import deepct_system
from eval.scoring import bm25_system, evaluate
from lens.corpus import Beir
from lens.deepct import DeepCT, term_frequencies
from lens.search.words import Word
from train.deepct import main, passages_of_beir, passages_of_examples, query_term_recall, targets

for module in ("bm25s", "Stemmer"):
    pytest.importorskip(module, reason='needs pip install "lens-embeddings[bm25]"')

WORDS = ["fox", "dog", "tree", "files", "thread", "date", "string", "error", "format", "token", "head", "states"]


def passage(rng: random.Random, count: int = 3) -> tuple[str, list[str], list[str]]:
    """Pairs of a marker and a word: words after `quick` are asked for, words after `lazy` are not."""
    words = rng.sample(WORDS, 2 * count)
    asked, ignored = words[:count], words[count:]
    pairs = [f"quick {word}" for word in asked] + [f"lazy {word}" for word in ignored]
    rng.shuffle(pairs)
    return " ".join(pairs), asked, ignored


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    rows = []
    for _ in range(300):
        text, asked, _ = passage(rng)
        rows.append(row(query=" ".join(asked), pos=[text], neg=[]))
    return write_rows(tmp_path_factory.mktemp("deepct") / "examples.jsonl", *rows)


def arguments(bert: Path, data: Path, output: Path, **changes: object) -> list[str]:
    values = {
        "base": bert, "data": data, "output": output, "batch_size": 16, "learning_rate": 3e-3, "max_steps": 6,
        "save_steps": 2, "logging_steps": 1, "device": "cpu", **changes,
    }  # fmt: skip
    return [str(part) for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def trained(bert: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "deepct"
    assert main(arguments(bert, examples, output, max_steps=500, save_steps=500, logging_steps=50)) == 0
    return output


def test_query_term_recall_by_hand() -> None:
    queries = [["red", "fox"], ["fox", "fox", "den"], ["hound"], []]
    assert query_term_recall(["fox", "red", "rose", "hound"], queries) == [2 / 4, 1 / 4, 0, 1 / 4]


def test_targets_are_stopped_and_stemmed(bert: Path) -> None:
    model = DeepCT.build(bert, "cpu")
    text = "The foxes jumped over the lazy dogs"
    (found,) = targets(model, {text: ["is a fox jumping", "the dog", "The FOX"]})
    window, values = found
    assert [word.term for word in window.words] == ["fox", "jump", "over", "lazi", "dog"]
    assert values == [2 / 3, 1 / 3, 0, 0, 1 / 3]


def test_a_words_weight_is_that_of_its_first_subword(bert: Path) -> None:
    model = DeepCT.build(bert, "cpu", max_length=128)
    text = "Quickest fox, copyfiles of the-dog"
    ((window,),) = model.windows([text])
    first = []
    for word in window.words:
        before = model.tokenizer(text[: word.start], add_special_tokens=False)["input_ids"]
        first.append(1 + len(before))  # after [CLS]
    assert window.places == first
    pieces = [len(model.tokenizer.tokenize(word.lower)) for word in window.words]
    assert max(pieces) > 1, "no word of this test has subwords"
    with torch.no_grad():
        states = model.model.backbone(torch.tensor([window.ids])).last_hidden_state[0]
        wanted = [float(model.model.linear(states[place])) for place in first]
    assert [weight for _, weight in model.weights([text])[0]] == pytest.approx(wanted, abs=1e-5)


def test_long_texts_lose_no_word_and_windows_do_not_depend_on_the_batch(bert: Path) -> None:
    model = DeepCT.build(bert, "cpu", max_length=12)
    texts = [" ".join(SENTENCES), "", "fox", "of the", SENTENCES[3]]
    windows = model.windows(texts)
    assert len(windows[0]) > 5
    assert all(len(window.ids) <= 12 for row in windows for window in row)
    for text, row_ in zip(texts, windows, strict=True):
        assert [w for window in row_ for w in window.words] == model.words.located([text])[0]
    together = model.weights(texts, batch_tokens=1000)
    for text, weighted in zip(texts, together, strict=True):
        (alone,) = model.weights([text], batch_tokens=1)
        assert [word for word, _ in weighted] == [word for word, _ in alone]
        assert [weight for _, weight in weighted] == pytest.approx([weight for _, weight in alone], abs=1e-5)


def test_a_word_that_the_tokenizer_drops_has_no_weight(bert: Path) -> None:
    model = DeepCT.build(bert, "cpu")
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[0-9]"), "")
    ((window,),) = model.windows(["fox 42 dog 7"])
    assert [word.lower for word in window.words] == ["fox", "dog"]
    pieces = model.tokenizer.convert_ids_to_tokens(window.ids)
    assert [pieces[place][0] for place in window.places] == ["f", "d"]


def test_frequencies_by_hand() -> None:
    def word(lower: str, term: str) -> Word:
        return Word(0, 1, lower, term)

    weighted = [
        (word("fox", "fox"), -0.2),
        (word("fox", "fox"), 0.312),  # the highest occurrence: 31
        (word("fox", "fox"), 0.126),
        (word("foxes", "fox"), 0.2049),  # the same stem: + 20
        (word("dog", "dog"), -0.3),
        (word("hound", "hound"), 0.004),  # 0.4 rounds to 0
        (word("rose", "rose"), 1.21),
    ]
    assert term_frequencies(weighted) == {"fox": 51, "rose": 121}
    assert term_frequencies(weighted, scale=10) == {"fox": 5, "rose": 12}


def test_training_learns_which_words_are_asked_for(trained: Path, bert: Path) -> None:
    """On new passages weights follow the targets, which the marker before a word decides, not the word itself."""
    rng = random.Random(1)
    held_out = [passage(rng) for _ in range(40)]

    def correlation(model: DeepCT) -> float:
        found, wanted = [], []
        for weighted, (_, asked, ignored) in zip(model.weights([t for t, *_ in held_out]), held_out, strict=True):
            for word, weight in weighted:
                if word.lower in {*asked, *ignored}:
                    found.append(weight)
                    wanted.append(word.lower in asked)
        return float(np.corrcoef(found, wanted)[0, 1])

    torch.manual_seed(0)
    before = correlation(DeepCT.build(bert, "cpu"))
    after = correlation(DeepCT.load(trained, "cpu"))
    assert abs(before) < 0.5
    assert after > 0.85


def test_the_index_ranks_by_what_was_learnt(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    corpus, queries, qrels = {}, {}, {}
    for number, word in enumerate(WORDS):
        others = [other for other in WORDS if other != word]
        near, far = (" ".join(f"lazy {w}" for w in rng.sample(others, 3)) for _ in range(2))
        corpus |= {f"a{number}": f"{far} lazy {word}", f"b{number}": f"{near} quick {word}"}
        queries[f"q{number}"], qrels[f"q{number}"] = word, {f"b{number}": 1}
    beir = Beir("markers", corpus, queries, qrels)
    model = DeepCT.load(trained, "cpu")
    found = evaluate(beir, [deepct_system("deepct", model, beir), bm25_system("bm25", beir)])
    assert found.values["deepct"]["RR@10"].mean() > found.values["bm25"]["RR@10"].mean() + 0.3
    assert found.values["deepct"]["RR@10"].mean() > 0.8

    write_beir(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    command = "--beir tiny --baselines bm25 --resamples 100 --output out --device cpu --lexical"
    assert evaluation.main([*command.split(), f"ct={trained}"]) == 0
    systems = json.loads((tmp_path / "out" / "results.json").read_text())["datasets"]["tiny"]["systems"]
    assert list(systems) == ["ct", "bm25"]
    assert 0 < systems["ct"]["dimensions"] <= systems["bm25"]["dimensions"]


def test_a_killed_run_goes_on_to_the_same_weights(bert: Path, examples: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(arguments(bert, examples, whole)) == 0
    shutil.copytree(whole, broken)
    for path in broken.iterdir():  # as a kill after step 4 leaves it
        if path.is_file() and path.name not in ("run.json", "training_log.jsonl"):
            path.unlink()
    shutil.rmtree(broken / "checkpoint-6")
    assert (broken / "checkpoint-4" / "complete.json").is_file()
    assert main(arguments(bert, examples, broken)) == 0
    first, second = weights_of(whole), weights_of(broken)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [[json.loads(line)["loss"] for line in (o / "training_log.jsonl").open()][:6] for o in (whole, broken)]
    assert losses[0] == losses[1]


def test_a_finished_run_is_left_alone_and_another_refused(
    trained: Path, bert: Path, examples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = arguments(bert, examples, trained, max_steps=500, save_steps=500, logging_steps=50)
    assert main(same) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(arguments(bert, examples, trained, max_steps=251)) == 2
    assert "a run with other options (max_steps)" in capsys.readouterr().err


def test_both_sources_give_the_same_passages(tmp_path: Path) -> None:
    folder = tmp_path / "beir"
    write_beir(folder)
    data = passages_of_beir(str(folder), "test")
    assert data["the red fox jumps"] == ["red fox"]
    pairs = [row(query=query, pos=[text], neg=[]) for text, queries in data.items() for query in queries]
    pairs.append(pairs[0])  # a pair that stands twice is one query
    assert passages_of_examples([str(write_rows(tmp_path / "pairs.jsonl", *pairs))]) == data


def test_bad_input_gets_one_line(
    bert: Path, trained: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    beir = write_beir(tmp_path / "beir")
    (beir / "qrels" / "none.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")
    stopped = write_rows(tmp_path / "stopped.jsonl", row(query="x", pos=["of the"], neg=[]))
    cases = [
        (arguments(bert, tmp_path / "no.jsonl", output), "no.jsonl does not exist"),
        (arguments(bert, stopped, output, batch_size=1), "no passage holds a word"),
        (arguments(bert, examples, output, batch_size=1000), "fewer than batch_size=1000"),
        (arguments(bert, examples, output, learning_rate="nan"), "--learning-rate must be a number above 0"),
        (arguments(bert, examples, output, warmup_steps=6), "takes up all 6 steps"),
        (arguments(bert, examples, output, max_length=1000), "more than the 128 positions"),
        (arguments(bert, examples, output, stemmer="klingon"), "unknown stemmer 'klingon'"),
        (arguments(tmp_path / "gone", examples, output), "does not exist"),
        (arguments(bert, examples, beir), "is not empty"),
        (["--base", str(bert), "--beir", str(beir), "--split", "none", "--output", str(output)], "no document"),
    ]
    for command, message in cases:
        shutil.rmtree(output, ignore_errors=True)
        assert main(command) == 2, message
        error = capsys.readouterr().err
        assert error.strip().splitlines()[-1].startswith("train/deepct.py: ")
        assert message in error, error
    for file, damage, message in (
        ("deepct.json", b'{"format_version": 99, "base": "x"}', "format_version"),
        ("deepct.json", b'{"format_version": 1, "base": "x", "max_lenght": 3}', "max_length"),
        ("head.safetensors", b"torn", "not a whole safetensors file"),
    ):
        broken = tmp_path / "broken"
        shutil.copytree(trained, broken, ignore=shutil.ignore_patterns("checkpoint-*"))
        (broken / file).write_bytes(damage)
        with pytest.raises(ValueError, match=message):
            DeepCT.load(broken, "cpu")
        shutil.rmtree(broken)
    with pytest.raises(FileNotFoundError, match="no DeepCT model"):
        DeepCT.load(bert, "cpu")

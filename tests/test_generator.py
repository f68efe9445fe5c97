"""train/generator.py: a decoder made of an encoder's layers, T5 as it is; a toy task that is learnt; restarts."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import encoder_tokenizer, row, save_bert, write_rows
from test_generate import command, lines, passages, save_t5, t5_tokenizer
from torch.nn import functional as F
from train_helpers import log_of, weights_of
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    T5ForConditionalGeneration,
)

from train import generate
from train.doc2query import Settings, Writer
from train.generator import main
from train.sampler import Schedule
from train.seq2seq import CROSS, OWN, POOL_STEPS, Pairs, load_base

WORDS = ["fox", "dog", "tree", "files", "thread", "date", "string", "error", "format", "token", "head", "states"]


def texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.sample(WORDS, rng.randint(3, 7))) for _ in range(count)]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The query of a passage is its first word."""
    rows = [row(query=text.split()[0], pos=[text], neg=[]) for text in texts(400, 0)]
    return write_rows(tmp_path_factory.mktemp("generator") / "examples.jsonl", *rows)


def arguments(base: Path, data: Path, output: Path, *flags: str, **changes: object) -> list[str]:
    values = {
        "base": base, "data": data, "output": output, "batch_size": 16, "learning_rate": 3e-3, "max_steps": 6,
        "save_steps": 2, "logging_steps": 1, "device": "cpu", **changes,
    }  # fmt: skip
    return [*(str(part) for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)), *flags]


@pytest.fixture(scope="module")
def trained(bert: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "generator"
    assert main(arguments(bert, examples, output, max_steps=400, save_steps=400, logging_steps=20, dropout=0)) == 0
    return output


def first_words(model: Path) -> float:
    """Share of new passages for which the most probable query is their first word."""
    found = texts(60, 1)
    written = Writer(Settings(str(model), queries=1, beams=1, query_length=8, passage_length=32), "cpu")(found, 0)
    return sum(query == [text.split()[0]] for query, text in zip(written, found, strict=True)) / len(found)


def test_a_decoder_begins_as_the_encoders_layers(bert: Path) -> None:
    model, tokenizer = load_base(str(bert), encoder_layers=1, decoder_layers=2)
    base = dict(BertModel.from_pretrained(bert).named_parameters())
    reading, writing = dict(model.encoder.named_parameters()), dict(model.decoder.bert.named_parameters())
    assert not any(".layer.1." in name for name in reading)
    assert all(torch.equal(value, base[name]) for name, value in reading.items())
    assert {name for name in writing if CROSS not in name} == {name for name in base if not name.startswith("pooler.")}
    for name, value in writing.items():
        if CROSS in name and ("value" in name or "output.dense" in name):
            assert torch.equal(value, torch.eye(32) if name.endswith("weight") else torch.zeros(32)), name
        else:
            assert torch.equal(value, base[name.replace(CROSS, OWN)]), name
    assert any(CROSS in name for name in writing)
    assert model.decoder.cls.predictions.decoder.weight is model.decoder.bert.embeddings.word_embeddings.weight
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.decoder.cls(states)
    wanted = F.layer_norm(states, (32,)) @ base["embeddings.word_embeddings.weight"].T
    assert F.cosine_similarity(logits, wanted).min() > 0.99
    assert torch.equal(logits.argmax(1), wanted.argmax(1))
    assert (model.config.decoder_start_token_id, model.config.pad_token_id) == (2, 0)
    assert (model.generation_config.eos_token_id, tokenizer.sep_token_id) == (3, 3)


def test_a_trained_head_is_kept(bert_mlm: Path) -> None:
    model, _ = load_base(str(bert_mlm))
    base = AutoModelForMaskedLM.from_pretrained(bert_mlm).cls.state_dict()
    found = model.decoder.cls.state_dict()
    assert all(torch.equal(found[name], value) for name, value in base.items())


def test_the_loss_is_that_of_each_query_token_given_those_before(bert: Path) -> None:
    model, tokenizer = load_base(str(bert), dropout=0.0)
    found = [("the quick brown fox jumps", "lazy dog"), ("copy files", "whole directory tree of files")]
    pairs = Pairs(model, tokenizer, found, 32, 16)
    with torch.no_grad():
        loss = float(model(**pairs.collate([0, 1])).loss)
        losses = []
        for passage, query in found:
            ids = [2, *tokenizer(query, add_special_tokens=False)["input_ids"], 3]
            read = tokenizer(passage, return_tensors="pt").input_ids
            for place in range(1, len(ids)):  # each prefix by itself: no mask, no padding, no batch
                logits = model(input_ids=read, decoder_input_ids=torch.tensor([ids[:place]])).logits[0, -1]
                losses.append(-float(logits.log_softmax(-1)[ids[place]]))
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_texts_are_cut_and_framed(bert: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(bert))
    long = "the quick brown fox jumps over the lazy dog"
    bare = tokenizer(long, add_special_tokens=False)["input_ids"]
    pairs = Pairs(model, tokenizer, [(long, long), ("fox", "dog"), ("tree", "\u200b")], 6, 5)
    assert pairs.read == [[2, *bare[:4], 3], tokenizer("fox")["input_ids"]]  # a query without tokens is out
    assert pairs.written == [[*bare[:4], 3], [*tokenizer("dog", add_special_tokens=False)["input_ids"], 3]]
    save_t5(tmp_path, 0)
    model, tokenizer = load_base(str(tmp_path))
    pairs = Pairs(model, tokenizer, [("fox dog tree", "fox dog tree"), ("fox", "dog")], 3, 3)
    assert pairs.read == [*pairs.written[:1], [3, 1]] == [[3, 4, 1], [3, 1]]
    batch = pairs.collate([0, 1])
    assert batch["labels"].tolist() == [[3, 4, 1], [4, 1, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["input_ids"].tolist() == [[3, 4, 1], [3, 1, 0]]


def test_batches_hold_every_pair_once_and_little_padding(bert: Path) -> None:
    model, tokenizer = load_base(str(bert))
    pairs = Pairs(model, tokenizer, [(text, "fox") for text in texts(333, 0)], 64, 8)
    schedule = Schedule([len(pairs)], 8, 42, 2 * (333 // 8))
    batches = [pairs.pool(schedule, step // POOL_STEPS)[step % POOL_STEPS] for step in range(schedule.steps)]
    epoch = 2 * POOL_STEPS  # steps that lie within the first pass
    seen = [number for rows in batches[:epoch] for number in rows]
    assert len(seen) == len(set(seen)) == epoch * 8
    drawn = [number for step in range(schedule.steps) for number in schedule.batch(step)[1]]
    assert sorted(drawn) == sorted(number for rows in batches for number in rows)

    def padding(rows: list[int]) -> int:
        lengths = [len(pairs.read[number]) for number in rows]
        return len(lengths) * max(lengths) - sum(lengths)

    assert sum(map(padding, batches)) < 0.5 * sum(padding(schedule.batch(s)[1]) for s in range(schedule.steps))
    one, other = pairs.batches(schedule), pairs.batches(schedule)
    forward = [one(step, [])["input_ids"] for step in range(schedule.steps)]
    backward = [other(step, [])["input_ids"] for step in reversed(range(schedule.steps))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert all(len(ids) == 8 for ids in forward)


def test_training_learns_to_copy_a_word(trained: Path, bert: Path, examples: Path, tmp_path: Path) -> None:
    losses = [line["loss"] for line in log_of(trained) if "loss" in line]
    assert losses[-1] < 0.3 * losses[0]
    untrained = tmp_path / "untrained"
    assert main(arguments(bert, examples, untrained, max_steps=1, learning_rate=1e-9)) == 0
    assert first_words(untrained) < 0.2
    assert first_words(trained) > 0.8


def test_the_folder_is_read_whole_and_names_no_place(trained: Path, bert: Path) -> None:
    model, report = AutoModelForSeq2SeqLM.from_pretrained(trained, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.decoder.cls.predictions.decoder.weight is model.decoder.bert.embeddings.word_embeddings.weight
    (text,) = texts(1, 3)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    written = model.eval().generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8)
    assert tokenizer.batch_decode(written, skip_special_tokens=True) == [text.split()[0]]
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert str(bert.parent) not in (trained / name).read_text()


def test_generate_writes_with_it(trained: Path, tmp_path: Path) -> None:
    found = texts(30, 4)
    corpus = write_rows(tmp_path / "corpus.jsonl", *({"_id": f"d{i}", "text": text} for i, text in enumerate(found)))
    output = tmp_path / "out"
    assert generate.main(command(trained, corpus, output)) == 0
    words = [
        (word, text)
        for item in lines(output / "examples.jsonl")
        for text in item["pos"]
        for word in item["query"].split()
    ]
    assert len(words) >= 30
    assert sum(word in text.split() for word, text in words) / len(words) > 0.8
    assert len(lines(output / "expanded" / "corpus.jsonl")) == 30


def test_t5_is_trained_as_it_is(tmp_path: Path) -> None:
    base = save_t5(tmp_path / "base", 0)
    data = write_rows(
        tmp_path / "pairs.jsonl", *(row(query=text.split()[0], pos=[text], neg=[]) for text in passages(1500, 0))
    )
    output = tmp_path / "out"
    assert main(arguments(base, data, output, batch_size=64, max_steps=200, logging_steps=10, learning_rate=4e-3)) == 0
    assert isinstance(AutoModelForSeq2SeqLM.from_pretrained(output), T5ForConditionalGeneration)
    losses = [line["loss"] for line in log_of(output) if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    found = passages(50, 5)
    written = Writer(Settings(str(output), queries=1, beams=1, query_length=6, passage_length=32), "cpu")(found, 0)
    assert sum(query == [text.split()[0]] for query, text in zip(written, found, strict=True)) > 40


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_frozen_encoder_stays(kind: str, bert: Path, examples: Path, tmp_path: Path) -> None:
    base, data = bert, examples
    if kind == "t5":
        base = save_t5(tmp_path / "base", 0)
        data = write_rows(tmp_path / "pairs.jsonl", *(row(query="fox", pos=[text], neg=[]) for text in passages(99, 0)))
    assert main(arguments(base, data, tmp_path / "out", "--freeze-encoder", max_steps=3)) == 0
    before = dict(load_base(str(base))[0].named_parameters())
    after = dict(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").named_parameters())
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in moved if name.startswith("encoder.")]
    assert [name for name in moved if name.startswith("decoder.")]
    assert ("shared.weight" in moved) == (kind == "t5")  # what writes uses it too


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
    assert first
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [line["loss"] for line in log_of(whole)[:6]] == [line["loss"] for line in log_of(broken)[:6]]


def test_a_finished_run_is_left_alone_and_another_refused(
    bert: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(arguments(bert, examples, output, max_steps=2)) == 0
    assert main(arguments(bert, examples, output, max_steps=2)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(arguments(bert, examples, output, max_steps=3)) == 2
    assert "a run with other options (max_steps)" in capsys.readouterr().err


def without(token: str, tokenizer: Any, base: Path, folder: Path) -> Path:
    """A copy of a base whose tokenizer has no such token."""
    shutil.copytree(base, folder)
    for name in token.split():
        setattr(tokenizer, name, None)
    tokenizer.save_pretrained(folder)
    return folder


def test_bad_input_gets_one_line(
    bert: Path, mistral: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, foreign = tmp_path / "out", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "precious").write_text("x")
    t5 = save_t5(tmp_path / "t5", 0)
    small = save_bert(tmp_path / "small")
    DistilBertModel(
        DistilBertConfig(vocab_size=300, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64)
    ).save_pretrained(tmp_path / "distil")
    encoder_tokenizer().save_pretrained(tmp_path / "distil")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    blank = write_rows(tmp_path / "blank.jsonl", row(query=" "))
    nothing = write_rows(tmp_path / "nothing.jsonl", row(query="\u200b"))
    hollow = write_rows(tmp_path / "hollow.jsonl", row(pos=[]))
    cases = [
        (arguments(mistral, examples, output), "a causal mistral model, which writes queries untrained"),
        (
            arguments(tmp_path / "distil", examples, output),
            "a distilbert model, of which transformers makes no decoder",
        ),
        (arguments(tmp_path / "gone", examples, output), "gone does not exist"),
        (arguments(bert, tmp_path / "no.jsonl", output), "no.jsonl does not exist"),
        (arguments(bert, empty, output), "empty.jsonl holds no examples"),
        (arguments(bert, blank, output), "blank.jsonl:1: `query` must be a text that is not empty"),
        (arguments(bert, hollow, output), "hollow.jsonl:1: `pos` must hold at least one text"),
        (arguments(bert, nothing, output), "no pair has a query of which the tokenizer leaves a token"),
        (arguments(bert, examples, foreign), "foreign exists and is not empty"),
        (arguments(bert, examples, output, batch_size=1000), "fewer than batch_size=1000"),
        (arguments(bert, examples, output, passage_length=129), "--passage-length 129 is more than the model's 128"),
        (arguments(bert, examples, output, query_length=129), "--query-length 129 is more than the model's 128"),
        (arguments(bert, examples, output, query_length=1), "--query-length must be at least 2"),
        (arguments(bert, examples, output, dropout=1), "--dropout must be at least 0 and below 1"),
        (arguments(bert, examples, output, decoder_layers=3), "--decoder-layers must be from 1 to 2"),
        (arguments(bert, examples, output, encoder_layers=0), "--encoder-layers must be from 1 to 2"),
        (arguments(t5, examples, output, decoder_layers=1), "--decoder-layers is for encoders"),
        (arguments(bert, examples, output, learning_rate=1e30), "is not finite"),
        (
            arguments(without("pad_token", encoder_tokenizer(), small, tmp_path / "padless"), examples, output),
            "padless has no pad_token, which a generator needs",
        ),
        (
            arguments(without("cls_token", encoder_tokenizer(), small, tmp_path / "startless"), examples, output),
            "startless has no cls_token and no bos_token",
        ),
        (
            arguments(without("eos_token", t5_tokenizer(), t5, tmp_path / "endless"), examples, output),
            "endless has no eos_token, which a generator needs",
        ),
    ]
    for given, message in cases:
        shutil.rmtree(output, ignore_errors=True)
        assert main(given) == 2, message
        error = capsys.readouterr().err
        assert error.strip().splitlines()[-1].startswith("train/generator.py: ")
        assert message in error, error
    assert (foreign / "precious").read_text() == "x"


def test_a_generator_reads_no_more_than_its_positions(trained: Path) -> None:
    Writer(Settings(str(trained), passage_length=126, query_length=127), "cpu")
    with pytest.raises(ValueError, match="take 129 tokens, and .* has 128 positions: lower --passage-length"):
        Writer(Settings(str(trained), passage_length=127), "cpu")
    with pytest.raises(ValueError, match="has 128 positions: lower --query-length below it"):
        Writer(Settings(str(trained), passage_length=32, query_length=128), "cpu")


def test_a_generator_can_be_trained_further(trained: Path, examples: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(arguments(trained, examples, again, max_steps=2, learning_rate=1e-5, dropout=0)) == 0
    assert log_of(again)[0]["loss"] < 1.5 * log_of(trained)[-2]["loss"] + 0.1
    assert json.loads((again / "config.json").read_text())["model_type"] == "encoder-decoder"

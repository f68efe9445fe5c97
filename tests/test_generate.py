"""train/generate.py: a tiny T5 that was taught to copy words, a tiny causal model, filters, restarts, bad input."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES, decoder_tokenizer, encoder_tokenizer, write_rows
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from eval.scoring import bm25_system, evaluate
from lens.corpus import read_beir
from lens.dense import Dense
from lens.files import atomic_file
from train.doc2query import Settings, Writer, clean, shard_seed
from train.generate import main, threshold_of
from train.sources import read_examples

VOCABULARY = ["fox", "dog", "tree", "file", "thread", "date", "string", "error", "rose", "token", "head", "state"]


def t5_tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "</s>", "<unk>", *VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def passages(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.sample(VOCABULARY, rng.randint(2, 5))) for _ in range(count)]


def save_t5(folder: Path, steps: int) -> Path:
    """A T5 that is taught, for so many steps, to write the first two words of its passage."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        texts = passages(64, 1000 + step)
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = tokenizer([" ".join(text.split()[:2]) for text in texts], padding=True, return_tensors="pt").input_ids
        labels[labels == 0] = -100
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"), 200)


@pytest.fixture(scope="module")
def untaught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("untaught"), 0)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reranker")
    torch.manual_seed(0)
    tokenizer = encoder_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.3, num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"_id": f"d{i}", "title": text.split()[0], "text": text.partition(" ")[2], "url": f"u{i}"}
        for i, text in enumerate(passages(23, 1))
    ]
    rows.append({"_id": "blank", "title": "", "text": "  "})
    write_rows(folder / "corpus.jsonl", *rows)
    write_rows(folder / "queries.jsonl", {"_id": "q0", "text": "fox"}, {"_id": "q1", "text": "dog"})
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n")
    return folder


def command(model: Path, corpus: Path, output: Path, *flags: str, **changes: object) -> list[str]:
    values = {
        "model": model, "corpus": corpus, "output": output, "queries": 3, "shard_size": 5, "query_length": 6,
        "passage_length": 32, "device": "cpu", **changes,
    }  # fmt: skip
    return [*(str(part) for key, value in values.items() for part in (f"--{key.replace('_', '-')}", value)), *flags]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_taught_model_writes_words_of_the_passage(t5: Path, untaught: Path) -> None:
    texts = passages(40, 2)

    def share(model: Path) -> float:
        written = Writer(Settings(str(model), queries=4, query_length=6), "cpu")(texts, 0)
        words = [
            (word, text.split()) for text, row in zip(texts, written, strict=True) for q in row for word in q.split()
        ]
        return sum(word in text for word, text in words) / max(1, len(words))

    assert share(t5) > 0.9
    assert share(t5) > share(untaught) + 0.3


def test_outputs(t5: Path, beir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(command(t5, beir, output, instruction="Find it.")) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    counts = manifest["counts"]
    assert (counts["passages"], counts["blank_passages"], counts["written"]) == (24, 1, 69)
    assert counts["kept"] == counts["distinct"] <= 69
    before = {row["_id"]: row for row in lines(beir / "corpus.jsonl")}
    after = lines(output / "expanded" / "corpus.jsonl")
    assert [row["_id"] for row in after] == list(before)
    added = {}
    for row in after:
        old = before[row["_id"]]
        assert {**row, "text": None} == {**old, "text": None}  # title and other fields stay
        assert row["text"].startswith(old["text"].strip())
        added[row["_id"]] = row["text"][len(old["text"]) :].strip()
    assert added["blank"] == ""
    assert sum(bool(text) for text in added.values()) == 23
    for name in ("queries.jsonl", "qrels/test.tsv"):
        assert (output / "expanded" / name).read_bytes() == (beir / name).read_bytes()
    examples = read_examples(output / "examples.jsonl", 1)
    texts = {name: f"{row['title']} {row['text']}" for name, row in before.items()}
    pairs = {(example.query, text) for example in examples for text in example.pos}
    assert len(pairs) == counts["kept"]
    assert len({example.query for example in examples}) == len(examples) == counts["examples"]
    assert {example.prompt for example in examples} == {"Find it."}
    for query, text in pairs:
        assert any(query in added[name] for name, found in texts.items() if found == text)


def test_expansion_helps_an_index(t5: Path, tmp_path: Path) -> None:
    """Twice the words that the passage begins with: BM25 then prefers passages that begin with the query."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    rows, queries, judged = [], [], []
    for i, word in enumerate(VOCABULARY):
        others = [w for w in VOCABULARY if w != word]
        rest = random.Random(i).sample(others, 3)
        rows += [{"_id": f"a{i}", "text": " ".join([*rest, word])}, {"_id": f"b{i}", "text": " ".join([word, *rest])}]
        queries.append({"_id": f"q{i}", "text": word})
        judged.append(f"q{i}\tb{i}\t1\n")
    write_rows(folder / "corpus.jsonl", *rows)
    write_rows(folder / "queries.jsonl", *queries)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))
    assert main(command(t5, folder, tmp_path / "out")) == 0

    def gain(path: Path) -> float:
        data = read_beir(path)
        return float(evaluate(data, [bm25_system("bm25", data)]).values["bm25"]["RR@10"].mean())

    assert gain(tmp_path / "out" / "expanded") > gain(folder) + 0.2


def test_a_killed_run_goes_on_byte_for_byte(
    t5: Path, beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(command(t5, beir, whole)) == 0
    calls: list[int] = []
    write = Writer.__call__

    def dies(self: Writer, texts: list[str], seed: int) -> list[list[str]]:
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(self, texts, seed)

    monkeypatch.setattr(Writer, "__call__", dies)
    assert main(command(t5, beir, broken)) == 130
    assert not broken.exists()
    assert len(list((tmp_path / "broken.shards").glob("shard-*"))) == 2
    assert main(command(t5, beir, broken, top_k=4)) == 2
    assert "shards of other settings (top_k)" in capsys.readouterr().err
    torch.manual_seed(99)  # whatever random numbers were drawn before
    assert main(command(t5, beir, broken)) == 0
    assert calls == [shard_seed(42, shard) for shard in (0, 1, 2, 2, 3, 4)]
    assert contents(broken) == contents(whole)
    assert not (tmp_path / "broken.shards").exists()
    assert len({shard_seed(seed, shard) for seed in range(20) for shard in range(50)}) == 1000
    other = tmp_path / "other"
    assert main(command(t5, beir, other, seed=43)) == 0
    assert contents(other)["examples.jsonl"] != contents(whole)["examples.jsonl"]


@pytest.mark.parametrize("which", ["model", "scorer"])
def test_shards_of_a_model_that_was_trained_anew_are_refused(
    which: str, t5: Path, untaught: Path, reranker: Path, beir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, scorer = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (t5, reranker))
    again = command(model, beir, tmp_path / "out", "--cross-encoder", str(scorer), "--keep-share", "0.5")

    def dies(self: Writer, texts: list[str], seed: int) -> list[list[str]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "__call__", dies)
    assert main(again) == 130
    assert main(again) == 130  # the same models are taken up
    if which == "model":
        shutil.copyfile(untaught / "model.safetensors", model / "model.safetensors")
    else:
        tensors = load_file(scorer / "model.safetensors")
        tensors["classifier.weight"] += 1
        save_file(tensors, scorer / "model.safetensors", {"format": "pt"})
    assert main(again) == 2
    assert f"holds shards of other settings ({which}_files): remove it" in capsys.readouterr().err


def test_a_run_killed_while_it_wrote_its_settings_is_begun_again(t5: Path, beir: Path, tmp_path: Path) -> None:
    shards = tmp_path / "out.shards"
    with atomic_file(shards / "settings.json") as temporary:
        torn = temporary
    (shards / "settings.json").unlink()
    torn.write_text('{"mo')
    assert main(command(t5, beir, tmp_path / "out")) == 0
    assert not shards.exists()


def test_an_output_that_holds_the_corpus_is_never_replaced(
    t5: Path, beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(command(t5, beir, output)) == 0
    before = contents(output)
    for corpus in (output / "expanded", output / "expanded" / "corpus.jsonl"):
        assert main(command(t5, corpus, output, "--overwrite")) == 2
        assert "holds the --corpus that is read: choose another place" in capsys.readouterr().err
    assert contents(output) == before


@pytest.mark.slow
def test_several_devices_write_the_same(t5: Path, beir: Path, tmp_path: Path) -> None:
    assert main(command(t5, beir, tmp_path / "one")) == 0
    flags = command(t5, beir, tmp_path / "two")
    place = flags.index("--device")
    flags[place : place + 2] = ["--devices", "cpu", "cpu"]
    assert main(flags) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_passage_is_written_for_alone_as_in_a_batch(mistral: Path, t5: Path) -> None:
    """Greedy search of passages of different lengths, padded, equals each by itself; the prompt is not repeated."""
    for model in (mistral, t5):
        texts = SENTENCES if model == mistral else passages(6, 3)
        settings = Settings(str(model), queries=1, beams=1, query_length=8, passage_length=40, prompt="Ask: {text} ?")
        writer = Writer(settings, "cpu")
        together = writer(texts, 0)
        assert together == [writer([text], 1)[0] for text in texts]
        assert all(len(row) == 1 for row in together)
        assert not any("Ask:" in query for row in together for query in row)
    reference = writer.model.generate(
        writer.tokenizer([f"Ask: {texts[0]} ?"], return_tensors="pt").input_ids, max_new_tokens=8, do_sample=False
    )
    assert together[0] == writer.tokenizer.batch_decode(reference, skip_special_tokens=True)


def test_a_causal_model_writes_too(mistral: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "passages.txt"
    corpus.write_text("\n".join(SENTENCES) + "\n")
    assert main(command(mistral, corpus, tmp_path / "out", temperature=0.7, top_p=0.9)) == 0
    rows = lines(tmp_path / "out" / "expanded" / "corpus.jsonl")
    assert [row["_id"] for row in rows] == [str(number) for number in range(1, 8)]
    assert all(row["text"].startswith(text) for row, text in zip(rows, SENTENCES, strict=True))
    assert lines(tmp_path / "out" / "examples.jsonl")


def test_long_passages_are_cut_before_the_prompt(mistral: Path) -> None:
    writer = Writer(Settings(str(mistral), passage_length=5, query_length=4, prompt="{text} <end>"), "cpu")
    (ids,) = writer.tokens([" ".join(SENTENCES)])
    tokenizer = decoder_tokenizer()
    cut = tokenizer(" ".join(SENTENCES), add_special_tokens=False)["input_ids"][:5]
    assert ids == tokenizer(tokenizer.decode(cut) + " <end>")["input_ids"]


def test_clean_and_threshold_by_hand() -> None:
    assert clean([" What is  a fox\nand more", "", "  \n", "what is a FOX", "A dog?"]) == ["What is a fox", "A dog?"]
    scores = [0.1, 0.9, 0.5, 0.5, 0.3]
    assert [threshold_of(scores, share) for share in (0.1, 0.2, 0.4, 0.6, 1.0)] == [0.9, 0.9, 0.5, 0.5, 0.1]
    assert threshold_of([], 0.5) == -math.inf


@pytest.mark.parametrize("kind", ["cross-encoder", "bi-encoder"])
def test_filtering_keeps_the_best_by_the_scorers_own_scores(
    kind: str, t5: Path, reranker: Path, bert: Path, beir: Path, tmp_path: Path
) -> None:
    scorer = reranker if kind == "cross-encoder" else bert
    assert main(command(t5, beir, tmp_path / "all")) == 0
    half = tmp_path / "half"
    assert main(command(t5, beir, half, **{kind: scorer, "keep-share": 0.5})) == 0
    every, kept = (
        {(row["query"], text) for row in lines(folder / "examples.jsonl") for text in row["pos"]}
        for folder in (tmp_path / "all", half)
    )
    pairs = sorted(every)
    if kind == "cross-encoder":
        from sentence_transformers import CrossEncoder

        scores = CrossEncoder(str(reranker), device="cpu").predict(pairs)
    else:
        dense = Dense(bert, "cpu", max_length=32)
        queries, texts = (dense.encode([pair[i] for pair in pairs]) for i in (0, 1))
        scores = (queries * texts).sum(1)
    assert kept < every
    assert len(kept) >= len(every) // 2
    lowest = min(score for pair, score in zip(pairs, scores, strict=True) if pair in kept)
    highest = max(score for pair, score in zip(pairs, scores, strict=True) if pair not in kept)
    assert lowest > highest - 1e-4
    assert json.loads((half / "manifest.json").read_text())["threshold"] == pytest.approx(lowest, abs=1e-4)
    strict = tmp_path / "strict"
    assert main(command(t5, beir, strict, **{kind: scorer, "min-score": float(np.max(scores)) + 1})) == 0
    assert lines(strict / "examples.jsonl") == []
    texts_after = [row["text"].strip() for row in lines(strict / "expanded" / "corpus.jsonl")]
    assert texts_after == [row["text"].strip() for row in lines(beir / "corpus.jsonl")]


def test_bad_input_gets_one_line(
    t5: Path,
    bert: Path,
    reranker: Path,
    mistral: Path,
    overflowing: Path,
    beir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blank = write_rows(tmp_path / "blank.jsonl", {"_id": "a", "text": " "})
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"_id": "a", "text": "x"}\n{"_id": ')
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("x")
    damaged = tmp_path / "damaged"
    shutil.copytree(reranker, damaged)
    model = BertForSequenceClassification.from_pretrained(damaged)
    torch.nn.init.constant_(model.classifier.weight, math.nan)
    model.save_pretrained(damaged)
    output = tmp_path / "out"
    cases = [
        (command(t5, blank, output), "no passage that is not blank"),
        (command(t5, torn, output), "torn.jsonl:2: not valid JSON"),
        (command(t5, tmp_path / "gone", output), "gone does not exist"),
        (command(tmp_path / "gone", beir, output), "gone does not exist"),
        (command(bert, beir, output), "is a bert model, which writes no text"),
        (command(t5, beir, taken), "taken exists and is not empty"),
        (command(t5, beir, taken, "--overwrite"), "holds no manifest.json"),
        (command(t5, beir, beir / "inside"), "lies in the folder --corpus"),
        (command(t5, beir, output, queries=0), "--queries must be at least 1"),
        (command(t5, beir, output, top_p=0), "--top-p must be above 0"),
        (command(t5, beir, output, temperature=0), "--temperature must be above 0"),
        (command(t5, beir, output, prompt="ask"), "--prompt must hold {text}"),
        (command(t5, beir, output, keep_share=0.5), "need scores: give --cross-encoder or --bi-encoder"),
        (command(t5, beir, output, bi_encoder=bert), "give --keep-share or --min-score"),
        (command(t5, beir, output, bi_encoder=bert, keep_share=2), "--keep-share must be above 0"),
        (command(t5, beir, output, device="cuda:99"), "cuda:99"),
        (command(mistral, beir, output, passage_length=600), "lower --passage-length"),
        (command(t5, beir, output, cross_encoder=damaged, keep_share=0.5), "gives nan for the query"),
        (command(t5, beir, output, bi_encoder=overflowing, keep_share=0.5), f"{overflowing}: embeddings hold NaN"),
    ]
    for arguments, message in cases:
        shutil.rmtree(tmp_path / "out.shards", ignore_errors=True)
        assert main(arguments) == 2, message
        error = capsys.readouterr().err
        assert error.strip().splitlines()[-1].startswith("train/generate.py: ")
        assert message in error, error
        assert not output.exists()
    assert (taken / "precious").read_text() == "x"


def test_a_corpus_with_one_document(t5: Path, tmp_path: Path) -> None:
    corpus = write_rows(tmp_path / "one.jsonl", {"id": 7, "text": "fox dog"})
    assert main(command(t5, corpus, tmp_path / "out")) == 0
    (document,) = lines(tmp_path / "out" / "expanded" / "corpus.jsonl")
    assert document["_id"] == "7"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "out"]

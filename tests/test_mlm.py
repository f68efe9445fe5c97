"""Masked language modelling: texts, windows and masks, the loss and its level, runs that learn and go on."""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, encoder_tokenizer, row, write_rows
from safetensors.torch import load_file, save_file
from splade_helpers import masked_lm
from test_eval_program import write_beir
from train_helpers import log_of
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertModel

import lens
from train.mlm import GAINS, RIDGE, MaskedLM, build, main
from train.windows import Windows, mask, plain, stream

KINDS = ("bert", "distilbert", "roberta", "modernbert", "modernbert-biased")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces of the sentences, of six to nine words."""
    rng = random.Random(0)
    pieces = {}
    while len(pieces) < 160:
        words = rng.choice(SENTENCES).split()
        start = rng.randrange(len(words) - 4)
        pieces[" ".join(words[start : start + rng.randint(6, 9)])] = None
        if len(pieces) > 100:
            pieces[" ".join([*words, str(len(pieces))])] = None
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(pieces) + "\n")
    return path


def arguments(base: Path, text: Path, output: Path, *flags: str, **changes: object) -> list[str]:
    values = {
        "base": base, "text": text, "output": output, "batch_size": 16, "max_steps": 6, "active_terms": 20,
        "max_length": 32, "save_steps": 2, "logging_steps": 1, "device": "cpu", **changes,
    }  # fmt: skip
    return [str(part) for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)] + [*flags]


def headless(kind: str, folder: Path) -> Path:
    """The tiny encoder of a masked LM without its head."""
    model, tokenizer = masked_lm(kind)
    model.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encoder_weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForMaskedLM.from_pretrained(folder)
    return {name: value for name, value in model.base_model.state_dict().items() if not name.startswith("pooler.")}


@pytest.fixture(scope="module")
def trained(bert: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "mlm"
    steps = {"max_steps": 200, "save_steps": 100, "logging_steps": 20}
    assert main(arguments(bert, texts, output, kept_share=0.1, learning_rate=1e-2, **steps)) == 0
    return output


def test_texts_of_every_form(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    rows = [
        {"title": "T", "text": "x"},
        {"title": "", "text": "y"},
        row(query="q", pos=["p1", "p2"], neg=["n"]),
        {"query": "a", "positive": "b"},
        {"title": "no text", "paragraphs": ["c", "d"]},
    ]
    path = write_rows(tmp_path / "b.jsonl", *rows)
    assert list(stream(tmp_path / "a.txt")) == ["one", "", "two"]
    assert list(stream(path)) == ["T x", "y", "q", "p1", "p2", "n", "a", "b", "c", "d"]
    beir = write_beir(tmp_path / "beir")
    corpus = [json.loads(line) for line in (beir / "corpus.jsonl").read_text().splitlines()]
    assert list(stream(beir)) == [" ".join(filter(None, (r.get("title"), r["text"]))) for r in corpus]


def test_windows_hold_every_token_of_every_text_once(tmp_path: Path) -> None:
    tokenizer = encoder_tokenizer()
    long = " ".join(SENTENCES)
    given = [long, "fox", "  ", SENTENCES[0], "fox", " fox  ", "[MASK] [SEP]"]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(given))
    windows = Windows([path, path], tokenizer, 12)
    assert windows.texts == 4  # the last one holds special tokens only, and gives no window
    expected = []
    for text in (long, "fox", SENTENCES[0]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected += [[2, *ids[at : at + 10], 3] for at in range(0, len(ids), 10)]
    assert [windows[i].tolist() for i in range(len(windows))] == expected
    counts = Counter(i for window in expected for i in window if i > 4)
    assert not windows.ends.flags.owndata  # held once, as it was read
    wanted = torch.tensor([float(counts[i]) for i in range(300)])
    assert torch.equal(windows.frequencies(300), wanted)


def test_masks_are_those_of_bert_and_follow_the_seed(texts: Path) -> None:
    tokenizer = encoder_tokenizer()
    windows = Windows([texts], tokenizer, 32)
    rows = list(range(len(windows)))
    shown = plain(windows, rows, tokenizer)
    parts = mask(windows, rows, tokenizer, 0.4, 0.1, 7)
    asked = masked = kept = total = 0
    for part, whole in zip(parts, shown, strict=True):
        where = part["labels"] >= 0
        assert torch.equal(torch.where(where, part["labels"], part["input_ids"]), whole["input_ids"])
        assert torch.equal(part["attention_mask"], whole["attention_mask"])
        assert not bool((where & (whole["input_ids"] <= 4)).any())  # special tokens, padding among them
        asked += int(where.sum())
        masked += int((part["input_ids"] == 4).sum())
        kept += int((where & (part["input_ids"] == part["labels"])).sum())
        total += int((whole["input_ids"] > 4).sum())
    assert asked / total == pytest.approx(0.4, abs=0.05)
    assert masked / asked == pytest.approx(0.8, abs=0.06)
    assert kept / asked == pytest.approx(0.1, abs=0.05)
    again = mask(windows, rows, tokenizer, 0.4, 0.1, 7)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(parts, again, strict=True) for name in a)
    half = mask(windows, rows, tokenizer, 0.4, 0.5, 7)
    kept = sum(int(((part["labels"] >= 0) & (part["input_ids"] == part["labels"])).sum()) for part in half)
    assert kept / sum(int((part["labels"] >= 0).sum()) for part in half) == pytest.approx(0.5, abs=0.07)
    other = mask(windows, rows, tokenizer, 0.4, 0.1, 8)
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(parts, other, strict=True))
    shortest = min(rows, key=lambda index: len(windows[index]))
    for seed in range(40):  # one token of one window at least
        assert any(bool((part["labels"] >= 0).any()) for part in mask(windows, [shortest], tokenizer, 0.01, 0.1, seed))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_models_own(kind: str, texts: Path) -> None:
    wrapper, tokenizer = masked_lm(kind)
    windows = Windows([texts], tokenizer, 32)
    parts = mask(windows, list(range(24)), tokenizer, 0.3, 0.1, 1)
    (whole,) = mask(windows, [0, 1, 2], tokenizer, 0.3, 0.1, 1)
    expected = wrapper(**whole).loss.detach()
    model = MaskedLM(wrapper, train_encoder=True)
    wanted = torch.autograd.grad(wrapper(**whole).loss, list(model.parameters()), allow_unused=True)
    found = model([whole])["loss"]
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)
    gradients = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    with torch.no_grad():  # several parts weigh as their tokens do
        counts = [int((part["labels"] >= 0).sum()) for part in parts]
        losses = [float(wrapper(**part).loss) for part in parts]
        assert float(model(parts)["loss"]) == pytest.approx(np.average(losses, weights=counts), rel=1e-4)
        hits = sum(int((wrapper(**part).logits.argmax(-1) == part["labels"]).sum()) for part in parts)
        assert float(model(parts)["accuracy"]) == pytest.approx(hits / sum(counts))


def test_the_shift_sets_the_level_and_no_probability(texts: Path) -> None:
    wrapper, tokenizer = masked_lm("bert")
    windows = Windows([texts], tokenizer, 32)
    rows = list(range(0, len(windows), 3))
    parts = plain(windows, rows, tokenizer)
    before = [wrapper(**part).logits for part in parts]
    model = MaskedLM(wrapper)
    for active in (37, 3):
        constant = model.shift(parts, active)
        positive = 0
        for part, old in zip(parts, before, strict=True):
            logits = wrapper(**part).logits
            torch.testing.assert_close(logits.softmax(-1), old.softmax(-1), rtol=1e-4, atol=1e-7)
            inside = logits.masked_fill(~part["attention_mask"].bool()[..., None], -math.inf)
            positive += int((inside.amax(1) > 0).sum())
        assert positive / len(rows) == pytest.approx(active, abs=0.05)
        assert math.isfinite(constant)


def test_the_bias_loses_the_log_frequencies(bert: Path, texts: Path, tmp_path: Path) -> None:
    runs = {share: tmp_path / str(share) for share in (0, 0.5, None)}
    for share, output in runs.items():
        assert main(arguments(bert, texts, output, **({} if share is None else {"pmi": share}))) == 0
    plain_head, half, full = (load_file(runs[share] / "model.safetensors") for share in runs)
    name = "cls.predictions.bias"
    size = len(plain_head[name])
    counts = Windows([texts], encoder_tokenizer(), 32).frequencies(size).double().numpy()
    logs = np.log((counts + 1) / (counts.sum() + size))
    logs[counts == 0] = logs.max()  # what never occurs, [CLS] for one, is not raised
    for share, found in ((0.5, half), (1, full)):
        moved = (found[name] - plain_head[name]).double().numpy() + share * logs
        assert np.ptp(moved) < 1e-4 < 0.1 < share * np.ptp(logs)  # but for the constant of the level
        assert all(torch.equal(found[other], plain_head[other]) for other in found if "decoder" not in other != name)
    assert [json.loads((run / "config.json").read_text())["frequency_discount"] for run in runs.values()] == [0, 0.5, 1]
    lines = texts.read_text().splitlines()
    vectors = {
        share: lens.load(run, device="cpu").encode_documents(lines, output="numpy") for share, run in runs.items()
    }
    assert all((found > 0).sum(1).mean() == pytest.approx(20, abs=0.5) for found in vectors.values())
    common = int(counts.argmax())
    assert (vectors[None][:, common] > 0).mean() < (vectors[0][:, common] > 0).mean()  # a term of fewer texts

    again = {"max_steps": 1, "learning_rate": 1e-12, "weight_decay": 0}
    losses = []
    for base, share in ((0, None), (0.5, None), (None, None), (None, 0)):
        output = tmp_path / f"again-{base}-{share}"
        assert main(arguments(runs[base], texts, output, **again, **({} if share is None else {"pmi": share}))) == 0
        wanted = plain_head if share == 0 else load_file(runs[base] / "model.safetensors")
        assert np.ptp((load_file(output / "model.safetensors")[name] - wanted[name]).numpy()) < 1e-4
        losses.append(log_of(output)[0]["loss"])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)  # training begins from the masked LM's probabilities


def test_a_discounted_base_has_its_frequencies_back_before_a_lost_part_begins_anew(texts: Path, tmp_path: Path) -> None:
    wrapper, tokenizer = masked_lm("bert")
    counts = Windows([texts], tokenizer, 32).frequencies(wrapper.config.vocab_size)
    heads = {}
    for name, share in (("plain", 0), ("discounted", 1)):
        base, output = tmp_path / name, tmp_path / f"{name}-out"
        MaskedLM(wrapper).weigh(counts, -share)
        wrapper.config.frequency_discount = share
        wrapper.save_pretrained(base)
        tokenizer.save_pretrained(base)
        tensors = load_file(base / "model.safetensors")
        kept = {k: v for k, v in tensors.items() if k != NAMES["norm.weight"]}
        save_file(kept, base / "model.safetensors", {"format": "pt"})
        options = {"max_steps": 1, "learning_rate": 1e-12, "weight_decay": 0, "pmi": 0}
        assert main(arguments(base, texts, output, **options)) == 0
        heads[name] = load_file(output / "model.safetensors")
    for name, value in heads["plain"].items():
        torch.testing.assert_close(heads["discounted"][name], value, rtol=0, atol=1e-4, msg=name)


def test_the_head_learns_and_the_encoder_stays(trained: Path, bert: Path, texts: Path) -> None:
    log = [line for line in log_of(trained) if "loss" in line]
    counts = Windows([texts], encoder_tokenizer(), 32).frequencies(300)
    shares = counts[counts > 0] / counts.sum()
    entropy = -float((shares * shares.log()).sum())  # no head that does not look at the states has a lower loss
    assert log[-1]["loss"] < entropy, (log[-1], entropy)
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["accuracy"] > log[0]["accuracy"]
    before = {
        name: value for name, value in BertModel.from_pretrained(bert).state_dict().items() if "pooler" not in name
    }
    after = encoder_weights(trained)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    checkpoint = load_file(trained / "checkpoint-200" / "model.safetensors")
    assert sorted(checkpoint) == ["bias", "dense.bias", "dense.weight", "norm.bias", "norm.weight"]


def test_lens_reads_the_head(trained: Path) -> None:
    wrapper, tokenizer = AutoModelForMaskedLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = wrapper(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits
    logits = logits.masked_fill(~tokens["attention_mask"].bool()[..., None], -math.inf)
    expected = logits.amax(1).relu().log1p().numpy()
    assert 5 < (expected > 0).sum(1).mean() < 60
    built = lens.LENS.build(trained, device="cpu", positions="all", prompt="plain", normalize=False)
    for model in (lens.load(trained, device="cpu"), built):
        np.testing.assert_allclose(model.encode_documents(SENTENCES, output="numpy"), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_encoders_of_every_kind_get_a_head(kind: str, texts: Path, tmp_path: Path) -> None:
    base, output = headless(kind, tmp_path / "base"), tmp_path / "out"
    assert main(arguments(base, texts, output, max_steps=2, max_length=64)) == 0  # every text is one window
    before, after = encoder_weights(base), encoder_weights(output)
    assert all(torch.equal(before[name], after[name]) for name in before)
    active = (lens.load(output, device="cpu").encode_documents(texts.read_text().splitlines(), output="numpy") > 0).sum(
        1
    )
    assert active.mean() == pytest.approx(20, abs=0.5)
    assert (output / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    assert json.loads((output / "config.json").read_text())["frequency_discount"] == 1  # its bias is a new one


@pytest.mark.parametrize("flags", [(), ("--train-encoder",)])
def test_a_killed_run_goes_on_to_the_same_weights(
    bert: Path, texts: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(arguments(bert, texts, whole, *flags)) == 0
    shutil.copytree(whole, broken)
    for path in broken.iterdir():  # as a kill after step 4 leaves it
        if path.is_file() and path.name not in ("run.json", "training_log.jsonl"):
            path.unlink()
    shutil.rmtree(broken / "checkpoint-6")
    assert (broken / "checkpoint-4" / "complete.json").is_file()
    assert main(arguments(bert, texts, broken, *flags)) == 0
    first, second = load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    used = json.loads((whole / "run.json").read_text())
    assert (used["kept_share"], used["learning_rate"]) == ((0.1, 5e-5) if flags else (0.5, 3e-3))
    losses = [[line["loss"] for line in log_of(output)][:6] for output in (whole, broken)]
    assert losses[0] == losses[1]
    before, after = encoder_weights(bert), encoder_weights(whole)
    assert all(torch.equal(before[name], after[name]) for name in before) == (not flags)


def test_a_head_of_its_own_is_kept(bert_mlm: Path, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(arguments(bert_mlm, texts, output, max_steps=1, learning_rate=1e-12, weight_decay=0)) == 0
    before, after = load_file(bert_mlm / "model.safetensors"), load_file(output / "model.safetensors")
    for name, value in before.items():
        if name.startswith("cls.") and not name.endswith("predictions.bias"):
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-9)
    moved = after["cls.predictions.bias"] - before["cls.predictions.bias"]
    assert float(moved.std()) < 1e-5 < abs(float(moved.mean()))


def test_a_decoder_that_was_never_trained_is_tied(texts: Path, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    tokenizer = encoder_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    assert main(arguments(base, texts, output, max_steps=1)) == 0
    model = AutoModelForMaskedLM.from_pretrained(output)
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


NAMES = {
    "bias": "cls.predictions.bias",
    "dense.bias": "cls.predictions.transform.dense.bias",
    "dense.weight": "cls.predictions.transform.dense.weight",
    "norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "norm.weight": "cls.predictions.transform.LayerNorm.weight",
}


@pytest.mark.parametrize("lost", [["bias"], ["dense.weight", "dense.bias"], ["norm.weight"], ["norm.bias"]])
def test_only_what_is_missing_of_a_head_begins_anew(lost: list[str], texts: Path, tmp_path: Path) -> None:
    wrapper, tokenizer = masked_lm("bert")
    wrapper.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = {NAMES[name] for name in lost}
    save_file({k: v for k, v in tensors.items() if k not in gone}, tmp_path / "model.safetensors", {"format": "pt"})
    options = argparse.Namespace(base=str(tmp_path), device="cpu", active_terms=5, max_length=32, train_encoder=False)
    model, tokenizer, new = build(options)
    assert new == set(lost)
    windows = Windows([texts], tokenizer, 32)
    counts = windows.frequencies(len(model.bias))
    model.begin(new, counts, [mask(windows, list(range(64)), tokenizer, 0.3, 0.1, 0)])
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, value in found.items():
        assert torch.equal(value, tensors[NAMES[name]]) == (name not in lost), name
    if lost == ["bias"]:
        torch.testing.assert_close(found["bias"], ((counts + 1) / (counts + 1).sum()).log())
    if lost == ["norm.weight"]:
        assert any(float(found["norm.weight"][0]) == pytest.approx(gain) for gain in GAINS)
        assert bool((found["norm.weight"] == found["norm.weight"][0]).all())


def test_a_new_head_is_set_with_the_logits_of_few_tokens_at_a_time(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(headless("bert", tmp_path))
    options = argparse.Namespace(base=base, device="cpu", active_terms=5, max_length=32, train_encoder=False)
    model, tokenizer, new = build(options)
    windows = Windows([texts], tokenizer, 32)
    batch = mask(windows, list(range(len(windows))), tokenizer, 0.3, 0.1, 0)
    monkeypatch.setattr("train.mlm.CHUNK", 16)
    logits, sizes = model.logits, []

    def counted(states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return logits(states)

    monkeypatch.setattr(model, "logits", counted)
    model.begin(new, windows.frequencies(len(model.bias)), [batch])
    chosen = float(model.norm.weight.detach()[0])
    with torch.no_grad():
        states, labels = model.targets(batch)
        held_out = len(labels) // 10
        assert max(sizes) == 16
        assert sum(sizes) == held_out * len(GAINS) > 16 * len(GAINS)
        losses = {}
        for value in GAINS:  # in one piece
            model.norm.weight.fill_(value)
            losses[value] = float(torch.nn.functional.cross_entropy(logits(states[:held_out]), labels[:held_out]))
    assert chosen == pytest.approx(min(losses, key=lambda value: losses[value]))


def test_half_precision_and_whole_passes(bert: Path, texts: Path, tmp_path: Path) -> None:
    command = arguments(bert, texts, tmp_path / "out", precision="bf16", epochs=1)
    at = command.index("--max-steps")
    del command[at : at + 2]
    assert main(command) == 0
    steps = [line["step"] for line in log_of(tmp_path / "out")]
    assert max(steps) == len(Windows([texts], encoder_tokenizer(), 32)) // 16


@pytest.mark.parametrize("kind", ["bert", "modernbert"])  # the latter's dense layer has no bias
def test_a_new_head_begins_at_frequencies_and_the_least_squares(kind: str, texts: Path, tmp_path: Path) -> None:
    base = str(headless(kind, tmp_path))
    options = argparse.Namespace(base=base, device="cpu", active_terms=5, max_length=32, train_encoder=False)
    model, tokenizer, new = build(options)
    assert new == {name for name, _ in model.named_parameters()}
    windows = Windows([texts], tokenizer, 32)
    counts = windows.frequencies(len(model.bias))
    batches = [mask(windows, list(range(at, at + 16)), tokenizer, 0.3, 0.1, at) for at in range(0, 128, 16)]
    model.begin(new, counts, batches)
    shares = model.bias.detach().exp()
    assert float(shares.sum()) == pytest.approx(1, rel=1e-4)
    for token in (int(counts.argmax()), int(counts.argmin())):
        assert float(shares[token]) == pytest.approx((float(counts[token]) + 1) / float(counts.sum() + len(counts)))

    with torch.no_grad():
        pairs = [model.targets(parts) for parts in batches]
    x, labels = (torch.cat(column).numpy() for column in zip(*pairs, strict=True))
    x, y = x[len(x) // 10 :], model.wrapper.get_input_embeddings().weight.detach().numpy()[labels[len(x) // 10 :]]
    x, y = x - (x.mean(0) if kind == "bert" else 0), y - y.mean(0)
    ridge = RIDGE * (x**2).sum(0).mean()
    wanted = np.linalg.lstsq(np.vstack([x, ridge**0.5 * np.eye(32)]), np.vstack([y, np.zeros((32, 32))]), rcond=None)[0]
    found = model.dense.weight.detach().numpy().T
    assert np.abs(found / np.linalg.norm(found) - wanted / np.linalg.norm(wanted)).max() < 1e-4

    with torch.no_grad():
        begun = np.mean([float(model(parts)["loss"]) for parts in batches])
        model.norm.weight.zero_()  # the bias alone
        blind = np.mean([float(model(parts)["loss"]) for parts in batches])
    assert begun < blind


def test_a_finished_run_is_left_alone_and_another_refused(
    trained: Path, bert: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {"save_steps": 100, "logging_steps": 20, "learning_rate": 1e-2, "kept_share": 0.1}
    assert main(arguments(bert, texts, trained, max_steps=200, **steps)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(arguments(bert, texts, trained, max_steps=201, **steps)) == 2
    assert "a run with other options (max_steps)" in capsys.readouterr().err


def test_bad_input_gets_one_line(
    bert: Path, mistral: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    bare, odd, number = (tmp_path / f"{name}.jsonl" for name in ("bare", "odd", "number"))
    write_rows(number, {"title": 7, "text": "x"})
    write_rows(bare, {"text": "x"}, {"body": "y"})
    write_rows(odd, {"pos": ["x", 3]})
    table = tmp_path / "table.parquet"
    table.write_bytes(b"PAR1")
    maskless = shutil.copytree(bert, tmp_path / "maskless")
    facts = json.loads((maskless / "tokenizer_config.json").read_text())
    del facts["mask_token"]
    (maskless / "tokenizer_config.json").write_text(json.dumps(facts))
    other = write_beir(tmp_path / "beir")
    damaged = tmp_path / "damaged"
    wrapper, tokenizer = masked_lm("bert")
    wrapper.config.frequency_discount = [1]
    wrapper.save_pretrained(damaged)
    tokenizer.save_pretrained(damaged)
    unbiased = headless("modernbert-biased", tmp_path / "unbiased")  # its decoder has no bias
    cases = [
        (arguments(bert, tmp_path / "no.txt", output), "no.txt does not exist"),
        (arguments(bert, empty, output), "no text holds a token"),
        (arguments(bert, bare, output), "bare.jsonl:2: a row needs one of the fields text"),
        (arguments(bert, odd, output), "odd.jsonl:1: `pos` must hold text only"),
        (arguments(bert, number, output), "number.jsonl:1: `title` and `text` must hold text only"),
        (arguments(bert, table, output), "--text takes .txt"),
        (arguments(mistral, texts, output), "masked language modelling needs an encoder"),
        (arguments(maskless, texts, output), "has no mask_token"),
        (arguments(unbiased, texts, output), "has no bias"),
        (arguments(damaged, texts, output), "must be a number from 0 to 2, found [1]"),
        (arguments(tmp_path / "gone", texts, output), "does not exist"),
        (arguments(bert, texts, other), "is not empty"),
        (arguments(bert, texts, output, max_length=1000), "more than the 128 positions"),
        (arguments(bert, texts, output, max_length=3), "--max-length must be at least 8"),
        (arguments(bert, texts, output, active_terms=300), "--active-terms must be below the vocabulary"),
        (arguments(bert, texts, output, active_terms=0), "--active-terms must be at least 1"),
        (arguments(bert, texts, output, mask_share="nan"), "--mask-share must lie between"),
        (arguments(bert, texts, output, batch_size=5000), "fewer than batch_size=5000"),
        (arguments(bert, texts, output, learning_rate=-1), "--learning-rate must be a number above 0"),
        (arguments(bert, texts, output, max_steps=0), "--max-steps must be at least 1, found 0"),
        (arguments(bert, texts, output, kept_share=1), "--kept-share must be at least 0 and below 1"),
        (arguments(bert, texts, output, pmi="nan"), "--pmi must lie between 0 and 2, found nan"),
        (arguments(bert, texts, output, pmi=-1), "--pmi must lie between 0 and 2, found -1"),
    ]
    for command, message in cases:
        shutil.rmtree(output, ignore_errors=True)
        assert main(command) == 2, message
        error = capsys.readouterr().err
        assert error.strip().splitlines()[-1].startswith("train/mlm.py: ")
        assert message in error, error
        assert not (output / "config.json").exists()
    assert main(arguments(bert, texts, output, learning_rate=1e30)) == 2
    assert "train/mlm.py: loss or gradient is not finite at step" in capsys.readouterr().err

"""Stages of encoding that work ahead of each other: order, errors, threads, memory."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from conftest import SENTENCES

import lens
from lens import pipeline
from lens.pipeline import ahead, compute
from lens.text import TextProcessor

CPU, BESIDE = torch.device("cpu"), torch.device("mps")  # the second works beside the CPU; no tensor goes there


@pytest.fixture(scope="module")
def model(bert, bert_clusters):
    return lens.LENS.build(bert, bert_clusters, device="cpu")


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("lens-ahead")]


def mixed(count):
    """Texts of 1 to 14 words, in no order of length."""
    words = " ".join(SENTENCES).split()
    return [" ".join(words[7 * i % 50 :][: i * 5 % 14 + 1]) for i in range(count)]


def test_ahead_gives_all_items_one_ahead():
    made, seen = [], []

    def items():
        for item in range(4):
            made.append(item)
            yield item

    for item in ahead(items()):
        end = time.monotonic() + 10
        while len(made) < min(item + 2, 4) and time.monotonic() < end:  # the next one, while this one is in use
            time.sleep(0.001)
        seen.append((item, list(made)))
    assert seen == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3])]
    assert list(ahead(iter([]))) == []
    assert threads() == []


def test_ahead_works_in_a_thread_and_passes_errors_on():
    where = []

    def items():
        where.append(threading.current_thread())
        yield 1
        raise KeyError("second")

    stream = ahead(items())
    assert next(stream) == 1
    with pytest.raises(KeyError, match="second"):
        next(stream)
    assert where != [threading.current_thread()]
    assert threads() == []


@pytest.mark.parametrize("output", ["numpy", "torch", "csr"])
@pytest.mark.parametrize("block", [1, 4, 7, 50, 51])
def test_blocks_change_nothing(model, monkeypatch, output, block):
    texts = mixed(50)
    whole = model.encode(texts, batch_tokens=40)
    alone = np.concatenate([model.encode([text]) for text in texts])
    monkeypatch.setattr(pipeline, "BLOCK", block)
    found = model.encode(texts, output=output, batch_tokens=40)
    found = found.toarray() if output == "csr" else np.asarray(found)
    np.testing.assert_allclose(found, alone, atol=1e-6)
    if block >= 50:
        np.testing.assert_array_equal(found, whole)
    assert threads() == []


def test_one_block_is_sorted_as_a_whole(model):
    """Batches of one block are those of one sort over all texts: the longest first."""
    blocks = list(pipeline.plan(model.text, mixed(50), "document", None, 40, True))
    assert len(blocks) == 1
    lengths = [len(item.ids) for _, tokens in blocks[0] for item in tokens]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(tokens) == 1 or sum(len(item.ids) for item in tokens) <= 40 for _, tokens in blocks[0])


def test_tokenising_runs_at_most_one_block_ahead(model, monkeypatch):
    monkeypatch.setattr(pipeline, "BLOCK", 5)
    calls = []

    class Counting(TextProcessor):
        def __call__(self, texts, *options):
            calls.append((len(texts), threading.current_thread().name))
            return super().__call__(texts, *options)

    monkeypatch.setattr(model, "text", Counting(model.tokenizer, model.config))
    blocks = pipeline.plan(model.text, mixed(23), "document", None, 40, True)
    held = [next(blocks), next(blocks)]
    time.sleep(0.05)
    assert len(calls) <= 3
    held += list(blocks)
    assert [count for count, _ in calls] == [5, 5, 5, 5, 3]
    assert all(name.startswith("lens-ahead") for _, name in calls)
    assert sorted(row for block in held for rows, _ in block for row in rows) == list(range(23))


def test_errors_name_the_text_by_its_place_in_the_whole_list(model, monkeypatch):
    monkeypatch.setattr(pipeline, "BLOCK", 5)
    texts = mixed(23)
    texts[17] = "\ud800"
    with pytest.raises(ValueError, match=r"texts\[17\] holds a lone surrogate"):
        model.encode(texts)
    texts[17] = None
    with pytest.raises(TypeError, match=r"texts\[17\] must be a str"):
        model.encode(texts)
    with pytest.raises(ValueError, match="the instruction takes"):
        model.encode_queries(mixed(23), instruction="word " * 600)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("tokenizer"), FloatingPointError("model")])
def test_an_error_in_any_stage_reaches_the_caller_and_ends_the_threads(model, monkeypatch, error):
    monkeypatch.setattr(pipeline, "BLOCK", 5)
    count = 0

    def failing(inner):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == 3:
                raise error
            return inner(*arguments, **options)

        return call

    if isinstance(error, RuntimeError):
        monkeypatch.setattr(model, "text", failing(model.text))
        monkeypatch.setattr(model.text, "collate", model.tokenizer, raising=False)
        monkeypatch.setattr(model.text, "pack", TextProcessor(model.tokenizer, model.config).pack, raising=False)
    else:
        monkeypatch.setattr(model.model, "forward", failing(model.model.forward))
    with pytest.raises(error if isinstance(error, type) else type(error)) as caught:
        model.encode(mixed(40), batch_tokens=40)
    assert count == 3
    assert threads() == []
    if isinstance(error, Exception):
        assert caught.value is error


@pytest.mark.parametrize(("device", "expected"), [(CPU, "s0 w0 s1 w1 s2 w2"), (BESIDE, "s0 s1 w0 s2 w1 w2")])
def test_the_next_batch_is_started_before_results_are_waited_for(device, expected):
    events = []

    class Result(torch.Tensor):
        def cpu(self):
            events.append(f"w{int(self[0, 0])}")
            return self.as_subclass(torch.Tensor)

    def network(number):
        events.append(f"s{number}")
        return torch.full((2, 3), float(number)).as_subclass(Result)

    batches = (([number, number + 10], {"number": number}) for number in range(3))
    found = list(compute(network, batches, lambda x: x, device, torch.float32))
    assert " ".join(events) == expected
    assert [rows for rows, _ in found] == [[0, 10], [1, 11], [2, 12]]
    assert [float(embeddings[1, 2]) for _, embeddings in found] == [0, 1, 2]


@pytest.mark.parametrize("device", [CPU, BESIDE])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found_before_pruning_hides_them(device, value):
    def network(bad):
        return torch.tensor([[1.0, value if bad else 2.0]])

    stream = compute(network, (([n], {"bad": n == 1}) for n in range(3)), lambda x: x[:, :1], device, torch.float16)
    assert next(stream)[0] == [0]
    with pytest.raises(FloatingPointError, match="infinite values in torch.float16; load with dtype='bfloat16'"):
        next(stream)


def test_the_bar_shows_for_many_batches_or_blocks(model, monkeypatch, capsys):
    cases = ((4, 99, 20, False), (40, 99, 20, True), (40, 20, 10**6, False), (40, 5, 10**6, True))
    for texts, block, tokens, shown in cases:
        monkeypatch.setattr(pipeline, "BLOCK", block)
        model.encode(mixed(texts), batch_tokens=tokens)
        assert ("encode" in capsys.readouterr().err) == shown


@pytest.mark.gpu
def test_on_a_gpu(model, bert, bert_clusters, monkeypatch):
    monkeypatch.setattr(pipeline, "BLOCK", 20)
    texts = mixed(50)
    for dtype, near in (("float32", 1e-4), ("bfloat16", 0.05)):
        other = lens.LENS.build(bert, bert_clusters, device="cuda", dtype=dtype)
        with torch.cuda.stream(torch.cuda.Stream()):
            for output in ("numpy", "torch"):
                found = other.encode(texts, output=output, batch_tokens=60)
                np.testing.assert_allclose(np.asarray(found), model.encode(texts), atol=near)


def test_a_cpu_never_touches_cuda_or_mps(model, monkeypatch):
    expected = model.encode(SENTENCES)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: pytest.fail("a stream on a CPU"))
    assert np.array_equal(model.encode(SENTENCES), expected)


@pytest.mark.parametrize("packed", [True, False])
def test_texts_without_any_token_get_zeros(packed, bert, bert_clusters, monkeypatch):
    model = lens.LENS.build(bert, bert_clusters, device="cpu", packed=packed)
    model.text.prefix, model.text.suffix = [], []
    assert not model.encode(["", ""]).any()
    for budget in (1, 100):
        found = model.encode(["", SENTENCES[0]], batch_tokens=budget)
        assert not found[0].any()
        np.testing.assert_allclose(found[1], model.encode([SENTENCES[0]])[0], atol=1e-6)

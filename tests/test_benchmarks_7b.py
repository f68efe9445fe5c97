"""benchmarks/train_7b.py on a toy shape: its FLOP formulas against torch's counter, its cases, its output."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import train_7b
from benchmarks.flops import SHAPES, Case, cached_share, forward_flops, hardware_flops, training_flops
from benchmarks.train_7b import build, recipe_of, texts, write_examples
from lens.backbone import hidden_states
from lens.text import TextProcessor
from train.build import make_trainable
from train.data import Batches
from train.sources import make_schedule, read_sources
from train.step import QueryPassageModel

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]


def test_the_shape_is_mistral_7b() -> None:
    shape = SHAPES["mistral-7b"]
    assert shape.matrices == 7_241_732_096 - 2 * 32_000 * 4096 - 65 * 4096  # published total less embeddings and norms
    assert shape.lora == 83_886_080  # what PEFT prints for r=32 on the seven maps
    assert training_flops(shape) == pytest.approx(2 * forward_flops(shape, lora=False), rel=0.08)
    assert hardware_flops(shape, Case("train")) > training_flops(shape)


@pytest.mark.parametrize(("checkpointing", "cached"), [(False, None), (True, None), (False, 64), (True, 64)])
def test_flops_are_those_that_torch_counts(tmp_path: Path, checkpointing: bool, cached: int | None) -> None:
    case = Case("train", batch=2, checkpointing=checkpointing, mini_batch_tokens=cached)
    write_examples(tmp_path / "train.jsonl", 2, TINY)
    recipe = recipe_of(case, TINY, tmp_path, 1, CPU)
    model, tokenizer = build(TINY, "bf16", CPU)
    model.backbone.config._attn_implementation = "eager"  # sdpa's CPU kernel is not counted
    make_trainable(model, tokenizer, recipe)
    model.train()
    sources, text = read_sources(recipe), TextProcessor(tokenizer, model.config)
    batch = Batches(sources, make_schedule(recipe, sources), text, TINY.passages, mini_batch_tokens=cached)[0]
    tokens = 2 * (TINY.passages + 1) * TINY.length
    # The head sees pooled positions alone, and its backward pass is not counted: only active clusters have gradients.
    pooled = sum(len(part["pooled"]) for part in batch["mini_batches"] or (batch["queries"], batch["passages"]))
    head = 2 * TINY.clusters * TINY.width
    passes = 1 + cached_share(TINY, case)
    expected = tokens * (hardware_flops(TINY, case) - passes * head) + passes * pooled * head
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        queries, passages = QueryPassageModel(model)(batch["queries"], batch["passages"], batch["mini_batches"])
    forward = tokens * (forward_flops(TINY, lora=True) - head) + pooled * head
    assert counter.get_total_flops() == pytest.approx(forward, rel=0.01)
    with FlopCounterMode(display=False) as backward:
        (queries.sum() + passages.sum()).backward()
    assert counter.get_total_flops() + backward.get_total_flops() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("weights", ["bf16", "4bit"])
def test_a_case_trains_and_encodes_on_the_real_path(weights: str) -> None:
    if weights == "4bit":
        pytest.importorskip("bitsandbytes")
    found = train_7b.measure(Case("train", weights, 2), TINY, CPU, 2)
    assert found["tokens"] == 2 * 4 * 32
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"], rel=0.01)
    cached = train_7b.measure(Case("train", weights, 2, False, 3 * 32), TINY, CPU, 2)
    assert cached["tokens"] == found["tokens"]
    found = train_7b.measure(Case("encode", weights, 4), TINY, CPU, 2)
    assert found["tokens"] == 2 * 4 * 32


def test_quantised_weights_stay_near_the_bf16_ones() -> None:
    pytest.importorskip("bitsandbytes")
    whole, tokenizer = build(TINY, "bf16", CPU)
    small, _ = build(TINY, "4bit", CPU)
    kinds = {type(module).__name__ for module in small.backbone.modules()}
    assert "Linear4bit" in kinds
    assert "Linear" not in kinds
    batch = (text := TextProcessor(tokenizer, whole.config)).collate(text(texts(3, TINY)))
    states = [hidden_states(m.backbone, batch.input_ids, batch.attention_mask).float() for m in (whole, small)]
    near = torch.cosine_similarity(states[0], states[1], dim=-1)
    assert near.min() > 0.9
    assert near.max() < 0.99999


def test_a_case_in_its_own_process_reports_its_figures() -> None:
    options = argparse.Namespace(shape="tiny", device="cpu", steps=1)
    found = train_7b.run_case(Case("encode", batch=2), options)
    assert found["tokens"] == 2 * TINY.length
    assert found["model_tflops"] <= found["tokens_per_second"] * forward_flops(TINY, lora=False) / 1e12 + 1e-3


def test_memory_that_does_not_suffice_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_7b, "train", full)
    found = train_7b.measure(Case("train"), TINY, CPU, 1)
    assert found["out_of_memory"] is True


def test_output_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Case] = []
    result = {"tokens": 4, "seconds": 1.0, "tokens_per_second": 4, "model_tflops": 50.0, "hardware_tflops": 60.0}

    def run_case(case: Case, options: object) -> dict[str, object]:
        ran.append(case)
        if case.batch == 4:
            return {"error": "broken"} if len(ran) < 5 else {"out_of_memory": True, "peak_gib": 1.0}
        return {**result, "peak_gib": 1.5}

    monkeypatch.setattr(train_7b, "run_case", run_case)
    output, sheet = tmp_path / "out.json", tmp_path / "page.md"
    arguments = ["--shape", "tiny", "--device", "cpu", "--batches", "2", "4", "--encode", "8", "--weights", "bf16"]
    arguments += ["--peak", "100", "--mini_batch_tokens", "256", "--output", str(output)]
    assert train_7b.main(arguments) == 0
    everything = train_7b.cases(TINY, [2, 4], [256], [8], ["bf16"], False)
    assert ran == everything
    assert len(set(everything)) == len(everything) == 6
    assert train_7b.main(arguments) == 0
    assert ran[6:] == everything[2:4]  # what failed is tried again
    assert [Case(**entry["case"]) for entry in json.loads(output.read_text())["cases"]].count(everything[0]) == 1
    assert train_7b.main(["--page", "--output", str(output), "--results", str(sheet)]) == 0
    text = sheet.read_text()
    assert "| train | bf16 | 2 | no |  |  | 4 | 50.0% | 60.0% | 1.5 |" in text
    assert "out of memory" in text


def test_bad_values_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out.json"), "--shape", "tiny"]
    assert train_7b.main([*output, "--device", "cpu", "--batches", "0"]) == 2
    assert "--batches must be at least 1, found [0]" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert train_7b.main(output) == 2
        assert "'cuda'" in capsys.readouterr().err

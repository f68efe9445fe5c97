"""What the speed benchmarks compute from their measurements, against values worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from benchmarks import encoding, head, kmeans, measure, scaling, scaling_page, step, where
from benchmarks.flops import encoder_flops

CPU = torch.device("cpu")


def test_a_line_is_that_of_least_squares() -> None:
    assert measure.line([1, 2, 4], [5, 7, 11]) == pytest.approx((2, 3))
    # means 2 and 2; sum of products (-1)(-1) + 0 + 1 * 0 = 1, of squares 2
    assert measure.line([1, 2, 3], [1, 3, 2]) == pytest.approx((0.5, 1))


def test_the_exponent_is_that_of_the_power() -> None:
    assert measure.exponent([1, 2, 8], [3, 3 * 2**1.5, 3 * 8**1.5]) == pytest.approx(1.5)
    assert measure.exponent([10, 1000], [4, 4]) == pytest.approx(0)


def test_bars_are_stacked_and_the_file_depends_on_the_figures_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PLOTS", tmp_path)
    parts = {"one": {"red": 1.0, "blue": 2.0}, "two": {"blue": 3.0}}
    assert measure.bars("shares", parts, "seconds") == "![seconds](plots/shares.svg)"
    first = (tmp_path / "shares.svg").read_bytes()
    assert all(text in first.decode() for text in ("<!-- one -->", "<!-- two -->", "<!-- red -->", "<!-- blue -->"))
    measure.bars("shares", parts, "seconds")
    assert (tmp_path / "shares.svg").read_bytes() == first


def test_flops_of_an_encoder_are_those_that_torch_counts() -> None:
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    model = BertModel(config, add_pooling_layer=False).eval()
    model.set_attn_implementation("eager")  # sdpa's CPU kernel is not counted
    head, transform = nn.Linear(16, 40), nn.Linear(16, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for length, pooled in ((5, 3), (9, 7)):
            states = model(torch.arange(length)[None]).last_hidden_state[0, :pooled]
            head(transform(states))
    found = encoder_flops(config.to_dict(), [5, 9], 40, transform=True, pooled=[3, 7])
    assert sum(found.values()) == counter.get_total_flops()
    assert found["head"] == 2 * (3 + 7) * 16 * 40
    assert found["attention"] == 2 * (5 * 5 + 9 * 9) * 16 * 2 * 3  # q k^T and its product with v, in 3 layers


@pytest.mark.parametrize(
    ("name", "callers", "kind"),
    [
        ("aten::addmm", ["aten::linear", where.WHOLE], where.LINEAR),
        ("onednn::qlinear_pointwise", [where.WHOLE], where.LINEAR),
        ("mkldnn::_linear_pointwise", [where.WHOLE], where.LINEAR),
        ("mkldnn::_linear_pointwise", [where.POOLED, where.WHOLE], where.HEAD),
        ("aten::mm", ["AddmmBackward0", "autograd::engine::evaluate_function: AddmmBackward0"], where.LINEAR),
        ("aten::mm", ["_MaxLogits", where.POOLED, where.WHOLE], where.HEAD),
        ("onednn::qlinear_pointwise", [where.POOLED, where.WHOLE], where.HEAD),
        ("aten::_embedding_bag", ["aten::embedding_bag", "_MaxLogitsBackward"], where.HEAD),
        ("lens::max_logits", [where.POOLED], where.HEAD),
        ("aten::amax", ["_MaxLogits", where.POOLED], where.POOL),
        ("aten::sort", ["_MaxLogitsBackward"], where.POOL),
        ("aten::amax", [where.QUANTISED, where.POOLED], where.QUANTISE),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ["aten::scaled_dot_product_attention"], where.ATTENTION),
        ("aten::bmm", ["BmmBackward0"], where.ATTENTION),
        ("aten::mul", ["ScaledDotProductFlashAttentionForCpuBackward0"], where.ATTENTION),
        ("aten::bernoulli_", ["aten::dropout", "aten::scaled_dot_product_attention"], where.DROPOUT),
        ("aten::random_", ["where: dropout", "where: attention"], where.DROPOUT),
        ("aten::masked_fill", ["where: attention", where.WHOLE], where.ATTENTION),
        ("aten::gelu_backward", ["GeluBackward0"], where.GELU),
        ("aten::native_layer_norm", ["aten::layer_norm"], where.OTHER),
        ("aten::embedding", [where.WHOLE], where.OTHER),
        ("aten::view", ["aten::reshape"], where.REST),
        ("autograd::engine::evaluate_function: AddmmBackward0", [where.WHOLE], where.REST),
        ("_MaxLogits", [where.POOLED], where.REST),
        (where.WHOLE, [], where.REST),
        ("aten::to", [where.TOKENISED, where.WHOLE], where.TOKENISE),
        (where.TOKENISED, [where.WHOLE], where.TOKENISE),
    ],
)
def test_operations_are_told_apart(name: str, callers: list[str], kind: str) -> None:
    assert where.kind_of(name, callers) == kind


def test_a_profile_is_divided_without_rest() -> None:
    layer, x = nn.Linear(64, 64), torch.randn(32, 64)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        layer(x)  # outside
        with record_function(where.WHOLE):
            nn.functional.gelu(layer(x)).sum().backward()
    kinds, operations = where.by_kind(found.events(), CPU)
    whole = next(event for event in found.events() if event.name == where.WHOLE)
    assert sum(kinds.values()) == pytest.approx(whole.cpu_time_total / 1e6)
    assert {where.LINEAR, where.GELU, where.OTHER, where.REST} <= set(kinds)
    span = whole.time_range
    inside = [e for e in found.events() if span.start <= e.time_range.start and e.time_range.end <= span.end]
    products = sum(e.self_cpu_time_total for e in inside if e.name in ("aten::addmm", "aten::mm", "aten::linear"))
    assert kinds[where.LINEAR] == pytest.approx(products / 1e6)
    assert f"aten::addmm ({where.LINEAR})" in operations


def event(name: str, caller: Any = None, cpu: float = 0, own: float = 0, kernels: float = 0, device: int = 0) -> Any:
    """An event as torch.profiler gives it, times in microseconds."""
    kind = torch.autograd.DeviceType.CUDA if device else torch.autograd.DeviceType.CPU
    return SimpleNamespace(
        name=name,
        cpu_parent=caller,
        cpu_time_total=cpu,
        self_cpu_time_total=own,
        self_device_time_total=kernels,
        device_type=kind,
    )


def test_on_a_gpu_kernels_count_and_what_is_left_is_idle() -> None:
    whole = event(where.WHOLE, cpu=100e6)
    pooled = event(where.POOLED, whole, kernels=7e6)  # a kernel that no operation of torch started
    events = [
        whole,
        event("aten::mm", whole, own=9e6, kernels=20e6),
        event("aten::mm", None, own=9e6, kernels=30e6),  # of the backward pass, in a thread of its own
        pooled,
        event("lens::max_logits", pooled, kernels=13e6),
        event("ampere_sgemm_128x64", None, kernels=99e6, device=1),  # a kernel, counted where it was started
    ]
    kinds, _ = where.by_kind(events, torch.device("cuda"))
    assert kinds == {where.LINEAR: 50, where.HEAD: 20, where.IDLE: 30}


def test_labels_name_what_is_called_and_go_again() -> None:
    before = [getattr(owner, name) for owner, name, _ in where.LABELLED]
    with where.labelled(), profile(activities=[ProfilerActivity.CPU]) as found:
        where.lens.head.lexical_pool(torch.randn(2, 3, 4), torch.randn(5, 4))
    assert [getattr(owner, name) for owner, name, _ in where.LABELLED] == before
    names = [event.name for event in found.events()]
    assert names.count(where.POOLED) == 1
    product = next(event for event in found.events() if event.name in ("aten::mm", "mkldnn::_linear_pointwise"))
    callers = []
    while product.cpu_parent is not None:
        product = product.cpu_parent
        callers.append(product.name)
    assert where.kind_of("aten::mm", callers) == where.HEAD


def test_seconds_at_the_peak() -> None:
    run = {"flops": {"linear": 30e9, "attention": 10e9, "head": 20e9}, "products": "float32"}
    peaks = {"float32": 100.0, "int8": 500.0}
    assert where.at_peak(run, peaks) == pytest.approx(0.6)
    assert where.at_peak({**run, "products": "int8"}, peaks) == pytest.approx(0.1 + 0.1)


def test_the_next_batch_is_where_the_line_meets_the_limit() -> None:
    points = {8: 500.0, 32: 1700.0}  # 50 MB a query on top of 100
    assert step.next_batch(points, 2100, 100) == 40
    assert step.next_batch(points, 2149, 100) == 40
    assert step.next_batch(points, 2150, 100) == 41
    assert step.next_batch(points, 9000, 100) == 100
    assert step.next_batch(points, 50, 100) == 1
    assert step.next_batch({8: 300.0, 32: 290.0}, 2000, 100) == 100


def test_the_largest_batch_is_one_that_was_measured_to_fit() -> None:
    asked = []

    def held(batch: int) -> float:
        asked.append(batch)
        return 100.0 + 50 * batch

    points = {8: held(8), 32: held(32)}
    asked.clear()
    assert step.largest_batch(held, points, 2120, 100) == 40
    assert asked == [40, 41]  # one more must not fit
    assert points[40] == 2100
    assert points[41] == 2150
    asked.clear()
    assert step.largest_batch(held, points, 2120, 100) == 40  # nothing left to measure
    assert asked == []
    assert step.largest_batch(held, points, 120, 100) is None
    assert asked == [1]
    assert step.largest_batch(held, points, 9000, 100) == 100


def test_a_bent_line_is_followed() -> None:
    def held(batch: int) -> float:
        return 0.5 * batch**2 + 10 * batch

    points = {8: held(8), 32: held(32)}
    found = step.largest_batch(held, points, 3000, 200)  # the root of 0.5 b^2 + 10 b = 3000 is 68.1
    assert found is not None
    assert 60 <= found <= 68
    assert held(found) <= 3000 < held(min(batch for batch in points if points[batch] > 3000))


def test_prefixes_reach_their_size_with_as_few_texts_as_can_be() -> None:
    assert scaling.prefixes([5, 10, 20, 5], [1, 5, 6, 15, 35, 40, 900]) == [1, 1, 2, 2, 3, 4, 4]


def test_documents_are_scaled_rows_of_which_no_two_are_equal() -> None:
    rows = np.random.default_rng(0).random((3, 4), dtype=np.float32)
    found = scaling.like(rows, 50, 0)
    assert found.dtype == np.float32
    assert len(np.unique(found, axis=0)) == 50
    cosines = found @ rows.T / np.linalg.norm(found, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
    assert np.allclose(cosines.max(1), 1, atol=1e-6)
    assert len(set(cosines.argmax(1))) == 3


def seconds_of(**medians: list[float]) -> dict[str, list[dict[str, float]]]:
    return {name: [{"median": value} for value in values] for name, values in medians.items()}


def test_the_page_on_scaling_gives_the_fitted_exponents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PLOTS", tmp_path)
    part = {"load_before": 0.1}
    content = {
        "machine": {"cpu": "a chip", "cores": 2},
        "versions": {},
        "sources": ["one", "two"],
        "judged": "three",
        "length": 256,
        "rounds": 3,
        "clusters": part
        | {
            "sizes": [1000, 2000, 4000],
            "tokens": 8000,
            "seconds": seconds_of(LENS=[3.0, 4.0, 6.0]),  # 2 s, and 1 s for every 1,000
            "backbone": {"median": 1.9},
            "memory_mb": {"LENS": [10.0, 20.0, 40.0]},
        },
        "ranks": part
        | {
            "sizes": [1, 2],
            "clusters": 4000,
            "batch": 8,
            "seconds": seconds_of(exchanging=[1.0, 2.0], apart=[1.0, 2**0.5]),
        },
    }
    text = "\n".join(scaling_page.page(content))
    assert "a line fits: 2.00 s and 1.000 s for every 1,000 clusters. The backbone alone takes 1.90 s" in text
    assert (
        "as K to the power 0.50" in text
    )  # (ln 3, ln 4, ln 6) against (ln 1, ln 2, ln 4) / ln 2: (ln 6 - ln 3) / 2 ln 2
    assert "1.00 (exchanging), 0.50 (apart)" in text
    assert "| 2 | 2.00 | 1.41 | 50.00 |" in text
    assert "### Tokens" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"scaling-clusters.svg", "scaling-ranks.svg"}


def test_synthetic_rows_have_groups_a_falling_spectrum_and_a_seed() -> None:
    rows = kmeans.synthetic(4000, 64)
    assert rows.shape == (4000, 64)
    assert rows.dtype == np.float32
    assert np.array_equal(rows, kmeans.synthetic(4000, 64))
    assert not np.array_equal(rows, kmeans.synthetic(4000, 64, seed=1))
    variances = (rows**2).mean(0) / ((np.arange(64) + 10.0) ** -0.65)
    assert variances.mean() == pytest.approx((1 / ((np.arange(64) + 10.0) ** -0.65).mean()) * np.exp(0.02), rel=0.1)
    assert np.abs(variances / variances.mean() - 1).max() < 0.4  # few large groups leave their mark
    wide = kmeans.synthetic(1000, 2048)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    nearest = (wide @ wide.T - 2 * np.eye(1000)).max(1)
    assert np.median(nearest) == pytest.approx(0.25, abs=0.05)  # rows of one group share a quarter of the variance
    shuffled = np.stack([np.random.default_rng(i).permutation(column) for i, column in enumerate(wide.T)], axis=1)
    assert np.median((shuffled @ shuffled.T - 2 * np.eye(1000)).max(1)) < 0.15


def test_every_run_is_measured_alike_and_the_page_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PLOTS", tmp_path)
    rows = np.array([[0, 0], [0, 2], [9, 0], [9, 4]], dtype=np.float32)
    found = kmeans.measure("ours", rows, 2, 0, "cpu")
    assert found["inertia"] == 2 * 1 + 2 * 4
    assert found["empty_clusters"] == 0
    assert found["share_of_labels_nearest"] == 1
    runs = [{**found, "rounds": 3, "seconds": 1.0}, {**found, "seed": 1, "rounds": 5, "seconds": 3.0}]
    runs.append({**found, "name": "faiss-10", "rounds": 10, "inertia": 12.0})
    content = {
        "machine": {"cpu": "a chip", "packages": {"numpy": "2"}},
        "matrix": {"model": "synthetic", "rows": 4, "width": 2, "k": 2},
        "summary": kmeans.summarise(runs),
        "runs": runs,
    }
    text = "\n".join(kmeans.page("kmeans-try", content))
    assert "### synthetic, 4 x 2 -> 2 clusters" in text
    assert "| LENS: greedy k-means++, until nothing moves | 2 | 3 to 5 | 2.00 (1.00 to 3.00) |" in text
    assert "| faiss, 10 rounds | 1 | 10 |" in text
    assert "| 12 | 1.200 |" in text
    assert (tmp_path / "kmeans-try.svg").is_file()


def test_on_a_gpu_only_what_can_run_there_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kmeans.chosen(False, "cpu") == list(kmeans.CONTENDERS)
    assert not set(kmeans.LONG) & set(kmeans.chosen(True, "cpu"))
    faiss = SimpleNamespace(get_num_gpus=lambda: 1)
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    assert kmeans.chosen(True, "cuda") == ["ours", "ours-random", "faiss-10", "faiss-25"]
    faiss.get_num_gpus = lambda: 0
    assert kmeans.chosen(True, "cuda") == ["ours", "ours-random"]
    assert "faiss sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (encoding, "--beir nowhere", "argument --beir: nowhere has neither corpus.jsonl nor corpus.jsonl.gz"),
        (encoding, "--rounds 0", "argument --rounds: must be at least 1, found 0"),
        (encoding, "--model . --judged .", "argument --model: . is no LENS model: it has no lens.json"),
        (encoding, "--page --output none.json", "--page: there are no stored figures in none.json"),
        (where, "--texts 0", "argument --texts: must be at least 1, found 0"),
        (step, "--memory-gb 2 -1", "argument --memory-gb: must be a finite number above 0, found -1"),
        (step, "--memory-gb nan", "argument --memory-gb: must be a finite number above 0, found nan"),
        (step, "--beir folder", "argument --beir: folder has no folder qrels"),
        (head, "--shape 1 2 3 x", "argument --shape: invalid positive value: 'x'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    program: ModuleType,
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for stem in ("corpus", "queries"):
        (tmp_path / "folder" / f"{stem}.jsonl").touch()
    monkeypatch.setattr(sys, "argv", [program.__name__, *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [head, where, kmeans])
def test_a_gpu_that_is_not_there_is_said(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--device", "cuda"])
    with pytest.raises(SystemExit, match="2"):
        program.main()
    assert "torch sees no GPU" in capsys.readouterr().err

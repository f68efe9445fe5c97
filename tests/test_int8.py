"""Encoding in int8: products against exact integer arithmetic, embeddings and ranks against float32."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import lens
from lens.chunked import reduce_max
from lens.int8 import Int8Linear, Int8Rows, _Shared, _top, is_int8
from tests.conftest import SENTENCES


def product_by_hand(x, weight):
    """x W^T with both sides rounded to their grids and multiplied as whole numbers."""
    scales, steps = weight.abs().amax(1).double() / 127, x.abs().amax(1, keepdim=True).double() / _top()
    rows = (weight.double() / scales[:, None]).round()
    tokens = (x.double() / steps.clamp(min=1e-30)).round()
    return (tokens @ rows.T * steps * scales).float(), steps.float()


@pytest.mark.parametrize("shape", [(1, 8, 3), (33, 64, 130), (700, 32, 600)])
def test_products_equal_whole_number_arithmetic(shape):
    torch.manual_seed(0)
    count, width, outputs = shape
    linear = nn.Linear(width, outputs)
    x = torch.randn(count, width) * torch.logspace(-3, 3, count)[:, None]
    wanted, steps = product_by_hand(x, linear.weight.detach())
    # in float32 an activation at the middle of two whole numbers may be rounded the other way
    room = 1.01 * steps * linear.weight.detach().abs().max() + 1e-6
    found = Int8Linear(linear)(x) - linear.bias.detach()
    assert ((found - wanted).abs() <= room + 1e-5 * wanted.abs()).all()
    assert (found != wanted).float().mean() < 0.9 or count == 1
    assert ((found - wanted).abs() > 1e-4 * (steps + wanted.abs())).float().mean() < 0.05
    lengths = [count // 3, count - count // 3]
    values, _ = reduce_max(x, Int8Rows(linear.weight), linear.bias.detach(), lengths)
    torch.testing.assert_close(
        values,
        torch.stack(
            [
                part.amax(0) if len(part) else part.new_full((outputs,), -torch.inf)
                for part in torch.split(Int8Linear(linear)(x), lengths)
            ]
        ),
    )


_WITHOUT_VNNI = """
import torch
from torch import nn
import lens.int8
lens.int8._top = lambda: 63
torch.manual_seed(0)
linear = nn.Linear(384, 500)
for x in (torch.randn(64, 384), torch.ones(3, 384)):
    exact, found = linear(x), lens.int8.Int8Linear(linear)(x)
    assert (found - exact).abs().max() < 0.05 * exact.abs().max(), (found - exact).abs().max()
nn.init.ones_(linear.weight), nn.init.zeros_(linear.bias)
assert torch.allclose(lens.int8.Int8Linear(linear)(torch.ones(2, 384)), torch.tensor(384.0))
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_sums_do_not_overflow_without_vnni(instructions):
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", _WITHOUT_VNNI], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_token_is_rounded_by_its_own_values_only():
    linear = nn.Linear(16, 40)
    small, large = torch.randn(3, 16) / 100, torch.randn(3, 16) * 100
    torch.testing.assert_close(Int8Linear(linear)(torch.cat([small, large]))[:3], Int8Linear(linear)(small))


@pytest.mark.parametrize(
    ("family", "pooling"),
    [("mistral", "max"), ("mistral", "sum"), ("mistral", "last"), ("bert", "max"), ("bert", "sum")],
)
def test_embeddings_stay_near_float32(family, pooling, request, tmp_path):
    base, clusters = request.getfixturevalue(family), request.getfixturevalue(f"{family}_clusters")
    model = lens.LENS.build(base, clusters, device="cpu", pooling=pooling)
    model.save(tmp_path / "model")
    eight = lens.load(tmp_path / "model", device="cpu", quantization="int8")
    assert is_int8(eight.model)
    exact, rough = model.encode(SENTENCES), eight.encode(SENTENCES)
    assert 0 < np.abs(exact - rough).max() < 0.1 * np.abs(exact).max()
    assert np.abs(exact - rough).mean() < 0.02 * np.abs(exact).max()
    with pytest.raises(ValueError, match="int8 cannot be saved"):
        eight.save(tmp_path / "again")


def test_nan_is_named():
    weight = torch.randn(4, 3)
    rows = torch.tensor([[1.0, torch.nan, 0.0]])
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        Int8Rows(weight).logits(rows)


def test_no_rows_and_all_zero_rows():
    rows = Int8Rows(torch.zeros(5, 3))
    logits = rows.logits(torch.zeros(2, 3))
    assert [logits(slice(0, 2), c).tolist() for c in logits.columns()] == [[[0.0] * 5] * 2]
    assert list(rows.logits(torch.zeros(0, 3)).columns()) == [slice(0, 5)]


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": torch.float16}])
def test_other_dtypes_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match="int8' is for a CPU in float32"):
        lens.load(tmp_path, device="cpu", quantization="int8", **options)


@pytest.mark.parametrize("folder", ["bert", "mistral"])
def test_query_key_and_value_quantise_their_input_once(folder, request, monkeypatch):
    path, clusters = request.getfixturevalue(folder), request.getfixturevalue(f"{folder}_clusters")
    model = lens.LENS.build(path, clusters, device="cpu", packed=False)
    lens.int8.quantize(model.model)
    layers = [module for module in model.model.backbone.modules() if isinstance(module, Int8Linear)]
    assert sum(layer.shared is not None for layer in layers) == {"bert": 3, "mistral": 5}[folder] * 2
    counted, quantised = [], lens.int8._quantised
    monkeypatch.setattr("lens.int8._quantised", lambda x: counted.append(len(x)) or quantised(x))
    found = model.encode(SENTENCES)
    shared = len(counted)
    counted.clear()
    for layer in layers:
        layer.shared = None
    assert np.array_equal(model.encode(SENTENCES), found)
    saved = {"bert": 2, "mistral": 3}[folder] * 2  # in each of two layers
    assert len(counted) - shared == saved
    copy = pickle.loads(pickle.dumps(_Shared(3)))
    assert (copy.kept, copy.count) == (None, 3)


def test_other_inputs_are_never_taken_for_the_shared_one():
    shared, linear = _Shared(3), nn.Linear(8, 5)
    layers = [Int8Linear(linear) for _ in range(3)]
    alone = Int8Linear(linear)
    for layer in layers:
        layer.shared = shared
    for number in range(4):
        first, second = torch.randn(4, 8), torch.randn(4, 8)
        for layer, x in zip(layers, (first, second, first) if number % 2 else (first, first, first), strict=True):
            assert torch.equal(layer(x), alone(x))
        assert number % 2 or shared.kept is None

"""Products by oneDNN against torch's own and against double precision."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from torch import nn
from torch.nn import functional as F

import lens
from lens import products
from lens.chunked import reduce_max, reduce_sum
from lens.dense import Dense

AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN wherever it can be; returns the shapes that it multiplied."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "pays", lambda: True)
    seen: list[tuple[int, ...]] = []
    fits = products.fits

    def watching(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
        found = fits(x, weight, bias)
        if found:
            seen.append((*x.shape, len(weight)))
        return found

    monkeypatch.setattr(products, "fits", watching)
    return seen


@pytest.mark.parametrize("shape", [(2, 8), (37, 8), (3, 5, 8), (1, 2, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product(shape: tuple[int, ...], bias: bool, forced: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(11, 8)
    added = torch.randn(11) if bias else None
    wanted = x.double() @ weight.double().T + (0 if added is None else added.double())
    with torch.inference_mode():
        found = products.linear(x, weight, added)
        strided = products.linear(torch.stack([x, x], dim=-1)[..., 0], weight, added)
    assert forced == [(*shape, 11)] * 2
    assert found.dtype == torch.float32
    assert found.double().numpy() == pytest.approx(wanted.numpy(), abs=1e-5)
    assert torch.equal(found, strided)


def test_a_row_does_not_depend_on_the_rows_beside_it(forced: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 64), torch.randn(48, 64)
    with torch.inference_mode():
        whole = products.linear(x, weight)
        for rows in (slice(0, 2), slice(7, 300), slice(100, 164)):
            assert products.linear(x[rows], weight).numpy() == pytest.approx(whole[rows].numpy(), abs=1e-5)


@pytest.mark.filterwarnings("ignore:TF32")
def test_where_torch_multiplies(forced: list[tuple[int, ...]]) -> None:
    x, layer = torch.randn(4, 8), products.Linear(8, 3)
    wanted = F.linear(x, layer.weight, layer.bias)
    found = layer(x)  # with gradients
    found.sum().backward()
    assert torch.equal(found, wanted)
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer(x[:1])
        layer(x[:0])
        layer.double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.float()(x).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            layer(x)
        assert not forced
        layer(x)
    assert forced == [(4, 8, 3)]


def test_a_bias_of_another_form(forced: list[tuple[int, ...]]) -> None:
    """oneDNN's kernel would read past its end."""
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    for bias in (torch.arange(6.0)[::2], torch.tensor([7.0]).expand(3), torch.tensor([7.0])):
        with torch.no_grad():
            assert torch.equal(products.linear(x, weight, bias), F.linear(x, weight, bias))
    assert not forced


def test_compiled_layers_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "pays", lambda: pytest.fail("asked while compiling"))
    module = nn.Sequential(products.Linear(8, 8), nn.ReLU(), products.Linear(8, 3)).eval()
    x = torch.randn(5, 8)
    with torch.inference_mode():
        found = torch.compile(module, fullgraph=True, backend="eager")(x)
        wanted = F.linear(torch.relu(F.linear(x, module[0].weight, module[0].bias)), module[2].weight, module[2].bias)
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("reduce", [reduce_max, reduce_sum])
def test_the_heads_blocks_leave_autocast_alone(reduce: Any, forced: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(9, 32), torch.randn(5, 32)
    with torch.no_grad():
        wanted = reduce(rows, weight, None, [4, 5])
        assert forced
        forced.clear()
        with torch.autocast("cpu", torch.bfloat16):
            found = reduce(rows, weight, None, [4, 5])
    assert not forced
    for one, other in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(wanted), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "capability", "wanted"),
    [(AMD, "AVX512", True), (AMD, "AVX2", False), (INTEL, "AVX512", False), (None, "AVX512", False)],
)
def test_for_which_processors(
    text: str | None, capability: str, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_CPU_FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch._C, "_has_mkldnn", True)
    if text is not None:
        (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + text)
    assert products.pays.__wrapped__() == wanted
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    assert not products.pays.__wrapped__()


def test_layers_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "pays", lambda: False)
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 2)))
    before = copy.deepcopy(module.state_dict())
    products.speed_up(module)
    assert not any(type(part) is products.Linear for part in module.modules())
    monkeypatch.setattr(products, "pays", lambda: True)
    products.speed_up(module)
    assert [type(part) for part in module.modules() if isinstance(part, nn.Linear)] == [products.Linear] * 2
    again = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert [type(part) for part in again] == [type(part) for part in module]
    after = again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(again(torch.ones(5, 4)), module(torch.ones(5, 4)))


@pytest.mark.parametrize("pooling", ["max", "sum", "last"])
@pytest.mark.parametrize("packed", [True, False])
def test_embeddings(
    pooling: str,
    packed: bool,
    mistral: Path,
    mistral_clusters: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    model = lens.LENS.build(mistral, mistral_clusters, device="cpu", pooling=pooling, packed=packed)
    monkeypatch.setattr(products, "pays", lambda: False)
    wanted = model.encode(SENTENCES)
    seen = request.getfixturevalue("forced")
    found = model.encode(SENTENCES)
    layers = {shape[-1] for shape in seen}
    assert {32, 64, 16} <= layers  # queries and outputs, feed-forward, keys and values
    assert found == pytest.approx(wanted, abs=1e-5)
    assert (24 in layers) == (pooling != "last")  # the head's blocks


def test_the_dense_baseline(bert: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(products, "pays", lambda: False)
    wanted = Dense(bert, "cpu").encode(SENTENCES)
    seen = request.getfixturevalue("forced")
    assert Dense(bert, "cpu").encode(SENTENCES) == pytest.approx(wanted, abs=1e-5)
    assert seen


def test_first_of_equal_maxima(forced: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    row, other = torch.randn(2, 8)
    rows = torch.stack([other * 0, row, row, other * 0, row])
    with torch.no_grad():
        values, argmax = reduce_max(rows, row[None] * torch.ones(3, 1), None, [5], training=True)
    assert argmax.tolist() == [[1, 1, 1]]
    assert values.numpy() == pytest.approx(np.full((1, 3), float(row.double() @ row.double())), rel=1e-6)
    assert forced

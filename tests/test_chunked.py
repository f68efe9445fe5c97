"""The chunked backend against the eager one: values, gradients, and what it keeps in memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lens import chunked
from lens.chunked import _blocks, max_pool, sum_pool
from lens.head import lexical_pool

SHAPES = {
    "mixed": [3, 0, 1, 6, 6, 2, 0, 11],
    "sorted": [9, 5, 5, 5, 2, 2, 1, 0],
    "alike": [4, 4, 4, 4],
    "one long text": [37],
    "a block exactly": [8, 16, 8],
    "nothing": [0, 0],
}
BLOCKS = [(4, 3), (8, 130), (512, 1024)]


def case(lengths, clusters=130, width=5, seed=0, whole=False):
    """Rows, weight, bias and offsets; `whole` numbers make ties everywhere."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), width), (clusters, width), (clusters,)]
    if whole:
        tensors = [torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes]
    else:
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return *tensors, torch.tensor([0, *lengths]).cumsum(0)


def run(backend, leaves, offsets, pooling):
    """Embeddings and the gradients of an uneven sum of them."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = lexical_pool(*leaves, cu_seqlens=offsets, pooling=pooling, backend=backend)
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return out.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("whole", [False, True])
def test_values_and_gradients_equal_eager_ones(pooling, lengths, block, whole, monkeypatch):
    monkeypatch.setattr("lens.chunked._BLOCK", block)
    *leaves, offsets = case(lengths, whole=whole)
    expected, expected_gradients = run("eager", leaves, offsets, pooling)
    found, gradients = run("chunked", leaves, offsets, pooling)
    torch.testing.assert_close(found, expected)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("length", [1, 2, 511, 512, 513, 1024, 8192])
def test_long_texts(length):
    *leaves, offsets = case([length, 3], clusters=5, seed=length)
    expected, expected_gradients = run("eager", leaves, offsets, "max")
    found, gradients = run("chunked", leaves, offsets, "max")
    torch.testing.assert_close(found, expected)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("limit", [1, 3, 4, 100])
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
def test_blocks_hold_every_row_once_and_in_order(lengths, limit):
    owners = [text for text, length in enumerate(lengths) for _ in range(length)]
    found = []
    for part, runs in _blocks(lengths, limit):
        assert part.start == len(found)
        assert 0 < part.stop - part.start <= limit
        for run in runs:
            assert run.later == (run.first in found)
            found += [text for text in range(run.first, run.first + run.texts) for _ in range(run.length)]
        assert part.stop == len(found)
    assert found == owners


def test_ties_go_to_the_first_row_across_blocks(monkeypatch):
    monkeypatch.setattr("lens.chunked._BLOCK", (2, 64))
    rows = torch.tensor([[1.0], [3.0], [2.0], [3.0], [3.0]], requires_grad=True)
    max_pool(rows, torch.ones(1, 1), None, [5]).backward()
    assert rows.grad.flatten().tolist() == [0, 1, 0, 0, 0]


def test_nan_is_not_hidden():
    rows = torch.randn(6, 4)
    rows[2, 1] = torch.nan
    for training in (False, True):
        pooled = max_pool(rows.clone().requires_grad_(training), torch.randn(3, 4), None, [4, 2])
        assert pooled[0].isnan().all()
        assert pooled[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    *leaves, offsets = case([300, 7, 40], clusters=40, width=32)
    expected, expected_gradients = run("eager", leaves, offsets, "max")
    found, gradients = run("chunked", [leaf.to(dtype) for leaf in leaves], offsets, "max")
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        # where two rows nearly tie another one may win: most of the gradient, not each entry, must agree
        assert torch.nn.functional.cosine_similarity(gradient.float().flatten(), wanted.flatten(), dim=0) > 0.95


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation's result has memory for."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("pool", [max_pool, sum_pool])
def test_no_tensor_of_texts_by_positions_by_clusters(pool, monkeypatch):
    monkeypatch.setattr("lens.chunked._BLOCK", (16, 32))
    texts, length, clusters, width = 8, 50, 300, 4
    rows = torch.randn(texts * length, width, requires_grad=True)
    weight = torch.randn(clusters, width, requires_grad=True)
    with Largest() as seen:
        pool(rows, weight, None, [length] * texts).square().sum().backward()
    assert seen.elements <= texts * clusters * 2  # against 120,000; indices of active entries come in pairs


def test_embedding_bag_reads_only_active_clusters():
    """Clusters without gradient cost nothing: rows that are NaN there leave the gradients finite."""
    rows, weight = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
    pooled = max_pool(rows, weight, None, [5])
    weight.data[2] = torch.nan
    pooled.backward(torch.tensor([[1.0, 2.0, 0.0, 3.0]]))
    assert rows.grad.isfinite().all()


def test_without_gradients_no_argmax_is_taken(monkeypatch):
    *leaves, offsets = case([3, 5])
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected = lexical_pool(*leaves, cu_seqlens=offsets, backend="chunked")
    taken = []
    first = chunked._first
    monkeypatch.setattr(chunked, "_first", lambda *arguments: taken.append(1) or first(*arguments))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(lexical_pool(*leaves, cu_seqlens=offsets, backend="chunked"), expected)
    assert not taken
    lexical_pool(*leaves, cu_seqlens=offsets, backend="chunked")
    assert taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_pieces_are_those_in_one(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 0, 5, 1, 0, 0, 4, 2, 0]
    rows = torch.randn(sum(lengths), 6, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(11, 6, generator=generator).to(dtype).requires_grad_()
    scale = torch.randn(len(lengths), 11, generator=generator)
    found = []
    for entries in (1, 22, 30, 1 << 20):
        monkeypatch.setattr(chunked, "_ENTRIES", entries)
        values = chunked.max_pool(rows, weight, None, lengths)
        found.append(torch.autograd.grad((values.clamp(min=-9) * scale).sum(), (rows, weight)))
    expected = torch.autograd.grad(
        sum(
            (text.amax(0).float() * scale[number]).sum()
            for number, text in enumerate(torch.split(rows @ weight.T, lengths))
            if len(text)
        ),
        (rows, weight),
    )
    for gradients in found:
        torch.testing.assert_close(gradients, found[-1], rtol=0, atol=0)
        torch.testing.assert_close(
            gradients, expected, **({} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05})
        )

"""The triton backend against the eager one in float64; tests/test_triton.py runs these in a process of their own.

On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), on a GPU as they are and on larger texts too.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lens import triton_pool
from lens.head import lexical_pool

DEVICE = "cpu" if triton_pool.INTERPRETED else "cuda"
on_gpu = pytest.mark.skipif(triton_pool.INTERPRETED, reason="the interpreter has no device memory and no streams")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def offsets(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def case(lengths, clusters, width, dtype=torch.float32):
    weight = torch.randn(clusters, width, device=DEVICE) * width**-0.5
    tensors = torch.randn(sum(lengths), width, device=DEVICE), weight, torch.randn(clusters, device=DEVICE) / 3
    return [tensor.to(dtype) for tensor in tensors]


def results(leaves, backend, frozen=(), **options):
    """Pooled values and the gradients of hidden, weight and bias under a fixed gradient of either sign."""
    leaves = [leaf if leaf is None else leaf.detach().clone() for leaf in leaves]
    for place, leaf in enumerate(leaves):
        if leaf is not None and place not in frozen:
            leaf.requires_grad_()
    out = lexical_pool(*leaves, backend=backend, **options)
    (out * torch.linspace(-1, 2, out.numel(), device=DEVICE).view_as(out)).sum().backward()
    return [out.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def compare(leaves, **options):
    dtype = leaves[0].dtype
    exact = results([leaf if leaf is None else leaf.double() for leaf in leaves], "eager", **options)
    for ours, theirs in zip(results(leaves, "triton", **options), exact, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == (torch.float32 if theirs is exact[0] else dtype)
            atol = TOLERANCE[dtype] * max(float(theirs.abs().max()) if theirs.numel() else 0.0, 1.0)
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=TOLERANCE[dtype], atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_dtypes(dtype, pooling, with_bias):
    lengths = [3, 0, 1, 50]
    hidden, weight, bias = case(lengths, 130, 72, dtype)
    compare([hidden, weight, bias if with_bias else None], cu_seqlens=offsets(lengths), pooling=pooling)


SHAPES = [
    ([1], 1, 1),
    ([0], 5, 4),
    ([0, 0, 2, 0], 5, 4),
    ([128], 128, 64),
    ([129], 129, 65),  # one more than a tile in every direction
    ([300], 3, 16),  # several tiles of one text
    ([1, 2, 3, 4, 5, 6, 7, 8, 9], 7, 3),  # more texts than a tile holds
    ([33, 0, 64, 1, 31], 130, 20),
]
LARGE = [
    ([512] * 16, 4000, 384),
    ([8192, 1, 0, 4097], 1000, 768),
    ([8192], 30522, 128),
    (list(range(1, 200)), 30522, 300),
]


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize(
    ("lengths", "clusters", "width"), SHAPES + [pytest.param(*shape, marks=on_gpu) for shape in LARGE]
)
def test_shapes(lengths, clusters, width, pooling):
    compare(case(lengths, clusters, width), cu_seqlens=offsets(lengths), pooling=pooling)


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_no_texts_and_no_clusters(pooling):
    for clusters, lengths in ((5, []), (0, [2, 3])):
        out, *gradients = results(case(lengths, clusters, 4), "triton", cu_seqlens=offsets(lengths), pooling=pooling)
        assert out.shape == (len(lengths), clusters)
        for gradient, shape in zip(gradients, [(sum(lengths), 4), (clusters, 4), (clusters,)], strict=True):
            assert torch.equal(gradient, torch.zeros(shape, device=DEVICE))


@pytest.mark.parametrize("pooling", ["max", "last"])
def test_the_second_logarithm(pooling):
    lengths = [3, 0, 1, 50]
    compare(case(lengths, 130, 72), cu_seqlens=offsets(lengths), pooling=pooling, activation="log1p_twice")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_large_half_precision(dtype, pooling):
    lengths = [512, 40, 0, 1, 257] * 10
    compare(case(lengths, 8000, 768, dtype), cu_seqlens=offsets(lengths), pooling=pooling)


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_padded_input_with_holes_and_padding_on_either_side(pooling):
    hidden, weight, bias = case([3 * 20], 40, 12)
    mask = torch.rand(3, 20, device=DEVICE) > 0.5
    mask[0], mask[1, :7], mask[2, 9:] = False, False, False
    compare([hidden.view(3, 20, 12), weight, bias], mask=mask, pooling=pooling)
    compare([hidden.view(3, 20, 12), weight, bias], pooling=pooling)


@pytest.mark.parametrize("repeats", [2, 150])
def test_ties_go_to_the_first_row(repeats):
    hidden = torch.tensor([[1.0, 2.0]], device=DEVICE).repeat(repeats, 1)
    hidden = torch.cat([-hidden[:1], hidden, hidden])  # two texts, the first with a smaller row before the tie
    weight = torch.ones(3, 2, device=DEVICE)
    bounds = torch.tensor([0, repeats + 1, 2 * repeats + 1], device=DEVICE)
    gradient = results([hidden, weight, None], "triton", frozen=(1,), cu_seqlens=bounds)[1]
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [1, repeats + 1]
    compare([hidden, weight, None], cu_seqlens=bounds)


def test_negative_logits_give_zeros_and_no_gradient():
    leaves = [torch.ones(6, 4, device=DEVICE), -torch.ones(5, 4, device=DEVICE), -torch.ones(5, device=DEVICE)]
    for pooling in ("max", "sum"):
        for part in results(leaves, "triton", cu_seqlens=offsets([2, 4]), pooling=pooling):
            assert torch.equal(part, torch.zeros_like(part))


def test_the_bare_maximum_is_minus_infinity_for_texts_without_rows():
    hidden, weight, bias = case([2], 5, 4)
    bare = triton_pool.max_pool(hidden, weight, bias, offsets([0, 2]))
    assert torch.equal(bare[0], torch.full((5,), -torch.inf, device=DEVICE))
    torch.testing.assert_close(bare[1], (hidden @ weight.T + bias).amax(0))


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_not_a_number_is_not_passed_over(pooling):
    hidden, weight, _ = case([40, 3], 5, 4)
    hidden[1, 2] = torch.nan
    out = lexical_pool(hidden, weight, cu_seqlens=offsets([40, 3]), pooling=pooling, backend="triton")
    assert not out[0].isfinite().any()
    assert out[1].isfinite().all()


class Calls(TorchDispatchMode):
    """The operators of lens that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lens":
            self.seen.append((func._opname, args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_frozen_parts_get_no_gradient(pooling, frozen):
    compare(case([3, 5], 6, 4), cu_seqlens=offsets([3, 5]), pooling=pooling, frozen=frozen)


def test_what_is_frozen_is_not_computed():
    leaves = case([3, 5], 6, 4)
    with Calls() as calls:
        results(leaves, "triton", frozen=(1,), cu_seqlens=offsets([3, 5]))
    assert [name for name, _ in calls.seen] == ["max_logits", "max_logits_d_rows"]
    with Calls() as calls:
        results(leaves, "triton", frozen=(0, 1), cu_seqlens=offsets([3, 5]))
        with torch.no_grad():
            lexical_pool(leaves[0].requires_grad_(), *leaves[1:], cu_seqlens=offsets([3, 5]), backend="triton")
    assert calls.seen == [("max_logits", False)] * 2  # no argmax


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_two_calls_are_equal_to_the_bit(pooling):
    lengths = [30, 2, 0, 41] if triton_pool.INTERPRETED else [300, 2, 0, 410] * 20
    leaves = case(lengths, 140, 40, torch.bfloat16)
    one, other = (results(leaves, "triton", cu_seqlens=offsets(lengths), pooling=pooling) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_strided_tensors_and_32_bit_offsets(pooling):
    hidden, weight, bias = case([14], 11, 30)
    wide = torch.randn(14, 60, device=DEVICE)
    wide[:, 10:40] = hidden
    sparse_rows = torch.randn(22, 30, device=DEVICE)
    sparse_rows[::2] = weight

    def pooled(hidden, weight, backend):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        bounds = offsets([5, 9]).int()
        out = lexical_pool(*leaves, bias, cu_seqlens=bounds, pooling=pooling, backend=backend)
        out.sum().backward()
        return out, leaves[0].grad, leaves[1].grad

    expected = pooled(hidden, weight, "eager")
    for rows, centroids in [
        (wide[:, 10:40], sparse_rows[::2]),
        (hidden.t().contiguous().t(), weight.t().contiguous().t()),
    ]:
        assert not rows.is_contiguous()
        assert not centroids.is_contiguous()
        for ours, theirs in zip(pooled(rows, centroids, "triton"), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_autocast_computes_in_its_dtype(pooling):
    leaves = case([5, 9], 11, 30)
    options = {"cu_seqlens": offsets([5, 9]), "pooling": pooling}
    narrow = results([*(leaf.bfloat16() for leaf in leaves[:2]), None], "triton", **options)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = results([*leaves[:2], None], "triton", **options)
    for ours, theirs in zip(cast[:3], narrow[:3], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=0)


def test_sums_backward_in_several_blocks(monkeypatch):
    lengths = [100, 0, 170, 30]
    whole = results(case(lengths, 9, 8), "triton", cu_seqlens=offsets(lengths), pooling="sum")
    monkeypatch.setattr(triton_pool, "_GRADIENT_ELEMENTS", 1)  # blocks of 128 rows
    torch.manual_seed(0)
    blocks = results(case(lengths, 9, 8), "triton", cu_seqlens=offsets(lengths), pooling="sum")
    for one, other in zip(whole, blocks, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_few_long_texts_are_cut(pooling, monkeypatch):
    lengths = [700, 0, 320]
    monkeypatch.setattr(triton_pool, "_processors", lambda tensor: 64)
    leaves = case(lengths, 9, 5)
    assert triton_pool._pieces(leaves[0], 2, 9) == 1
    leaves[0] = torch.cat([leaves[0]] * 2)  # every row twice: a tie, often between two pieces of one text
    lengths = [1400, 0, 640]
    assert triton_pool._pieces(leaves[0], 3, 9) == 2
    compare(leaves, cu_seqlens=offsets(lengths), pooling=pooling)


def test_offsets_out_of_range_read_nothing_outside():
    hidden, weight, _ = case([6], 5, 4)
    wrong = torch.tensor([-3, 2, 900], device=DEVICE)
    out = lexical_pool(hidden, weight, cu_seqlens=wrong, backend="triton")
    torch.testing.assert_close(out, lexical_pool(hidden, weight, cu_seqlens=offsets([2, 4]), backend="eager"))


@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_compiled_without_a_graph_break(pooling):
    hidden, weight, bias = case([5, 9], 11, 30)

    def pooled(*leaves):
        return lexical_pool(*leaves, cu_seqlens=offsets([5, 9]), pooling=pooling, backend="triton")

    gradients = []
    for function in (pooled, torch.compile(pooled, backend="aot_eager", fullgraph=True)):
        leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weight, bias)]
        out = function(*leaves)
        out.square().sum().backward()
        gradients.append([out, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_operators_keep_the_contract_of_torch():
    hidden, weight, bias = (leaf.requires_grad_() for leaf in case([14], 11, 30))
    starts, ends = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 5, 5], [5, 5, 14]))
    torch.library.opcheck(torch.ops.lens.max_logits.default, (hidden, weight, starts, ends, True))
    torch.library.opcheck(torch.ops.lens.sum_logits.default, (hidden, weight, bias, starts, ends))


@on_gpu
@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_waits_for_the_device(pooling, padded):
    hidden, weight, bias = case([64 * 20], 500, 64, torch.bfloat16)
    mask = torch.rand(20, 64, device=DEVICE) > 0.3
    bounds, leaf = offsets([64] * 20), hidden.clone().requires_grad_()

    def step():
        if padded:
            out = lexical_pool(leaf.view(20, 64, 64), weight, bias, mask=mask, pooling=pooling, backend="triton")
        else:
            out = lexical_pool(leaf, weight, bias, cu_seqlens=bounds, pooling=pooling, backend="triton")
        out.sum().backward()

    step()  # compiles and tunes
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_memory_does_not_grow_with_rows_times_clusters(pooling):
    lengths, clusters, width = [2048] * 16, 30522, 128
    hidden, weight, _ = case(lengths, clusters, width, torch.bfloat16)
    leaf, bounds = hidden.requires_grad_(), offsets(lengths)
    lexical_pool(leaf, weight, cu_seqlens=bounds, pooling=pooling, backend="triton").sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lexical_pool(leaf, weight, cu_seqlens=bounds, pooling=pooling, backend="triton").sum().backward()
    held = torch.cuda.max_memory_allocated() - before
    assert held < 2 * sum(lengths) * clusters / 5  # a fifth of the bfloat16 logits


@on_gpu
def test_results_of_more_than_2_to_the_31_elements():
    texts, clusters, width = 8300, 262144, 16
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB of free device memory")
    hidden, weight, _ = case([texts], clusters, width)
    with torch.no_grad():
        out = triton_pool.max_pool(hidden, weight, None, offsets([1] * texts))
    torch.testing.assert_close(out[-1], weight @ hidden[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[0], weight @ hidden[0], rtol=1e-5, atol=1e-5)

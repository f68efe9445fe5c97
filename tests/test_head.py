"""The formula against loops and hand-computed values, in values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from lens.config import LensConfig
from lens.head import ContextTransform, LexicalHead, lexical_pool, whitened


def naive(hidden, weight, bias, lengths, pooling):
    """e[b][k] by plain Python over rows, texts and clusters."""
    out = torch.zeros(len(lengths), len(weight), dtype=torch.float64)
    start = 0
    for b, length in enumerate(lengths):
        for k in range(len(weight)):
            values = []
            for i in range(start, start + length):
                logit = sum(float(h) * float(w) for h, w in zip(hidden[i], weight[k], strict=True))
                values.append(math.log1p(max(logit + (float(bias[k]) if bias is not None else 0.0), 0.0)))
            if values:
                out[b, k] = {"max": max(values), "sum": sum(values), "last": values[-1]}[pooling]
        start += length
    return out


def case(seed=0, width=5, clusters=7):
    torch.manual_seed(seed)
    lengths = [3, 0, 1, 6]
    hidden = torch.randn(sum(lengths), width)
    return hidden, torch.randn(clusters, width), torch.randn(clusters), lengths


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def padded(hidden, lengths, left=False):
    longest = max(lengths)
    out, mask = torch.randn(len(lengths), longest, hidden.shape[1]) * 9, torch.zeros(len(lengths), longest)
    start = 0
    for b, n in enumerate(lengths):
        place = slice(longest - n, longest) if left else slice(0, n)
        out[b, place] = hidden[start : start + n]
        mask[b, place] = 1
        start += n
    return out, mask


@pytest.mark.parametrize("pooling", ["max", "sum", "last"])
@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_naive_loop(pooling, backend, with_bias):
    hidden, weight, bias, lengths = case()
    bias = bias if with_bias else None
    expected = naive(hidden, weight, bias, lengths, pooling).float()
    packed = lexical_pool(hidden, weight, bias, cu_seqlens=offsets(lengths), pooling=pooling, backend=backend)
    torch.testing.assert_close(packed, expected)
    for left in (False, True):
        rows, mask = padded(hidden, lengths, left)
        pooled = lexical_pool(rows, weight, bias, mask=mask, pooling=pooling, backend=backend)
        torch.testing.assert_close(pooled, expected)


def test_activation_after_maximum_is_maximum_after_activation():
    """lexical_pool activates the maximum; here every logit is activated first."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 3, 6) * 3, torch.randn(11, 6)
    every = torch.log1p(torch.relu(hidden @ weight.T))  # (B, L, K)
    torch.testing.assert_close(lexical_pool(hidden, weight), every.amax(1))
    assert (every.amax(1) == 0).any()
    assert (every.amax(1) > 0).any()


def test_gradient_against_finite_differences():
    torch.manual_seed(1)
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    cu = torch.tensor([0, 4, 6])
    leaf = hidden.clone().requires_grad_()
    lexical_pool(leaf, weight, cu_seqlens=cu).sum().backward()
    step = 1e-2
    for i in range(6):
        for d in range(4):
            up, down = hidden.clone(), hidden.clone()
            up[i, d] += step
            down[i, d] -= step
            slope = (
                lexical_pool(up, weight, cu_seqlens=cu).sum() - lexical_pool(down, weight, cu_seqlens=cu).sum()
            ) / (2 * step)
            assert abs(float(leaf.grad[i, d]) - float(slope)) < 2e-3


def test_frozen_weight_gets_no_gradient():
    hidden, weight, _, lengths = case()
    hidden.requires_grad_()
    lexical_pool(hidden, weight, cu_seqlens=offsets(lengths)).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_all_negative_logits_and_empty_batch():
    weight = -torch.ones(3, 2)
    hidden = torch.ones(1, 4, 2, requires_grad=True)
    out = lexical_pool(hidden, weight)
    assert torch.equal(out, torch.zeros(1, 3))
    out.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    for pooling in ("max", "sum", "last"):
        for backend in ("eager", "chunked"):
            empty = lexical_pool(
                torch.zeros(0, 2), weight, cu_seqlens=torch.tensor([0]), pooling=pooling, backend=backend
            )
            assert empty.shape == (0, 3)


def test_ties_send_the_whole_gradient_to_one_position():
    row = torch.tensor([1.0, 2.0])
    hidden = torch.stack([row, row]).requires_grad_()
    weight = torch.tensor([[1.0, 1.0]])
    lexical_pool(hidden, weight, cu_seqlens=torch.tensor([0, 2])).sum().backward()
    expected = weight[0] / (1 + 3.0)  # d log(1+x) at x = 3
    norms = hidden.grad.abs().sum(1)
    assert int((norms > 0).sum()) == 1
    torch.testing.assert_close(hidden.grad.sum(0), expected)


def test_bfloat16_stays_near_float32():
    hidden, weight, bias, lengths = case(5, width=32, clusters=64)
    exact = lexical_pool(hidden, weight, bias, cu_seqlens=offsets(lengths))
    rough = lexical_pool(hidden.bfloat16(), weight, bias, cu_seqlens=offsets(lengths))
    assert rough.dtype == torch.float32
    assert (exact - rough).abs().max() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 4)}, r"\(B, L, D\) without"),
        ({"weight": torch.zeros(5, 3)}, r"weight must be \(K, 4\)"),
        ({"bias": torch.zeros(4)}, r"bias must be \(5,\)"),
        ({"mask": torch.ones(2, 2)}, r"mask must be \(2, 3\)"),
        ({"pooling": "mean"}, "max, sum or last"),
        ({"backend": "fast"}, "auto, eager, chunked or triton"),
        ({"hidden": torch.zeros(6, 4), "cu_seqlens": torch.tensor([0, 5])}, "rise from 0 to T=6"),
    ],
)
def test_misfits_are_named(change, message):
    arguments = {"hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(5, 4), **change}
    with pytest.raises(ValueError, match=message):
        lexical_pool(**arguments)


def test_context_transform_adds_each_texts_own_mean():
    transform = ContextTransform(3, gate=2.0)
    hidden = torch.tensor([[1.0, 0, 0], [3.0, 0, 2.0], [0, 5.0, 0]])
    out = transform(hidden, torch.tensor([0, 2, 2, 3]))
    expected = torch.tensor([[5.0, 0, 2.0], [7.0, 0, 4.0], [0, 15.0, 0]])
    torch.testing.assert_close(out, expected)
    torch.manual_seed(0)
    config = {"base": "x", "architecture": "encoder", "positions": "content", "dimensions": 6, "hidden_size": 3}
    head = LexicalHead(LensConfig(**config, transform="context"), torch.arange(6))
    rows, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    alone = torch.cat([head(rows[:1, :3]), head(rows[1:, 2:])])
    torch.testing.assert_close(head(rows, mask), alone)  # neither padding nor the neighbour is mixed in


def test_whitened_rows_cover_every_direction_alike():
    generator = torch.Generator().manual_seed(0)
    crowded = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator) ** 3 + 5
    rows = whitened(crowded)
    torch.testing.assert_close(rows.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    assert rows.norm(dim=1).mean() == pytest.approx(1, abs=1e-5)
    square = rows.T @ rows
    torch.testing.assert_close(square / square[0, 0], torch.eye(6), rtol=0, atol=1e-4)
    # the same by another road: the rotation that the singular value decomposition leaves when it drops the spread
    left, _, right = torch.linalg.svd((crowded - crowded.mean(0)).double(), full_matrices=False)
    expected = left @ right
    torch.testing.assert_close(rows.double(), expected / expected.norm(dim=1).mean(), rtol=0, atol=1e-4)


def test_whitening_leaves_out_directions_without_spread():
    flat = torch.cat([torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.full((9, 2), 4.1)], 1)
    rows = whitened(flat)
    assert rows[:, 3:].abs().max() < 1e-5
    torch.testing.assert_close(rows[:, :3], whitened(flat[:, :3]), rtol=0, atol=1e-5)
    for value in (1.0, 0.1):
        with pytest.raises(ValueError, match="nothing to whiten"):
            whitened(torch.full((5, 3), value))
    with pytest.raises(ValueError, match="needs more than 5 centroids, found 4"):
        whitened(torch.eye(4))


def test_residual_transform_starts_as_the_identity():
    facts = {"base": "x", "architecture": "encoder", "positions": "content", "dimensions": 6, "hidden_size": 8}
    labels = torch.arange(6)
    torch.manual_seed(0)
    plain = LexicalHead(LensConfig(**facts), labels)
    residual = LexicalHead(LensConfig(**facts, transform="residual"), labels)
    residual.weight.data.copy_(plain.weight.data)
    hidden, mask = torch.randn(2, 5, 8), torch.ones(2, 5)
    torch.testing.assert_close(plain(hidden, mask), residual(hidden, mask))
    torch.testing.assert_close(plain(hidden, mask).norm(dim=1), torch.ones(2))

"""Attention with dropout on a CPU against the formula, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lens import dropped
from lens.dropped import attention, draw, speed_up


def states(heads=4, shared=1, length=7, texts=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(texts, count, length, size, generator=generator, requires_grad=True)
        for count in (heads, heads // shared, heads // shared)
    ]


def by_loops(query, key, value, visible, gone, dropout, scaling):
    """(N, L, H, E), one query at a time."""
    texts, heads, length, size = query.shape
    rows = []
    for text in range(texts):
        for place in range(length):
            for head in range(heads):
                other = head * key.shape[1] // heads
                scores = key[text, other] @ query[text, head, place] * scaling
                shares = torch.where(visible[place], scores, -torch.inf).softmax(0)
                kept = shares * ~gone[text, head, place] / (1 - dropout)
                rows.append(kept @ value[text, other])
    return torch.stack(rows).view(texts, length, heads, size)


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 3)])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_values_and_gradients_are_those_of_the_formula(shared, causal, window, scaling, monkeypatch):
    query, key, value = states(shared=shared)
    length, dropout = query.shape[2], 0.25
    gone = torch.rand(3, 4, length, length, generator=torch.Generator().manual_seed(1)) < dropout
    monkeypatch.setattr(dropped, "draw", lambda shape, level, seed: gone)
    places = torch.arange(length)
    mask = None if window is None else (places[:, None] - places).abs() < window
    found = attention(query, key, value, None if mask is None else mask[None, None], dropout, scaling, causal)
    visible = torch.ones(length, length, dtype=torch.bool) if mask is None else mask
    visible = visible.tril() if causal else visible
    expected = by_loops(
        query, key, value, visible, gone, dropout, query.shape[3] ** -0.5 if scaling is None else scaling
    )
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), (query, key, value)),
        torch.autograd.grad((expected * weights).sum(), (query, key, value)),
    )


def test_on_average_it_is_attention_without_dropout():
    query, key, value = (state.detach() for state in states(texts=1, heads=2))
    many = [state.expand(4000, -1, -1, -1) for state in (query, key, value)]
    torch.manual_seed(0)
    found = attention(*many, None, 0.1, None, False)
    expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)[0]
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - expected).abs() < 5 * error).all()
    assert (error > 0).all()


@pytest.mark.parametrize("level", [1, 6554, 32768, 65535])
def test_draws_have_their_probability_and_do_not_hang_together(level):
    torch.manual_seed(0)
    drawn = draw((1000, 1003), level).double()
    share = level / 65536
    spread = math.sqrt(share * (1 - share) / drawn.numel())
    assert abs(drawn.mean() - share) < 5 * spread
    flat = drawn.flatten() - share
    for distance in (1, 2, 3, 4, 1003):  # four neighbours come of one random number
        assert abs((flat[distance:] * flat[:-distance]).mean()) < 5 * share * (1 - share) / math.sqrt(drawn.numel())


def test_the_generator_decides_and_a_checkpoint_repeats_it():
    query, key, value = states()
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(attention(query, key, value, None, 0.5, None, False))
    assert torch.equal(*results)
    assert not torch.equal(results[0], attention(query, key, value, None, 0.5, None, False))
    plain = torch.autograd.grad(results[0].pow(2).sum(), query)[0]
    torch.manual_seed(3)
    again = checkpoint(lambda q: attention(q, key, value, None, 0.5, None, False), query, use_reentrant=False)
    torch.manual_seed(4)  # what is drawn meanwhile
    torch.testing.assert_close(torch.autograd.grad(again.pow(2).sum(), query)[0], plain, rtol=0, atol=0)


def test_modules_drop_like_torchs():
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Dropout(0.3), torch.nn.Dropout(0.0), torch.nn.Tanh())
    speed_up(model)
    assert [type(part) for part in model] == [torch.nn.Linear, dropped.Dropout, dropped.Dropout, torch.nn.Tanh]
    states = torch.randn(300, 200, requires_grad=True)
    torch.manual_seed(0)
    out = model[1](states)
    gone = out == 0
    share = round(0.3 * 65536) / 65536
    assert abs(gone.double().mean() - share) < 5 * math.sqrt(share * (1 - share) / gone.numel())
    torch.testing.assert_close(out, torch.where(gone, 0.0, states / (1 - share)))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), states)[0], torch.where(gone, 0.0, 1 / (1 - share)))
    assert torch.equal(model[2](states), states)
    assert torch.equal(model.eval()[1](states), states)
    assert (dropped.Dropout(1.0)(states) == 0).all()
    assert torch.equal(dropped.Dropout(1e-9)(states), F.dropout(states, 1e-9))

"""Gradient caching: mini-batches whose activations are computed again give the gradients of the whole batch."""

from __future__ import annotations

import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import SENTENCES
from torch.utils._pytree import tree_map

from lens.text import TextProcessor
from train import step
from train.build import build
from train.config import Recipe
from train.data import Batches, Example
from train.loss import contrastive_loss
from train.sampler import Schedule
from train.states import compute_states, keys_of
from train.step import QueryPassageModel, cached_backward
from train.top import TopLayers


def examples():
    """Six queries with three passages each, of very unequal lengths, with teacher scores."""
    found = []
    for number in range(6):
        long = " ".join(SENTENCES[(number + i) % len(SENTENCES)] for i in range(number + 1))
        negatives = [SENTENCES[(number + 2) % len(SENTENCES)], f"{long} {number}"]
        found.append(
            Example(f"which {number}", [f"{number} {long}"], negatives, [3.0], [1.0, 0.5], "Find it.", "retrieval")
        )
    return found


@pytest.fixture
def step_of(monkeypatch):
    """Loss, gradients, number of mini-batches and the random numbers after one batch."""
    return partial(_step_of, monkeypatch)


def _step_of(monkeypatch, folder, clusters, budget, autocast=False, caching="checkpoints", packed=False, **changes):
    """`caching`: none, by checkpoints, or in two passes as under ZeRO-3. The budget is in tokens."""
    monkeypatch.undo()
    recipe = Recipe(
        base=str(folder), data=("none",), output="none", clusters=str(clusters), batch_size=6, group_size=3, **changes
    )
    torch.manual_seed(3)
    model, tokenizer = build(recipe)
    with torch.no_grad():  # LoRA starts at zero, and then half of its gradients are zero
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    data = examples()
    text = TextProcessor(tokenizer, model.config)
    batch = Batches([data], Schedule([6], 6, 1, 1), text, 3, mini_batch_tokens=budget, packed=packed)[0]
    wrapped = QueryPassageModel(model).train()
    if caching == "none":
        monkeypatch.setattr(step, "checkpoint", lambda function, inputs, use_reentrant: function(inputs))
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if caching == "passes":
            losses = []

            def loss_of(embeddings):
                queries, passages = embeddings[batch["queries"]], embeddings[batch["passages"]]
                loss = contrastive_loss(queries, passages, batch["teacher"], 0.1, 0.5, 1.0, True, None, batch["keys"])
                losses.append(loss)
                return loss.total

            cached_backward(wrapped, batch["mini_batches"], loss_of, lambda surrogate, last: surrogate.backward())
            loss = losses[0]
        else:
            queries, passages = wrapped(batch["queries"], batch["passages"], batch["mini_batches"])
            loss = contrastive_loss(queries, passages, batch["teacher"], 0.1, 0.5, 1.0, True, None, batch["keys"])
            loss.total.backward()
    after = torch.rand(3)  # what the random numbers are after the step
    gradients = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    count = len(batch["mini_batches"]) if budget else 2
    return loss, gradients, count, after


def assert_same(one, other, rtol):
    assert one[1].keys() == other[1].keys()
    torch.testing.assert_close(one[0].total, other[0].total, rtol=rtol, atol=0)
    torch.testing.assert_close(one[0].kd, other[0].kd, rtol=rtol, atol=1e-6)
    largest = max(gradient.norm() for gradient in one[1].values())
    for name, gradient in one[1].items():  # some, as of keys' biases, are zero but for rounding
        assert (gradient - other[1][name]).norm() <= rtol * (gradient.norm() + 1e-3 * largest), name


LORA = {"backbone": "lora", "lora_r": 4, "train_head": True}


@pytest.mark.parametrize("caching", ["checkpoints", "passes"])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"pooling": "sum"}])
@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_cached_equals_uncached(budget, changes, caching, step_of, mistral, mistral_clusters):
    settings = {**LORA, "lora_dropout": 0.0, **changes}
    whole = step_of(mistral, mistral_clusters, None, **settings)
    cached = step_of(mistral, mistral_clusters, budget, caching=caching, **settings)
    assert cached[2] == {1: 24, 100_000: 1}.get(budget, cached[2])
    assert 1 <= cached[2] <= 24
    assert_same(whole, cached, 1e-4)


def test_cached_equals_uncached_for_an_encoder_trained_in_full(step_of, bert, bert_clusters):
    settings = {"backbone": "full", "train_head": True, "transform": "residual"}
    kept = step_of(bert, bert_clusters, 50, caching="none", **settings)  # BERT's own dropout
    cached = step_of(bert, bert_clusters, 50, **settings)
    assert cached[2] > 1
    assert_same(kept, cached, 1e-5)


def test_cached_equals_uncached_on_stored_states(bert, bert_clusters, tmp_path):
    recipe = Recipe(
        base=str(bert), data=("none",), output="none", clusters=str(bert_clusters), batch_size=6, group_size=3,
        backbone="top", train_head=True,
    )  # fmt: skip
    model, tokenizer = build(recipe)
    top = TopLayers(model.backbone, 1)
    text = TextProcessor(tokenizer, model.config)
    store = compute_states(model, text, keys_of([examples()]), tmp_path / "hidden.f16", top)
    wrapped = QueryPassageModel(model, top).eval()  # without BERT's dropout
    found = []
    for budget in (None, 40):
        batch = Batches([examples()], Schedule([6], 6, 1, 1), text, 3, store=store, mini_batch_tokens=budget)[0]
        if budget:
            assert all(len(part["below"]) <= budget or len(part["lengths"]) == 1 for part in batch["mini_batches"])
        wrapped.zero_grad()
        queries, passages = wrapped(batch["queries"], batch["passages"], batch["mini_batches"])
        loss = contrastive_loss(queries, passages, batch["teacher"], 0.1, 0.5, 1.0, True)
        loss.total.backward()
        found.append((loss, {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.requires_grad}))
    assert_same(*found, 1e-4)


def test_random_numbers_of_the_device_are_kept_for_the_second_pass(step_of, mistral, mistral_clusters, monkeypatch):
    """torch finds the devices whose random numbers it saves by the tensors among a checkpoint's arguments."""
    seen = []
    found = torch.utils.checkpoint.get_device_states

    def spy(*arguments):
        tree_map(lambda item: seen.append(item) if isinstance(item, torch.Tensor) else None, arguments)
        return found(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.checkpoint, "_infer_device_type", lambda *_: "cuda")
        patch.setattr(torch.utils.checkpoint, "_get_device_module", lambda *_: SimpleNamespace(_initialized=True))
        patch.setattr(torch.utils.checkpoint, "get_device_states", spy)
        with contextlib.suppress(Exception):  # there is no such device here
            step_of(mistral, mistral_clusters, 60, **LORA)
    assert len(seen) >= 3  # ids, attention mask, places of pooled tokens


def test_a_batch_keeps_the_activations_of_its_last_mini_batch_alone(step_of, mistral, mistral_clusters, monkeypatch):
    def kept(caching):
        sizes, inside = [], []
        run = QueryPassageModel._run

        def embed(model, inputs):
            before = len(sizes)
            embeddings = run(model, inputs)
            inside.append(sum(sizes[before:]))
            return embeddings

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(QueryPassageModel, "_run", embed)
            count = step_of(mistral, mistral_clusters, 60, caching=caching, **LORA)[2]
        return sum(sizes), inside[count - 1]  # of the first `count` passes, which are the forward ones

    (cached, last), (whole, same) = kept("checkpoints"), kept("none")
    assert last == same > 0
    assert cached - last < (whole - same) / 20


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("caching", ["checkpoints", "passes"])
@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_masks_are_the_same_in_the_second_pass(autocast, changes, caching, step_of, mistral, mistral_clusters):
    settings = {**LORA, "lora_dropout": 0.3, **changes}
    kept = step_of(mistral, mistral_clusters, 60, autocast, "none", **settings)
    cached = step_of(mistral, mistral_clusters, 60, autocast, caching, **settings)
    assert cached[2] > 1
    # In two passes bfloat16 gradients of a weight are summed in another order.
    assert_same(kept, cached, 2e-2 if autocast and caching == "passes" else 1e-5)
    assert torch.equal(kept[3], cached[3])  # the step leaves the random numbers where it found them
    other = step_of(mistral, mistral_clusters, 60, autocast, **{**settings, "lora_dropout": 0.0})
    with pytest.raises(AssertionError):
        assert_same(other, cached, 2e-2)

"""The last layers on stored states give what the whole backbone gives, gradients included."""

from __future__ import annotations

import pytest
import torch
from conftest import SENTENCES
from torch import nn

import lens
from lens.backbone import hidden_states
from lens.text import TextProcessor
from train.data import tokenize
from train.states import compute_states
from train.top import TopLayers, layer_list
from train.trainer import QueryPassageModel

TEXTS = [*SENTENCES, "a", "", "one two " * 40]


@pytest.fixture(params=["mistral", "bert"])
def untrained(request):
    folders = (request.getfixturevalue(request.param), request.getfixturevalue(f"{request.param}_clusters"))
    return lens.LENS.build(*folders)


def batch_of(untrained, kind="document"):
    text = TextProcessor(untrained.tokenizer, untrained.model.config)
    keys = [(item, kind, None) for item in TEXTS]
    return text, keys, text.collate(tokenize(text, keys))


def test_stored_states_and_last_layers_equal_the_whole_backbone(untrained, tmp_path):
    model = untrained.model
    text, keys, batch = batch_of(untrained)
    top = TopLayers(model.backbone, 1)
    model.backbone.requires_grad_(False)
    top.layers.requires_grad_(True)
    store = compute_states(model, text, keys, tmp_path / "hidden.f16", top)
    both = QueryPassageModel(model, top)
    stored, _ = both(store.batch(keys), store.batch(keys[3:5]))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "pool_mask": batch.pool_mask}
    whole = model(**inputs)
    torch.testing.assert_close(stored, whole, rtol=0, atol=2e-3)  # states are kept in float16
    target = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for embeddings in (stored, whole):
        model.zero_grad()
        (embeddings * target).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert sum(name.startswith("backbone.") for name in gradients[0]) > 5
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() < 0.02 * gradient.norm() + 1e-6, name


def test_without_rounding_the_states_are_equal(untrained):
    backbone = untrained.model.backbone
    _, _, batch = batch_of(untrained)
    mask = batch.attention_mask.bool()
    top = TopLayers(backbone, 1)
    with torch.no_grad():
        below = top.below(batch.input_ids, batch.attention_mask)
        lengths = mask.sum(1)
        packed = top(below[mask], torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
        whole = hidden_states(backbone, batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(packed, whole[mask], rtol=1e-5, atol=1e-5)


def test_the_backbone_is_whole_again_even_after_an_error(untrained):
    backbone = untrained.model.backbone
    _, _, layers = layer_list(backbone)
    top = TopLayers(backbone, 1)
    with pytest.raises(RuntimeError):
        top(torch.zeros(3, 5), torch.tensor([0, 3]))  # states of another width
    assert layer_list(backbone)[2] is layers
    assert len(layers) == 2
    assert all(len(layer._forward_pre_hooks) == 0 for layer in layers)


@pytest.mark.parametrize("count", [0, 2, 7])
def test_a_count_that_leaves_no_layer_below_is_refused(untrained, count):
    with pytest.raises(ValueError, match="top_layers must be from 1 to 1"):
        TopLayers(untrained.model.backbone, count)


def test_frozen_layers_stay_in_eval_mode(bert, bert_clusters):
    model = lens.LENS.build(bert, bert_clusters).model
    model.backbone.requires_grad_(False)
    layers = TopLayers(model.backbone, 1).layers
    layers.requires_grad_(True)
    model.train()
    below, above = layer_list(model.backbone)[2]
    assert not any(module.training for module in below.modules())
    assert not any(module.training for module in model.backbone.embeddings.modules())
    assert any(isinstance(module, nn.Dropout) and module.training for module in above.modules())

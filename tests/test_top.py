"""The last layers on stored states give what the whole backbone gives, gradients included."""

from __future__ import annotations

import pytest
import torch
from conftest import SENTENCES
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    Gemma2Config,
    Gemma2Model,
    MPNetConfig,
    MPNetModel,
    Qwen2Config,
    Qwen2Model,
)

import lens
from lens.backbone import hidden_states
from lens.text import TextProcessor
from train.data import tokenize
from train.states import compute_states
from train.step import QueryPassageModel
from train.top import TopLayers, layer_list

TEXTS = [*SENTENCES, "a", "", "one two " * 40, *(" ".join(SENTENCES)[:n] for n in range(20, 400, 7))]


@pytest.fixture(params=["mistral", "bert"])
def untrained(request):
    folders = (request.getfixturevalue(request.param), request.getfixturevalue(f"{request.param}_clusters"))
    return lens.LENS.build(*folders)


def tiny(kind):
    """A tiny random backbone of a family whose layers depend on their number, or give tuples."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    types = ["sliding_attention", "full_attention"] * 2
    if kind == "qwen2":
        config = Qwen2Config(
            **shape, num_key_value_heads=1, use_sliding_window=True, sliding_window=4, layer_types=types
        )
        model = Qwen2Model(config)
    elif kind == "gemma2":
        config = Gemma2Config(**shape, num_key_value_heads=1, head_dim=8, sliding_window=4, layer_types=types)
        model = Gemma2Model(config)
    elif kind == "deberta":
        model = DebertaV2Model(DebertaV2Config(**shape, relative_attention=True, conv_kernel_size=3))
    elif kind == "mpnet":
        model = MPNetModel(MPNetConfig(**shape))
    else:
        model = DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, hidden_dim=32, n_layers=4, n_heads=2))
    for parameter in model.parameters():  # far from the identity, so that a mistaken layer shows
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    return model.eval()


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
    with torch.no_grad():
        stored, _ = both(store.batch(keys), store.batch(keys[3:5]))
    with torch.no_grad():
        whole = model(**batch.inputs())
    torch.testing.assert_close(stored, whole, rtol=0, atol=2e-3)  # states are kept in float16


def test_without_rounding_states_and_gradients_are_equal(untrained):
    backbone = untrained.model.backbone
    _, _, batch = batch_of(untrained)
    mask = batch.attention_mask.bool()
    top = TopLayers(backbone, 1)
    with torch.no_grad():
        below = top.below(batch.input_ids, batch.attention_mask)
    packed = top(below[mask], mask.sum(1).tolist())
    whole = hidden_states(backbone, batch.input_ids, batch.attention_mask)[mask]
    torch.testing.assert_close(packed, whole, rtol=1e-5, atol=1e-5)
    target = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for states in (packed, whole):
        backbone.zero_grad()
        (states * target).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 5
    largest = max(float(gradient.norm()) for gradient in gradients[1].values())  # that of a key's bias is zero
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "mpnet", "distilbert"])
def test_other_families_too(kind, count):
    backbone = tiny(kind)
    ids = torch.randint(5, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([12, 7, 9])
    mask = torch.arange(12) < lengths[:, None]
    top = TopLayers(backbone, count)
    with torch.no_grad():
        below = top.below(ids, mask.long())[mask]
        whole = hidden_states(backbone, ids, mask.long())[mask]
        torch.testing.assert_close(top(below, lengths.tolist()), whole, rtol=1e-5, atol=1e-5)
        fresh = TopLayers(backbone, count)  # as after a restart: the states come from the file
        torch.testing.assert_close(fresh(below, lengths.tolist()), whole, rtol=1e-5, atol=1e-5)


def test_the_backbone_is_whole_again_even_after_an_error(untrained):
    backbone = untrained.model.backbone
    _, _, batch = batch_of(untrained)
    before = hidden_states(backbone, batch.input_ids, batch.attention_mask)
    with pytest.raises(RuntimeError):
        TopLayers(backbone, 1)(torch.zeros(3, 5), torch.tensor([0, 3]))  # states of another width
    assert torch.equal(hidden_states(backbone, batch.input_ids, batch.attention_mask), before)
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in layer_list(backbone))


@pytest.mark.parametrize("count", [0, 2, 7])
def test_a_count_that_leaves_no_layer_below_is_refused(untrained, count):
    with pytest.raises(ValueError, match="top_layers must be from 1 to 1"):
        TopLayers(untrained.model.backbone, count)


def test_only_the_last_layers_leave_eval_mode_and_learn(bert, bert_clusters):
    model = lens.LENS.build(bert, bert_clusters).model
    top = TopLayers(model.backbone, 1)
    QueryPassageModel(model, top).train()
    training = {name for name, module in model.backbone.named_modules() if module.training}
    assert any(isinstance(module, nn.Dropout) for module in top.layers.modules())
    assert training
    assert all(name.startswith("encoder.layer.1") for name in training)
    learning = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(name.startswith("encoder.layer.1.") for name in learning)


def test_backbones_that_cannot_be_cut_are_refused(monkeypatch):
    albert = AlbertModel(AlbertConfig(vocab_size=50, embedding_size=8, hidden_size=16, intermediate_size=32,
                                      num_attention_heads=2, num_hidden_layers=3))  # fmt: skip
    with pytest.raises(ValueError, match="0 lists of its 3 layers"):
        TopLayers(albert, 1)
    with pytest.raises(ValueError, match="cannot be cut below its last 3 layers"):
        TopLayers(tiny("deberta"), 3)  # a convolution after the first layer
    backbone = tiny("distilbert")
    monkeypatch.setattr(TopLayers, "below", lambda self, ids, mask: torch.zeros(*ids.shape, 16))
    with pytest.raises(ValueError, match="their outputs then differ"):
        TopLayers(backbone, 1)


def test_states_in_float32_meet_a_backbone_in_bfloat16(bert, bert_clusters):
    backbone = lens.LENS.build(bert, bert_clusters, dtype="bfloat16").model.backbone
    out = TopLayers(backbone, 1)(torch.randn(7, 32), [3, 4])
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()

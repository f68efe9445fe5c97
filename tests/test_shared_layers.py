"""Layers that several models share give what each model gives by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES, encoder_tokenizer, save_clusters, save_mistral
from test_analyse import analyse, data, points  # noqa: F401
from torch import nn

import lens
from eval.shared_layers import SharedLayers, shared_count
from lens.int8 import quantize

TEXTS = [" ".join(SENTENCES[i:] + SENTENCES[:i])[: 9 * i + 9] for i in range(7)]


def build(folder: Path, clusters: Path, **options: Any) -> lens.LENS:
    return lens.LENS.build(folder, clusters, device="cpu", **options)


def changed(model: lens.LENS, layer: int, amount: float = 0.1) -> lens.LENS:
    """Another model of the same backbone, one of whose layers was trained."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in layers_of(other)[layer].parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer)))
    return other


def layers_of(model: lens.LENS) -> nn.ModuleList:
    return next(part for part in model.model.backbone.modules() if isinstance(part, nn.ModuleList))


def backbones(*models: lens.LENS) -> list[nn.Module]:
    return [model.model.backbone for model in models]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_embeddings_are_the_same_to_the_bit(
    kind: str, packed: bool, bert: Path, bert_clusters: Path, mistral_clusters: Path, tmp_path: Path
) -> None:
    folder = bert if kind == "bert" else save_mistral(tmp_path / "deep", num_hidden_layers=4)
    clusters = bert_clusters if kind == "bert" else mistral_clusters
    first = build(folder, clusters, packed=packed)
    last = len(layers_of(first)) - 1
    models = [first, changed(first, last), build(folder, clusters, pooling="sum", packed=packed)]
    alone = [model.encode(TEXTS, batch_tokens=40) for model in models]
    assert not np.allclose(alone[0], alone[1], atol=1e-3)
    shared = SharedLayers(backbones(*models), 10**9)
    assert shared.layers == last
    together = [model.encode(TEXTS, batch_tokens=40) for model in models]
    assert shared.batches > 3
    assert 3 * shared.hits == 2 * shared.batches
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)
    again = models[1].encode(TEXTS[::-1], batch_tokens=40)  # other batches, or the same
    assert np.allclose(again, alone[1][::-1], atol=1e-6)
    shared.close()
    batches = shared.batches
    assert np.array_equal(models[2].encode(TEXTS, batch_tokens=40), alone[2])
    assert shared.batches == batches
    assert all("forward" not in vars(part) for one in backbones(*models) for part in one.modules())


def test_states_are_let_go_and_bounded(bert: Path, bert_clusters: Path) -> None:
    first = build(bert, bert_clusters)
    models = [first, changed(first, 1)]
    wanted = [model.encode(TEXTS) for model in models]
    for limit, hits in ((10**9, 1), (100, 0)):
        shared = SharedLayers(backbones(*models), limit)
        found = [model.encode(TEXTS) for model in models]
        assert shared.hits == hits
        assert all(np.array_equal(one, other) for one, other in zip(wanted, found, strict=True))
        shared.forget()
        models[1].encode(TEXTS)
        assert shared.hits == hits
        shared.close()


def test_layers_above_may_work_in_place(bert: Path, bert_clusters: Path) -> None:
    models = [build(bert, bert_clusters) for _ in range(2)]
    for model in models:
        upper = layers_of(model)[-1]

        def doubled(states: torch.Tensor, *args: Any, forward: Any = upper.forward, **options: Any) -> Any:
            return forward(states.mul_(2), *args, **options)

        upper.forward = doubled
    wanted = [model.encode(TEXTS) for model in models]
    shared = SharedLayers(backbones(*models), 10**9)
    assert shared.layers == 1
    for _ in range(3):
        found = [model.encode(TEXTS) for model in models]
        assert all(np.array_equal(one, other) for one, other in zip(wanted, found, strict=True))
    assert shared.hits == 5


def test_what_cannot_be_shared(bert: Path, bert_clusters: Path, mistral: Path, mistral_clusters: Path) -> None:
    first = build(bert, bert_clusters)
    words = copy.deepcopy(first)
    with torch.no_grad():
        words.model.backbone.get_input_embeddings().weight[3] += 1
    half = build(bert, bert_clusters, dtype="bfloat16")
    eight = build(bert, bert_clusters)
    quantize(eight.model)
    causal = build(mistral, mistral_clusters, bidirectional=False)
    both = build(mistral, mistral_clusters)
    for models in (
        [first],
        [first, changed(first, 0)],
        [first, words],
        [first, half],
        [eight, copy.deepcopy(eight)],
        [causal, both],
        [first, both],
        [first, changed(first, 1), words],
    ):
        assert shared_count(backbones(*models)) == 0
        shared = SharedLayers(backbones(*models), 10**9)
        assert shared.layers == 0
        models[0].encode(TEXTS)
        assert shared.hits == 0
    assert shared_count(backbones(first, copy.deepcopy(first))) == 1  # one layer is each one's own


def test_a_model_that_hands_on_more_than_states_is_left_alone(bert: Path, bert_clusters: Path) -> None:
    """As where an upper layer looks at what a lower one computed."""
    models = [build(bert, bert_clusters) for _ in range(2)]
    for model in models:
        lower, upper = layers_of(model)
        seen: list[torch.Tensor] = []
        forward, above = lower.forward, upper.forward

        def look(*args: Any, forward: Any = forward, seen: Any = seen, **options: Any) -> Any:
            output = forward(*args, **options)
            seen[:] = [output.mean()]
            return output

        def use(*args: Any, above: Any = above, seen: Any = seen, **options: Any) -> Any:
            extra = seen.pop() if seen else 7.0
            return above(*args, **options) + extra

        lower.forward, upper.forward = look, use
    wanted = [model.encode(TEXTS) for model in models]
    shared = SharedLayers(backbones(*models), 10**9)
    assert shared.layers == 0
    assert all(np.array_equal(model.encode(TEXTS), one) for model, one in zip(models, wanted, strict=True))


def test_variants_share_layers(
    bert: Path,
    bert_clusters: Path,
    data: dict[str, str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where models of unlike numbers of clusters would go through a corpus in chunks of unlike sizes."""
    monkeypatch.setattr("eval.encoder.CHUNK_VALUES", 24)
    monkeypatch.setattr("eval.encoder.PROBE", 1)
    options = {"positions": "content", "document_max_length": 64}
    models = {name: build(bert, bert_clusters, pooling=name, **options) for name in ("max", "sum")}
    few = save_clusters(tmp_path / "few", len(encoder_tokenizer()), k=12)
    models["few"] = build(bert, few, **options)
    for name, model in models.items():
        model.save(tmp_path / f"{name}-model")
    local = ["--local", data["beir"], data["sts"], data["labels"]]
    given = [*local, "--model", *(f"{name}={tmp_path / name}-model" for name in models)]
    made: list[SharedLayers] = []

    class Watched(SharedLayers):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr("eval.analyse.SharedLayers", Watched)
    assert analyse("variants", tmp_path / "together", *given) == 0
    assert made[0].layers == 1
    assert 3 * made[0].hits >= 2 * made[0].batches > 12  # a text that is met twice is a batch that is held
    told = f"up to 2,000 MB a task: of {made[0].batches:,} batches, {made[0].hits:,} took them"
    assert told in (tmp_path / "together" / "report.md").read_text()
    monkeypatch.setattr("eval.shared_layers.shared_count", lambda backbones: 0)
    assert analyse("variants", tmp_path / "alone", *given) == 0
    assert made[1].batches == 0
    assert "in common" not in (tmp_path / "alone" / "report.md").read_text()
    one, other = points(tmp_path / "together"), points(tmp_path / "alone")
    assert {name: point["scores"] for name, point in one.items()} == {n: point["scores"] for n, point in other.items()}

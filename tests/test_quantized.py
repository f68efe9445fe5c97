"""4 and 8 bits: near the unquantised model, exactly bitsandbytes' own arithmetic, trained by LoRA, never merged."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, row, save_clusters, save_mistral, write_rows
from safetensors.torch import load_file
from torch.nn.functional import normalize

import lens
import lens.files
from lens.attention import probe_attention
from lens.backbone import check_attention, hidden_states, load_backbone
from lens.quantized import exact_rows, is_quantized, quantization_config
from train.build import build
from train.config import Recipe
from train.run import main as train

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install 'lens-embeddings[quantized]'"
)
KINDS = ("4bit", "8bit")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Mistral whose layers are wide enough for blocks of 64 weights with one scale each, and clusters."""
    folder = save_mistral(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=128, head_dim=16)
    return folder, save_clusters(tmp_path_factory.mktemp("clusters") / "wide", 400, width=64)


@pytest.fixture(scope="module")
def quantised(wide):
    return {kind: lens.LENS.build(*wide, device="cpu", quantization=kind) for kind in KINDS}


def linear_layers(backbone):
    return {name: module for name, module in backbone.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_is_quantised_and_nothing_else(kind, quantised, wide):
    plain = linear_layers(lens.LENS.build(*wide, device="cpu").model.backbone)
    model = quantised[kind].model
    found = linear_layers(model.backbone)
    assert found.keys() == plain.keys()
    kinds = {"4bit": (bitsandbytes.nn.Linear4bit, torch.uint8), "8bit": (bitsandbytes.nn.Linear8bitLt, torch.int8)}
    for name, layer in found.items():
        assert isinstance(layer, kinds[kind][0])
        assert layer.weight.dtype == kinds[kind][1]
        assert layer.weight.numel() * (2 if kind == "4bit" else 1) == plain[name].weight.numel()
        if kind == "4bit":
            state = layer.weight.quant_state
            assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
            assert layer.compute_dtype == torch.float32
    others = {
        p.dtype for n, p in model.named_parameters() if n.rpartition(".")[0].removeprefix("backbone.") not in found
    }
    assert others == {torch.float32}


def nearest_of_sixteen(weight):
    """NF4 by hand: each block of 64 is scaled to [-1, 1] and every weight goes to the nearest of 16 levels, which are
    quantiles of the normal distribution (arXiv 2305.14314, appendix E)."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([positive, torch.zeros(1), negative]).sort().values
    levels = levels / levels.max()
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    places = ((blocks / scales)[:, :, None] - levels).abs().argmin(2)
    return (levels[places] * scales).reshape(weight.shape)


def test_four_bits_are_the_nearest_normal_quantiles(quantised, wide):
    plain = linear_layers(lens.LENS.build(*wide, device="cpu").model.backbone)
    for name, layer in linear_layers(quantised["4bit"].model.backbone).items():
        found = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        expected = nearest_of_sixteen(plain[name].weight.detach())
        assert float((found - expected).norm() / expected.norm()) < 0.02  # scales are themselves kept in 8 bits


@pytest.mark.parametrize(("kind", "least"), [("4bit", 0.9), ("8bit", 0.995)])
def test_embeddings_stay_near_the_unquantised_ones(kind, least, quantised, wide):
    expected = lens.LENS.build(*wide, device="cpu").encode(SENTENCES, output="torch")
    found = quantised[kind].encode(SENTENCES, output="torch")
    cosine = (normalize(found) * normalize(expected)).sum(1)
    assert float(cosine.min()) > least
    assert float(cosine.max()) < 1 - 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_is_exact_in_few_bits(kind, quantised, wide):
    folder = str(wide[0])
    causal, _, _ = load_backbone(folder, bidirectional=False, quantization=kind)
    with pytest.raises(ValueError, match="MistralModel is causal although"):
        check_attention(causal, True)
    with pytest.raises(ValueError, match="MistralModel is bidirectional although"):
        check_attention(quantised[kind].model.backbone, False)


def test_outliers_of_one_token_change_others_but_not_the_probe(wide):
    """In 8 bits, features that are large for any token of a batch are computed apart for all of them."""
    causal, _, _ = load_backbone(str(wide[0]), bidirectional=False, quantization="8bit")
    with torch.no_grad():
        causal.embed_tokens.weight[7, :8] = 300.0
        for layer in causal.layers:
            layer.input_layernorm.weight.fill_(4.0)
    ids = torch.arange(10, 20)[None]
    changed = ids.clone()
    changed[0, 9] = 7
    mask = torch.ones_like(ids)
    difference = hidden_states(causal, ids, mask)[:, :9] - hidden_states(causal, changed, mask)[:, :9]
    assert float(difference.detach().abs().max()) > 0
    with exact_rows(causal):
        difference = hidden_states(causal, ids, mask)[:, :9] - hidden_states(causal, changed, mask)[:, :9]
        assert float(difference.detach().abs().max()) == 0
    assert {layer.state.threshold for layer in linear_layers(causal).values()} == {6.0}
    probe_attention(causal, False, hidden_states)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_saved_without_its_backbone(kind, quantised, wide, tmp_path):
    model = quantised[kind]
    model.save(tmp_path / "thin")
    loaded = lens.load(tmp_path / "thin", device="cpu", quantization=kind)
    assert is_quantized(loaded.model.backbone)
    np.testing.assert_array_equal(loaded.encode(SENTENCES), model.encode(SENTENCES))
    assert not is_quantized(lens.load(tmp_path / "thin", device="cpu").model.backbone)
    with pytest.raises(ValueError, match="include_backbone contradicts quantization.*without quantization"):
        model.save(tmp_path / "whole", include_backbone=True)
    assert not (tmp_path / "whole").exists()
    lens.load(tmp_path / "thin", device="cpu").save(tmp_path / "own", include_backbone=True)
    own = lens.load(tmp_path / "own", device="cpu", quantization=kind)
    np.testing.assert_array_equal(own.encode(SENTENCES), model.encode(SENTENCES))
    with pytest.raises(ValueError, match="a quantised backbone cannot be saved"):
        own.save(tmp_path / "again")


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_over_quantised_weights(kind, wide, tmp_path, capsys):
    folder, clusters = wide
    rows = [
        row(query=" ".join(words[:4]), pos=[" ".join(words[4:])], neg=[SENTENCES[(i + 1) % 7], SENTENCES[(i + 2) % 7]])
        for i, words in enumerate(sentence.split() for sentence in SENTENCES)
    ]
    data = write_rows(tmp_path / "pairs.jsonl", *rows)
    (tmp_path / "empty.yaml").write_text("")
    values = {
        "base": folder, "clusters": clusters, "data": data, "output": tmp_path / "run", "quantization": kind,
        "batch_size": 7, "group_size": 3, "max_steps": 12, "save_steps": 6, "logging_steps": 1, "warmup_steps": 1,
        "report_to": "[]", "device": "cpu", "temperature": 0.1, "learning_rate": 0.01, "lora_r": 4, "kd_weight": 0,
        "lora_dropout": 0.0, "gradient_checkpointing": "true", "seed": 3,
    }  # fmt: skip
    arguments = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
    assert train([str(tmp_path / "empty.yaml"), *arguments]) == 0, capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    saved = {path.name for path in (tmp_path / "run").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    few, full = (lens.load(tmp_path / "run", device="cpu", quantization=q).encode(SENTENCES) for q in (kind, None))
    untrained = lens.LENS.build(folder, clusters, device="cpu", quantization=kind).encode(SENTENCES)
    cosine = (few * full).sum(1).min()
    assert cosine > 0.8  # the same adapter over the unquantised weights
    assert (few * untrained).sum(1).min() < cosine
    merged = lens.load(tmp_path / "run", device="cpu")
    merged.save(tmp_path / "merged", include_backbone=True)
    np.testing.assert_allclose(lens.load(tmp_path / "merged", device="cpu").encode(SENTENCES), full, atol=1e-5)


def test_gradients_pass_through_four_bits(wide):
    """Against the same adapter over ordinary layers that hold the dequantised weights."""
    folder, clusters = wide
    gradients = {}
    for kind in ("4bit", None):
        torch.manual_seed(0)
        recipe = Recipe(base=str(folder), clusters=str(clusters), data=("d",), output="o", device="cpu",
                        quantization=kind, lora_r=2, lora_dropout=0.0)  # fmt: skip
        model, _ = build(recipe)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        layers = {n: m for n, m in linear_layers(model.backbone).items() if n.endswith("base_layer")}
        if kind is not None:
            packed = {name: layer.weight for name, layer in layers.items()}
        else:
            for name, layer in layers.items():
                layer.weight.data = bitsandbytes.functional.dequantize_4bit(packed[name].data, packed[name].quant_state)
        ids = torch.arange(30, 50)[None]
        hidden_states(model.backbone.eval(), ids, torch.ones_like(ids))  # as between training steps
        hidden = hidden_states(model.backbone.train(), ids, torch.ones_like(ids))
        (hidden * torch.linspace(-1, 1, 64)).sum().backward()
        gradients[kind] = {n: p.grad for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert gradients["4bit"].keys() == gradients[None].keys()
    for name, gradient in gradients["4bit"].items():
        torch.testing.assert_close(gradient, gradients[None][name], atol=1e-4, rtol=1e-3)


def test_what_is_trained_over_four_bits_is_float32(wide):
    folder, clusters = wide
    recipe = Recipe(base=str(folder), clusters=str(clusters), data=("d",), output="o", device="cpu",
                    precision="bf16", quantization="4bit", lora_r=2)  # fmt: skip
    model, _ = build(recipe)
    assert {
        layer.compute_dtype for layer in linear_layers(model.backbone).values() if hasattr(layer, "compute_dtype")
    } == {torch.bfloat16}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert all("lora_" in name or "trainable_tokens" in name for name in trained)
    norms = [parameter for name, parameter in model.named_parameters() if "layernorm" in name]
    assert {parameter.dtype for parameter in norms} == {torch.float32}


def test_what_cannot_be_quantised_is_refused(wide, bert_mlm, bert_clusters, tmp_path, monkeypatch):
    folder, clusters = wide
    with pytest.raises(ValueError, match="quantization must be one of 4bit, 8bit or None; found '2bit'"):
        lens.LENS.build(folder, clusters, device="cpu", quantization="2bit")
    with pytest.raises(ValueError, match="quantization contradicts the MLM head of an encoder"):
        lens.LENS.build(bert_mlm, device="cpu", quantization="4bit")
    with pytest.raises(ValueError, match="where the base has one: take another transform"):
        lens.LENS.build(bert_mlm, bert_clusters, device="cpu", quantization="4bit", transform="mlm")
    run = tmp_path / "run"
    (run / "embedding").mkdir(parents=True)
    torch.save(torch.nn.Linear(64, 20, bias=False), run / "embedding" / "lm_head.pth")
    with pytest.raises(ValueError, match=r"quantization='4bit': the adapter of .* is merged.*Convert"):
        lens.load(run, device="cpu", quantization="4bit")
    monkeypatch.setattr(lens.files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"bitsandbytes, accelerate not installed; run: pip install .*\[quantized\]"):
        quantization_config("4bit", torch.float32)


def test_the_vocabulary_head_of_a_quantised_decoder_is_not_quantised(wide):
    folder, _ = wide
    model = lens.LENS.build(folder, device="cpu", quantization="4bit").model
    assert torch.equal(model.head.weight, lens.LENS.build(folder, device="cpu").model.head.weight)


def test_training_imports_bitsandbytes_with_its_warnings_off():
    """peft, which the Trainer imports, looks for bitsandbytes; where it is, it warns of every CPU kernel it lacks."""
    code = (
        "import logging, sys\nlevels = []\nclass Look:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'bitsandbytes': levels.append(logging.getLogger(name).level)\n"
        "sys.meta_path.insert(0, Look())\nimport train.run\nsys.exit(set(levels) != {logging.ERROR})"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

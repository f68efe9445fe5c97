"""SPLADE checkpoints that are damaged, or that LENS does not read, are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import encoder_tokenizer
from safetensors.torch import load_file, save_file
from splade_helpers import SMALL, inference_free, roberta_tokenizer, save_masked_lm, sparse_encoder, write
from transformers import BertForMaskedLM, ElectraConfig, ElectraForMaskedLM

import lens
from lens.cli import main
from lens.layout import is_splade, read_layout


def change(path: Path, **facts) -> None:
    write(path, {**json.loads(path.read_text()), **facts})


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop(path: Path, *prefixes: str) -> None:
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(prefixes)}
    save_file(tensors, path, {"format": "pt"})


def weigh(path: Path, rows: int) -> None:
    save_file({"weight": torch.ones(rows)}, path)


def other_tokenizer(path: Path) -> None:
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    write(path / "tokenizer.json", tokenizer)


STATIC, DOCUMENT = "query_0_SparseStaticEmbedding", "document_0_Transformer"
POOLING = "document_1_SpladePooling"
DAMAGES = [
    ("plain", lambda f: drop(f / "model.safetensors", "cls.predictions.transform.dense"), "lacks weights of its"),
    ("plain", lambda f: shorten(f / "model.safetensors"), "not whole safetensors"),
    ("plain", lambda f: change(f / "config.json", vocab_size=200), "weights and config.json do not fit together"),
    ("plain", lambda f: roberta_tokenizer().save_pretrained(f), "ids go up to .* vocabulary of"),
    ("saved", lambda f: (f / "modules.json").write_text("[{"), "modules.json is not valid JSON"),
    ("saved", lambda f: write(f / "modules.json", {}), "expected a list of modules"),
    (
        "saved",
        lambda f: write(f / "modules.json", [{"path": "", "type": "sentence_transformers.models.WordWeights"}]),
        "names sentence_transformers.models.WordWeights, which LENS does not read: it reads MLMTransformer",
    ),
    ("saved", lambda f: write(f / "modules.json", [{"path": "../x", "type": "a.SpladePooling"}]), "lies outside"),
    ("saved", lambda f: write(f / "modules.json", [{"path": "", "type": "a.SpladePooling"}]), "no sparse encoder"),
    ("saved", lambda f: change(f / "1_SpladePooling/config.json", activation_function="tanh"), "found 'tanh'"),
    ("saved", lambda f: change(f / "1_SpladePooling/config.json", pooling_strategy="mean"), "found 'mean'"),
    (
        "saved",
        lambda f: change(f / "1_SpladePooling/config.json", pooling_strategy="sum", activation_function="log1p_relu"),
        "log1p_relu goes with pooling_strategy max here",
    ),
    ("saved", lambda f: change(f / "1_SpladePooling/config.json", embedding_dimension=9), "saved for 9 dimensions"),
    ("saved", lambda f: (f / "1_SpladePooling/config.json").unlink(), "config.json is missing"),
    ("saved", lambda f: change(f / "sentence_bert_config.json", transformer_task="retrieval"), "must be fill-mask"),
    ("saved", lambda f: change(f / "sentence_bert_config.json", max_seq_length="9"), "a number of tokens; found '9'"),
    (
        "saved",
        lambda f: change(f / "sentence_bert_config.json", tokenizer_args={"strip_accents": True}),
        "options of the tokenizer are not supported; found strip_accents",
    ),
    ("saved", lambda f: change(f / "config_sentence_transformers.json", prompts={"document": "d: "}), "'d: '"),
    ("saved", lambda f: change(f / "config_sentence_transformers.json", prompts={"query": "q:"}), "end with a space"),
    ("free", lambda f: change(f / "config_sentence_transformers.json", prompts={"query": "q: "}), "bags of tokens"),
    ("free", lambda f: (f / STATIC / "model.safetensors").unlink(), "model.safetensors is missing"),
    ("free", lambda f: shorten(f / STATIC / "model.safetensors"), "not a whole safetensors file"),
    ("free", lambda f: weigh(f / STATIC / "model.safetensors", 5000), "weights of 5000 tokens"),
    ("free", lambda f: other_tokenizer(f / STATIC), "the tokenizer of queries is not that of documents"),
    ("free", lambda f: (f / "router_config.json").unlink(), "router_config.json is missing"),
    ("free", lambda f: change(f / "router_config.json", structure={"text": []}), "the two routes query and document"),
    (
        "free",
        lambda f: change(f / "router_config.json", structure={"query": ["x"], "document": [DOCUMENT]}),
        "route 'query' names modules without a type",
    ),
    (
        "free",
        lambda f: change(f / "router_config.json", structure={"query": [DOCUMENT], "document": [DOCUMENT, POOLING]}),
        "queries go through Transformer; LENS reads a SparseStaticEmbedding there",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    plain = save_masked_lm("bert", folder / "plain")
    sparse_encoder(plain).save(str(folder / "saved"))
    inference_free(plain).save(str(folder / "free"))
    return {name: folder / name for name in ("plain", "saved", "free")}


@pytest.mark.parametrize(("layout", "damage", "message"), DAMAGES, ids=[message[:40] for _, _, message in DAMAGES])
def test_what_does_not_fit_is_refused_by_name(layout, damage, message, layouts, tmp_path):
    folder = Path(shutil.copytree(layouts[layout], tmp_path / "damaged"))
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        lens.load(folder)
    assert (
        main(["encode", str(folder / "config.json"), "--model", str(folder), "--output", str(tmp_path / "x.npz")]) == 2
    )


def test_options_that_contradict_a_splade_checkpoint(layouts, bert, mistral, tmp_path):
    with pytest.raises(ValueError, match="holds its own weights, which base="):
        lens.load(layouts["plain"], base=str(bert))
    with pytest.raises(ValueError, match="the MLM head of .* would be quantised too"):
        lens.load(layouts["plain"], quantization="8bit")
    with pytest.raises(ValueError, match="compat='official' is for checkpoints of the released LENS code"):
        lens.load(layouts["plain"], compat="official")
    assert [is_splade(folder) for folder in (*layouts.values(), bert, mistral, tmp_path)] == [True] * 3 + [False] * 3
    lens.load(layouts["plain"]).save(tmp_path / "ours")
    assert not is_splade(tmp_path / "ours")
    (tmp_path / "ours" / "lens.json").unlink()
    assert not is_splade(tmp_path / "ours")  # a LENS model that is not whole
    assert read_layout(layouts["free"]).query == layouts["free"] / STATIC


def test_a_head_of_another_form_is_refused(tmp_path):
    sizes = {**SMALL, "vocab_size": len(encoder_tokenizer()), "initializer_range": 0.15}
    ElectraForMaskedLM(ElectraConfig(**sizes, embedding_size=16)).save_pretrained(tmp_path / "electra")
    encoder_tokenizer().save_pretrained(tmp_path / "electra")
    with pytest.raises(ValueError, match="the MLM head of electra is not dense, activation, LayerNorm, decoder"):
        lens.load(tmp_path / "electra")


def test_a_head_that_computes_something_else_is_refused(layouts, monkeypatch):
    forward = BertForMaskedLM.forward

    def capped(self, **inputs):
        output = forward(self, **inputs)
        output.logits = output.logits.tanh()
        return output

    monkeypatch.setattr(BertForMaskedLM, "forward", capped)
    with pytest.raises(ValueError, match=r"the MLM head of bert computes something else .* differ by \d"):
        lens.load(layouts["plain"])


def test_fields_that_contradict_each_other_are_refused(bert_mlm, bert_clusters):
    for fields, message in (
        ({"activation": "log1p_twice", "pooling": "sum"}, "activation='log1p_twice' contradicts pooling='sum'"),
        ({"activation": "log2p"}, "activation must be one of log1p, log1p_twice; found 'log2p'"),
        ({"transform_eps": 0}, r"transform_eps=0 contradicts the MLM head of bert, which has 1e-12"),
        ({"transform_activation": "relu"}, "transform_activation='relu' contradicts the MLM head of bert"),
        ({"transform": "residual"}, "transform='residual' contradicts the MLM head of bert, which has 'mlm'"),
        ({"query_encoder": "bags"}, "query_encoder must be one of model, bag"),
        ({"head": "dense", "pooling": "last", "query_encoder": "bag"}, "query_encoder='bag' contradicts head='dense'"),
    ):
        with pytest.raises(ValueError, match=message):
            lens.LENS.build(bert_mlm, **fields)
        if fields.keys() & {"transform_eps", "transform_activation"}:
            with pytest.raises(ValueError, match=message):
                lens.LENS.build(bert_mlm, bert_clusters, transform="mlm", **fields)
    with pytest.raises(ValueError, match="transform_eps must be a number from above 0 to below 1; found 0"):
        lens.load(bert_mlm).config.replace(transform_eps=0)

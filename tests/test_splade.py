"""SPLADE checkpoints give SparseEncoder's vectors, in every layout, and are models like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, save_bert
from splade_helpers import SparseEncoder, inference_free, save_masked_lm, sparse_encoder, write
from train_helpers import settings
from transformers import AutoTokenizer

import lens
from eval.run import model_folders
from lens.cli import main
from lens.head import lexical_pool
from train.run import main as train

LONG = " ".join(SENTENCES * 6)
TEXTS = [*SENTENCES, "", "  \n ", "a", "Ünïcode, naïve café: 日本語 😀 \u200b [MASK] </s>", LONG]
OLD = "sentence_transformers.sparse_encoder.models."


KINDS = ("bert", "bert-relu", "bert-tanh", "distilbert", "roberta", "xlm-roberta", "modernbert", "modernbert-biased")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    """Masked LMs as Hugging Face folders, which is naver/splade's layout."""
    return {kind: save_masked_lm(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def rows_of(folder) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def assert_same(folder, theirs=None, **options) -> lens.LENS:
    """That lens.load gives SparseEncoder's queries and documents; returns our model."""
    theirs = theirs or SparseEncoder(str(folder), device="cpu")
    ours = lens.load(folder, device="cpu", **options)
    for method, encode in (("encode_query", ours.encode_queries), ("encode_document", ours.encode_documents)):
        expected = getattr(theirs, method)(TEXTS, convert_to_sparse_tensor=False).numpy()
        assert (expected > 0).any(1).sum() >= len(SENTENCES)
        np.testing.assert_allclose(encode(TEXTS), expected, rtol=0, atol=1e-5)
    return ours


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_lm_gives_the_vectors_of_sparse_encoder(kind, plain, tmp_path):
    theirs = SparseEncoder(str(plain[kind]), device="cpu")
    ours = assert_same(plain[kind], theirs)
    config = ours.config
    assert (config.query_max_length, config.document_max_length) == (theirs.max_seq_length, theirs.max_seq_length)
    assert len(ours.text([LONG])[0].ids) == theirs.max_seq_length  # it was cut
    assert (config.pooling, config.positions, config.prompt, config.normalize) == ("max", "all", "plain", False)
    # Saved as one of our artifacts, it needs nothing else and gives the same; without padding, too.
    ours.save(tmp_path / "saved")
    again = lens.load(tmp_path / "saved", packed=True)
    assert again.config == config
    expected = theirs.encode_document(TEXTS, convert_to_sparse_tensor=False).numpy()
    np.testing.assert_allclose(again.encode(TEXTS), expected, rtol=0, atol=1e-5)
    if kind == "bert":
        exported = SparseEncoder(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
        np.testing.assert_allclose(
            exported.encode_document(TEXTS, convert_to_sparse_tensor=False).numpy(), expected, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
@pytest.mark.parametrize(("strategy", "activation"), [("max", "relu"), ("sum", "relu"), ("max", "log1p_relu")])
def test_the_layout_that_sentence_transformers_saves(kind, strategy, activation, plain, tmp_path):
    sparse_encoder(plain[kind], strategy, activation).save(str(tmp_path / "saved"))
    ours = assert_same(tmp_path / "saved")
    assert ours.config.pooling == strategy
    ours.save(tmp_path / "ours")
    assert_same(tmp_path / "ours", SparseEncoder(str(tmp_path / "saved"), device="cpu"))


def test_options_of_the_saved_layout(plain, tmp_path):
    """Length, lower case, prompt, normalisation, and the number of values that are kept."""
    theirs = sparse_encoder(plain["roberta"], normalize=True)
    theirs.max_seq_length = 20
    theirs.prompts["query"] = "find this: "
    theirs.max_active_dims = 30
    theirs.save(str(tmp_path))
    settings_file = tmp_path / "sentence_bert_config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "do_lower_case": True}))
    saved = SparseEncoder(str(tmp_path), device="cpu")
    with pytest.warns(UserWarning, match=r"30 largest values.*encode\(..., top_k=30\)"):
        ours = lens.load(tmp_path)
    assert (ours.config.instruction, ours.config.document_max_length) == ("find this:", 20)
    upper = [*TEXTS, "THE Quick FOX"]
    for method, encode in (("encode_query", ours.encode_queries), ("encode_document", ours.encode_documents)):
        expected = getattr(saved, method)(upper, convert_to_sparse_tensor=False, max_active_dims=400).numpy()
        np.testing.assert_allclose(encode(upper), expected, rtol=0, atol=1e-5)
    lower = ours.encode_documents(["the quick fox"])
    np.testing.assert_array_equal(ours.encode_documents(["THE Quick FOX"]), lower)


def test_the_older_layout_with_its_own_names(plain, tmp_path):
    """As sentence-transformers 5.0 wrote it."""
    folder = Path(shutil.copytree(plain["distilbert"], tmp_path / "old"))
    write(folder / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": OLD + "MLMTransformer"},
        {"idx": 1, "name": "1", "path": "1_SpladePooling", "type": OLD + "SpladePooling"},
    ])  # fmt: skip
    write(folder / "sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False})
    facts = {"pooling_strategy": "max", "activation_function": "relu", "word_embedding_dimension": rows_of(folder)}
    write(folder / "1_SpladePooling" / "config.json", facts)
    write(folder / "config_sentence_transformers.json", {"model_type": "SparseEncoder", "prompts": {"query": ""}})
    assert assert_same(folder).config.document_max_length == 24


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("weighted", [False, True])
def test_inference_free_queries(kind, weighted, plain, tmp_path):
    weight = torch.rand(rows_of(plain[kind])) if weighted else None
    inference_free(plain[kind], weight).save(str(tmp_path / "saved"))
    ours = assert_same(tmp_path / "saved")
    assert (ours.config.query_encoder, ours.config.activation) == ("bag", "log1p_twice")
    ours.save(tmp_path / "ours")
    again = assert_same(tmp_path / "ours", SparseEncoder(str(tmp_path / "saved"), device="cpu"))
    assert again.config == ours.config
    exported = SparseEncoder(str(tmp_path / "ours"), device="cpu", trust_remote_code=True)
    for method, encode in (("encode_query", ours.encode_queries), ("encode_document", ours.encode_documents)):
        found = getattr(exported, method)(TEXTS, convert_to_sparse_tensor=False).numpy()
        np.testing.assert_allclose(found, encode(TEXTS), rtol=0, atol=1e-6)


def test_inference_free_with_the_encoder_at_the_top_and_idf_as_json(plain, tmp_path):
    """OpenSearch's layout: the masked LM's files in the folder itself, under the empty name."""
    folder = Path(shutil.copytree(plain["bert"], tmp_path / "top"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    query = folder / "query_0_SparseStaticEmbedding"
    tokenizer.save_pretrained(query)
    tokens = list(tokenizer.get_vocab())[::2]
    idf = {token: 0.5 + number / 10 for number, token in enumerate(tokens)}
    write(query / "idf.json", idf)
    write(query / "config.json", {"frozen": True, "path": str(query / "idf.json")})
    write(folder / "document_1_SpladePooling" / "config.json", {"pooling_strategy": "max"})
    write(folder / "modules.json", [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}
    ])  # fmt: skip
    write(folder / "router_config.json", {
        "types": {
            "": OLD + "MLMTransformer",
            query.name: OLD + "SparseStaticEmbedding",
            "document_1_SpladePooling": OLD + "SpladePooling",
        },
        "structure": {"query": [query.name], "document": ["", "document_1_SpladePooling"]},
        "parameters": {"default_route": "document", "allow_empty_key": True},
    })  # fmt: skip
    write(folder / "config_sentence_transformers.json", {"model_type": "SparseEncoder"})
    ours = assert_same(folder)
    weights = ours.model.head.query_weights
    assert all(weights[tokenizer.convert_tokens_to_ids(token)] == torch.tensor(value) for token, value in idf.items())
    assert int((weights == 0).sum()) == len(weights) - len(tokens)
    (query / "idf.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"idf\.json is missing"):
        lens.load(folder)


def test_pooling_of_a_checkpoint_that_does_not_say(plain, bert_clusters, tmp_path):
    theirs = sparse_encoder(plain["bert"], "sum")
    assert_same(plain["bert"], theirs, pooling="sum")
    theirs.save(str(tmp_path / "sum"))
    assert_same(tmp_path / "sum", theirs, pooling="sum")
    with pytest.raises(ValueError, match="pooling='max' contradicts .*sum, which says 'sum'"):
        lens.load(tmp_path / "sum", pooling="max")
    with pytest.raises(ValueError, match="pooling must be 'max', 'sum' or None; found 'mean'"):
        lens.load(plain["bert"], pooling="mean")
    assert main(["export", "--model", str(plain["bert"]), "--pooling", "sum", "--output", str(tmp_path / "out")]) == 0
    assert lens.load(tmp_path / "out").config.pooling == "sum"
    with pytest.raises(ValueError, match="pooling='sum' is for SPLADE checkpoints that do not say theirs"):
        lens.load(tmp_path / "out", pooling="sum")


def test_repositories_of_the_hub_come_with_the_folders_of_their_modules(plain, tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    inference_free(plain["bert"]).save(str(tmp_path / "repository"))
    (tmp_path / "repository" / "onnx").mkdir()
    (tmp_path / "repository" / "onnx" / "model.onnx").touch()

    def download(name, revision=None, allow_patterns=None, ignore_patterns=None, **_):
        assert (name, revision) == ("owner/splade", "v1")
        files = [str(p.relative_to(tmp_path / "repository")) for p in (tmp_path / "repository").rglob("*.*")]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "repository" / file, tmp_path / "cache" / file)
        return str(tmp_path / "cache")

    monkeypatch.setattr("lens.model.snapshot_download", download)
    monkeypatch.setattr("lens.splade.snapshot_download", download)
    ours = lens.load("owner/splade", revision="v1")
    expected = lens.load(tmp_path / "repository").encode(TEXTS)
    np.testing.assert_array_equal(ours.encode(TEXTS), expected)
    assert not (tmp_path / "cache" / "onnx").exists()


def test_the_evaluator_takes_them(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def download(name, file):
        if (name, file) != ("owner/splade", "config.json"):
            raise FileNotFoundError(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    systems = model_folders([f"SPLADE={plain['bert']}", "hub=owner/splade"])
    assert systems == {"SPLADE": str(plain["bert"]), "hub": "owner/splade"}
    with pytest.raises(FileNotFoundError, match="neither a folder nor on the hub"):
        model_folders(["owner/other"])


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "modernbert"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_masked_lms_are_trained(kind, mode, empty, plain, pairs, tmp_path):
    changes = {"backbone": mode, "train_head": "true", "normalize": "false", "positions": "all", "lora_r": 2}
    changes |= {"lora_targets": "all-linear"} if mode == "lora" else {}
    lengths = {"query_max_length": 32, "document_max_length": 32}
    arguments = settings(plain[kind], "null", pairs, tmp_path / "run", **changes, **lengths, max_steps=2, temperature=5)
    assert train([empty, *arguments]) == 0
    trained = lens.load(tmp_path / "run")
    untrained = lens.LENS.build(plain[kind], normalize=False, positions="all", **lengths)
    assert trained.config.transform == "mlm"
    assert trained.config.transform_eps == untrained.config.transform_eps
    before, after = (model.model.head.transform.dense.weight for model in (untrained, trained))
    assert not torch.equal(before, after)
    expected = lens.load(plain[kind]).encode(SENTENCES)
    np.testing.assert_allclose(untrained.encode(SENTENCES), expected, rtol=0, atol=1e-5)


def test_in_eight_bits(plain):
    """As near to float32 as the 8 bits of any other encoder."""
    exact = lens.load(plain["modernbert"]).encode(SENTENCES)
    found = lens.load(plain["modernbert"], device="cpu", quantization="int8").encode(SENTENCES)
    cosine = (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)
    assert cosine.min() > 0.99


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_the_second_logarithm_by_hand(backend):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, requires_grad=True)
    weight, bias = torch.randn(11, 5, requires_grad=True), torch.randn(11, requires_grad=True)
    offsets = torch.tensor([0, 3, 3, 7])
    leaves = (hidden, weight, bias)
    found = lexical_pool(*leaves, cu_seqlens=offsets, backend=backend, activation="log1p_twice")
    expected = torch.zeros(3, 11)
    for text, (start, end) in enumerate(((0, 3), (3, 3), (3, 7))):
        for k in range(11):
            logits = [hidden[i] @ weight[k] + bias[k] for i in range(start, end)]
            values = [torch.log(1 + torch.log(1 + logit.clamp(min=0))) for logit in logits]
            if values:
                expected[text, k] = torch.stack(values).max()
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(3, 11)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="log1p_twice.*not with sum"):
        lexical_pool(hidden, weight, cu_seqlens=offsets, pooling="sum", activation="log1p_twice")


def test_a_masked_lm_in_bfloat16(tmp_path):
    """Half precision does not keep the head from being recognised."""
    folder = save_bert(tmp_path / "bert", masked_lm=True)
    half = lens.load(folder, dtype="bfloat16").encode(SENTENCES)
    np.testing.assert_allclose(half, lens.load(folder).encode(SENTENCES), atol=0.1)

"""Bidirectionality, padding, artifacts: the model as a whole on a tiny Mistral and a tiny BERT."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SENTENCES, SHARED, need, save_clusters
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import lens
from lens.backbone import check_attention, hidden_states, load_backbone

TEXTS = [*SENTENCES, "", "fox", "  ", "dog " * 40]


@pytest.fixture(scope="module", params=["mistral", "bert"])
def model(request):
    folder = request.getfixturevalue(request.param)
    return lens.LENS.build(folder, request.getfixturevalue(f"{request.param}_clusters"))


def states(model, ids, mask):
    with torch.inference_mode():
        return hidden_states(model.model.backbone, ids, mask)


def test_a_later_token_changes_earlier_outputs(model):
    ids = torch.randint(10, 100, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    changed = ids.clone()
    changed[:, 5] = 7
    difference = (states(model, ids, mask) - states(model, changed, mask)).abs().amax(2)
    assert (difference[:, :5] > 1e-4).all()


def test_padding_changes_nothing(model):
    ids = torch.randint(10, 100, (1, 6), generator=torch.Generator().manual_seed(1))
    bare = states(model, ids, torch.ones_like(ids))
    filler = torch.full((1, 4), 5)
    mask = torch.tensor([[1] * 6 + [0] * 4])
    right = states(model, torch.cat([ids, filler], 1), mask)[:, :6]
    left = states(model, torch.cat([filler, ids], 1), mask.flip(1))[:, 4:]
    torch.testing.assert_close(right, bare, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(left, bare, atol=2e-5, rtol=1e-4)
    other = states(model, torch.cat([ids, filler + 30], 1), mask)[:, :6]
    torch.testing.assert_close(other, right, atol=2e-5, rtol=1e-4)


def test_batch_of_one_equals_batch_of_many_in_any_order(model):
    together = model.encode_documents(TEXTS)
    alone = np.concatenate([model.encode_documents([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    np.testing.assert_allclose(model.encode_documents([TEXTS[i] for i in order]), together[order], atol=1e-5)
    np.testing.assert_allclose(model.encode_documents(TEXTS, batch_tokens=1), together, atol=1e-5)


def test_embeddings_follow_the_formula(model):
    """Against a loop over the pooled positions with the backbone called on one text at a time."""
    for text in ("copy the whole directory tree", "fox"):
        (item,) = model.text([text])
        ids = torch.tensor([item.ids])
        hidden = states(model, ids, torch.ones_like(ids))[0].double()
        centroids = model.model.head.weight.detach().double()
        expected = np.zeros(len(centroids))
        for i in range(item.start, item.end):
            for k, centroid in enumerate(centroids):
                expected[k] = max(expected[k], np.log1p(max(float(hidden[i] @ centroid), 0.0)))
        expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(model.encode_documents([text])[0], expected, atol=1e-5)


def test_causal_when_asked_for(mistral, mistral_clusters):
    causal = lens.LENS.build(mistral, mistral_clusters, bidirectional=False)
    ids = torch.randint(10, 100, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 5] = 7
    mask = torch.ones_like(ids)
    difference = (states(causal, ids, mask) - states(causal, changed, mask)).abs().amax(2)
    assert float(difference[:, :5].max()) == 0.0
    with pytest.raises(ValueError, match="is causal although bidirectional=True"):
        check_attention(causal.model.backbone, True)


def test_a_decoder_loses_its_sliding_window(mistral, tmp_path):
    folder = shutil.copytree(mistral, tmp_path / "windowed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 3}))
    windowed, _, _ = load_backbone(str(folder))
    plain, _, _ = load_backbone(str(mistral))
    ids = torch.randint(10, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            hidden_states(windowed, ids, torch.ones_like(ids)), hidden_states(plain, ids, torch.ones_like(ids))
        )


def test_vocabulary_head_of_a_decoder_is_its_lm_head(mistral):
    model = lens.LENS.build(mistral)
    reference = AutoModelForCausalLM.from_pretrained(mistral)
    torch.testing.assert_close(model.model.head.weight, reference.lm_head.weight)
    assert (model.config.head, model.config.dimensions) == ("vocabulary", reference.config.vocab_size)


def test_vocabulary_head_of_bert_is_its_mlm_head(bert_mlm):
    """SPLADE by hand: log1p(relu(MLM logits)), maximum over all tokens, from transformers' own masked LM."""
    model = lens.LENS.build(bert_mlm, positions="all", normalize=False)
    assert (model.config.transform, model.config.bias) == ("mlm", True)
    reference = AutoModelForMaskedLM.from_pretrained(bert_mlm).eval()
    batch = model.tokenizer("the quick fox jumps", return_tensors="pt")
    with torch.inference_mode():
        logits = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
    expected = torch.log1p(torch.relu(logits)).amax(0).numpy()
    np.testing.assert_allclose(model.encode_documents(["the quick fox jumps"])[0], expected, atol=1e-5)


def mean_clusters(folder, rows, labels):
    """A clusters folder whose centroids are the means of the rows (V, D) of each label; -1 belongs to none."""
    folder.mkdir()
    used = labels >= 0
    sums = torch.zeros(int(labels.max()) + 1, rows.shape[1]).index_add_(0, labels[used].long(), rows[used])
    centroids = sums / torch.bincount(labels[used].long())[:, None]
    save_file({"centroids": centroids, "labels": labels}, folder / "clusters.safetensors")
    return folder


@pytest.fixture
def biased(bert_mlm, tmp_path):
    """A masked LM with a bias that is not zero, its folder, and one of clusters whose centroids are mean rows."""
    reference = AutoModelForMaskedLM.from_pretrained(bert_mlm).eval()
    with torch.no_grad():
        reference.cls.predictions.bias.normal_()
    reference.save_pretrained(shutil.copytree(bert_mlm, tmp_path / "base"))
    rows = reference.get_output_embeddings().weight.detach()
    labels = torch.arange(len(rows), dtype=torch.int32) % 24
    labels[:5] = -1
    return reference, tmp_path / "base", mean_clusters(tmp_path / "clusters", rows, labels), labels


def test_clusters_of_an_mlm_head_have_the_mean_logits_of_their_tokens(biased):
    reference, base, clusters, labels = biased
    model = lens.LENS.build(base, clusters, transform="mlm", positions="all", normalize=False)
    assert model.config.bias
    batch = model.tokenizer("the quick fox jumps", return_tensors="pt")
    with torch.inference_mode():
        logits = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
    means = torch.stack([logits[:, labels == k].mean(1) for k in range(24)], 1)
    expected = torch.log1p(torch.relu(means)).amax(0).numpy()
    np.testing.assert_allclose(model.encode_documents(["the quick fox jumps"])[0], expected, atol=1e-5)


def test_the_bias_of_clusters_survives_half_precision_and_goes_where_it_is_refused(biased):
    reference, base, clusters, labels = biased
    bias = reference.cls.predictions.bias.detach()
    expected = torch.stack([bias[labels == k].mean() for k in range(24)])
    model = lens.LENS.build(base, clusters, transform="mlm", dtype="bfloat16")
    assert model.config.bias
    torch.testing.assert_close(model.model.head.bias.detach().float(), expected, atol=0.02, rtol=0.02)
    without = lens.LENS.build(base, clusters, transform="mlm", bias=False)
    assert (without.config.bias, without.model.head.bias) == (False, None)
    torch.testing.assert_close(
        without.model.head.transform.dense.weight, reference.cls.predictions.transform.dense.weight
    )
    vocabulary = lens.LENS.build(base, bias=False)
    assert (vocabulary.config.bias, vocabulary.model.head.bias, vocabulary.config.transform) == (False, None, "mlm")
    tensors = load_file(clusters / "clusters.safetensors")
    tensors["centroids"] *= 1.2  # not the means, however coarse the numbers
    save_file(tensors, clusters / "clusters.safetensors")
    assert not lens.LENS.build(base, clusters, transform="mlm", dtype="bfloat16").config.bias


@pytest.mark.parametrize("fields", [{"transform": "mlm"}, {}, {"whiten": True}])
def test_clusters_of_another_width_are_refused(bert_mlm, bert_clusters, tmp_path, fields):
    clusters = shutil.copytree(bert_clusters, tmp_path / "clusters")
    tensors = load_file(clusters / "clusters.safetensors")
    wide = torch.cat([tensors["centroids"], tensors["centroids"]], 1)
    save_file({**tensors, "centroids": wide}, clusters / "clusters.safetensors")
    message = rf"the head is {wide.shape[1]} wide but the backbone .* has hidden size {wide.shape[1] // 2}: take clust"
    with pytest.raises(ValueError, match=message):
        lens.LENS.build(bert_mlm, clusters, **fields)


def test_other_centroids_take_the_transform_of_an_mlm_head_alone(bert, bert_mlm, bert_clusters):
    model = lens.LENS.build(bert_mlm, bert_clusters, transform="mlm")
    reference = AutoModelForMaskedLM.from_pretrained(bert_mlm).cls.predictions.transform
    torch.testing.assert_close(model.model.head.transform.dense.weight, reference.dense.weight)
    torch.testing.assert_close(model.model.head.transform.norm.bias, reference.LayerNorm.bias)
    assert not model.config.bias
    assert not lens.LENS.build(bert, bert_clusters, transform="mlm").config.bias  # no head to take along


def test_save_and_load_give_identical_embeddings(model, tmp_path):
    model.save(tmp_path / "model")
    assert not list(tmp_path.glob("model/*.bin"))
    assert not list(tmp_path.glob("model/*.pt*"))
    loaded = lens.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.encode_documents(TEXTS), model.encode_documents(TEXTS))
    np.testing.assert_array_equal(loaded.encode_queries(TEXTS), model.encode_queries(TEXTS))
    assert loaded.config == model.config


def test_saved_with_its_backbone_it_needs_no_other_folder(mistral, mistral_clusters, tmp_path):
    base = shutil.copytree(mistral, tmp_path / "base")
    model = lens.LENS.build(base, mistral_clusters)
    model.save(tmp_path / "whole", include_backbone=True)
    model.save(tmp_path / "thin")
    expected = model.encode_documents(TEXTS)
    shutil.move(base, tmp_path / "moved")
    np.testing.assert_array_equal(lens.load(tmp_path / "whole").encode_documents(TEXTS), expected)
    with pytest.raises(FileNotFoundError, match="pass base= with its new place"):
        lens.load(tmp_path / "thin")
    np.testing.assert_array_equal(lens.load(tmp_path / "thin", base=str(tmp_path / "moved")).encode(TEXTS), expected)


def test_adapter_and_token_rows_survive(mistral, mistral_clusters, tmp_path):
    model = lens.LENS.build(mistral, mistral_clusters)
    ids = model.tokenizer.convert_tokens_to_ids(["<instruct>", "<query>", "<response>"])
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ids})
    model.model.backbone = get_peft_model(model.model.backbone, config)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    model.model.eval()
    model.save(tmp_path / "lora")
    files = {file.name for file in (tmp_path / "lora").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    loaded = lens.load(tmp_path / "lora")
    queries = loaded.encode_queries(TEXTS, instruction="find")
    np.testing.assert_array_equal(queries, model.encode_queries(TEXTS, instruction="find"))
    untrained = lens.LENS.build(mistral, mistral_clusters).encode_queries(TEXTS, instruction="find")
    assert np.abs(queries - untrained).max() > 1e-3


def test_a_model_saved_from_elsewhere_finds_its_backbone(bert, bert_clusters, tmp_path, monkeypatch):
    monkeypatch.chdir(bert.parent)
    model = lens.LENS.build(bert.name, bert_clusters)
    model.save(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(lens.load("m").encode(TEXTS), model.encode(TEXTS))


def test_saving_never_overwrites_unasked(model, tmp_path):
    model.save(tmp_path / "m")
    before = {file: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    with pytest.raises(FileExistsError, match="is not empty"):
        model.save(tmp_path / "m")
    assert {file: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before
    model.save(tmp_path / "m", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds no lens.json"):
        model.save(tmp_path / "other", overwrite=True)


@pytest.fixture
def artifact(bert, bert_clusters, tmp_path):
    lens.LENS.build(bert, bert_clusters).save(tmp_path / "a")
    return tmp_path / "a"


def edit_config(folder, **changes):
    path = folder / "lens.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damaged_artifacts_are_named(artifact, bert, tmp_path):
    head = artifact / "head.safetensors"
    whole = head.read_bytes()
    head.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="head.safetensors is not a whole safetensors file"):
        lens.load(artifact)
    head.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        lens.load(artifact)
    head.write_bytes(whole)
    tensors = load_file(head)
    save_file({**tensors, "centroids": tensors["centroids"][:, :5].contiguous()}, head)
    with pytest.raises(ValueError, match=r"centroids should have shape \(24, 32\), found \(24, 5\)"):
        lens.load(artifact)
    spoiled = tensors["centroids"].clone()
    spoiled[3, 3] = float("nan")
    save_file({**tensors, "centroids": spoiled}, head)
    with pytest.raises(ValueError, match="centroids holds NaN"):
        lens.load(artifact)
    save_file({**tensors, "labels": tensors["labels"] + 1}, head)
    with pytest.raises(ValueError, match="labels must be whole numbers from -1 to 23"):
        lens.load(artifact)
    head.unlink()
    with pytest.raises(FileNotFoundError, match="head.safetensors is missing"):
        lens.load(artifact)
    with pytest.raises(FileNotFoundError, match="no LENS model folder"):
        lens.load(bert)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        lens.load(tmp_path / "nothing" / "here")


def test_configuration_of_an_artifact_is_checked(artifact):
    edit_config(artifact, format_version=99, lens_version="9.1")
    with pytest.raises(ValueError, match=r"format version 99 \(written by lens 9.1\).*pip install --upgrade"):
        lens.load(artifact)
    edit_config(artifact, format_version=1, poolling="max")
    with pytest.raises(ValueError, match="unknown field 'poolling'.*did you mean 'pooling'"):
        lens.load(artifact)


def test_nan_in_the_backbone_is_named(bert, bert_clusters, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "layer.1" in n and tensors[n].dim() == 2)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        lens.LENS.build(folder, bert_clusters)


def test_truncated_backbone_is_named(bert, bert_clusters, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "cut")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])
    with pytest.raises(ValueError, match="not whole safetensors"):
        lens.LENS.build(folder, bert_clusters)


def test_head_of_another_width_is_refused(bert, tmp_path):
    clusters = save_clusters(tmp_path / "wide", 300, width=48)
    with pytest.raises(ValueError, match="48 wide but the backbone .* hidden size 32"):
        lens.LENS.build(bert, clusters)
    with pytest.raises(ValueError, match="document_max_length=600 is more than the 128 positions"):
        lens.LENS.build(bert, save_clusters(tmp_path / "long", 300), document_max_length=600)
    with pytest.raises(FileNotFoundError, match="clusters folder"):
        lens.LENS.build(bert, tmp_path / "none")
    with pytest.raises(ValueError, match="unknown field 'poling'.*'pooling'"):
        lens.LENS.build(bert, clusters, poling="max")
    with pytest.raises(ValueError, match="positions='shifted' contradicts"):
        lens.LENS.build(bert, save_clusters(tmp_path / "fit", 300), positions="shifted")


def test_equals_the_released_code_on_texts_that_fit(tmp_path):
    """Golden embeddings that the released LENS code computed, on texts that fit (longer ones keep EOS here)."""
    golden = need(SHARED / "golden" / "official-tiny")
    with torch.serialization.safe_globals([torch.nn.Linear]):
        linear = torch.load(golden / "hub" / "lm_head.pth", weights_only=True)
    texts = json.loads((golden / "texts.json").read_text())
    expected = np.load(golden / "embeddings.npz")
    tensors = {"centroids": linear.weight.detach(), "labels": torch.zeros(1503, dtype=torch.int32)}
    save_file(tensors, tmp_path / "clusters.safetensors")
    model = lens.LENS.build(golden / "hub", tmp_path)

    def whole(items):
        return [i for i, item in enumerate(items) if len(item.ids) < 512]

    fits = whole(model.text(texts["documents"]))
    assert len(fits) >= 15
    documents = model.encode_documents(texts["documents"])
    np.testing.assert_allclose(documents[fits], expected["documents_512"][fits], atol=1e-5)
    for number, instruction in enumerate(texts["instructions"]):
        fits = whole(model.text(texts["queries"], "query", instruction))
        assert len(fits) >= 10
        queries = model.encode_queries(texts["queries"], instruction=instruction)
        np.testing.assert_allclose(queries[fits], expected[f"queries_{number}_512"][fits], atol=1e-5)

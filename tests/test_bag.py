"""Queries as bags of tokens: by hand, over words and clusters, in every way that a model is used."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import SENTENCES, encoder_tokenizer

import lens
from lens.bag import bag, idf
from lens.bag import lay_out as lay_out_bags
from lens.cli import main
from lens.splade import idf as idf_of_splade

QUERIES = [
    "the fox and the dog",
    "",
    "copy the whole directory tree",
    "Ünïcode 日本語",
    "zzz the [SEP] the",
    *SENTENCES,
]
INSTRUCTION = "Find the lazy directory"


@pytest.fixture(scope="module", params=["words", "clusters"])
def model(request, bert_mlm, bert, bert_clusters):
    """A model whose queries are bags, with weights, over the vocabulary or over clusters."""
    options = {"query_encoder": "bag", "normalize": False, "query_max_length": 16}
    if request.param == "words":
        built = lens.LENS.build(bert_mlm, positions="all", **options)
    else:
        built = lens.LENS.build(bert, bert_clusters, **options)
    torch.manual_seed(3)
    built.model.head.weigh_queries(torch.rand(built.config.dimensions) + 0.5)
    return built


def by_hand(model, texts):
    """A loop over the text's own tokens."""
    labels, weights = model.model.head.labels.tolist(), model.model.head.query_weights.tolist()
    expected = np.zeros((len(texts), model.config.dimensions), dtype=np.float32)
    for row, text in enumerate(texts):
        for token in model.tokenizer.tokenize(text)[: model.config.query_max_length]:
            label = labels[model.tokenizer.convert_tokens_to_ids(token)]
            if label >= 0:
                expected[row, label] = weights[label]
    return expected


def test_a_bag_by_hand():
    """Tokens 0 and 3 share a dimension, token 1 has none, token 9 is not in the vocabulary."""
    labels = torch.tensor([2, -1, 0, 2], dtype=torch.int32)
    ids, offsets = torch.tensor([0, 0, 3, 1, 9, 2, 0]), torch.tensor([0, 4, 4, 7])
    expected = torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0]])
    assert torch.equal(bag(ids, offsets, labels, 4), expected)
    assert bag(ids[:0], torch.zeros(1, dtype=torch.long), labels, 4).shape == (0, 4)
    assert not bag(ids[:0], torch.zeros(3, dtype=torch.long), labels, 4).any()


def test_a_bag_never_waits_for_the_device():
    """Tensors of the meta device have no values, so that whoever asks for one is refused."""
    ids, offsets, labels = (torch.zeros(count, dtype=torch.long, device="meta") for count in (7, 4, 9))
    assert bag(ids, offsets, labels, 5).shape == (3, 5)


def test_inverse_document_frequencies_by_hand():
    tokenizer = encoder_tokenizer()
    texts = ["the fox the fox", "the dog", "the tree", ""]
    fox, dog, the, tree, lazy = tokenizer.convert_tokens_to_ids(["fox", "dog", "the", "tree", "lazy"])
    found = idf(iter(texts), tokenizer)
    assert found.shape == (len(tokenizer),)
    for token, count in ((the, 3), (fox, 1), (lazy, 0)):
        assert float(found[token]) == pytest.approx(math.log(1 + (4 - count + 0.5) / (count + 0.5)), abs=1e-6)
    labels = torch.full((len(tokenizer),), -1)
    labels[[fox, dog]], labels[[the, tree]] = 0, 1
    clusters = idf(texts, tokenizer, labels, dimensions=3)
    expected = [math.log(1 + (4 - n + 0.5) / (n + 0.5)) for n in (2, 3, 0)]
    np.testing.assert_allclose(clusters, expected, atol=1e-6)
    assert idf_of_splade is idf
    with pytest.raises(ValueError, match="no text was given"):
        idf([], tokenizer)
    with pytest.raises(TypeError, match="expected a list of texts"):
        idf("the fox", tokenizer)


def test_queries_are_their_bags_and_need_no_backbone(model, monkeypatch):
    expected = by_hand(model, QUERIES)
    assert (expected > 0).any(1).sum() == len(QUERIES) - 1
    documents = model.encode_documents(QUERIES)
    with monkeypatch.context() as patch:
        patch.setattr(model.model, "pooled_states", None)
        np.testing.assert_array_equal(model.encode_queries(QUERIES), expected)
        np.testing.assert_array_equal(model.encode_queries(QUERIES, INSTRUCTION), expected)
        np.testing.assert_array_equal(model.encode_queries(QUERIES, output="csr").toarray(), expected)
        np.testing.assert_array_equal(model.encode_queries(QUERIES, batch_tokens=3), expected)
        assert model.encode_queries([]).shape == (0, model.config.dimensions)
        with pytest.raises(TypeError):
            model.encode_documents(["a"])
    assert np.abs(documents - expected).max() > 0.1


def test_queries_longer_than_the_limit_are_cut(model):
    text = " ".join(SENTENCES)
    np.testing.assert_array_equal(model.encode_queries([text]), by_hand(model, [text]))
    assert len(model.text([text], "query")[0].ids) == 16


def test_without_weights_every_token_counts_one(bert_mlm):
    found = lens.LENS.build(bert_mlm, query_encoder="bag").encode_queries(["the fox the"])
    assert sorted(found[found > 0]) == pytest.approx([2**-0.5, 2**-0.5])  # normalised


def test_no_backbone_limits_the_length_of_queries(bert_mlm, tmp_path):
    model = lens.LENS.build(bert_mlm, query_encoder="bag", query_max_length=1000)
    model.save(tmp_path / "model")
    text = " ".join(SENTENCES * 20)
    assert len(lens.load(tmp_path / "model").text([text], "query")[0].ids) == 1000
    assert len(model.text([text], "document")[0].ids) == 128
    with pytest.raises(ValueError, match="document_max_length=1000 is more than the 128 positions"):
        lens.LENS.build(bert_mlm, query_encoder="bag", document_max_length=1000)


def test_gradients_reach_the_weights_where_these_are_trained(model):
    head = model.model.head
    assert not head.query_weights.requires_grad
    inputs = lay_out_bags(model.text(QUERIES, "query")).inputs()
    assert not model.model(**inputs).requires_grad
    head.query_weights.requires_grad_()
    try:
        embeddings = model.model(**inputs)
        np.testing.assert_array_equal(embeddings.detach(), by_hand(model, QUERIES))
        upstream = torch.randn_like(embeddings)
        (found,) = torch.autograd.grad(embeddings, head.query_weights, upstream)
    finally:
        head.query_weights.requires_grad_(False)
    present = torch.from_numpy(by_hand(model, QUERIES) > 0)
    torch.testing.assert_close(found, (upstream * present).sum(0))


def test_saved_and_loaded_in_any_form(model, tmp_path):
    model.save(tmp_path / "saved")
    expected = by_hand(model, QUERIES)
    documents = model.encode_documents(QUERIES)
    again = lens.load(tmp_path / "saved")
    assert again.config.query_encoder == "bag"
    np.testing.assert_array_equal(again.encode_queries(QUERIES), expected)
    np.testing.assert_array_equal(again.encode_documents(QUERIES), documents)
    eight = lens.load(tmp_path / "saved", device="cpu", quantization="int8")
    np.testing.assert_array_equal(eight.encode_queries(QUERIES), expected)
    half = lens.load(tmp_path / "saved", dtype="bfloat16")
    np.testing.assert_allclose(half.encode_queries(QUERIES), expected, rtol=5e-3)
    packed = lens.load(tmp_path / "saved", packed=True)
    np.testing.assert_allclose(packed.encode_documents(QUERIES), documents, atol=1e-5)
    assert "bags of tokens" in (tmp_path / "saved" / "README.md").read_text()


def test_several_processes_give_the_same(model):
    with model.start_multi_process_pool(["cpu", "cpu"]) as pool:
        np.testing.assert_array_equal(model.encode_queries(QUERIES, pool=pool), by_hand(model, QUERIES))


def test_terms_explanations_and_the_command_line(model, tmp_path, capsys):
    query, document = "the fox", "the quick brown fox"
    explanation = model.explain(query, document, k=None)
    expected = model.similarity(by_hand(model, [query]), model.encode_documents([document]))[0, 0]
    assert explanation.score == pytest.approx(expected, abs=1e-5)
    assert 1 <= len(explanation.matches) <= 2
    model.save(tmp_path / "model")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"{text}\n" for text in SENTENCES))
    command = ["search", query, "--model", str(tmp_path / "model"), "--corpus", str(corpus), "--json", "-k", "7"]
    assert main(command) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = model.similarity(by_hand(model, [query]), model.encode_documents(SENTENCES))[0]
    assert [hit["score"] for hit in found] == pytest.approx(sorted(scores[scores > 0], reverse=True), abs=1e-5)


def test_sentence_transformers_encodes_queries_by_their_task(model, tmp_path):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer, SparseEncoder

    model.save(tmp_path / "saved")
    expected, documents = by_hand(model, QUERIES), model.encode_documents(QUERIES)
    for form in (SentenceTransformer, SparseEncoder):
        theirs = form(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
        options = {"convert_to_sparse_tensor": False} if form is SparseEncoder else {"convert_to_tensor": True}
        np.testing.assert_array_equal(theirs.encode_query(QUERIES, **options).numpy(), expected)
        np.testing.assert_allclose(theirs.encode_document(QUERIES, **options).numpy(), documents, atol=1e-6)
        np.testing.assert_array_equal(theirs.encode(QUERIES, prompt_name="query", **options).numpy(), expected)
    kept = theirs.encode_query(QUERIES[:1], max_active_dims=1, convert_to_sparse_tensor=False).numpy()
    assert (kept > 0).sum() == 1


def test_queries_and_documents_in_one_batch_of_sentence_transformers(mistral, mistral_clusters, tmp_path):
    """As where a framework glues the prompt to the text: with the lens prompt a text tells what it is."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    ours = lens.LENS.build(mistral, mistral_clusters, query_encoder="bag")
    ours.save(tmp_path / "saved")
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    texts = ["the lazy dog", "<query>copy a tree", "", "<instruct>Find\n<query>wait until", "join the threads"]
    queries = ours.encode_queries(["", "copy a tree", "", "wait until", ""])
    documents = ours.encode_documents(texts)
    expected = np.stack([(queries if "<query>" in text else documents)[row] for row, text in enumerate(texts)])
    np.testing.assert_allclose(theirs.encode(texts), expected, atol=1e-6)
    assert (expected > 0).any(1).tolist() == [True, True, False, True, True]


def test_weights_that_do_not_fit_are_refused(model, bert_mlm):
    head, count = model.model.head, model.config.dimensions
    with pytest.raises(ValueError, match=rf"query weights must be \({count},\).*found \(3,\)"):
        head.weigh_queries(torch.ones(3))
    with pytest.raises(ValueError, match="query weights hold NaN"):
        head.weigh_queries(torch.full((count,), float("nan")))
    with pytest.raises(ValueError, match="no bags of tokens: build it with query_encoder='bag'"):
        lens.LENS.build(bert_mlm).model.head.weigh_queries(torch.ones(count))


def test_a_model_without_its_query_weights_is_refused(model, tmp_path):
    from safetensors.torch import load_file, save_file

    model.save(tmp_path / "saved")
    file = tmp_path / "saved" / "head.safetensors"
    tensors = load_file(file)
    del tensors["query_weights"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"head\.safetensors: expected tensors .*query_weights missing"):
        lens.load(tmp_path / "saved")

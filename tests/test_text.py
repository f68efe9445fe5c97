"""Pooling spans by hand, prompts, truncation, and texts that cannot be encoded."""

from __future__ import annotations

import pytest

import lens
from lens.text import SPECIAL_TOKENS, TextProcessor


@pytest.fixture(scope="module")
def decoder(mistral, mistral_clusters):
    return lens.LENS.build(mistral, mistral_clusters, query_max_length=24, document_max_length=16)


@pytest.fixture(scope="module")
def encoder(bert, bert_clusters):
    return lens.LENS.build(bert, bert_clusters, query_max_length=24, document_max_length=16)


def tokens_of(model, ids):
    return model.tokenizer.convert_ids_to_tokens(ids)


def pooled(model, item):
    return tokens_of(model, item.ids[item.start : item.end])


def test_document_of_a_decoder_is_pooled_from_bos_to_the_third_last(decoder):
    (item,) = decoder.text(["the quick fox"])
    tokens = tokens_of(decoder, item.ids)
    assert tokens[0] == "<s>"
    assert tokens[-1] == "</s>"
    assert (item.start, item.end) == (0, len(tokens) - 2)
    # Each pooled position predicts the token after it, and together they predict exactly the content.
    content = decoder.tokenizer("the quick fox", add_special_tokens=False)["input_ids"]
    assert item.ids[item.start + 1 : item.end + 1] == content


def test_query_of_a_decoder_is_pooled_from_the_query_token_to_the_third_last(decoder):
    (item,) = decoder.text(["the fox"], "query", "find it")
    tokens = tokens_of(decoder, item.ids)
    assert tokens[:2] == ["<s>", "<instruct>"]
    start = tokens.index("<query>")
    assert (item.start, item.end) == (start, len(tokens) - 2)
    assert pooled(decoder, item)[0] == "<query>"
    content = decoder.tokenizer("the fox", add_special_tokens=False)["input_ids"]
    assert item.ids[item.start + 1 : item.end + 1] == content


def test_query_without_instruction_and_document_with_one(decoder):
    (bare,) = decoder.text(["fox"], "query")
    assert tokens_of(decoder, bare.ids)[:2] == ["<s>", "<query>"]
    (symmetric,) = decoder.text(["fox"], "document", "group it")
    assert symmetric.ids == decoder.text(["fox"], "query", "group it")[0].ids
    assert pooled(decoder, symmetric)[0] == "<query>"


def test_markers_inside_a_text_do_not_move_the_span(decoder):
    (item,) = decoder.text(["a <query> b"], "query", "x")
    tokens = tokens_of(decoder, item.ids)
    assert tokens.count("<query>") == 2
    assert item.start == tokens.index("<query>")


def test_encoder_pools_its_content_tokens(encoder):
    (item,) = encoder.text(["the fox"])
    tokens = tokens_of(encoder, item.ids)
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
    assert (item.start, item.end) == (1, len(tokens) - 1)
    (query,) = encoder.text(["the fox"], "query", "copy tree")
    assert pooled(encoder, query) == pooled(encoder, item)
    assert len(query.ids) > len(item.ids)


def test_plain_instruction_before_a_byte_level_text(mistral, mistral_clusters):
    """The space after the instruction merges with the first word, which is pooled whole all the same."""
    model = lens.LENS.build(mistral, mistral_clusters, prompt="plain", positions="all")
    processor = TextProcessor(model.tokenizer, model.config.replace(positions="content"))
    for text in ("the", "fox jumps", " spaced"):
        (item,) = processor([text], "query", "parse a date")
        assert model.tokenizer.decode(item.ids[item.start : item.end]).strip() == text.strip()
        assert processor.prefix == item.ids[:1]


def test_all_positions_and_last_pooling(bert, bert_clusters, mistral, mistral_clusters):
    everything = lens.LENS.build(bert, bert_clusters, positions="all")
    (item,) = everything.text(["the fox"])
    assert (item.start, item.end) == (0, len(item.ids))
    last = lens.LENS.build(mistral, mistral_clusters, pooling="last")
    (item,) = last.text(["the fox"])
    assert pooled(last, item) == ["</s>"]


def test_long_texts_lose_their_end_and_keep_eos(decoder, encoder):
    for model, end in ((decoder, "</s>"), (encoder, "[SEP]")):
        (item,) = model.text(["fox dog " * 100])
        assert len(item.ids) == 16
        assert tokens_of(model, item.ids)[-1] == end
    (item,) = decoder.text(["fox dog " * 100], "query", "find")
    assert len(item.ids) == 24
    assert item.end == 22


def test_empty_texts_have_empty_spans(decoder, encoder):
    for model in (decoder, encoder):
        (item,) = model.text([""])
        assert item.end == item.start
    assert encoder.text(["  \n "])[0].end == 0
    assert decoder.text([]) == []


def test_instruction_that_leaves_no_room(decoder):
    with pytest.raises(ValueError, match="query_max_length=24 leaves: shorten it"):
        decoder.text(["x"], "query", "copy the whole directory tree " * 9)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("one string", TypeError, r"write \[text\]"),
        (["a", None], TypeError, r"texts\[1\] must be a str, found NoneType"),
        ([b"a"], TypeError, r"texts\[0\] must be a str, found bytes"),
        (["ok", "bad \ud800 end"], ValueError, r"texts\[1\] holds a lone surrogate at character 4"),
    ],
)
def test_texts_that_cannot_be_encoded(decoder, texts, error, message):
    with pytest.raises(error, match=message):
        decoder.encode_documents(texts)


def test_collate_pads_on_the_right(encoder):
    batch = encoder.text.collate(encoder.text(["the fox", "the quick brown fox jumps"]))
    assert batch.input_ids.shape == batch.attention_mask.shape
    lengths = batch.attention_mask.sum(1).tolist()
    assert batch.attention_mask[0, : lengths[0]].all()
    assert not batch.attention_mask[0, lengths[0] :].any()
    assert batch.pool_offsets.diff().tolist() == [length - 2 for length in lengths]
    width = batch.input_ids.shape[1]
    places = [row * width + 1 + i for row, length in enumerate(lengths) for i in range(length - 2)]
    assert batch.pooled.tolist() == places


def test_lens_prompt_needs_its_tokens(encoder):
    with pytest.raises(ValueError, match="lacks"):
        TextProcessor(encoder.tokenizer, encoder.config.replace(prompt="lens"))
    assert SPECIAL_TOKENS[0] not in encoder.tokenizer.get_vocab()

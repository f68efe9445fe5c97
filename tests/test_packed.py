"""Texts without padding: the states, embeddings and gradients of padded batches, and nothing from text to text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import SENTENCES
from test_models import ALL, DECODERS, backbones  # noqa: F401
from test_step import LORA, assert_same, examples, step_of  # noqa: F401
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

import lens
from lens.backbone import hidden_states, load_backbone
from lens.packed import (
    IMPLEMENTATION,
    UNLIMITED,
    can_pack,
    choose_packed,
    packed_attention,
    packed_states,
    packing_limit,
)
from lens.text import token_batches
from train.build import build
from train.config import Recipe
from train.states import compute_states, keys_of
from train.top import TopLayers

LENGTHS = [23, 23, 14, 9, 9, 9, 1]
OTHER_ORDER = [9, 1, 23, 14, 9, 23, 9]


def texts_of(lengths=LENGTHS, seed=0):
    """Packed ids (T,), their offsets, and the texts."""
    ids = torch.randint(10, 250, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return ids, torch.tensor([0, *lengths]).cumsum(0), list(torch.split(ids, lengths))


def one_by_one(backbone, texts):
    """States (T, D), every text by itself: no padding and nothing that it could see."""
    return torch.cat([hidden_states(backbone, text[None], torch.ones_like(text[None]))[0] for text in texts])


def padded(backbone, texts):
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return hidden_states(backbone, pad_sequence(texts, batch_first=True), mask)[mask.bool()]


@pytest.mark.parametrize(
    ("name", "bidirectional"), [*((name, True) for name in ALL), *((name, False) for name in DECODERS)]
)
def test_packed_states_are_those_of_texts_by_themselves(name, bidirectional, backbones):  # noqa: F811
    backbone, _, _ = load_backbone(str(backbones(name)[0]), bidirectional=bidirectional)
    backbone.eval()
    if name == "gemma2":  # its attention logits are capped, which sdpa cannot do
        assert packing_limit(backbone) == 0
        assert backbone.config._attn_implementation == "eager"
        return
    assert packing_limit(backbone) == UNLIMITED
    for lengths in (LENGTHS, OTHER_ORDER, [5]):
        ids, cu_seqlens, texts = texts_of(lengths)
        with torch.no_grad():
            found = packed_states(backbone, ids, cu_seqlens, lengths)
            torch.testing.assert_close(found, one_by_one(backbone, texts), atol=2e-5, rtol=1e-4)
    with torch.no_grad():  # one text changes, and no other
        ids, cu_seqlens, texts = texts_of()
        found = packed_states(backbone, ids, cu_seqlens, LENGTHS)
        for place in range(len(LENGTHS)):
            inside = torch.zeros(len(ids), dtype=torch.bool)
            inside[cu_seqlens[place] : cu_seqlens[place + 1]] = True
            other = packed_states(backbone, torch.where(inside, (ids + 50) % 250, ids), cu_seqlens, LENGTHS)
            assert torch.equal(other[~inside], found[~inside])
            assert ((other - found)[inside].abs().amax(1) > 1e-5).any()


def test_padding_tokens_inside_a_text_count_as_they_do_in_padded_batches(backbones):  # noqa: F811
    backbone, _, _ = load_backbone(str(backbones("roberta")[0]))
    ids, cu_seqlens, _ = texts_of()
    ids[[2, 30, 50]] = backbone.config.pad_token_id
    texts = list(torch.split(ids, LENGTHS))
    with torch.no_grad():
        found = packed_states(backbone.eval(), ids, cu_seqlens, LENGTHS)
        torch.testing.assert_close(found, one_by_one(backbone, texts), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "bert", "modernbert"])
def test_flash_attention_gets_the_texts_offsets(name, backbones, monkeypatch):  # noqa: F811
    seen = []

    def flash(module, query, key, value, attention_mask, **options):
        seen.append((attention_mask, options))
        layout = options.pop("cu_seq_lens_q").expand(1, 1, options["max_length_q"], -1)
        wanted = ("dropout", "scaling", "is_causal", "sliding_window")
        return packed_attention(
            module, query, key, value, layout, **{k: options[k] for k in wanted if options.get(k) is not None}
        )

    backbone, _, _ = load_backbone(str(backbones(name)[0]))
    ids, cu_seqlens, texts = texts_of()
    with torch.no_grad():
        expected = one_by_one(backbone.eval(), texts)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    monkeypatch.setattr("lens.packed._probe_limit", lambda *_, **__: UNLIMITED)  # which compares with padded batches
    backbone.config._attn_implementation = "flash_attention_2"
    with torch.no_grad():
        found = packed_states(backbone, ids, cu_seqlens, LENGTHS)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert len(seen) == backbone.config.num_hidden_layers
    for mask, options in seen:
        assert mask is None
        assert options["cu_seq_lens_k"].tolist() == [0, 23, 46, 60, 69, 78, 87, 88]
        assert options["cu_seq_lens_k"].dtype == torch.int32
        assert options["max_length_q"] == options["max_length_k"] == 23


def broken(monkeypatch, change):
    """Makes the attention function get other offsets than there are."""

    def wrong(module, query, key, value, attention_mask, **options):
        if attention_mask is not None and attention_mask.dtype == torch.int32:
            attention_mask = change(attention_mask)
        return packed_attention(module, query, key, value, attention_mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, IMPLEMENTATION, wrong)


def boom(layout):
    raise TypeError("unexpected mask")


@pytest.mark.parametrize("change", [lambda layout: layout[..., [0, -1]], boom, lambda layout: None])
def test_a_backbone_that_mixes_texts_gets_padded_batches(change, bert, bert_clusters, monkeypatch):
    expected = lens.LENS.build(bert, bert_clusters, packed=False).encode(SENTENCES)
    broken(monkeypatch, change)
    model = lens.LENS.build(bert, bert_clusters)
    assert packing_limit(model.model.backbone) == 0
    assert model.model.backbone.config._attn_implementation == "sdpa"
    assert (model.encode(SENTENCES) == expected).all()
    with pytest.raises(ValueError, match="packed=True contradicts the backbone BertModel: its attention does not keep"):
        lens.LENS.build(bert, bert_clusters, packed=True)
    ids, cu_seqlens, _ = texts_of()
    with pytest.raises(ValueError, match="Leave packed out"):
        packed_states(model.model.backbone, ids, cu_seqlens, LENGTHS)


def test_a_window_beyond_the_probe_bounds_the_texts(tmp_path, monkeypatch):
    from conftest import save_mistral

    folder = save_mistral(tmp_path / "windowed", sliding_window=16)
    backbone, _, _ = load_backbone(str(folder), bidirectional=False)
    assert packing_limit(backbone) == UNLIMITED  # the probe reaches across it
    monkeypatch.setattr("lens.packed._PROBED_WINDOW", 8)
    backbone, _, _ = load_backbone(str(folder), bidirectional=False)
    assert packing_limit(backbone) == 16
    assert can_pack(backbone, 16)
    assert not can_pack(backbone, 17)
    with pytest.raises(ValueError, match="window of 16 tokens is shorter than texts of 17"):
        can_pack(backbone, 17, required=True)


@pytest.mark.parametrize("folder", ["mistral", "bert"])
def test_embeddings_do_not_depend_on_packing_or_company(folder, request):
    path, clusters = request.getfixturevalue(folder), request.getfixturevalue(f"{folder}_clusters")
    model = lens.LENS.build(path, clusters, packed=True)
    texts = [*SENTENCES, "", "fox", " ".join(SENTENCES[:3]), "fox"]
    found = model.encode(texts, output="torch")
    plain = lens.LENS.build(path, clusters, packed=False)
    torch.testing.assert_close(found, plain.encode(texts, output="torch"), atol=1e-5, rtol=1e-4)
    for tokens in (1, 40):
        torch.testing.assert_close(
            model.encode(texts, output="torch", batch_tokens=tokens), found, atol=1e-5, rtol=1e-4
        )
    for i, text in enumerate(texts):
        torch.testing.assert_close(model.encode([text], output="torch")[0], found[i], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.encode(texts[::-1], output="torch").flip(0), found, atol=1e-5, rtol=1e-4)


def test_what_is_chosen_when_nothing_is_asked_for(mistral, monkeypatch):
    backbone, _, _ = load_backbone(str(mistral))
    assert choose_packed(backbone, 100, None, half=False)
    assert not choose_packed(backbone, 100, False, half=False)
    gpu = SimpleNamespace(device=torch.device("cuda"), requires_grad=True)
    monkeypatch.setattr(type(backbone), "parameters", lambda self: iter([gpu]))
    assert choose_packed(backbone, 100, None, half=True)
    assert not choose_packed(backbone, 100, None, half=False)  # many small kernels instead of one
    backbone.config.attention_dropout = 0.1
    assert not choose_packed(backbone, 100, None, half=True)
    assert choose_packed(backbone, 100, True, half=True)
    gpu.requires_grad = False
    assert choose_packed(backbone, 100, None, half=True)


def test_packed_batches_hold_real_tokens_only(bert, bert_clusters):
    model = lens.LENS.build(bert, bert_clusters)
    tokens = model.text(["the quick brown fox", "", "a lexicon"])
    batch = model.text.pack(tokens)
    assert batch.input_ids.tolist() == [i for item in tokens for i in item.ids]
    assert batch.cu_seqlens.diff().tolist() == [len(item.ids) for item in tokens]
    assert list(batch.lengths) == [len(item.ids) for item in tokens]
    pooled = [i for item in tokens for i in item.ids[item.start : item.end]]
    assert batch.input_ids[batch.pooled].tolist() == pooled
    assert batch.pool_offsets.diff().tolist() == [item.end - item.start for item in tokens]
    padded = model.text.collate(tokens)
    assert padded.input_ids.flatten()[padded.pooled].tolist() == pooled
    assert torch.equal(padded.pool_offsets, batch.pool_offsets)
    lengths = [3, 9, 1, 4, 4, 20, 2]
    assert token_batches(lengths, 10, packed=True) == [[5], [1], [3, 4], [0, 6, 2]]
    assert token_batches(lengths, 10) == [[5], [1], [3, 4], [0, 6, 2]]
    assert token_batches([6, 2, 2], 10, packed=True) == [[0, 1, 2]]
    assert token_batches([6, 2, 2], 10) == [[0], [1, 2]]


FULL = {"backbone": "full", "train_head": True}


@pytest.mark.parametrize(
    ("settings", "budget", "caching"),
    [
        (LORA, None, "checkpoints"),
        ({**LORA, "gradient_checkpointing": True}, 60, "checkpoints"),
        ({**LORA, "gradient_checkpointing": True}, 60, "passes"),
        ({**LORA, "bidirectional": False}, 60, "checkpoints"),
        ({**FULL, "gradient_checkpointing": True}, None, "checkpoints"),
        (FULL, 60, "passes"),
    ],
)
def test_gradients_are_those_of_padded_batches(settings, budget, caching, step_of, mistral, mistral_clusters):  # noqa: F811
    settings = {"lora_dropout": 0.0, **settings}
    whole = step_of(mistral, mistral_clusters, None, **settings)
    packed = step_of(mistral, mistral_clusters, budget, caching=caching, packed=True, **settings)
    assert (packed[2] > 2) == (budget is not None)
    assert_same(whole, packed, 1e-4)


@pytest.mark.parametrize("caching", ["checkpoints", "passes"])
def test_dropout_of_packed_texts_is_the_same_in_the_second_pass(caching, step_of, bert, bert_clusters):  # noqa: F811
    settings = {"backbone": "full", "train_head": True, "packed": True}  # dropout inside the attention, too
    kept = step_of(bert, bert_clusters, 60, caching="none", **settings)
    again = step_of(bert, bert_clusters, 60, caching=caching, **settings)
    assert kept[2] > 1
    assert_same(kept, again, 1e-5)
    assert torch.equal(kept[3], again[3])


def test_lora_and_gradient_checkpointing_reach_the_attention_of_every_family(backbones):  # noqa: F811
    for name in ("gemma3", "roberta", "modernbert"):
        folder, clusters = backbones(name)
        grads = []
        for packed in (True, False):
            torch.manual_seed(0)
            recipe = Recipe(
                base=str(folder), data=("none",), output="none", clusters=str(clusters), lora_r=4, lora_dropout=0.0,
                lora_targets=("all-linear",), gradient_checkpointing=True,
                **({"query_max_length": 64, "document_max_length": 64} if name == "roberta" else {}),
            )  # fmt: skip
            model, _ = build(recipe)
            backbone = model.backbone.train()
            for module in backbone.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                if isinstance(getattr(module, "attention_dropout", None), float):
                    module.attention_dropout = 0.0
            ids, cu_seqlens, texts = texts_of()
            run = packed_states(backbone, ids, cu_seqlens, LENGTHS) if packed else padded(backbone, texts)
            (run * torch.randn(run.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
            grads.append({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        assert len(grads[0]) > 8
        largest = max(grad.norm() for grad in grads[1].values())
        for key, grad in grads[1].items():
            assert (grad - grads[0][key]).norm() <= 1e-4 * (grad.norm() + 1e-3 * largest), (name, key)


def test_compiled_layers_take_packed_texts(mistral):
    backbone, _, _ = load_backbone(str(mistral))
    assert packing_limit(backbone.eval()) == UNLIMITED
    cases = [texts_of(lengths) for lengths in (LENGTHS, OTHER_ORDER)]
    with torch.no_grad():
        expected = [one_by_one(backbone, texts) for _, _, texts in cases]
        for layer in backbone.layers:  # traced as by compile_layers, but without its minute of C++
            layer.compile(dynamic=True, backend="aot_eager")
        for (ids, cu_seqlens, texts), states in zip(cases, expected, strict=True):
            found = packed_states(backbone, ids, cu_seqlens, [len(text) for text in texts])
            torch.testing.assert_close(found, states, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("folder", ["mistral", "bert"])
def test_stored_states_and_last_layers_are_those_of_padded_batches(folder, request, tmp_path):
    path, clusters = request.getfixturevalue(folder), request.getfixturevalue(f"{folder}_clusters")
    keys = keys_of([examples()])
    found = {}
    for packed in (False, True):
        model = lens.LENS.build(path, clusters)
        for parts in ("final", "below"):
            top = TopLayers(model.model.backbone, 1, packed) if parts == "below" else None
            file = tmp_path / f"{parts}-{packed}.f16"
            store = compute_states(model.model, model.text, keys, file, top, batch_tokens=60, packed=packed)
            batch = store.batch(keys[::-1])
            found[parts, packed] = batch["hidden" if top is None else "below"]
            if top is not None:
                states = found["below", False].clone().requires_grad_()
                found["top", packed] = top(states, batch["lengths"])
                found["gradient", packed] = torch.autograd.grad(found["top", packed].pow(3).sum(), states)[0]
    for parts in ("final", "below", "top", "gradient"):
        torch.testing.assert_close(found[parts, True], found[parts, False], atol=2e-3, rtol=2e-3)


def test_attention_refuses_what_it_cannot_keep_apart():
    query = torch.randn(1, 2, 6, 8)
    layout = torch.tensor([0, 2, 6], dtype=torch.int32).expand(1, 1, 4, -1)
    module = SimpleNamespace(is_causal=False)
    with pytest.raises(ValueError, match="no position bias"):
        packed_attention(module, query, query, query, layout, position_bias=torch.zeros(1, 2, 6, 6))
    with pytest.raises(ValueError, match="end at 6, but there are 5 tokens"):
        packed_attention(module, query[:, :, :5], query[:, :, :5], query[:, :, :5], layout)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_is_softmax_of_each_text(heads, causal, window):
    """Against a loop over texts, heads and tokens in float64."""
    lengths = [5, 5, 7, 0, 2, 2, 2]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, sum(lengths), count, 8, generator=generator).double().transpose(1, 2)
        for count in (4, heads, heads)
    )
    module = SimpleNamespace(is_causal=not causal, num_key_value_groups=4 // heads)
    found, _ = packed_attention(
        module, query, key, value, ends.expand(1, 1, 7, -1), scaling=0.3, is_causal=causal, sliding_window=window
    )
    for start, length in zip(ends.tolist(), lengths, strict=False):
        for head in range(4):
            for i in range(length):
                seen = [j for j in range(length) if (j <= i or not causal) and (window is None or abs(i - j) < window)]
                keys = key[0, head * heads // 4, [start + j for j in seen]]
                weights = torch.softmax(0.3 * keys @ query[0, head, start + i], 0)
                expected = weights @ value[0, head * heads // 4, [start + j for j in seen]]
                torch.testing.assert_close(found[0, start + i, head], expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_the_gpu_kernel_gets_each_text_and_its_window(causal, window, monkeypatch):
    """torch's varlen_attn, replaced by a loop over texts that reads the arguments as its documentation says."""

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa
        assert (max_q, max_k) == (7, 7)
        assert cu_q.tolist() == cu_k.tolist() == ends.tolist()
        out = torch.empty_like(query)
        for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
            places = torch.arange(end - start)
            ahead = places - places[:, None]
            left, right = (1 << 30 if side < 0 else side for side in window_size)
            seen = (ahead >= -left) & (ahead <= right)
            for head in range(query.shape[1]):
                scores = scale * query[start:end, head] @ key[start:end, head // 2].T
                weights = scores.masked_fill(~seen, -torch.inf).softmax(1)
                out[start:end, head] = weights @ value[start:end, head // 2]
        return out

    ends = torch.tensor([0, 5, 10, 17, 19], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 19, heads, 8, generator=generator).transpose(1, 2) for heads in (4, 2, 2)]
    module = SimpleNamespace(is_causal=causal, num_key_value_groups=2)
    options = {"scaling": 0.3, "sliding_window": window}
    layout = ends.expand(1, 1, 7, -1)
    expected, _ = packed_attention(module, *states, layout, **options)
    monkeypatch.setattr("lens.packed._has_kernel", lambda query, value: True)
    monkeypatch.setattr("lens.packed.varlen", SimpleNamespace(varlen_attn=varlen_attn))
    found, _ = packed_attention(module, *states, layout, **options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    again, _ = packed_attention(module, *states, layout, dropout=0.5, **options)  # which the kernel cannot do
    assert not torch.allclose(again, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's kernel for texts of any length needs a GPU")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [4, 2])
def test_the_gpu_kernel_gives_what_the_cpu_gives(heads, causal, window):
    """Values and gradients in bfloat16 against float32 on the CPU."""
    ends = torch.tensor([0, 5, 10, 17, 19], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    module = SimpleNamespace(is_causal=causal, num_key_value_groups=4 // heads)
    whole = [torch.randn(1, 19, count, 64, generator=generator).transpose(1, 2) for count in (4, heads, heads)]
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        leaves = [states.to(device, dtype).requires_grad_() for states in whole]
        layout = ends.to(device).expand(1, 1, 7, -1)
        out, _ = packed_attention(module, *leaves, layout, scaling=0.1, sliding_window=window)
        out.float().square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.float().cpu(), expected, atol=0.05, rtol=0.05)

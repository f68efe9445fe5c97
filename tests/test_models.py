"""Every family of backbones: bidirectional in truth, padded as unpadded, saved as loaded, trained by LoRA."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import SENTENCES, decoder_tokenizer, encoder_tokenizer, save_clusters
from transformers import AutoModel, AutoModelForCausalLM

import lens
import lens.attention
import lens.backbone
from lens.attention import compile_layers, layer_lists
from lens.backbone import check_attention, hidden_states, load_backbone
from lens.text import SPECIAL_TOKENS
from train.build import build
from train.config import Recipe

LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DECODER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WINDOW = {"sliding_window": 3, "head_dim": 8, "query_pre_attn_scalar": 8}
LOCAL_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
DECODERS = {
    "mistral": (hf.MistralConfig, {"sliding_window": 3}),
    "llama": (hf.LlamaConfig, {}),
    "smollm": (hf.LlamaConfig, {"tie_word_embeddings": True}),
    "smollm3": (hf.SmolLM3Config, {}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen2-windowed": (hf.Qwen2Config, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 8}),
    "gemma": (hf.GemmaConfig, {"head_dim": 8}),
    "gemma2": (hf.Gemma2Config, {**WINDOW, "attn_logit_softcapping": 2.0}),
    "gemma3": (
        hf.Gemma3TextConfig,
        {**WINDOW, "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": LOCAL_ROPE},
    ),
    "phi3": (hf.Phi3Config, {"sliding_window": 3}),
    "stablelm": (hf.StableLmConfig, {}),
    "gpt2": (hf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}
NO_LLAMA_NAMES = ("phi3", "gpt2")
ENCODER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 130, "initializer_range": 0.15,
}  # fmt: skip
ROBERTA_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
ENCODERS = {
    "bert": (hf.BertConfig, hf.BertModel, {}),
    "distilbert": (hf.DistilBertConfig, hf.DistilBertModel, {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "roberta": (hf.RobertaConfig, hf.RobertaModel, ROBERTA_IDS),
    "xlm-roberta": (hf.XLMRobertaConfig, hf.XLMRobertaModel, ROBERTA_IDS),
    "modernbert": (
        hf.ModernBertConfig,
        hf.ModernBertModel,
        {"local_attention": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2,
         "sep_token_id": 3},
    ),
}  # fmt: skip
ALL = [*DECODERS, *ENCODERS]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders of tiny random backbones by name, written when first asked for, and a clusters folder for each kind."""
    root = tmp_path_factory.mktemp("backbones")
    tokenizers = {"decoder": decoder_tokenizer(), "encoder": encoder_tokenizer()}
    clusters = {kind: save_clusters(root / f"{kind}-clusters", len(t)) for kind, t in tokenizers.items()}

    def folder(name):
        path = root / name
        kind = "decoder" if name in DECODERS else "encoder"
        if not path.exists():
            torch.manual_seed(0)
            size = len(tokenizers[kind])
            if kind == "decoder":
                config, changes = DECODERS[name]
                AutoModelForCausalLM.from_config(config(vocab_size=size, **{**DECODER, **changes})).save_pretrained(
                    path
                )
            else:
                config, model, changes = ENCODERS[name]
                model(config(vocab_size=size, **{**ENCODER, **changes})).save_pretrained(path)
            tokenizers[kind].save_pretrained(path)
        return path, clusters[kind]

    return folder


def some_ids(count=1, length=9, seed=0):
    return torch.randint(10, 250, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def states(backbone, ids, mask=None):
    return hidden_states(backbone.eval(), ids, torch.ones_like(ids) if mask is None else mask)


@pytest.mark.parametrize("name", ALL)
def test_every_token_sees_every_other_and_padding_none(name, backbones):
    backbone, _, _ = load_backbone(str(backbones(name)[0]))
    ids, rest = some_ids(), torch.full((1, 4), 5)
    mask = torch.tensor([[1] * 9 + [0] * 4])
    bare = states(backbone, ids)
    padded = torch.cat([ids, rest], 1)
    right = states(backbone, padded, mask)[:, :9]
    left = states(backbone, torch.cat([rest, ids], 1), mask.flip(1))[:, 4:]
    other = states(backbone, torch.cat([ids, rest + 30], 1), mask)[:, :9]
    positions_from_ids = name in ("roberta", "xlm-roberta")  # which takes the padding token for padding, and no other
    if not positions_from_ids:
        torch.testing.assert_close(left, bare, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(right, bare, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(other, bare, atol=2e-5, rtol=1e-4)
    changed = ids.clone()
    changed[:, 8] = 7
    assert ((states(backbone, changed) - bare)[:, :8].abs().amax(2) > 1e-5).all()
    changed = torch.cat([changed, rest], 1)
    assert ((states(backbone, changed, mask)[:, :8] - right[:, :8]).abs().amax(2) > 1e-5).all()


@pytest.mark.parametrize("name", DECODERS)
def test_equals_the_untouched_decoder_under_a_mask_without_limits(name, backbones):
    """transformers takes a ready mask (1, 1, L, L) as it is: no causality, no window, everything else as trained."""
    folder, _ = backbones(name)
    backbone, _, _ = load_backbone(str(folder))
    reference = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = some_ids()
    with torch.inference_mode():
        expected = reference(input_ids=ids, attention_mask=torch.zeros(1, 1, 9, 9), use_cache=False).last_hidden_state
    torch.testing.assert_close(states(backbone, ids), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_causal_when_asked_for_with_the_window_it_was_trained_with(name, backbones):
    folder, _ = backbones(name)
    backbone, _, _ = load_backbone(str(folder), bidirectional=False)
    reference = AutoModel.from_pretrained(folder).eval()
    ids = some_ids()
    changed = ids.clone()
    changed[:, 5] = 7
    with torch.inference_mode():
        expected = reference(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(states(backbone, ids), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(states(backbone, ids)[:, :5], states(backbone, changed)[:, :5])
    with pytest.raises(ValueError, match=r"is causal although bidirectional=True .*layers 0, 1\)"):
        check_attention(backbone, True)


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded_it_embeds_the_same(name, backbones, tmp_path):
    folder, clusters = backbones(name)
    model = lens.LENS.build(folder, clusters)
    expected = model.encode_documents(SENTENCES)
    assert (expected > 0).any(1).all()
    model.save(tmp_path / "thin")
    model.save(tmp_path / "whole", include_backbone=True)
    np.testing.assert_array_equal(lens.load(tmp_path / "thin").encode_documents(SENTENCES), expected)
    np.testing.assert_array_equal(lens.load(tmp_path / "whole").encode_documents(SENTENCES), expected)


def recipe(folder, clusters, **changes):
    return Recipe(base=str(folder), clusters=str(clusters), data=("d.jsonl",), output="o", device="cpu", **changes)


def one_step(model, tokenizer):
    """One step of gradient descent on the norm of two embeddings; the trained parameters before and after."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    prompt = "<instruct>find\n<query>" if SPECIAL_TOKENS[0] in tokenizer.get_vocab() else "find "
    ids = torch.tensor([tokenizer(f"{prompt}the quick brown fox")["input_ids"]])
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    hidden = hidden_states(model.backbone.train(), ids, torch.ones_like(ids))
    (hidden.float() * torch.linspace(-1, 1, 32)).sum().backward()
    optimizer.step()
    return before, trained


@pytest.mark.parametrize("name", ALL)
def test_lora_trains(name, backbones):
    folder, clusters = backbones(name)
    targets = LLAMA_LIKE
    if name in NO_LLAMA_NAMES or name in ENCODERS:
        with pytest.raises(ValueError, match=r"lora_targets q_proj.* do not occur.*or all-linear"):
            build(recipe(folder, clusters))
        targets = ("all-linear",)
    elif name == "stablelm":
        targets = ("q_proj", "v_proj")
    model, tokenizer = build(recipe(folder, clusters, lora_targets=targets, lora_r=2, gradient_checkpointing=True))
    untouched = lens.LENS.build(folder, clusters)
    wrapped = lens.LENS(model, tokenizer, "cpu")
    assert np.array_equal(wrapped.encode_queries(SENTENCES), untouched.encode_queries(SENTENCES))
    before, after = one_step(model, tokenizer)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name for name in after if "lora_B" in name} <= changed
    rows = [name for name in after if "trainable_tokens" in name]
    assert len(rows) == (1 if name in DECODERS else 0)
    assert set(rows) <= changed
    assert all("lora_" in name or "trainable_tokens" in name for name in after)
    assert all(torch.isfinite(parameter).all() for parameter in after.values())


def test_the_language_model_of_a_multimodal_one_is_taken(backbones, tmp_path):
    _, clusters = backbones("gemma3")
    text = {**DECODER, **DECODERS["gemma3"][1], "vocab_size": len(decoder_tokenizer())}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    torch.manual_seed(0)
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    whole = hf.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "base")
    decoder_tokenizer().save_pretrained(tmp_path / "base")
    model = lens.LENS.build(tmp_path / "base", clusters)
    backbone = model.model.backbone
    assert not any("vision" in name for name, _ in backbone.named_modules())
    inner = whole.model.language_model
    ids = some_ids()
    full = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    with torch.inference_mode():
        expected = inner(input_ids=ids, attention_mask={"full_attention": full, "sliding_attention": full})
    torch.testing.assert_close(states(backbone, ids), expected.last_hidden_state, atol=2e-5, rtol=1e-4)
    model.save(tmp_path / "saved", include_backbone=True)
    loaded = lens.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.encode_documents(SENTENCES), model.encode_documents(SENTENCES))
    vocabulary = lens.LENS.build(tmp_path / "base")
    torch.testing.assert_close(vocabulary.model.head.weight, inner.embed_tokens.weight)  # tied


def test_a_tied_head_stays_the_vocabulary_head(backbones):
    folder, _ = backbones("smollm")
    model = lens.LENS.build(folder, normalize=False)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    (item,) = model.text(["the quick brown fox"])
    ids = torch.tensor([item.ids])
    with torch.inference_mode():
        logits = reference(
            input_ids=ids, attention_mask=torch.zeros(1, 1, *[len(item.ids)] * 2), use_cache=False
        ).logits
    expected = torch.log1p(torch.relu(logits[0, item.start : item.end])).amax(0)
    found = model.encode_documents(["the quick brown fox"], output="torch")[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_decoder_that_is_causal_without_padding_only_is_found_out(backbones, monkeypatch):
    """StableLM and Nemotron take the mask from the configuration but, where there is none, the modules' own flag."""
    monkeypatch.setattr(lens.backbone, "free_modules", lambda backbone: None)
    with pytest.raises(ValueError, match="StableLmModel is causal although"):
        load_backbone(str(backbones("stablelm")[0]))


def test_layers_that_stay_causal_are_named(tmp_path):
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
              "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
              "shared_expert_intermediate_size": 16, "head_dim": 8}  # fmt: skip
    config = hf.Qwen3NextConfig(vocab_size=300, **DECODER, **linear, layer_types=["linear_attention", "full_attention"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hybrid")
    with pytest.raises(ValueError, match=r"Qwen3NextModel is causal .*\(layers 0\).*linear"):
        load_backbone(str(tmp_path / "hybrid"))
    bert = hf.BertConfig(vocab_size=300, **ENCODER, is_decoder=True)
    hf.BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="BertModel is causal although"):
        load_backbone(str(tmp_path / "bert"))


@pytest.mark.parametrize("name", ["mistral", "gemma3", "modernbert"])
def test_the_probe_holds_in_bfloat16(name, backbones):
    folder, _ = backbones(name)
    backbone, _, _ = load_backbone(str(folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="is bidirectional although bidirectional=False"):
        check_attention(backbone, False)
    if name in DECODERS:
        causal, _, _ = load_backbone(str(folder), bidirectional=False, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="is causal although"):
            check_attention(causal, True)


def test_states_beyond_float16_are_refused(backbones, tmp_path):
    folder = shutil.copytree(backbones("llama")[0], tmp_path / "large")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(60000.0)
    model.save_pretrained(folder)
    assert load_backbone(str(folder))[0] is not None
    with pytest.raises(ValueError, match=r"NaN or infinite hidden states in torch.float16.*bfloat16"):
        load_backbone(str(folder), dtype=torch.float16)


def test_weights_are_read_once_in_their_dtype_and_place(backbones, monkeypatch):
    folder, clusters = backbones("mistral")
    asked = []
    read = AutoModel.from_pretrained
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *a, **k: asked.append(k) or read(*a, **k))
    load_backbone(str(folder), dtype=torch.bfloat16, device=torch.device("cpu"))
    build(recipe(folder, clusters, precision="bf16"))
    assert [options["dtype"] for options in asked] == [torch.bfloat16, torch.bfloat16]
    assert not any("device_map" in options for options in asked)

    class Stop(Exception):
        pass

    def stop(*arguments, **options):
        asked.append(options)
        raise Stop

    monkeypatch.setattr(AutoModel, "from_pretrained", stop)
    with pytest.raises(Stop):
        load_backbone(str(folder), dtype=torch.bfloat16, device=torch.device("cuda", 1))
    assert (asked[-1]["dtype"], asked[-1]["device_map"]) == (torch.bfloat16, {"": torch.device("cuda", 1)})


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({"precision": "bf16"}, torch.bfloat16),
        ({"precision": "bf16", "backbone": "frozen", "train_head": True}, torch.bfloat16),
        ({"precision": "fp32"}, torch.float32),
        ({"precision": "bf16", "backbone": "full"}, torch.float32),
        ({"precision": "bf16", "backbone": "full", "deepspeed": "zero1"}, torch.bfloat16),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_what_is_trained_is_float32_and_what_is_frozen_is_not(changes, frozen, backbones):
    model, tokenizer = build(recipe(*backbones("mistral"), **changes))
    trained = {parameter.dtype for parameter in model.backbone.parameters() if parameter.requires_grad}
    rest = {parameter.dtype for parameter in model.backbone.parameters() if not parameter.requires_grad}
    if changes.get("backbone") == "full":
        assert trained == {frozen}
    else:
        assert rest == {frozen}
        assert trained <= {torch.float32}
    assert {parameter.dtype for parameter in model.head.parameters()} == {torch.float32}
    if changes.get("backbone", "lora") == "lora" and frozen == torch.bfloat16:
        with torch.autocast("cpu", torch.bfloat16):
            before, after = one_step(model, tokenizer)
        assert any(not torch.equal(after[name], before[name]) for name in after)


def test_attention_implementations_agree_and_wrong_ones_are_refused(backbones, monkeypatch):
    folder, clusters = backbones("mistral")
    sdpa, eager = (lens.LENS.build(folder, clusters, attn_implementation=name) for name in ("sdpa", "eager"))
    np.testing.assert_allclose(sdpa.encode(SENTENCES), eager.encode(SENTENCES), atol=1e-5)
    assert eager.model.backbone.config._attn_implementation == "eager"
    cases = [
        ("spda", ValueError, r"attn_implementation='spda' is unknown; did you mean 'sdpa'\? Accepted are sdpa, eager"),
        ("fast", ValueError, r"'fast' is unknown. Accepted are .*kernels-community/flash-attn2"),
        ("flash_attention_2", ValueError, "needs a GPU, and the device is the CPU"),
        ("kernels-community/some", ImportError, "needs the package kernels; run: pip install kernels"),
    ]
    monkeypatch.setattr(lens.attention, "_installed", lambda module: False)
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    for name, error, message in cases:
        with pytest.raises(error, match=message):
            lens.LENS.build(folder, clusters, device="cpu", attn_implementation=name)
    for name, command in (
        ("flash_attention_2", "pip install flash-attn"),
        ("flash_attention_3", "pip install kernels"),
    ):
        with pytest.raises(ImportError, match=f"{name}.*{command}"):
            load_backbone(str(folder), attn_implementation=name, device=torch.device("cuda"))
    with pytest.raises(ValueError, match="dtype=float32 contradicts attn_implementation='flash_attention_2'"):
        lens.LENS.build(folder, clusters, device="cpu", dtype="float32", attn_implementation="flash_attention_2")


def test_soft_capped_attention_is_kept_or_refused(backbones):
    folder, _ = backbones("gemma2")
    capped, _, _ = load_backbone(str(folder))
    assert capped.config._attn_implementation != "sdpa"
    with pytest.raises(ValueError, match="attn_implementation='sdpa' cannot be used .*Gemma2Model"):
        load_backbone(str(folder), attn_implementation="sdpa")


@pytest.mark.slow
def test_compiled_layers_embed_as_plain_ones(backbones):
    folder, clusters = backbones("mistral")
    try:
        lens.attention.check_compiler(torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    plain = lens.LENS.build(folder, clusters)
    compiled = lens.LENS.build(folder, clusters, compile=True)
    for texts in (SENTENCES, SENTENCES[2:5]):  # two widths and two sizes of a batch
        np.testing.assert_allclose(compiled.encode(texts), plain.encode(texts), atol=1e-5)
    (layers,) = layer_lists(compiled.model.backbone)
    assert all(layer._compiled_call_impl is not None for layer in layers)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()


def test_without_a_compiler_compiling_is_refused(backbones, monkeypatch):
    folder, clusters = backbones("mistral")
    monkeypatch.setattr(lens.attention.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"compile=True needs a C\+\+ compiler"):
        lens.LENS.build(folder, clusters, compile=True)
    with pytest.raises(ValueError, match=r"compile=True needs a C\+\+ compiler"):
        build(recipe(folder, clusters, compile=True))
    monkeypatch.undo()
    backbone, _, _ = load_backbone(str(folder))
    backbone.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="one list of layers; MistralModel has 0"):
        compile_layers(backbone, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "4bit", "backbone": "full"}, "quantization=4bit contradicts backbone=full"),
        ({"quantization": "8bit", "backbone": "top"}, "quantization=8bit contradicts backbone=top"),
        ({"quantization": "4bit", "include_backbone": True}, "include_backbone=true contradicts quantization=4bit"),
        ({"quantization": "4bit", "deepspeed": "zero3"}, "deepspeed=zero3 contradicts quantization=4bit"),
        ({"quantization": "2bit"}, "quantization must be one of 4bit, 8bit or null; found '2bit'"),
        ({"compile": True, "backbone": "top"}, "compile=true contradicts backbone=top"),
        ({"lora_targets": ["all-linear", "q_proj"]}, "all-linear stands alone"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2 contradicts precision=fp32"),
    ],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe("b", "c", **changes)


def test_positions_end_where_they_were_learnt(backbones):
    for name, limit in (("gpt2", 256), ("roberta", 129), ("bert", 130), ("mistral", None)):
        model = lens.LENS.build(*backbones(name))
        assert lens.backbone.position_limit(model.model.backbone) == limit
        assert model.config.document_max_length == min(512, limit or 512)

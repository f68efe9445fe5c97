"""Released checkpoints give what the released code gives, by hand and by its own word; damaged ones are refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import SENTENCES, SHARED, need
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, MistralForCausalLM

import lens
from lens.cli import main
from lens.text import SPECIAL_TOKENS, TextProcessor
from lens.vectors import load_embeddings

LONG = " ".join(SENTENCES * 2)
DOCUMENTS = [*SENTENCES, "", "a", LONG]
QUERIES = [*SENTENCES[:3], LONG]
LIMIT = 48


@pytest.fixture(scope="module")
def released(mistral, tmp_path_factory):
    """A run and a hub folder in the released layouts, over the tiny Mistral with a LoRA adapter and 20 clusters."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(mistral)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    model = MistralForCausalLM.from_pretrained(mistral)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    head = nn.Linear(32, 20, bias=False)
    run, hub = folder / "run", folder / "hub"
    (run / "embedding").mkdir(parents=True)
    torch.save(model.get_input_embeddings(), run / "embedding" / "input_emb.pth")
    torch.save(head, run / "embedding" / "lm_head.pth")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=targets))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    peft.save_pretrained(run / "checkpoint-3")
    (run / "checkpoint-2").mkdir()
    (run / "checkpoint-2" / "adapter_config.json").write_text("{}")  # an older one, not to be taken
    tokenizer.save_pretrained(run)
    peft.merge_and_unload().save_pretrained(hub)
    torch.save(head, hub / "lm_head.pth")
    tokenizer.save_pretrained(hub)
    return {"run": (run, {"base": str(mistral)}), "hub": (hub, {})}


def by_hand(hub, text, instruction=None):
    """The released forward pass, from the weights alone: one text, loops over heads and positions."""
    weights = load_file(hub / "model.safetensors")
    config = json.loads((hub / "config.json").read_text())
    with torch.serialization.safe_globals([nn.Linear]):
        head = torch.load(hub / "lm_head.pth", weights_only=True).weight.detach()
    tokenizer = AutoTokenizer.from_pretrained(hub)
    prompt = "" if instruction is None else f"<instruct>{instruction}\n<query>"
    ids = tokenizer(prompt + text + "</s>")["input_ids"][:LIMIT]
    heads, shared, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * weights[name]

    def rotated(vector, position):
        angles = (position * frequencies).repeat(2)
        turned = torch.cat([-vector[size // 2 :], vector[: size // 2]])
        return vector * angles.cos() + turned * angles.sin()

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        normed = norm(x, at + "input_layernorm.weight")
        q, k, v = (normed @ weights[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
        mixed = torch.zeros(len(ids), heads * size)
        for number in range(heads):
            own = slice(number * size, (number + 1) * size)
            group = number // (heads // shared)
            theirs = slice(group * size, (group + 1) * size)
            keys = torch.stack([rotated(k[j, theirs], j) for j in range(len(ids))])
            for i in range(len(ids)):  # every position sees all others, later ones too
                shares = (keys @ rotated(q[i, own], i) / size**0.5).softmax(0)
                mixed[i, own] = shares @ v[:, theirs]
        x = x + mixed @ weights[at + "self_attn.o_proj.weight"].T
        normed = norm(x, at + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(normed @ weights[at + "mlp.gate_proj.weight"].T)
        x = x + (gate * (normed @ weights[at + "mlp.up_proj.weight"].T)) @ weights[at + "mlp.down_proj.weight"].T
    x = norm(x, "model.norm.weight")
    start = 0 if instruction is None else ids.index(tokenizer.convert_tokens_to_ids("<query>"))
    best = torch.zeros(len(head))
    for i in range(start, len(ids) - 2):
        best = torch.maximum(best, torch.log1p(torch.relu(head @ x[i])))
    return torch.nn.functional.normalize(best, dim=0).numpy()


def shortened(model, limit=LIMIT):
    """The model with another limit on length, for both kinds of text."""
    model.config = model.config.replace(query_max_length=limit, document_max_length=limit)
    model.text = TextProcessor(model.tokenizer, model.config)
    return model


@pytest.mark.parametrize("layout", ["run", "hub"])
def test_equals_the_released_forward_pass_done_by_hand(layout, released):
    folder, options = released[layout]
    hub = released["hub"][0]
    model = shortened(lens.load(folder, compat="official", **options))
    instruction = "Find the sentence."
    documents = model.encode_documents(DOCUMENTS)
    expected = np.stack([by_hand(hub, text) for text in DOCUMENTS])
    assert np.abs(expected).sum(1).min() == 0  # the empty document
    np.testing.assert_allclose(documents, expected, atol=1e-5)
    queries = model.encode_queries(QUERIES, instruction=instruction)
    np.testing.assert_allclose(queries, [by_hand(hub, text, instruction) for text in QUERIES], atol=1e-5)
    # By default a text that is too long keeps EOS, so that its last words are pooled as any others.
    kept = shortened(lens.load(folder, **options))
    ours = kept.encode_documents(DOCUMENTS)
    np.testing.assert_allclose(ours[:-1], expected[:-1], atol=1e-5)
    assert np.abs(ours[-1] - expected[-1]).max() > 1e-3
    assert kept.text([LONG])[0].ids[-1] == kept.tokenizer.eos_token_id
    assert model.text([LONG])[0].ids[-1] != kept.tokenizer.eos_token_id


@pytest.mark.parametrize("layout", ["run", "hub"])
@pytest.mark.parametrize("limit", [64, 512])
def test_equals_the_released_code(layout, limit):
    golden = need(SHARED / "golden" / "official-tiny")
    texts, expected = json.loads((golden / "texts.json").read_text()), np.load(golden / "embeddings.npz")
    base = {"base": str(golden / "base")} if layout == "run" else {}
    model = shortened(lens.load(golden / layout, compat="official", **base), limit)
    suffix = "_512" if limit == 512 else ""
    np.testing.assert_allclose(
        model.encode_documents(texts["documents"]), expected[f"documents{suffix}"], rtol=0, atol=1e-5
    )
    for number, instruction in enumerate(texts["instructions"]):
        queries = model.encode_queries(texts["queries"], instruction=instruction)
        np.testing.assert_allclose(queries, expected[f"queries_{number}{suffix}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["run", "hub"])
def test_converted_once_it_gives_the_same_vectors(layout, released, tmp_path):
    folder, options = released[layout]
    for compat in ("official", None):
        model = lens.load(folder, compat=compat, **options)
        model.save(tmp_path / str(compat))
        again = lens.load(tmp_path / str(compat))
        assert again.config.truncation == ("tail" if compat else "text")
        assert not list((tmp_path / str(compat)).glob("*.pth"))
        assert np.array_equal(
            shortened(model).encode_documents(DOCUMENTS), shortened(again).encode_documents(DOCUMENTS)
        )
    with pytest.raises(ValueError, match="compat='official' is for checkpoints of the released LENS code"):
        lens.load(tmp_path / "None", compat="official")
    with pytest.raises(ValueError, match="compat must be 'official' or None"):
        lens.load(folder, compat="offical", **options)


def test_compat_is_an_option_of_encode_and_of_the_command_line(released, tmp_path):
    hub, _ = released["hub"]
    texts = [" ".join(SENTENCES * 9), SENTENCES[0]]  # the first is above 512 tokens
    official, default = (lens.load(hub, compat=compat).encode(texts) for compat in ("official", None))
    assert np.abs(official[0] - default[0]).max() > 1e-4
    assert np.array_equal(lens.encode(texts, model=hub, compat="official"), official)
    assert np.array_equal(lens.encode(texts, model=hub), default)
    with pytest.raises(ValueError, match="compat='official' is decided when a model is loaded"):
        lens.encode(texts, model=lens.load(hub), compat="official")
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    for options, expected in ((["--compat", "official"], official), ([], default)):
        output = tmp_path / f"{len(options)}.npz"
        arguments = ["encode", str(tmp_path / "texts.txt"), "--model", str(hub), "--device", "cpu", *options]
        assert main([*arguments, "--output", str(output)]) == 0
        np.testing.assert_allclose(load_embeddings(output)[0].toarray(), expected, atol=1e-6)


def test_the_page_holds_what_was_measured():
    from benchmarks import compat

    text = compat.PAGE.read_text(encoding="utf-8")
    assert compat.page(text, json.loads(compat.RESULTS.read_text(encoding="utf-8"))) == text
    with pytest.raises(ValueError, match="lacks the lines"):
        compat.page("no marks", {})


def test_the_benchmark_finds_no_difference_on_texts_that_fit(monkeypatch):
    from benchmarks import compat

    monkeypatch.setattr(compat, "LIMITS", (64,))
    found = compat.collect(None)["limits"]["64"]
    assert found["fit"]["max_difference"] < 1e-6
    assert found["fit"]["ranking"]["same_first"] == 1
    assert found["too_long"]["max_difference"] > 1e-3
    assert found["fit"]["texts"] > 3
    assert found["too_long"]["texts"] > 3


class Malicious:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_what_is_no_released_checkpoint_is_named(released, tmp_path, monkeypatch):
    hub, run = (shutil.copytree(released[name][0], tmp_path / name) for name in ("hub", "run"))
    options = released["run"][1]
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    whole = (hub / "lm_head.pth").read_bytes()
    with pytest.raises(ValueError, match="holds its own merged weights"):
        lens.load(hub, **options)
    for content in (pickle.dumps(Malicious()), whole[: len(whole) // 2], b"", b"text"):
        (hub / "lm_head.pth").write_bytes(content)
        with pytest.raises(ValueError, match="lm_head.pth is damaged, or holds more than a pickled Linear"):
            lens.load(hub)
    torch.save(Malicious(), hub / "lm_head.pth")
    with pytest.raises(ValueError, match="lm_head.pth is damaged, or holds more"):
        lens.load(hub)
    assert ran == []
    for module, message in (
        (nn.Embedding(20, 32), "should hold a pickled Linear"),
        (nn.Linear(32, 20), "has no bias"),
        (nn.Linear(16, 20, bias=False), "16 wide"),
        ({"weight": torch.zeros(20, 32)}, "should hold a pickled Linear"),
    ):
        torch.save(module, hub / "lm_head.pth")
        with pytest.raises(ValueError, match=message):
            lens.load(hub)
    broken = nn.Linear(32, 20, bias=False)
    broken.weight.data[3, 4] = torch.nan
    torch.save(broken, hub / "lm_head.pth")
    with pytest.raises(ValueError, match="NaN or infinite"):
        lens.load(hub)
    with pytest.raises(FileNotFoundError, match="pass base="):
        lens.load(run, base=str(tmp_path / "gone" / "model"))
    (run / "embedding" / "input_emb.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"input_emb.pth is missing"):
        lens.load(run, **options)
    (run / "checkpoint-3" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing"):
        lens.load(run, **options)
    shutil.rmtree(run / "checkpoint-3")
    with pytest.raises(ValueError, match="peft_type should be LORA"):
        lens.load(run, **options)
    shutil.rmtree(run / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match="holds no adapter_config.json"):
        lens.load(run, **options)
    (run / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged"):
        lens.load(run, **options)

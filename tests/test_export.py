"""Artifacts in sentence-transformers, merged adapters, uploads: the same vectors, and nothing of this machine."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

import lens
import lens.export
import lens.merge
from lens import cli
from lens.merge import save_merged
from lens.text import SPECIAL_TOKENS

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer, SparseEncoder

from lens.sentence import LensModule, read_prompt

INSTRUCTION = "Find the sentence that says the same"
TAGGED = f"<instruct>{INSTRUCTION}\n<query>"
TEXTS = [*SENTENCES, "", " ".join(SENTENCES), "one", "Zwölf Boxkämpfer jagen Viktor", *SENTENCES[:2]]
KINDS = ("kept", "merged", "bert", "vocabulary", "released")


def with_lora(model: lens.LENS) -> lens.LENS:
    """A LENS model with a LoRA adapter and trained token rows that are far from nothing."""
    torch.manual_seed(1)
    tokens = model.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        trainable_token_indices={"embed_tokens": tokens},
    )
    model.model.backbone = get_peft_model(model.model.backbone, lora).eval()
    for name, parameter in model.model.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def adapted(mistral: Path, mistral_clusters: Path) -> lens.LENS:
    return with_lora(lens.LENS.build(mistral, mistral_clusters, query_max_length=24, document_max_length=40))


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    adapted: lens.LENS,
    mistral: Path,
    bert: Path,
    bert_mlm: Path,
    bert_clusters: Path,
) -> dict[str, Path]:
    """Artifacts of every kind, by name."""
    root = tmp_path_factory.mktemp("artifacts")
    adapted.save(root / "kept")
    adapted.save(root / "merged", include_backbone=True)
    lens.LENS.build(bert, bert_clusters, query_max_length=12, transform="context").save(root / "bert")
    lens.LENS.build(bert_mlm, normalize=False, query_max_length=20).save(root / "vocabulary")
    released = root / "their checkpoint"
    shutil.copytree(mistral, released)
    tokenizer = copy.deepcopy(adapted.tokenizer)
    tokenizer.save_pretrained(released)
    backbone = AutoModel.from_pretrained(mistral)
    backbone.resize_token_embeddings(len(tokenizer))
    backbone.save_pretrained(released)
    torch.save(torch.nn.Linear(32, 16, bias=False), released / "lm_head.pth")
    lens.load(released, compat="official").save(root / "released")
    return {kind: root / kind for kind in KINDS}


def transformer(folder: Path, **options) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)


def sparse(folder: Path, **options) -> SparseEncoder:
    return SparseEncoder(str(folder), trust_remote_code=True, device="cpu", **options)


def close(found, expected, tolerance: float = 5e-6, relative: float = 1e-5) -> None:
    # A logit is a sum of products of order 1 to 10 in float32, in an order that goes with the batch: 1e-6 is rounding.
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=tolerance, rtol=relative)


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_gives_the_vectors_of_lens(folders: dict[str, Path], kind: str) -> None:
    model, peer = lens.load(folders[kind], device="cpu", packed=False), transformer(folders[kind])
    documents, queries = model.encode_documents(TEXTS), model.encode_queries(TEXTS)
    assert not np.allclose(documents, queries)
    # `model` pads texts; packed ones, as both sides have them unless asked otherwise, are summed in another order
    close(lens.load(folders[kind], device="cpu").encode_documents(TEXTS), documents)
    close(peer.encode(TEXTS), documents)
    close(peer.encode(TEXTS, batch_size=1), documents)
    close(peer.encode(TEXTS[::-1], batch_size=3)[::-1], documents)
    close(peer.encode_document(TEXTS), documents)
    close(peer.encode(TEXTS, prompt_name="document"), documents)
    close(peer.encode(TEXTS, prompt_name="query"), queries)
    close(peer.encode_query(TEXTS), queries)
    close(peer.encode_query(TEXTS[0]), queries[0])
    if kind != "bert":  # its queries have 12 tokens, too few for an instruction
        asked = model.encode_queries(TEXTS, INSTRUCTION[:8])
        assert not np.allclose(asked, queries)
        close(peer.encode_query(TEXTS, prompt=f"<instruct>{INSTRUCTION[:8]}\n<query>"), asked)
        close(peer.encode(TEXTS, prompt=f"<instruct>{INSTRUCTION[:8]}\n<query>"), asked)
        close(peer.encode_query(TEXTS, prompt=INSTRUCTION[:8]), asked)
    both_sides = model.encode(TEXTS, "document", "say")
    close(peer.encode_document(TEXTS, prompt="<instruct>say\n<query>"), both_sides)
    tensor = peer.encode(TEXTS, convert_to_tensor=True)
    assert tensor.dtype == torch.float32
    close(tensor, documents)
    assert peer.get_embedding_dimension() == model.config.dimensions
    assert peer.similarity_fn_name == ("cosine" if model.config.normalize else "dot")
    filled = [i for i, row in enumerate(documents) if row.any()]
    scores = model.similarity(queries[filled], documents[filled])
    close(peer.similarity(queries[filled], documents[filled]), scores, relative=1e-6)
    assert peer.encode([]).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_encoder_gives_the_vectors_of_lens(folders: dict[str, Path], kind: str) -> None:
    model, peer = lens.load(folders[kind], device="cpu", packed=False), sparse(folders[kind])
    documents, queries = model.encode_documents(TEXTS), model.encode_queries(TEXTS)
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in model.model.parameters())
    assert peer.max_active_dims is None
    found = peer.encode_document(TEXTS)
    assert found.is_sparse
    close(found.to_dense(), documents)
    close(peer.encode_query(TEXTS).to_dense(), queries)
    close(peer.encode_query(TEXTS, prompt="say").to_dense(), model.encode_queries(TEXTS, "say"))
    close(peer.encode(TEXTS, convert_to_sparse_tensor=False), documents)
    close(peer.encode(TEXTS, max_active_dims=3).to_dense(), model.encode_documents(TEXTS, top_k=3))
    sparse_documents = peer.encode(TEXTS[:7])
    scores = model.similarity(queries[:3], documents[:7])
    close(peer.similarity(peer.encode_query(TEXTS[:3]), sparse_documents), scores, relative=1e-6)
    assert peer.get_embedding_dimension() == model.config.dimensions
    expected = model.terms(documents[0], 4)
    decoded = peer.decode(found[0], top_k=4)
    close([weight for _, weight in decoded], [weight for _, _, weight in expected])
    names = [", ".join(tokens[:5]) or f"cluster {cluster}" for cluster, tokens, _ in expected]
    assert [name for name, _ in decoded] == names
    assert len(peer.decode(found)) == len(TEXTS)


def test_the_long_lose_their_end_as_in_lens(folders: dict[str, Path]) -> None:
    """Queries have 24 tokens, documents 40: a query taken for a document would differ."""
    model, peer = lens.load(folders["kept"], packed=False), transformer(folders["kept"])
    long = [" ".join(SENTENCES)]
    assert len(model.text(long, "query")[0].ids) == 24
    assert len(model.text(long, "document")[0].ids) == 40
    assert peer.max_seq_length == 40
    assert [len(row) for row in peer.preprocess(long, prompt="<query>")["input_ids"]] == [24]
    peer.max_seq_length = 17
    model.config = model.text.config = model.config.replace(query_max_length=17, document_max_length=17)
    close(peer.encode(long), model.encode_documents(long))
    close(peer.encode_query(long), model.encode_queries(long))
    with pytest.raises(ValueError, match="document_max_length must be a whole number|query_max_length must be"):
        peer.max_seq_length = 2
    with pytest.raises(ValueError, match="max_seq_length=500 is more than the 128 positions"):
        transformer(folders["bert"]).max_seq_length = 500


def test_prompts_that_a_framework_glues_to_the_text(folders: dict[str, Path]) -> None:
    model, peer = lens.load(folders["kept"], packed=False), transformer(folders["kept"])
    texts = SENTENCES[:3]
    glued = [f"<query>{texts[0]}", f"<instruct>say\n<query>{texts[1]}", texts[2]]
    expected = [
        model.encode_queries(texts[:1])[0],
        model.encode_queries(texts[1:2], "say")[0],
        model.encode_documents(texts[2:])[0],
    ]
    close(peer.encode(glued), expected)
    close(peer.encode_document(glued), model.encode_documents(glued))
    inner = [f"a text with <query> inside {texts[0]}"]
    close(peer.encode(inner), model.encode_documents(inner))


def test_the_models_own_instruction_is_its_query_prompt(tmp_path: Path, mistral: Path, mistral_clusters: Path) -> None:
    model = lens.LENS.build(mistral, mistral_clusters, instruction="say")
    model.save(tmp_path / "m")
    peer = transformer(tmp_path / "m")
    assert peer.prompts == {"query": "<instruct>say\n<query>", "document": ""}
    close(peer.encode_query(SENTENCES), model.encode_queries(SENTENCES))
    close(peer.encode(SENTENCES, prompt_name="query"), model.encode_queries(SENTENCES, "say"))
    close(peer.encode_query(SENTENCES, prompt="<query>"), model.encode_queries(SENTENCES, ""))
    inside = SentenceTransformer(modules=[LensModule.load(str(tmp_path / "m"))], device="cpu")
    close(inside.encode_query(SENTENCES), model.encode_queries(SENTENCES))


def test_read_prompt() -> None:
    assert read_prompt(None) is None
    assert read_prompt("") == read_prompt("<query>") == ""
    assert read_prompt(TAGGED) == INSTRUCTION
    assert read_prompt("<instruct>a\nb\n<query>") == "a\nb"
    assert read_prompt("search: ") == "search:"
    for torn in ("<instruct>a", "<instruct>a<query>", "<instruct>\n<query>"):
        with pytest.raises(ValueError, match="prompt should be"):
            read_prompt(torn)


@pytest.mark.parametrize("loader", [transformer, sparse])
@pytest.mark.parametrize("kind", ["kept", "bert"])
def test_saved_by_sentence_transformers_and_loaded_by_all_three(
    folders: dict[str, Path], tmp_path: Path, loader, kind: str
) -> None:
    peer = loader(folders[kind])
    peer.prompts["summary"] = "<instruct>sum up\n<query>"
    peer.save(str(tmp_path / "again"))
    assert {f.name for f in folders[kind].iterdir()} == {f.name for f in (tmp_path / "again").iterdir()}
    expected = lens.load(folders[kind]).encode_documents(SENTENCES)
    close(lens.load(tmp_path / "again").encode_documents(SENTENCES), expected)
    again = transformer(tmp_path / "again")
    close(again.encode(SENTENCES), expected)
    assert again.prompts["summary"] == "<instruct>sum up\n<query>"
    close(sparse(tmp_path / "again").encode(SENTENCES).to_dense(), expected)
    assert "# LENS-24" in (tmp_path / "again" / "README.md").read_text()
    with pytest.raises(ValueError, match="safetensors only"):
        peer.save(str(tmp_path / "pickled"), safe_serialization=False)


def test_options_of_encode(folders: dict[str, Path]) -> None:
    model, peer = lens.load(folders["kept"], packed=False), transformer(folders["kept"])
    cut = peer.encode(SENTENCES, truncate_dim=10, normalize_embeddings=True)
    close(cut, model.encode_documents(SENTENCES, dims=range(10)))
    close(peer.encode(SENTENCES, truncate_dim=10), model.encode_documents(SENTENCES)[:, :10])
    close(peer.encode(SENTENCES, max_active_dims=5), model.encode_documents(SENTENCES, top_k=5))
    rows = transformer(folders["kept"], truncate_dim=10)
    assert rows.encode(SENTENCES).shape == (7, 10)
    assert rows.get_embedding_dimension() == 10
    assert peer.encode(SENTENCES, precision="int8").dtype == np.int8


def test_threads_and_processes(folders: dict[str, Path]) -> None:
    """Threads share a tokenizer; worker processes get the model by pickle."""
    peer = transformer(folders["kept"])
    long = [" ".join(SENTENCES[i:]) for i in range(3)]

    def tokens(i: int) -> list[list[int]]:
        return peer.preprocess(long, prompt="<query>" if i % 2 else None)["input_ids"].tolist()

    alone = tokens(0), tokens(1)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(tokens, range(200)))
    finally:
        sys.setswitchinterval(interval)
    assert all(rows == alone[i % 2] for i, rows in enumerate(found))
    close(pickle.loads(pickle.dumps(peer)).encode(TEXTS), peer.encode(TEXTS))
    encoder = sparse(folders["kept"])
    twin = pickle.loads(pickle.dumps(encoder))
    assert twin.decode(twin.encode("copy"), top_k=2) == encoder.decode(encoder.encode("copy"), top_k=2)


def test_sentence_transformers_packs_texts_where_it_pays(folders: dict[str, Path], monkeypatch) -> None:
    peer = transformer(folders["merged"])
    seen: list[tuple[int, int]] = []
    inner = lens.model.packed_states

    def spy(backbone, ids, cu_seqlens, longest):
        seen.append((len(ids), int(cu_seqlens[-1])))
        return inner(backbone, ids, cu_seqlens, longest)

    monkeypatch.setattr(lens.model, "packed_states", spy)
    packed = peer.encode(TEXTS, batch_size=len(TEXTS))
    tokens = sum(len(item.ids) for item in peer[0].text(TEXTS))
    assert seen == [(tokens, tokens)]
    monkeypatch.setattr("lens.sentence.choose_packed", lambda *_: False)
    close(peer.encode(TEXTS), packed)
    assert len(seen) == 1


def test_gradients_pass_through(folders: dict[str, Path], monkeypatch) -> None:
    found = []
    for packs in (True, False):
        peer = transformer(folders["bert"])
        peer[0].model.requires_grad_(True)
        with monkeypatch.context() as patch:
            if not packs:
                patch.setattr("lens.sentence.choose_packed", lambda *_: False)
            peer(peer.preprocess(SENTENCES[:2]))["sentence_embedding"].pow(2)[:, ::3].sum().backward()
        found.append([peer[0].model.head.weight.grad, *(p.grad for p in peer[0].model.backbone.parameters())])
        assert all(gradient is not None for gradient in found[-1])
    assert found[0][0].abs().sum() > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    peer = transformer(folders["bert"]).train()
    peer[0].model.head.weight.requires_grad_(True)
    peer(peer.preprocess(SENTENCES[:2]))["sentence_embedding"].sum().backward()
    assert peer[0].model.head.weight.grad.abs().sum() > 0


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path, mistral: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(folders["kept"]))
    for options, message in (
        ({"model_kwargs": {"load_in_4bit": True}}, "takes no load_in_4bit"),
        ({"processor_kwargs": {"padding_side": "left"}}, "processor_kwargs: .* padding_side"),
        ({"backend": "onnx"}, "backend must be 'torch'"),
        ({"model_kwargs": {"dtype": "float7"}}, "float7"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer(folders["kept"], **options)
    peer = transformer(folders["kept"])
    with pytest.raises(ValueError, match="task must be 'query' or 'document', found 'classify'"):
        peer.encode(SENTENCES, task="classify")
    with pytest.raises(ValueError, match="prompt should be"):
        peer.encode(SENTENCES, prompt="<instruct>no end")
    with pytest.raises(ValueError, match="lone surrogate"):
        peer.encode(["fine", "\ud800"])
    with pytest.raises(ValueError, match="the instruction takes"):
        peer.encode_query(SENTENCES, prompt=" ".join(SENTENCES))
    folder = shutil.copytree(folders["kept"], tmp_path / "moved")
    facts = json.loads((folder / "lens.json").read_text())
    (folder / "lens.json").write_text(json.dumps({**facts, "base": "/nowhere/mistral"}))
    with pytest.raises(FileNotFoundError, match="pass base="):
        transformer(folder)
    close(transformer(folder, model_kwargs={"base": str(mistral)}).encode(SENTENCES), peer.encode(SENTENCES))
    facts = json.loads((folder / "config_sentence_transformers.json").read_text())
    facts["requirements"]["lens-embeddings"]["specifier"] = ">=999"
    (folder / "config_sentence_transformers.json").write_text(json.dumps(facts))
    with pytest.raises(ImportError, match="lens-embeddings>=999"):
        transformer(folder)


def test_artifacts_from_before_still_load(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["merged"], tmp_path / "old")
    expected = lens.load(folder).encode_documents(SENTENCES)
    for name in ("card.json", "modules.json", "config_sentence_transformers.json", "README.md"):
        (folder / name).unlink()
    close(lens.load(folder).encode_documents(SENTENCES), expected)
    assert cli.main(["export", "--model", str(folder), "--output", str(tmp_path / "new")]) == 0
    close(transformer(tmp_path / "new").encode(SENTENCES), expected)


# Merging


def test_merged_is_kept_and_the_model_is_not_touched(adapted: lens.LENS, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    expected = adapted.encode_queries(SENTENCES, INSTRUCTION[:8])
    adapted.save(tmp_path / "merged", include_backbone=True)
    after = adapted.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list((tmp_path / "merged").glob("adapter*"))
    shutil.copytree(tmp_path / "merged", tmp_path / "alone")
    facts = json.loads((tmp_path / "alone" / "lens.json").read_text())
    (tmp_path / "alone" / "lens.json").write_text(json.dumps({**facts, "base": "/nowhere"}))
    close(lens.load(tmp_path / "alone").encode_queries(SENTENCES, INSTRUCTION[:8]), expected, 2e-6)


def test_merged_weights_are_w_plus_scaled_b_a(adapted: lens.LENS, tmp_path: Path) -> None:
    save_merged(adapted.model.backbone, tmp_path)
    merged = load_file(tmp_path / "model.safetensors")
    plain = AutoModel.from_pretrained(adapted.config.base).state_dict()
    state = adapted.model.backbone.state_dict()
    name = "layers.1.mlp.down_proj"
    a, b = (state[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB")
    close(merged[f"{name}.weight"], plain[f"{name}.weight"] + 8 / 4 * b @ a, 1e-6)
    for untouched in ("layers.0.mlp.up_proj.weight", "norm.weight"):
        assert torch.equal(merged[untouched], plain[untouched])
    rows = adapted.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    delta = next(t for n, t in state.items() if "trainable_tokens_delta" in n)
    assert torch.equal(merged["embed_tokens.weight"][rows], delta)
    old = plain["embed_tokens.weight"]
    assert torch.equal(merged["embed_tokens.weight"][: len(old)], old)
    assert set(merged) == set(plain)


def test_merging_goes_layer_by_layer_and_shards(
    adapted: lens.LENS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []

    def duplicate(module):
        copied.append(sum(p.numel() for p in module.parameters()) if isinstance(module, torch.nn.Module) else 0)
        return copy.deepcopy(module)

    monkeypatch.setattr(lens.merge, "copy", SimpleNamespace(deepcopy=duplicate))
    (tmp_path / "whole").mkdir()
    save_merged(adapted.model.backbone, tmp_path / "whole")
    assert max(copied) < sum(p.numel() for p in adapted.model.backbone.parameters()) / 2
    (tmp_path / "parts").mkdir()
    save_merged(adapted.model.backbone, tmp_path / "parts", max_shard_size=40_000)
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    whole, parts = AutoModel.from_pretrained(tmp_path / "whole"), AutoModel.from_pretrained(tmp_path / "parts")
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert whole.config.is_causal is False


def test_a_quantised_backbone_is_not_merged(
    adapted: lens.LENS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapted.model.backbone.get_base_model(), "is_quantized", True, raising=False)
    with pytest.raises(ValueError, match="quantised backbone"):
        adapted.save(tmp_path / "m", include_backbone=True)
    assert not (tmp_path / "m").exists()


# Uploading


class Hub:
    """Stands for HfApi: records what would be sent."""

    files: tuple[str, ...] = (".gitattributes",)

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.calls: list[tuple[str, dict]] = []
        self.sent: dict[str, bytes] = {}
        Hub.last = self

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def list_repo_files(self, repo_id, **options):
        return list(self.files)

    def upload_folder(self, *, folder_path, **options):
        self.calls.append(("upload_folder", options))
        self.sent = {str(f.relative_to(folder_path)): f.read_bytes() for f in folder_path.rglob("*") if f.is_file()}
        return SimpleNamespace(repo_url=f"https://hub/{options['repo_id']}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(lens.export, "HfApi", Hub)
    monkeypatch.setattr(lens.export, "is_offline_mode", lambda: False)
    monkeypatch.setattr(lens.export, "get_token", lambda: "hf_stand_in")
    monkeypatch.setattr(Hub, "files", (".gitattributes",))
    return Hub


ALWAYS = {
    "README.md", "card.json", "config_sentence_transformers.json", "head.safetensors", "lens.json", "modules.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def test_push_sends_a_whole_model_without_places(
    adapted: lens.LENS, hub: type[Hub], tmp_path: Path, mistral: Path
) -> None:
    url = adapted.push_to_hub(
        "someone/lens-tiny", private=True, commit_message="First", revision="v1", include_backbone=True
    )
    assert url == "https://hub/someone/lens-tiny"
    names = [name for name, _ in hub.last.calls]
    assert names == ["create_repo", "create_branch", "upload_folder"]
    assert hub.last.calls[0][1] == {"repo_id": "someone/lens-tiny", "private": True, "exist_ok": True}
    assert hub.last.calls[1][1]["branch"] == "v1"
    upload = hub.last.calls[2][1]
    assert (upload["commit_message"], upload["revision"]) == ("First", "v1")
    assert "*.safetensors" in upload["delete_patterns"]
    assert set(hub.last.sent) == ALWAYS | {"config.json", "model.safetensors"}
    for name, content in hub.last.sent.items():
        assert str(mistral).encode() not in content, name
        assert str(tmp_path.parents[1]).encode() not in content, name
    assert b'lens.load("someone/lens-tiny")' in hub.last.sent["README.md"]
    for name, content in hub.last.sent.items():
        (tmp_path / name).write_bytes(content)
    close(lens.load(tmp_path).encode_documents(SENTENCES), adapted.encode_documents(SENTENCES), 2e-6)


def test_push_keeps_an_adapter_on_a_backbone_of_the_hub(
    adapted: lens.LENS, hub: type[Hub], mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="folder of this machine.*include_backbone"):
        adapted.push_to_hub("someone/lens-tiny")
    monkeypatch.setattr(adapted.model, "config", adapted.config.replace(base="someone/mistral"))
    monkeypatch.setattr(adapted.model.backbone.peft_config["default"], "base_model_name_or_path", str(mistral))
    adapted.push_to_hub("someone/lens-tiny")
    assert set(hub.last.sent) == ALWAYS | {"adapter_config.json", "adapter_model.safetensors"}
    assert all(str(mistral).encode() not in content for content in hub.last.sent.values())
    assert b"base_model: someone/mistral" in hub.last.sent["README.md"]
    assert b"base_model_relation: adapter" in hub.last.sent["README.md"]


def test_push_refuses(adapted: lens.LENS, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    def push(name: str = "someone/lens", **options) -> str:
        return adapted.push_to_hub(name, include_backbone=True, **options)

    for name in ("a/b/c", "some one/lens", "-lens", ""):
        with pytest.raises(ValueError, match="no repository name of the hub"):
            push(name)
    monkeypatch.setattr(hub, "files", ("config.json", "model.safetensors"))
    with pytest.raises(FileExistsError, match="is no LENS model"):
        push()
    assert hub.last.sent == {}
    monkeypatch.setattr(hub, "files", ("lens.json", "model.safetensors"))
    assert push()
    monkeypatch.setattr(lens.export, "get_token", lambda: None)
    with pytest.raises(ValueError, match="no token of the hub: run `hf auth login`"):
        push()
    assert push(token="hf_given")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "create_repo", lambda *_, **__: {}["torn"])
        with pytest.raises(ConnectionError, match="did not take someone/lens .KeyError"):
            push(token="hf_given")
    assert push(token="hf_given")
    assert hub.last.token == "hf_given"
    monkeypatch.setattr(lens.export, "is_offline_mode", lambda: True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        push(token="hf_given")


def test_export_and_push_on_the_command_line(
    folders: dict[str, Path], hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folders["kept"]), "--include-backbone"]
    assert cli.main(["export", *options, "--dtype", "bfloat16", "--output", str(tmp_path / "m")]) == 0
    assert load_file(tmp_path / "m" / "model.safetensors")["norm.weight"].dtype == torch.bfloat16
    assert cli.main(["export", *options, "--output", str(tmp_path / "m")]) == 2
    assert "overwrite" in capsys.readouterr().err
    assert cli.main(["push", *options, "--repo", "someone/lens", "--private", "--message", "Hello"]) == 0
    assert "model at https://hub/someone/lens" in capsys.readouterr().out
    assert hub.last.calls[-1][1]["commit_message"] == "Hello"
    assert cli.main(["push", "--model", str(folders["kept"]), "--repo", "someone/lens"]) == 2
    assert "--include-backbone" in capsys.readouterr().err

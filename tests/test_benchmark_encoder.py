"""LENS models as mteb takes them: instructions, embeddings, exact search in chunks, metadata."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mteb
import numpy as np
import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset
from mteb.models.models_protocols import EncoderProtocol, SearchProtocol
from mteb.types import PromptType
from scipy import sparse

import lens
from eval.encoder import LensEncoder, texts_of
from eval.instructions import instruction_for
from eval.meta import RELEASED, artifact_meta, filled, open_model, released_meta, revision_of
from eval.running import RunningTop, _on_device, inner_products
from lens.search.exact import search

STS, RETRIEVAL, RERANKING = (
    mteb.get_task(name).metadata for name in ("STSBenchmark", "NFCorpus", "AskUbuntuDupQuestions")
)


@pytest.fixture(scope="module")
def folder(mistral: Path, mistral_clusters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = lens.LENS.build(mistral, mistral_clusters, device="cpu")
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save(path)
    return path


@pytest.fixture
def encoder(folder: Path) -> LensEncoder:
    model = lens.load(folder, device="cpu")
    return LensEncoder(model, artifact_meta(model, folder))


def corpus(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"id": [f"d{i}" for i in range(len(texts))], "title": [""] * len(texts), "text": texts})


def asked(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"id": [f"q{i}" for i in range(len(texts))], "text": texts})


def find(encoder: LensEncoder, task: Any = RETRIEVAL, **changes: Any) -> dict[str, dict[str, float]]:
    options = {"hf_split": "test", "hf_subset": "default", "top_k": 4, "encode_kwargs": {}, "num_proc": None, **changes}
    return encoder.search(asked(SENTENCES[:3]), task_metadata=task, **options)


@pytest.mark.parametrize(("benchmark", "count"), [("MTEB(eng, v1)", 56), ("MTEB(eng, v2)", 41)])
def test_every_task_of_both_benchmarks_has_the_papers_instruction(benchmark: str, count: int) -> None:
    table = json.loads((Path(__file__).parents[1] / "eval" / "instructions.json").read_text())
    tasks = mteb.get_benchmark(benchmark).tasks
    assert len(tasks) == count
    for task in tasks:
        for metadata in [task.metadata, *(part.metadata for part in getattr(task, "tasks", []))]:
            parent = table["aliases"].get(metadata.name, metadata.name)
            assert parent in table["tasks"], metadata.name
            assert instruction_for(metadata) == table["tasks"][parent]
            assert instruction_for(metadata).endswith(".")


def test_instructions_by_hand() -> None:
    wanted = {
        "STS17": "Retrieve semantically similar text.",
        "TRECCOVID": "Given a query, retrieve documents that answer the query.",
        "CQADupstackGamingRetrieval": "Retrieve text based on user query.",
        "HotpotQAHardNegatives": "Given a multi-hop question, retrieve documents that can help answer the question.",
        "MedrxivClusteringS2S.v2": "Identify the main category of Medrxiv papers based on the titles.",
        "SummEvalSummarization.v2": "Given a news summary, retrieve other semantically similar summaries.",
        "STS22.v2": "Retrieve semantically similar text.",
    }
    for name, text in wanted.items():
        assert instruction_for(mteb.get_task(name).metadata) == text
    own = SimpleNamespace(name="Mine", type="Retrieval", prompt={"query": "Find the page"})
    assert instruction_for(own) == "Find the page."
    assert (
        instruction_for(SimpleNamespace(name="Mine", type="Classification", prompt=None)) == "Classify user passages."
    )


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("chunk", [1, 2, 7, 30, 100, 101])
def test_chunks_of_any_size_give_what_one_search_gives(form: str, chunk: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 3, size=(130, 12)).astype(np.float32)  # whole numbers: many equal scores
    values[rng.random(values.shape) < 0.6] = 0
    queries, documents = values[:30], values[30:]
    if form == "sparse":
        queries, documents = sparse.csr_matrix(queries), sparse.csr_matrix(documents)
    for k in (1, 5, 100):
        found = RunningTop(30, k)
        for start in range(0, 100, chunk):
            part = documents[start : start + chunk]
            found.add(inner_products(queries, part), part.shape[0])
        positions, scores = search(queries, documents, k)
        np.testing.assert_array_equal(found.positions, positions)
        np.testing.assert_array_equal(found.scores, scores)


def test_a_search_goes_on_from_its_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    queries, documents = rng.random((5, 8), np.float32), rng.random((40, 8), np.float32)
    file = tmp_path / "state.safetensors"
    first = RunningTop.resume(file, "a", 5, 6)
    first.add(inner_products(queries, documents[:25]), 25)
    first.save(file, "a")
    again = RunningTop.resume(file, "a", 5, 6)
    assert again.seen == 25
    again.add(inner_products(queries, documents[25:]), 15)
    np.testing.assert_array_equal(again.positions, search(queries, documents, 6)[0])
    assert RunningTop.resume(file, "b", 5, 6).seen == 0  # another search's
    file.write_bytes(file.read_bytes()[:40])
    assert RunningTop.resume(file, "a", 5, 6).seen == 0  # torn
    with pytest.raises(ValueError, match="from 0 on are not numbers"):
        RunningTop(5, 6).add(lambda rows: np.full((5, 3), np.nan, np.float32), 3)


def test_mtebs_own_check_of_models_passes(encoder: LensEncoder) -> None:
    assert isinstance(encoder, EncoderProtocol)
    assert isinstance(encoder, SearchProtocol)
    results = mteb.mock_run(encoder)
    ran = {name for name, status in results.items() if status is not None}
    failed = {
        name: status for name, status in results.items() if isinstance(status, mteb.results.task_result.TaskError)
    }
    assert results.all_passed, failed
    assert not failed
    assert len(ran) >= 20, ran


def test_instructions_go_where_the_paper_puts_them(encoder: LensEncoder) -> None:
    model, texts = encoder.model, SENTENCES[:4]
    queries = {task.name: model.encode_queries(texts, instruction=instruction_for(task)) for task in (STS, RETRIEVAL)}
    documents = model.encode_documents(texts)
    loader = [{"text": texts[:3]}, {"text": texts[3:]}]
    cases = [
        (STS, None, queries[STS.name]),
        (STS, PromptType.document, queries[STS.name]),  # both sides of a symmetric task
        (RETRIEVAL, PromptType.query, queries[RETRIEVAL.name]),
        (RETRIEVAL, PromptType.document, documents),
    ]
    for task, side, wanted in cases:
        found = encoder.encode(loader, task_metadata=task, prompt_type=side)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert np.abs(queries[STS.name] - documents).max() > 1e-3


def test_equal_texts_are_embedded_once(encoder: LensEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = encoder.model.encode

    def counted(texts: list[str], *arguments: Any, **options: Any) -> Any:
        seen.extend(texts)
        return encode(texts, *arguments, **options)

    monkeypatch.setattr(encoder.model, "encode", counted)
    texts = [SENTENCES[i] for i in (0, 1, 0, 2, 1, 0)]
    found = encoder.encode([{"text": texts}], task_metadata=STS)
    assert seen == SENTENCES[:3]
    assert found.shape[0] == 6
    np.testing.assert_array_equal(found[0], found[5])
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("chunk", [3, 64])
def test_search_is_the_full_one(encoder: LensEncoder, chunk: int) -> None:
    encoder.chunk = chunk
    encoder.index(corpus(SENTENCES))
    found = find(encoder)
    queries = encoder.model.encode_queries(SENTENCES[:3], instruction=instruction_for(RETRIEVAL))
    scores = queries @ encoder.model.encode_documents(SENTENCES).T
    for number, row in enumerate(scores):
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:4]
        assert list(found[f"q{number}"]) == [f"d{i}" for i in best]
        np.testing.assert_allclose(list(found[f"q{number}"].values()), row[best], atol=1e-6)


def test_a_killed_search_encodes_only_what_is_left(
    encoder: LensEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.chunk, encoder.work = 4, tmp_path / "work"
    encoder.index(corpus(SENTENCES))
    whole = find(encoder)
    for file in encoder.work.iterdir():
        file.unlink()
    documents, seen = encoder.model.encode_documents, []

    def failing(texts: list[str], **options: Any) -> Any:
        if len(seen) >= 8:
            raise KeyboardInterrupt
        seen.extend(texts)
        return documents(texts, **options)

    monkeypatch.setattr(encoder.model, "encode_documents", failing)
    with pytest.raises(KeyboardInterrupt):
        find(encoder)
    seen.clear()
    monkeypatch.setattr(
        encoder.model, "encode_documents", lambda texts, **o: seen.extend(texts) or documents(texts, **o)
    )
    assert find(encoder) == whole
    assert set(SENTENCES[4:]) == set(seen)
    encoder.index(corpus(list(reversed(SENTENCES))))
    assert find(encoder) != whole  # another corpus is another search


def test_reranking_orders_the_candidates_alone(encoder: LensEncoder) -> None:
    encoder.index(corpus(SENTENCES))
    candidates = {"q0": ["d5", "d1", "d3"], "q1": ["d0"], "q2": ["d2", "d4"]}
    encoder.chunk = 2
    found = find(encoder, RERANKING, top_ranked=candidates)
    queries = encoder.model.encode_queries(SENTENCES[:3], instruction=instruction_for(RERANKING))
    scores = queries @ encoder.model.encode_documents(SENTENCES).T
    for number, names in enumerate(candidates.values()):
        wanted = {name: scores[number, int(name[1:])] for name in names}
        assert list(found[f"q{number}"]) == sorted(wanted, key=lambda name: -wanted[name])
        assert found[f"q{number}"] == pytest.approx(wanted, abs=1e-6)
    for task in (RERANKING, mteb.get_task("Core17InstructionRetrieval").metadata):
        with pytest.raises(ValueError, match=rf"{task.name}: the candidates to rerank \(top_ranked\) are missing"):
            find(encoder, task)
    with pytest.raises(ValueError, match="candidate 'd99' of query 'q0' is not in the corpus"):
        find(encoder, RERANKING, top_ranked={"q0": ["d99"]})


def test_broken_models_are_named_with_task_and_text(encoder: LensEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = encoder.model.encode

    def broken(texts: list[str], *arguments: Any, **options: Any) -> Any:
        if SENTENCES[3] in texts:
            raise FloatingPointError("embeddings hold NaN")
        return encode(texts, *arguments, **options)

    monkeypatch.setattr(encoder.model, "encode", broken)
    with pytest.raises(
        ValueError, match=f"STSBenchmark: embeddings hold NaN; the first such text: '{SENTENCES[3][:20]}"
    ):
        encoder.encode([{"text": SENTENCES}], task_metadata=STS)
    monkeypatch.setattr(encoder.model, "encode", lambda texts, *a, **o: 0 * encode(texts, *a, **o))
    with pytest.raises(ValueError, match=f"STSBenchmark: all 8 embeddings are zero, even that of '{SENTENCES[0][:20]}"):
        encoder.encode([{"text": [f"{SENTENCES[0]} {i}" for i in range(8)]}], task_metadata=STS)
    assert not encoder.encode([{"text": SENTENCES[:4]}], task_metadata=STS).any()  # few may share nothing
    assert not encoder.encode([{"text": ["", "  "]}], task_metadata=STS).any()  # nothing to embed is no error


def test_values_that_are_not_finite_are_named_whatever_the_model(encoder: LensEncoder) -> None:
    vectors = encoder.vectors

    def spoilt(texts: Any, *arguments: Any) -> Any:
        found = vectors(texts, *arguments)
        return np.where(np.array([text == SENTENCES[2] for text in texts])[:, None], np.nan, found)

    encoder.vectors = spoilt  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=f"STSBenchmark: the embedding of '{SENTENCES[2][:20]}.* is not finite"):
        encoder.encode([{"text": SENTENCES}], task_metadata=STS)


def test_documents_are_read_as_mteb_reads_them() -> None:
    from mteb._create_dataloaders import create_dataloader

    texts = ["  a text ", "b", "", " c"]
    for columns in ({"title": ["T", "", " U ", "V"]}, {}):
        rows = Dataset.from_dict({"id": list("abcd"), "text": texts, **columns})
        loader = create_dataloader(rows, task_metadata=RETRIEVAL, prompt_type=PromptType.document)
        wanted = [text for batch in loader for text in batch["text"]]
        assert texts_of(rows, RETRIEVAL, PromptType.document) == wanted


def test_the_devices_products_are_those_of_the_cpu() -> None:
    rng = np.random.default_rng(2)
    queries, documents = rng.random((7, 5), np.float32), rng.random((9, 5), np.float32)
    for form in (queries, sparse.csr_matrix(queries)):
        product = _on_device(form, documents, torch.device("cpu"))
        np.testing.assert_allclose(product(slice(2, 6)), queries[2:6] @ documents.T, rtol=1e-6)


def test_metadata_tells_the_model_and_no_path(folder: Path) -> None:
    model = lens.load(folder, device="cpu")
    meta = artifact_meta(model, folder)
    facts = meta.to_dict()
    assert str(folder.parent) not in json.dumps(facts, default=str)
    assert (facts["name"], facts["embed_dim"], facts["loader"]) == ("local/tiny", 24, "load_encoder")
    assert facts["n_parameters"] == sum(p.numel() for p in model.model.parameters())
    assert len(meta.revision) == 40
    loaded = meta.load_model(device="cpu")
    texts = [{"text": SENTENCES}]
    again = LensEncoder(model, meta).encode(texts, task_metadata=STS)
    np.testing.assert_array_equal(loaded.encode(texts, task_metadata=STS), again)
    assert loaded.mteb_model_meta.revision == meta.revision
    with pytest.raises(ValueError, match="OWNER/MODEL, of letters, digits and ._-; found 'mine'"):
        artifact_meta(model, folder, "mine")


def test_a_revision_is_a_hash_of_all_that_is_read(folder: Path, tmp_path: Path) -> None:
    import shutil

    model, base = shutil.copytree(folder, tmp_path / "model"), tmp_path / "base"
    first = revision_of(model)
    (model / "checkpoint-5").mkdir()
    (model / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    (model / "README.md").write_text("words")
    assert revision_of(model) == first
    base.mkdir()
    (base / "config.json").write_text("{}")
    assert revision_of(model, str(base)) != first  # whose backbone lies elsewhere
    seen = {first}
    for name in ("1_Pooling/config.json", "vocab.txt", "embedding/lm_head.pth", "tokenizer.model"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("content")
        seen.add(revision_of(model))
    assert len(seen) == 5
    with pytest.raises(ValueError, match="holds no file of a model"):
        revision_of(model / "checkpoint-5" / "none")


def test_what_only_the_owner_knows_comes_from_a_file(folder: Path, tmp_path: Path) -> None:
    meta = artifact_meta(lens.load(folder, device="cpu"), folder)
    file = tmp_path / "meta.json"
    file.write_text(json.dumps({"release_date": "2026-01-02", "languages": ["eng-Latn"], "training_datasets": ["NQ"]}))
    found = filled(meta, file)
    assert (found.release_date, found.languages, found.training_datasets) == ("2026-01-02", ["eng-Latn"], {"NQ"})
    assert (found.name, found.revision, found.loader) == (meta.name, meta.revision, meta.loader)
    for content, message in (
        ({"revision": "x"}, "'revision' is no field to fill"),
        ({"languages": ["xx"]}, "meta.json"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            filled(meta, file)


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints_have_a_loader(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert mteb.get_model_meta(name).loader is None
    meta = released_meta(name)
    calls: list[tuple[Any, dict[str, Any]]] = []

    def load(place: Any, **options: Any) -> Any:
        calls.append((place, options))
        return SimpleNamespace(config=SimpleNamespace(dimensions=24), device=None)

    monkeypatch.setattr("lens.load", load)
    released_meta(name, compat="official").load_model(device="cpu")
    meta.load_model(device="cpu")
    (first, options), (second, plain) = calls
    assert first == second == name
    assert options["compat"] == "official"
    assert "compat" not in plain
    assert plain["revision"] == meta.revision == mteb.get_model_meta(name).revision
    calls.clear()
    _, _, opened = open_model(name)
    assert calls[0][1]["revision"] == opened.revision == meta.revision  # not whatever the hub has now
    with pytest.raises(ValueError, match="has its name and metadata from mteb"):
        open_model(name, name="a/b")

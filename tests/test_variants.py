"""Stored embeddings, what is made of them, and how useful dimensions are, against plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import write_rows
from mteb.models.model_meta import ModelMeta
from mteb.types import PromptType
from scipy import sparse
from test_eval_program import DOCUMENTS, write_beir

from eval.encoder import ChunkedEncoder
from eval.tasks import local_task
from eval.usefulness import unlabelled
from eval.variants import Store, Variant, named, pruning, size_of, unchanged, weighted

WIDTH = 12
DOCUMENT, QUERY = PromptType.document, PromptType.query


class Made(ChunkedEncoder):
    """Embeddings that only a text's letters decide, unlike for queries and documents; remembers what it embedded."""

    def __init__(self, density: float = 0.5) -> None:
        super().__init__(ModelMeta.create_empty(), WIDTH)
        self.density = density
        self.calls: list[tuple[PromptType | None, str]] = []

    def vectors(self, texts: Sequence[str], task: Any, side: PromptType | None, output: str) -> Any:
        self.calls += [(side, text) for text in texts]
        rows = np.stack([self.one(text, side) for text in texts]) if texts else np.zeros((0, WIDTH), np.float32)
        return sparse.csr_matrix(rows) if output == "csr" else rows

    def one(self, text: str, side: PromptType | None) -> np.ndarray:
        rng = np.random.default_rng([*text.encode(), side == QUERY])
        row = rng.random(WIDTH) * (rng.random(WIDTH) < self.density)
        return (row / (np.linalg.norm(row) or 1)).astype(np.float32)


def task(name: str = "t", kind: str = "Retrieval") -> Any:
    return SimpleNamespace(name=name, type=kind)


def embeddings(rows: int = 11) -> np.ndarray:
    made = Made()
    return np.stack([made.one(f"text {row}", DOCUMENT) for row in range(rows)])


@pytest.mark.parametrize("n", [1, 3, WIDTH - 1])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_largest_values_are_those_of_argsort(n: int, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.variants.BLOCK", 4)
    vectors = embeddings()
    wanted = np.zeros_like(vectors)
    for row, values in enumerate(vectors):
        best = np.argsort(-values, kind="stable")[:n]
        wanted[row, best] = values[best]
        if normalize and wanted[row].any():
            wanted[row] /= np.linalg.norm(wanted[row])
    for given in (vectors, sparse.csr_matrix(vectors)):
        found = pruning(top_k=n, normalize=normalize)(given)
        assert sparse.issparse(found)
        assert found.toarray() == pytest.approx(wanted, abs=1e-6)


def test_kept_dimensions_are_columns() -> None:
    vectors, kept = embeddings(), np.array([7, 2, 9])
    found = pruning(kept, normalize=True)(sparse.csr_matrix(vectors)).toarray()
    wanted = vectors[:, [2, 7, 9]]
    lengths = np.linalg.norm(wanted, axis=1, keepdims=True)
    assert found == pytest.approx(wanted / np.where(lengths, lengths, 1), abs=1e-6)
    assert pruning(kept)(vectors).toarray() == pytest.approx(wanted)
    assert pruning(top_k=2)(np.zeros((0, WIDTH), np.float32)).shape == (0, WIDTH)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_joined_embeddings_sum_the_cosines(weight: float) -> None:
    one = embeddings()
    two = np.random.default_rng(0).normal(size=(len(one), 5)).astype(np.float32)
    two /= np.linalg.norm(two, axis=1, keepdims=True)
    joined = weighted(weight)(sparse.csr_matrix(one), two)
    assert joined @ joined.T == pytest.approx(weight * one @ one.T + (1 - weight) * two @ two.T, abs=1e-6)
    full = np.linalg.norm(one, axis=1) > 0
    assert np.linalg.norm(joined[full], axis=1) == pytest.approx(1, abs=1e-6)


def test_each_text_is_embedded_once_for_its_side() -> None:
    made = Made()
    store = Store(made, "csr", 1_000_000)
    for texts, side in ((["a", "b"], DOCUMENT), (["b", "c", "a"], DOCUMENT), (["a"], QUERY), (["c", "a"], DOCUMENT)):
        found = store.vectors(texts, task(), side)
        assert found.toarray() == pytest.approx(np.stack([made.one(text, side) for text in texts]))
    assert made.calls == [(DOCUMENT, "a"), (DOCUMENT, "b"), (DOCUMENT, "c"), (QUERY, "a")]
    assert store.vectors([], task(), DOCUMENT).shape == (0, WIDTH)
    store.vectors(["a"], task("other"), DOCUMENT)
    assert made.calls[4:] == [(DOCUMENT, "a")]  # instructions go by the task
    made.calls.clear()
    for side in (None, QUERY, DOCUMENT):  # a symmetric task has one side
        store.vectors(["a", "b"], task("sts", "STS"), side)
    assert made.calls == [(None, "a"), (None, "b")]


@pytest.mark.parametrize("output", ["csr", "numpy"])
def test_what_passes_the_limit_is_embedded_again_and_told(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made()
    one = size_of(made.vectors(["a", "b"], task(), DOCUMENT, output))
    made.calls.clear()
    store = Store(made, output, one)
    for _ in range(2):
        for texts in (["a", "b"], ["c", "d"], ["d", "b", "e", "a"]):
            found = store.vectors(texts, task(), DOCUMENT)
            rows = found.toarray() if sparse.issparse(found) else found
            assert rows == pytest.approx(np.stack([made.one(text, DOCUMENT) for text in texts]))
            assert sum(map(size_of, store.held.values())) <= one
    assert [text for _, text in made.calls] == ["a", "b", *"cdde" * 2]
    assert len(store.notes) == 1
    assert capsys.readouterr().err.count("--memory-mb") == 1


@pytest.mark.parametrize("density", [0.05, 0.6])
def test_a_variant_searches_as_the_model_does(density: float, tmp_path: Path) -> None:
    """The same chunks, the same choice between sparse and dense, the same ranks and scores."""
    local = local_task(str(write_beir(tmp_path / "beir")))
    local.load_data()
    data = local.dataset["default"]["test"]
    answers = []
    for system in (Made(density), Variant(ModelMeta.create_empty(), [Store(Made(density), "csr", 10**6)], unchanged)):
        system.index(data["corpus"])
        where = {"task_metadata": local.metadata, "hf_split": "test", "hf_subset": "default"}
        answers.append(system.search(data["queries"], **where, top_k=10))
    assert answers[0] == answers[1]
    assert {len(found) for found in answers[0].values()} == {min(10, len(DOCUMENTS))}


def test_variants_are_kept_apart_by_their_facts() -> None:
    meta = ModelMeta.create_empty().model_copy(update={"experiment_kwargs": {"dtype": "bfloat16"}})
    found = [named(meta, 8, top_n=8), named(meta, 8, top_n=16), named(meta, 8, dense="local/x@1", weight=0.5), meta]
    assert len({one.experiment_name for one in found}) == 4
    assert found[0].experiment_kwargs == {"dtype": "bfloat16", "top_n": 8}


def test_a_sample_holds_texts_and_no_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    beir = local_task(str(write_beir(tmp_path / "beir")))
    assert set(unlabelled(beir, 100, rng)) == set(DOCUMENTS.values())
    assert not beir.data_loaded
    for name, rows, wanted in (
        ("sts", [{"sentence1": "a", "sentence2": "bcde"[i], "score": i} for i in range(4)], set("abcde")),
        ("groups", [{"text": f"t{i}", "label": f"l{i % 2}"} for i in range(4)], {"t0", "t1", "t2", "t3"}),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "test.jsonl", *rows)
        assert set(unlabelled(local_task(str(tmp_path / name)), 100, rng)) == wanted
        assert len(unlabelled(local_task(str(tmp_path / name)), 2, rng)) == 2


def test_a_dev_split_is_a_task_of_its_own(tmp_path: Path) -> None:
    from eval.tasks import DEV

    folder = tmp_path / "sts"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        rows = [{"sentence1": split, "sentence2": f"{split} {i}", "score": i} for i in range(3)]
        write_rows(folder / f"{split}.jsonl", *rows)
    plain, dev = local_task(str(folder)), local_task(str(folder), DEV)
    assert (plain.metadata.name, list(plain.eval_splits)) == ("sts", ["test"])
    assert (dev.metadata.name, list(dev.eval_splits)) == ("sts.dev", ["dev"])
    dev.load_data()
    assert set(dev.dataset["dev"]["sentence1"]) == {"dev"}
    (folder / "dev.jsonl").unlink()
    with pytest.raises(ValueError, match="has test, train, of which none is called dev, validation"):
        local_task(str(folder), DEV)

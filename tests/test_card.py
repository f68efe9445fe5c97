"""Model cards: metadata that the hub reads, recipe and results, and nothing of the training machine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SENTENCES
from huggingface_hub import ModelCard

import lens
from lens import cli
from lens.card import Facts, is_hub_id, public, recipe_facts, result_facts
from lens.export import rewrite_card
from train.config import Recipe
from train.run import finish

RECIPE = Recipe(
    base="/home/someone/models/mistral",
    data=("/home/someone/data/pairs.jsonl", "cfli/bge-full-data"),
    output="/home/someone/runs/first",
    clusters="../clusters of mine",
    teacher_embeddings="teacher/all.npz",
    deepspeed="zero1",
    kd_weight=0.5,
)


@pytest.fixture
def folder(tmp_path: Path, bert: Path, bert_clusters: Path) -> Path:
    model = lens.LENS.build(bert, bert_clusters)
    model.model.facts = Facts(recipe_facts(RECIPE.resolved()))
    model.save(tmp_path / "model")
    return tmp_path / "model"


def results(path: Path, *models: str, **changes) -> Path:
    """A results.json as eval/run.py writes it."""

    def system(value: float, parts=()) -> dict:
        measures = {"nDCG@10": value, "RR@10": value / 2, "R@100": value / 4}
        return {**measures, "seconds": 1.0, "dimensions": 24, "active_per_query": 3.5, "parts": list(parts)}

    systems = {name: system(0.3 + i / 7) for i, name in enumerate(models)}
    systems |= {"dense": system(0.25), "bm25": system(0.125), f"{models[0]} + dense": system(0.5, [models[0], "dense"])}
    entry = {"queries": 323, "documents": 3633, "systems": systems, "comparisons": [], "warnings": []}
    path.write_text(json.dumps({"datasets": {"nf|corpus": entry, "cranfield": entry}, "config": {}, **changes}))
    return path


def test_the_hub_reads_the_metadata(folder: Path, tmp_path: Path) -> None:
    readme = rewrite_card(folder, results(tmp_path / "r.json", "mine"), license="apache-2.0")
    card = ModelCard.load(readme)
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "sentence-transformers",
        "feature-extraction",
    )
    assert {"lens", "sparse", "sentence-transformers", "custom_code"} <= set(data.tags)
    assert data.datasets == ["cfli/bge-full-data"]
    assert data.get("base_model") is None
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {
        (dataset, metric): value
        for dataset in ("nf|corpus", "cranfield")
        for metric, value in (("ndcg_at_10", 0.3), ("mrr_at_10", 0.15), ("recall_at_100", 0.075))
    }
    assert data.to_dict()["model-index"][0]["name"] == "LENS-24"
    table = [line for line in card.text.splitlines() if line.startswith("| cranfield")]
    assert table == [
        "| cranfield | **mine** | 0.3000 | 0.1500 | 0.0750 |",
        "| cranfield | dense | 0.2500 | 0.1250 | 0.0625 |",
        "| cranfield | bm25 | 0.1250 | 0.0625 | 0.0312 |",
        "| cranfield | mine + dense | 0.5000 | 0.2500 | 0.1250 |",
    ]
    assert r"| nf\|corpus | **mine** |" in card.text
    assert "323 queries and 3,633 documents" in card.text


def test_recipe_without_the_training_machine(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    for line in (
        "| base | `mistral` |",
        "| data | `pairs.jsonl, cfli/bge-full-data` |",
        "| clusters | `clusters of mine` |",
        "| teacher_embeddings | `all.npz` |",
        "| deepspeed | `zero1` |",
        "| kd_weight | `0.5` |",
        "| in_batch_negatives | `True` |",
    ):
        assert line in text, line
    stored = (folder / "card.json").read_text()
    for content in (text, stored):
        assert "someone" not in content
        assert str(folder.parent) not in content
        assert "save_steps" not in content
    assert "| output |" not in text


def test_a_finished_run_has_the_card(tmp_path: Path, bert: Path, bert_clusters: Path) -> None:
    built = lens.LENS.build(bert, bert_clusters)
    (tmp_path / "run").mkdir()
    finish(built.model, built.tokenizer, RECIPE, tmp_path / "run")
    text = (tmp_path / "run" / "README.md").read_text()
    assert "| kd_weight | `0.5` |" in text
    assert "someone" not in text
    assert lens.load(tmp_path / "run").model.facts.recipe["deepspeed"] == "zero1"


def test_recipe_and_results_outlive_loading_merging_and_saving(folder: Path, tmp_path: Path) -> None:
    rewrite_card(folder, results(tmp_path / "r.json", "mine"), license="mit")
    before = (folder / "README.md").read_text()
    lens.load(folder).save(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == before
    lens.load(folder).save(tmp_path / "whole", include_backbone=True)
    assert (tmp_path / "whole" / "README.md").read_text() == before


def test_code_in_the_card_runs(tmp_path: Path, bert: Path, bert_clusters: Path) -> None:
    lens.LENS.build(bert, bert_clusters).save(tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text().replace("path/to/this/folder", str(tmp_path / "m"))
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    scope: dict = {}
    for block in blocks:
        queries = scope.get("queries")
        exec(block, scope)
        if queries is not None:
            np.testing.assert_allclose(scope["queries"], queries, atol=1e-6)


def test_examples_name_tokens_of_their_cluster(folder: Path) -> None:
    model = lens.load(folder)
    text = (folder / "README.md").read_text()
    section = text[text.index("## Clusters") : text.index("## Training")]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ") and "," in line]
    assert 3 <= len(rows) <= 8
    for cluster, tokens in rows:
        assert set(tokens.split(", ")) <= set(model.tokens(int(cluster)))


def test_cards_of_other_models(tmp_path: Path, bert_mlm: Path, mistral: Path, mistral_clusters: Path) -> None:
    lens.LENS.build(bert_mlm, normalize=False).save(tmp_path / "v")
    text = (tmp_path / "v" / "README.md").read_text()
    assert "## Clusters" not in text
    assert "each one a token of the vocabulary" in text
    assert "inner product" in text
    assert "## Training" not in text
    assert "## Results" not in text
    model = lens.LENS.build(mistral, mistral_clusters, instruction="say | `it`", bidirectional=False)
    model.model.config = model.config.replace(base="mistralai/Mistral-7B-v0.1", revision="abc")
    model.save(tmp_path / "m")
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("mistralai/Mistral-7B-v0.1", "finetune")
    assert "| attention | causal |" in card.text
    assert r"say \| 'it'" in card.text


def test_a_card_edited_by_hand_is_not_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = results(tmp_path / "r.json", "mine")
    command = ["card", "--model", str(folder), "--results", str(report)]
    assert cli.main(command) == 0
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "\nBy hand.\n")
    assert cli.main(command) == 2
    assert "edited by hand" in capsys.readouterr().err
    assert "By hand." in readme.read_text()
    assert cli.main([*command, "--overwrite"]) == 0
    assert "By hand." not in readme.read_text()
    assert lens.load(folder).encode_documents(SENTENCES[:1]).shape == (1, 24)


def test_an_artifact_from_before_gets_a_card_from_its_recipe(folder: Path) -> None:
    (folder / "card.json").unlink()
    (folder / "recipe.json").write_text(json.dumps({**RECIPE.resolved(), "inputs": {"/home/someone/x": "0f"}}))
    with pytest.raises(FileExistsError, match="edited by hand or by another version"):
        rewrite_card(folder)
    text = rewrite_card(folder, overwrite=True).read_text()
    assert "| data | `pairs.jsonl, cfli/bge-full-data` |" in text
    assert "someone" not in text


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    report = results(tmp_path / "r.json", "one", "two")
    with pytest.raises(ValueError, match="results of one, two: say by --system"):
        result_facts(report)
    assert result_facts(report, "two")["system"] == "two"
    with pytest.raises(ValueError, match="system 'three' has no measures on nf.corpus, cranfield; known: one, two"):
        result_facts(report, "three")
    with pytest.raises(ValueError, match="give results"):
        rewrite_card(folder, system="two")
    with pytest.raises(FileNotFoundError, match=r"holds no lens\.json"):
        rewrite_card(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        rewrite_card(folder, tmp_path / "absent.json")
    for content in ({}, {"datasets": {}}, {"datasets": {"a": 3}}, {"datasets": {"a": {"systems": {"m": 1}}}}):
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="eval/run.py wrote"):
            rewrite_card(folder, tmp_path / "bad.json")
    for content in ({"recipes": {}}, {"recipe": []}):
        (folder / "card.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"card\.json: (unknown field 'recipes'|recipe should be an object)"):
            lens.load(folder)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("/data/models/x", "x"),
        ("~/x/y", "y"),
        ("runs/mined.jsonl", "mined.jsonl"),
        ("C:\\models\\x", "x"),
        ("/home/me/.cache/huggingface/hub/models--yibinlei--LENS-d8000/snapshots/a0b87bd9", "yibinlei/LENS-d8000"),
        (["./a/b", 3], ["b", 3]),
        (None, None),
        ("", ""),
    ],
)
def test_public(value, shown) -> None:
    assert public(value) == shown


def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("models/mine")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert not is_hub_id("models/mine")
    assert public("models/mine") == "mine"

"""Recipes: typed, overridden, refused by field name."""

from __future__ import annotations

import pytest
import yaml
from conftest import ROOT

from train.config import Recipe, load_recipe, parse_overrides

NEEDED = {"base": "b", "data": ["d.jsonl"], "output": "o"}


def recipe_file(tmp_path, **values):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**NEEDED, **values}))
    return path


def test_recipe_from_yaml_and_overrides(tmp_path):
    path = recipe_file(tmp_path, temperature=0.1)
    overrides = parse_overrides(["--learning_rate", "1e-4", "--data", "a.jsonl", "b.jsonl", "--pooling=sum",
                                 "--local_rank=0", "--resume", "false"])  # fmt: skip
    recipe = load_recipe(path, overrides)
    assert recipe.temperature == 0.1
    assert recipe.learning_rate == pytest.approx(1e-4)
    assert recipe.data == ("a.jsonl", "b.jsonl")
    assert (recipe.pooling, recipe.resume) == ("sum", False)
    assert Recipe(**recipe.resolved()) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temprature": 0.1}, "unknown field 'temprature' in the recipe; did you mean 'temperature'"),
        ({"batch_size": "many"}, "batch_size must be a whole number; found 'many'"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"pooling": "mean"}, "pooling must be one of max, sum, last; found 'mean'"),
        ({"resume": "yes please"}, "resume must be true or false"),
        ({"backbone": "frozen"}, "backbone=frozen contradicts train_head=false"),
        ({"group_size": 1, "in_batch_negatives": False}, "group_size=1 contradicts in_batch_negatives=false"),
        ({"lora_dropout": 1.0}, "lora_dropout must be from 0 to below 1"),
        ({"data": []}, "data must name at least one file"),
        ({"output": None}, "output is missing: set it in the recipe or pass --output"),
        ({"kd_weight": float("nan")}, "kd_weight must be a finite number; found nan"),
    ],
)
def test_bad_recipes_name_the_field(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file(tmp_path, **values))


def test_bad_recipe_files_and_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.yaml does not exist"):
        load_recipe(tmp_path / "gone.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="bad.yaml is not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="'stray' follows no --field"):
        parse_overrides(["stray"])
    with pytest.raises(ValueError, match="--seed needs a value"):
        parse_overrides(["--seed"])


@pytest.mark.parametrize("path", sorted((ROOT / "train" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    assert load_recipe(path, {**NEEDED, "clusters": "c"}).base == "b"

"""Recipes: typed, overridden, refused by field name."""

from __future__ import annotations

import pytest
import yaml
from conftest import ROOT
from train_helpers import log_of, settings

import lens
from train.config import Recipe
from train.overrides import load_recipe, parse_overrides
from train.run import _changed_files
from train.run import main as train

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


def test_lists_of_numbers_and_sizes_by_type(tmp_path):
    path = recipe_file(tmp_path, type_group_size={"symmetric_class": 2}, data_weights=2)
    assert load_recipe(path).data_weights == (2.0,)
    assert load_recipe(path).group_size_of("symmetric_class") == 2
    assert load_recipe(path).group_size_of("only_1neg") == 2
    assert load_recipe(path).group_size_of("retrieval") == 8
    arguments = ["--data", "a", "b", "--data_weights", "1", "0.5"]
    arguments += ["--type_batch_size", "symmetric_sts=256", "symmetric_class=128"]
    recipe = load_recipe(path, parse_overrides(arguments))
    assert recipe.data_weights == (1.0, 0.5)
    assert [recipe.batch_size_of(kind) for kind in ("symmetric_sts", "symmetric_class", "retrieval")] == [256, 128, 512]
    assert Recipe(**recipe.resolved()) == recipe
    renamed = load_recipe(path, {"type_batch_size": {"normal": 4}})  # what the published data calls retrieval
    assert (renamed.type_batch_size, renamed.batch_size_of("retrieval")) == ({"retrieval": 4}, 4)
    one = load_recipe(path, parse_overrides(["--type_batch_size=symmetric_sts=4", "--type_group_size", "null"]))
    assert (one.type_batch_size, one.type_group_size) == ({"symmetric_sts": 4}, None)


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
        ({"data_weights": [1, 2]}, r"data_weights must be 1 numbers above 0 .* found \[1.0, 2.0\]"),
        ({"data_weights": [0]}, "data_weights must be 1 numbers above 0"),
        ({"data_weights": ["much"]}, "data_weights must be a list of finite numbers or null; found"),
        ({"type_batch_size": {"sts": 3}}, "type_batch_size: unknown type 'sts'; types are retrieval, only_1neg"),
        ({"type_batch_size": {"retrieval": 0}}, "type_batch_size: retrieval must be at least 1, found 0"),
        ({"type_batch_size": {"retrieval": 1.5}}, "type_batch_size must be whole numbers by name .* or null; found"),
        ({"type_batch_size": "retrieval=x"}, "type_batch_size must be whole numbers by name .* found 'retrieval=x'"),
        ({"type_group_size": {"symmetric_class": 1}}, "type_group_size: symmetric_class must be at least 2, found 1"),
        ({"type_group_size": {"only_1neg": 3}}, "only_1neg takes one negative, so at most 2 passages"),
        ({"streaming": True, "backbone": "top"}, "streaming=true contradicts cache_hidden=true with backbone=top"),
        ({"false_negative_margin": 1}, "margin=1.0 contradicts mask_false_negatives=duplicates: it goes with teacher"),
        ({"mask_false_negatives": "some"}, "mask_false_negatives must be one of none, duplicates, teacher"),
        ({"type_batch_size": {"symetric_sts": 3}}, "unknown type 'symetric_sts'; .*; did you mean symmetric_sts?"),
        ({"type_batch_size": {"normal": 4, "retrieval": 8}}, "type_batch_size: normal and retrieval are one type"),
        ({"seed": -1}, "yaml: seed must be from 0 to 4294967295, found -1$"),
        ({"seed": 2**32}, "yaml: seed must be from 0 to 4294967295, found 4294967296$"),
        ({"epochs": 1e7}, "yaml: epochs must be at most 1e6, found 10000000.0$"),
        ({"max_steps": 10**20}, "max_steps must be at most 2147483647, found 1000"),
        ({"data": ["d", "e", "d"]}, "data names d twice: name it once, with data_weights"),
        ({"data": [""]}, r"data must not be an empty text; found \[''\]"),
        ({"base": " "}, "base must not be an empty text; found ' '"),
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
    (tmp_path / "twice.yaml").write_text("seed: 1\ntype_batch_size: {retrieval: 2, retrieval: 4}\n")
    with pytest.raises(ValueError, match="twice.yaml: line 2: retrieval is given twice: keep one"):
        load_recipe(tmp_path / "twice.yaml")
    (tmp_path / "merged.yaml").write_text(
        "base: b\noutput: o\ndata: d\ntype_batch_size: {<<: {retrieval: 2}, retrieval: 4}\n"
    )
    assert load_recipe(tmp_path / "merged.yaml").type_batch_size == {"retrieval": 4}
    with pytest.raises(ValueError, match=f"recipe {tmp_path} is a folder: name a YAML file"):
        load_recipe(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="model.bin is no recipe, it holds no UTF-8 text: name a YAML file"):
        load_recipe(tmp_path / "model.bin")
    (tmp_path / "large.bin").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(ValueError, match="large.bin is no recipe, its 1,048,577 bytes are too many"):
        load_recipe(tmp_path / "large.bin")
    with pytest.raises(ValueError, match="--data is given twice: give it once, with all values after it"):
        parse_overrides(["--data", "a", "--data", "b"])
    with pytest.raises(ValueError, match="'-base' begins with one dash, fields with two: --base"):
        parse_overrides(["--data", "a", "-base", "b"])
    for arguments, message in ((["--seed="], "--seed needs a value"), (["--"], "'--' names no field")):
        with pytest.raises(ValueError, match=message):
            parse_overrides(arguments)
    assert parse_overrides(["--seed", "-1", "--seed", "2"]) == {"seed": 2}
    twice = parse_overrides(["--type_batch_size", "symmetric_sts=2", "symmetric_sts=4"])
    message = r"type_batch_size: symmetric_sts is given twice \(symmetric_sts=2, symmetric_sts=4\): keep one"
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe_file(tmp_path), twice)
    with pytest.raises(ValueError, match="'stray' follows no --field"):
        parse_overrides(["stray"])
    with pytest.raises(ValueError, match="--seed needs a value"):
        parse_overrides(["--seed"])


@pytest.mark.parametrize("path", sorted((ROOT / "train" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    assert load_recipe(path, {**NEEDED, "clusters": "c"}).base == "b"


def test_the_published_recipes_are_as_published():
    folder = ROOT / "train" / "recipes"
    large, small = (load_recipe(folder / f"lens-mistral-7b-{name}.yaml") for name in ("d8000", "d4000"))
    assert (large.lora_r, large.lora_alpha, large.lora_dropout) == (32, 64, 0.1)
    assert set(large.lora_targets) == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert (large.learning_rate, large.warmup_steps, large.epochs, large.temperature) == (1e-4, 100, 1, 0.02)
    assert (large.batch_size_of("retrieval"), large.batch_size_of("symmetric_class")) == (512, 256)
    assert (large.batch_size_of("only_1neg"), large.group_size_of("only_1neg"), large.group_size) == (512, 2, 8)
    assert (large.pooling, large.bidirectional, large.normalize, large.train_head) == ("max", True, True, False)
    assert (large.query_max_length, large.document_max_length) == (512, 512)
    one, other = large.resolved(), small.resolved()
    assert {name for name in one if one[name] != other[name]} == {"clusters", "output"}


@pytest.mark.parametrize("name", ["lens-mistral-7b-d8000", "lens-mistral-7b-24gb", "lens-small-decoder"])
def test_recipes_for_gpus_train_a_tiny_decoder(name, mistral, mistral_clusters, pairs, tmp_path):
    if name == "lens-mistral-7b-24gb":
        pytest.importorskip("bitsandbytes", reason="4-bit loading needs bitsandbytes")
    changes = {
        "base": mistral, "clusters": mistral_clusters, "data": pairs, "output": tmp_path / "run", "batch_size": 8,
        "group_size": 3, "max_steps": 3, "save_steps": 2, "warmup_steps": 1, "mini_batch_tokens": 100, "device": "cpu",
        "deepspeed": "null",
        "report_to": "[]", "logging_steps": 1,
    }  # fmt: skip
    path = ROOT / "train" / "recipes" / f"{name}.yaml"
    assert train([str(path), *(str(part) for name, value in changes.items() for part in (f"--{name}", value))]) == 0
    log = log_of(tmp_path / "run")
    assert log[-1]["step"] == 3
    assert all(row["grad_norm"] > 0 for row in log)
    embeddings = lens.load(tmp_path / "run").encode_queries(["a query"], "Find the rest of the sentence.")
    assert (embeddings > 0).any()


def test_a_revision_of_a_local_base_is_refused(mistral, mistral_clusters, pairs, empty, tmp_path, capsys):
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "run", revision="main")
    assert train([empty, *arguments]) == 2
    assert f"revision=main contradicts base={mistral}, a local folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_whose_files_changed_names_only_these():
    before = {"same": "1", "other": "2", "gone": "3"} | {f"f{i}": "4" for i in range(7)}
    now = {"same": "1", "other": "5", "new": "6"}
    assert _changed_files(before, now) == (
        "files that appeared since: new, files that vanished since: gone f0 f1 f2 f3 and 3 more, "
        "files that changed since: other"
    )

"""Recipes, data, schedule and whole training runs: resumed, restarted, refused, and under the DeepSpeed launcher."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SENTENCES
from safetensors.torch import load_file

import lens
from lens.text import TextProcessor
from train.config import Recipe, load_recipe, parse_overrides
from train.data import Batches, Example, choose, read_examples
from train.mine import main as mine
from train.run import main as train
from train.sampler import Schedule
from train.score import main as score

# --- recipes --------------------------------------------------------------------------------------------------------

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
        ({"kd_weight": float("nan")}, "kd_weight must be at least 0"),
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
    assert load_recipe(path, NEEDED).base == "b"


# --- data -----------------------------------------------------------------------------------------------------------


def row(**changes):
    return {"query": "q", "pos": ["p"], "neg": ["n", "m"], "type": "retrieval", **changes}


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(query=" "), "`query` must be a text that is not empty"),
        (row(pos=[]), "`pos` must hold at least one text"),
        (row(pos="p"), "`pos` must be a list of texts"),
        (row(neg=[None]), "`neg` must be a list of texts"),
        (row(neg=["n", " "]), "`neg` holds an empty text"),
        (row(query="\ud800"), "lone surrogate"),
        (row(neg=[]), "`neg` is empty but group_size=3"),
        (row(neg_scores=[1.0]), "`neg_scores` must be null or 2 finite numbers"),
        (row(pos_scores=[float("nan")]), "`pos_scores` must be null or 1 finite numbers"),
        (row(type="retreival"), "`type` must be one of"),
        (row(prompt=3), "`prompt` must be a text or null"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, bad, message):
    path = write_rows(tmp_path / "d.jsonl", row(), bad)
    with pytest.raises(ValueError, match=message) as caught:
        read_examples(path, group_size=3)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_examples(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no examples"):
        read_examples(tmp_path / "empty.jsonl")
    mixed = write_rows(tmp_path / "mixed.jsonl", row(), row(type="symmetric_class"))
    with pytest.raises(ValueError, match="mixes types"):
        read_examples(mixed)


def test_choice_of_passages():
    example = Example("q", ["p1", "p2"], ["n1", "n2", "n3"], [1.0, 2.0], [3.0, 4.0, 5.0], None, "retrieval")
    group = choose(example, 3, random.Random(0))
    scores = {"p1": 1.0, "p2": 2.0, "n1": 3.0, "n2": 4.0, "n3": 5.0}
    assert group.passages[0] in ("p1", "p2")
    assert len(set(group.passages[1:])) == 2
    assert group.scores == [scores[passage] for passage in group.passages]
    for seed in range(50):  # 7 negatives of 3: the pool holds each three times
        few = choose(example, 8, random.Random(seed)).passages[1:]
        assert len(few) == 7
        assert max(few.count(name) for name in ("n1", "n2", "n3")) <= 3
    only = Example("q", ["p"], ["n1", "n2"], None, None, None, "only_1neg")
    assert len(choose(only, 8, random.Random(0)).passages) == 2
    assert choose(only, 8, random.Random(0)).scores is None


def test_schedule_is_a_pure_function_of_the_step():
    one, other = Schedule([10, 7], 3, 5, 40), Schedule([10, 7], 3, 5, 40)
    forwards = [one.batch(step) for step in range(40)]
    assert [other.batch(step) for step in reversed(range(40))] == forwards[::-1]
    assert one.steps_per_epoch == 3 + 2
    for epoch in range(8):
        batches = forwards[epoch * 5 : epoch * 5 + 5]
        for source, size in ((0, 10), (1, 7)):
            seen = [i for s, indices in batches if s == source for i in indices]
            assert len(seen) == len(set(seen)) == size // 3 * 3  # nothing twice in an epoch, whole batches only
    assert forwards[:5] != forwards[5:10]
    assert [Schedule([10, 7], 3, 6, 40).batch(step) for step in range(40)] != forwards
    with pytest.raises(ValueError, match="has 2 examples, fewer than batch_size=3"):
        Schedule([10, 2], 3, 5, 1)
    with pytest.raises(IndexError):
        one.batch(40)


def test_global_batch_is_the_same_for_any_number_of_ranks(bert, bert_clusters):
    model = lens.LENS.build(bert, bert_clusters)
    text = TextProcessor(model.tokenizer, model.config)
    source = [Example(f"{s} {i}", [s], SENTENCES, [1.0], [0.5] * 7, None, "retrieval")
              for i in range(3) for s in SENTENCES]  # fmt: skip
    schedule = Schedule([len(source)], 8, 0, 5)

    def ids(world_size):
        shares = [Batches([source], schedule, text, 3, True, rank, world_size)[2] for rank in range(world_size)]
        rows = []
        for share in shares:
            queries = share["queries"]
            rows += [
                tuple(i for i, m in zip(r.tolist(), k.tolist(), strict=True) if m)
                for r, k in zip(queries["input_ids"], queries["attention_mask"], strict=True)
            ]
        return rows, torch.cat([share["teacher"] for share in shares])

    (rows, teacher), (rows4, teacher4) = ids(1), ids(4)
    assert rows == rows4
    assert torch.equal(teacher, teacher4)
    with pytest.raises(ValueError, match="multiple of the 3 ranks"):
        Batches([source], schedule, text, 3, True, 0, 3)


def test_a_missing_score_switches_distillation_off_for_its_batch_only(bert, bert_clusters):
    model = lens.LENS.build(bert, bert_clusters)
    text = TextProcessor(model.tokenizer, model.config)
    source = [Example(f"q {i}", ["p"], ["n"], None if i == 0 else [1.0], [0.5], None, "retrieval") for i in range(8)]
    schedule = Schedule([8], 4, 0, 2)
    batches = [
        [Batches([source], schedule, text, 2, True, rank, 2)[step]["teacher"] for rank in (0, 1)] for step in (0, 1)
    ]
    gap = next(step for step in (0, 1) if 0 in schedule.batch(step)[1])
    assert batches[gap] == [None, None]  # on every rank, also the one whose share has no gap
    assert all(teacher.shape == (2, 2) for teacher in batches[1 - gap])


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Forty examples: the first half of a sentence finds the second."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for number in range(40):
        words = SENTENCES[number % 7].split()
        others = [SENTENCES[(number + step) % 7].partition(" ")[2] for step in (1, 2, 3)]
        rows.append(
            row(query=f"{' '.join(words[:4])} {number}", pos=[" ".join(words[4:])], neg=others,
                pos_scores=[2.0], neg_scores=[0.5, 0.1, 0.3], prompt="Find the rest of the sentence.")
        )  # fmt: skip
    return write_rows(path, *rows)


def settings(base, clusters, pairs, output, **changes):
    values = {
        "base": str(base), "clusters": str(clusters), "data": str(pairs), "output": str(output), "batch_size": 8,
        "group_size": 3, "max_steps": 6, "save_steps": 2, "logging_steps": 1, "warmup_steps": 1, "report_to": "[]",
        "device": "cpu", "temperature": 0.1, "learning_rate": 0.01, **changes,
    }  # fmt: skip
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


LORA = {"backbone": "lora", "lora_r": 4, "train_head": "true"}
FROZEN = {"backbone": "frozen", "transform": "residual", "train_head": "true"}
FULL = {"backbone": "full", "lora_dropout": 0.0}


@pytest.fixture
def empty(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    return str(path)


def log_of(output):
    return [json.loads(line) for line in (Path(output) / "training_log.jsonl").read_text().splitlines()]


def weights_of(output):
    files = sorted(path for path in Path(output).glob("*.safetensors"))
    return {f"{path.name}:{name}": tensor for path in files for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("mode", ["lora", "frozen", "full"])
def test_stopped_and_continued_equals_uninterrupted(mode, empty, mistral, mistral_clusters, pairs, tmp_path, capsys):
    changes = {"lora": LORA, "frozen": FROZEN, "full": FULL}[mode]

    def go(output, *extra):
        return train([empty, *settings(mistral, mistral_clusters, pairs, output, **changes), *extra])

    assert go(tmp_path / "whole") == 0
    assert go(tmp_path / "cut") == 0
    # What a kill after step 3 leaves: checkpoint 2, no finished model, a half-written checkpoint 4.
    for path in (tmp_path / "cut").iterdir():
        if path.is_file() and path.name not in ("recipe.json", "training_log.jsonl"):
            path.unlink()
    assert go(tmp_path / "shorter", "--save_total_limit", "9") == 0
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}", ignore_errors=True)
    shutil.copytree(tmp_path / "shorter" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2", dirs_exist_ok=True)
    shutil.copytree(tmp_path / "shorter" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    (tmp_path / "cut" / "checkpoint-4" / "complete.json").unlink()
    capsys.readouterr()
    assert go(tmp_path / "cut") == 0
    assert "going on from" in capsys.readouterr().out
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name
    assert [r["loss"] for r in log_of(tmp_path / "cut")] == [r["loss"] for r in log_of(tmp_path / "whole")]
    first, last = log_of(tmp_path / "whole")[0], log_of(tmp_path / "whole")[-1]
    assert last["step"] == 6
    assert last["contrastive"] < first["contrastive"]
    # The finished model loads and differs from the untrained one in what was trained.
    model = lens.load(tmp_path / "whole")
    untrained = lens.LENS.build(mistral, mistral_clusters)
    assert np.abs(model.encode(SENTENCES) - untrained.encode(SENTENCES)).max() > 1e-3
    capsys.readouterr()
    assert go(tmp_path / "whole") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_training_is_repeatable_and_seeded(empty, bert, bert_clusters, pairs, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train([empty, *settings(bert, bert_clusters, pairs, tmp_path / name, seed=seed, **FROZEN)]) == 0
    a, b, c = (weights_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_cached_states_train_as_computed_ones_do(empty, bert, bert_clusters, pairs, tmp_path):
    for name, cached in (("cached", "true"), ("computed", "false")):
        arguments = settings(bert, bert_clusters, pairs, tmp_path / name, cache_hidden=cached, **FROZEN)
        assert train([empty, *arguments, "--prompt", "plain"]) == 0
    for one, other in zip(log_of(tmp_path / "cached"), log_of(tmp_path / "computed"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)  # states are kept in float16, and dropout is off


def test_runs_that_cannot_start_say_why_in_one_line(empty, bert, bert_clusters, pairs, tmp_path, capsys):
    def fails(message, *extra, **changes):
        capsys.readouterr()
        values = {"base": bert, "clusters": bert_clusters, "pairs": pairs, "output": tmp_path / "out", **FROZEN}
        arguments = settings(**{**values, **changes})
        assert train([empty, *arguments, *extra]) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert len(error.strip().splitlines()) == 1, error

    fails("unknown field 'batchsize'", "--batchsize", "3")
    fails("does not exist", pairs=tmp_path / "gone.jsonl")
    fails("clusters folder", clusters=tmp_path / "gone")
    fails("fewer than batch_size=64", batch_size=64)
    fails("lora_targets q_proj", backbone="lora")
    fails("does not exist", base=tmp_path / "gone" / "model")
    fails("is more than the 128 positions", document_max_length=500)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    fails("is not empty")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    (tmp_path / "file").write_text("x")
    fails("is a file, not a folder", output=tmp_path / "file" / "out")
    assert train([]) == 0
    assert "--temperature" in capsys.readouterr().out
    assert train(["--seed", "3"]) == 2


def test_a_run_killed_while_caching_or_logging_goes_on(empty, bert, bert_clusters, pairs, tmp_path, monkeypatch):
    arguments = settings(bert, bert_clusters, pairs, tmp_path / "run", **FROZEN)

    def killed(*_):
        (tmp_path / "run" / "hidden.f16").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("train.run.compute_states", killed)
        with pytest.raises(KeyboardInterrupt):
            train([empty, *arguments])
    (tmp_path / "run" / "training_log.jsonl").write_text('{"step": 1, "loss": 3.0, "seconds": 1}\n{"step": 2, "lo')
    assert train([empty, *arguments]) == 0
    assert [r["step"] for r in log_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_divergence_stops_the_run_and_leaves_no_model(empty, bert, bert_clusters, pairs, tmp_path, capsys):
    changes = {**FROZEN, "learning_rate": 1e30}
    assert train([empty, *settings(bert, bert_clusters, pairs, tmp_path / "run", **changes)]) == 2
    assert "is not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "lens.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation": 2},
        {"precision": "bf16"},
        {"workers": 1},
        {"in_batch_negatives": "false"},
        {"backbone": "full", "train_head": "true"},
        {"backbone": "lora", "lora_targets": "query", "gradient_checkpointing": "true", "include_backbone": "true"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_other_settings_train_too(changes, empty, bert, bert_clusters, pairs, tmp_path):
    values = {**FROZEN, "max_steps": 3, **changes}
    if changes.get("backbone"):
        values["transform"] = "none"
    assert train([empty, *settings(bert, bert_clusters, pairs, tmp_path / "run", **values)]) == 0
    assert log_of(tmp_path / "run")[-1]["step"] == 3
    trained = lens.load(tmp_path / "run").encode(SENTENCES)
    assert np.abs(trained - lens.LENS.build(bert, bert_clusters).encode(SENTENCES)).max() > 1e-4
    if "include_backbone" in changes:
        assert (tmp_path / "run" / "model.safetensors").is_file()


def test_vocabulary_head_of_a_masked_lm_trains(empty, bert_mlm, pairs, tmp_path):
    changes = {"backbone": "full", "train_head": "true", "normalize": "false", "positions": "all"}
    arguments = settings(bert_mlm, "null", pairs, tmp_path / "run", **changes, max_steps=2, temperature=5)
    assert train([empty, *arguments]) == 0
    assert lens.load(tmp_path / "run").config.transform == "mlm"


def test_accumulated_batches_give_the_mean_of_their_gradients(empty, bert, bert_clusters, pairs, tmp_path):
    """One step over two batches of 8 equals the mean of the two batches' gradients (plain SGD is not needed: Adam's
    first step depends on the gradient's sign alone, so the logged gradient norms are compared)."""
    shared = {**FROZEN, "max_grad_norm": 0, "warmup_steps": 0, "learning_rate": 1e-12}
    for name, changes in (("two", {"max_steps": 2}), ("both", {"max_steps": 1, "gradient_accumulation": 2})):
        assert train([empty, *settings(bert, bert_clusters, pairs, tmp_path / name, **{**shared, **changes})]) == 0
    two, both = log_of(tmp_path / "two"), log_of(tmp_path / "both")
    assert both[0]["contrastive"] == pytest.approx((two[0]["contrastive"] + two[1]["contrastive"]) / 2, rel=1e-5)
    norms = [r["grad_norm"] for r in two]
    assert abs(norms[0] - norms[1]) / 2 <= both[0]["grad_norm"] + 1e-6
    assert both[0]["grad_norm"] <= sum(norms) / 2 + 1e-6


def test_symmetric_data_carries_the_instruction_on_both_sides(mistral, mistral_clusters):
    model = lens.LENS.build(mistral, mistral_clusters)
    text = TextProcessor(model.tokenizer, model.config)
    marker = model.tokenizer.convert_tokens_to_ids("<instruct>")
    for kind, expected, in_batch in (("retrieval", 0, True), ("symmetric_sts", 8, True), ("symmetric_class", 8, False)):
        source = [Example(f"q{i}", ["the fox"], ["the dog"], None, None, "same topic", kind) for i in range(4)]
        batch = Batches([source], Schedule([4], 4, 0, 1), text, 2)[0]
        assert int((batch["queries"]["input_ids"] == marker).sum()) == 4
        assert int((batch["passages"]["input_ids"] == marker).sum()) == expected
        assert batch["in_batch"] is in_batch


def test_a_changed_input_file_does_not_continue_a_run(empty, bert, bert_clusters, pairs, tmp_path, capsys):
    data = Path(shutil.copy(pairs, tmp_path / "pairs.jsonl"))
    arguments = settings(bert, bert_clusters, data, tmp_path / "run", **FROZEN)
    assert train([empty, *arguments]) == 0
    data.write_text(data.read_text().replace("the", "a"))
    assert train([empty, *arguments]) == 2
    assert "inputs" in capsys.readouterr().err


def test_another_recipe_does_not_continue_a_run(empty, bert, bert_clusters, pairs, tmp_path, capsys):
    arguments = settings(bert, bert_clusters, pairs, tmp_path / "run", **FROZEN)
    assert train([empty, *arguments]) == 0
    before = weights_of(tmp_path / "run")
    assert train([empty, *arguments, "--temperature", "0.3"]) == 2
    assert "temperature: 0.1 -> 0.3" in capsys.readouterr().err
    after = weights_of(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def deepspeed(empty, arguments, ranks, timeout=540):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_accelerators", str(ranks), "train/run.py", empty, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed's launcher runs on Linux")
def test_two_ranks_under_the_deepspeed_launcher_equal_one_process(empty, mistral, mistral_clusters, pairs, tmp_path):
    changes = {**LORA, "lora_dropout": 0.0}
    assert train([empty, *settings(mistral, mistral_clusters, pairs, tmp_path / "one", **changes)]) == 0
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "two", **changes, deepspeed="zero1")
    done = deepspeed(empty, arguments, 2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert two["contrastive"] == pytest.approx(one["contrastive"], rel=2e-3)
        assert two["kd"] == pytest.approx(one["kd"], rel=2e-2, abs=1e-4)
    one, two = lens.load(tmp_path / "one"), lens.load(tmp_path / "two")
    similarity = (one.encode(SENTENCES) * two.encode(SENTENCES)).sum(1)
    assert similarity.min() > 0.999
    # Continued from a checkpoint, two ranks reach the same losses.
    losses = [r["loss"] for r in log_of(tmp_path / "two")]
    (tmp_path / "two" / "lens.json").unlink()
    shutil.rmtree(tmp_path / "two" / "checkpoint-6")
    done = deepspeed(empty, arguments, 2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "checkpoint-4" in done.stdout
    assert [r["loss"] for r in log_of(tmp_path / "two")] == pytest.approx(losses, rel=1e-4)
    sizes = [file.stat().st_size for file in (tmp_path / "two" / "checkpoint-4").rglob("*") if file.is_file()]
    assert sum(sizes) < 1_000_000  # no frozen weights


# --- mining and scoring ---------------------------------------------------------------------------------------------


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    documents = [*SENTENCES, SENTENCES[0]]  # the last one repeats the first
    write_rows(folder / "corpus.jsonl", *({"_id": f"d{i}", "text": text} for i, text in enumerate(documents)))
    write_rows(folder / "queries.jsonl", {"_id": "q0", "text": "quick fox"}, {"_id": "q1", "text": "parse date"})
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td1\t0\nq1\td4\t2\n")
    return folder


def test_mined_negatives_are_never_positives(beir, bert, tmp_path):
    assert mine(["--beir", str(beir), "--output", str(tmp_path / "m.jsonl"), "--negatives", "4"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [r["query"] for r in rows] == ["quick fox", "parse date"]
    for r in rows:
        assert len(r["neg"]) == len(set(r["neg"])) == 4
        assert not set(r["neg"]) & set(r["pos"])
    assert rows[0]["pos"] == [SENTENCES[0]]
    arguments = ["--model", str(bert), "--data", str(tmp_path / "m.jsonl"), "--output", str(tmp_path / "s.jsonl")]
    assert score([*arguments, "--device", "cpu", "--max-length", "64"]) == 0
    scored = read_examples(tmp_path / "s.jsonl", 5)
    assert all(len(e.neg_scores) == 4 and len(e.pos_scores) == 1 for e in scored)
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    reference = SentenceTransformer(modules=[word := Transformer(str(bert)), Pooling(word.get_embedding_dimension())])
    a, b = reference.encode([scored[0].query, scored[0].neg[0]], normalize_embeddings=True)
    assert scored[0].neg_scores[0] == pytest.approx(float(a @ b), abs=1e-4)


def test_mining_and_scoring_fail_in_one_line(beir, bert, tmp_path, capsys):
    taken = tmp_path / "taken.jsonl"
    taken.write_text("precious")
    cases = [
        (mine, ["--beir", str(beir), "--output", str(taken)], "is not empty"),
        (mine, ["--beir", str(beir), "--split", "dev", "--output", str(tmp_path / "x")], "no dev.tsv; found train"),
        (mine, ["--beir", str(tmp_path / "no"), "--output", str(tmp_path / "x")], "is not a folder"),
        (mine, ["--beir", str(beir), "--output", str(tmp_path / "x"), "--negatives", "0"], "must be at least 1"),
        (score, ["--model", str(bert), "--data", str(taken), "--output", str(tmp_path / "x")], "taken.jsonl:1: not"),
        (score, ["--model", str(bert), "--data", str(taken), "--output", str(taken)], "is not empty"),
    ]
    for program, arguments, message in cases:
        capsys.readouterr()
        assert program(arguments) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert len(error.strip().splitlines()) == 1
    assert taken.read_text() == "precious"

"""Whole training runs: resumed, restarted, refused, and under the DeepSpeed launcher."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, encoder_tokenizer, row, save_clusters, write_rows
from safetensors.torch import load_file, save_file
from train_helpers import FROZEN, FULL, GENTLE, LORA, TOP, log_of, settings, weights_of

import lens
from lens.head import whitened
from lens.model import read_clusters
from lens.text import TextProcessor
from train.checkpoints import whole_checkpoints
from train.data import Batches, Example
from train.run import main as train
from train.sampler import Schedule
from train.states import compute_states


@pytest.mark.parametrize("mode", ["lora", "frozen", "full", "top"])
def test_stopped_and_continued_equals_uninterrupted(mode, empty, mistral, mistral_clusters, pairs, tmp_path, capsys):
    changes = {"lora": LORA, "frozen": FROZEN, "full": FULL, "top": TOP}[mode]

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
        arguments = settings(bert, bert_clusters, pairs, tmp_path / name, cache_hidden=cached, **GENTLE, **FROZEN)
        assert train([empty, *arguments, "--prompt", "plain"]) == 0
    for one, other in zip(log_of(tmp_path / "cached"), log_of(tmp_path / "computed"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)  # states are kept in float16, and dropout is off


def test_last_layers_on_cached_states_train_as_in_the_whole_backbone(empty, mistral, mistral_clusters, pairs, tmp_path):
    for name, cached in (("cached", "true"), ("computed", "false")):
        arguments = settings(mistral, mistral_clusters, pairs, tmp_path / name, cache_hidden=cached, **GENTLE, **TOP)
        assert train([empty, *arguments]) == 0
    for one, other in zip(log_of(tmp_path / "cached"), log_of(tmp_path / "computed"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)  # states are kept in float16
    kept = load_file(tmp_path / "cached" / "checkpoint-6" / "backbone.safetensors")
    assert kept
    assert all(name.startswith("layers.1.") for name in kept)
    before, after = load_file(mistral / "model.safetensors"), load_file(tmp_path / "cached" / "model.safetensors")
    before = {name.removeprefix("model."): tensor for name, tensor in before.items()}
    rows = len(before["embed_tokens.weight"])  # the three special tokens are added below them
    after["embed_tokens.weight"] = after["embed_tokens.weight"][:rows]
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved
    assert all(name.startswith("layers.1.") for name in moved)
    assert not list((tmp_path / "cached").glob("hidden*"))


def test_last_layers_with_dropout_go_on_as_uninterrupted(empty, bert, bert_clusters, pairs, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for output in (whole, cut):
        assert train([empty, *settings(bert, bert_clusters, pairs, output, **TOP), "--save_total_limit", "9"]) == 0
    for path in (cut / "lens.json", cut / "checkpoint-4", cut / "checkpoint-6"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train([empty, *settings(bert, bert_clusters, pairs, cut, **TOP), "--save_total_limit", "9"]) == 0
    one, other = weights_of(whole), weights_of(cut)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("file", ["backbone.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_checkpoint_is_left_out(file, harm, empty, bert, bert_clusters, pairs, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [empty, *settings(bert, bert_clusters, pairs, run, **TOP)]
    assert train(arguments) == 0
    whole = weights_of(run)
    (run / "lens.json").unlink()
    damaged = run / "checkpoint-6" / file
    damaged.write_bytes(damaged.read_bytes()[:-1]) if harm == "cut" else damaged.unlink()
    capsys.readouterr()
    assert train(arguments) == 0
    said = capsys.readouterr().out
    assert f"checkpoint-6 is damaged ({file}) and left out" in said
    assert "going on from" in said
    assert "checkpoint-4" in said
    assert all(torch.equal(tensor, weights_of(run)[name]) for name, tensor in whole.items())
    assert whole_checkpoints(run)[-1].name == "checkpoint-6"  # written anew, and whole


def test_what_a_run_stands_on_must_stay(empty, bert, bert_clusters, pairs, tmp_path, capsys):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(bert, base)
    arguments = [empty, *settings(base, bert_clusters, pairs, run, **TOP)]
    run.mkdir()
    (run / ".recipe.json.x1y2.json").write_text("{")  # what a kill during the first write leaves
    assert train(arguments) == 0
    (run / "lens.json").unlink()
    states = load_file(base / "model.safetensors")
    name = next(name for name in states if "layer.0" in name and "query.weight" in name)
    save_file({**states, name: states[name] * 1.5}, base / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert train(arguments) == 2
    assert "holds a run of another recipe (files that changed since: " in capsys.readouterr().err


def test_a_damaged_file_of_states_is_made_anew(bert, bert_clusters, tmp_path):
    untrained = lens.LENS.build(bert, bert_clusters)
    text = TextProcessor(untrained.tokenizer, untrained.model.config)
    keys = [(sentence, "document", None) for sentence in SENTENCES]
    path, stamp = tmp_path / "hidden.f16", tmp_path / "hidden.json"

    def made():
        return compute_states(untrained.model, text, keys, path).batch(keys)["hidden"]

    first, written = made(), path.read_bytes()
    for harm in (lambda: path.write_bytes(written[:-2]), lambda: stamp.write_text("{"), path.unlink):
        harm()
        assert torch.equal(made(), first)
        assert path.read_bytes() == written


def test_whitened_centroids_are_where_training_starts(empty, bert, tmp_path, pairs):
    clusters = save_clusters(tmp_path / "clusters", len(encoder_tokenizer()), k=40)
    changes = {"backbone": "top", "whiten": "true", "max_steps": 2}
    assert train([empty, *settings(bert, clusters, pairs, tmp_path / "run", **changes)]) == 0
    centroids, _ = read_clusters(clusters)
    kept = load_file(tmp_path / "run" / "head.safetensors")["centroids"]
    torch.testing.assert_close(kept, whitened(centroids))


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
    rows = [row(query="a", pos=["b"], neg=["c"], prompt="word " * 200)] * 8
    fails("long.jsonl: prompt 'word word", pairs=write_rows(tmp_path / "long.jsonl", *rows))
    fails("top_layers must be from 1 to 1, found 2", backbone="top", top_layers=2)
    fails("top_layers=2 contradicts backbone=frozen", top_layers=2)
    fails("contradicts the full vocabulary head", clusters="null", whiten="true")
    fails("needs more than 33 centroids, found 24; whiten: false takes", whiten="true")
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

    def killed(*_, **__):
        (tmp_path / "run" / "hidden.f16").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("train.run.compute_states", killed)
        assert train([empty, *arguments]) == 130
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
        {"backbone": "top", "precision": "bf16"},
        {"backbone": "top", "gradient_checkpointing": "true", "workers": 1},
        {"backbone": "top", "gradient_checkpointing": "true", "cache_hidden": "false"},
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


def test_which_data_carries_the_instruction_on_both_sides(mistral, mistral_clusters):
    model = lens.LENS.build(mistral, mistral_clusters)
    text = TextProcessor(model.tokenizer, model.config)
    marker = model.tokenizer.convert_tokens_to_ids("<instruct>")
    for kind, expected, in_batch in (
        ("retrieval", 0, True), ("symmetric_sts", 8, True), ("symmetric_class", 0, False),
        ("symmetric_clustering", 8, False),
    ):  # fmt: skip
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
    assert f"(files that changed since: {data})" in capsys.readouterr().err


def test_another_recipe_does_not_continue_a_run(empty, bert, bert_clusters, pairs, tmp_path, capsys):
    arguments = settings(bert, bert_clusters, pairs, tmp_path / "run", **FROZEN)
    assert train([empty, *arguments]) == 0
    before = weights_of(tmp_path / "run")
    assert train([empty, *arguments, "--temperature", "0.3"]) == 2
    assert "temperature: 0.1 -> 0.3" in capsys.readouterr().err
    after = weights_of(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_dense_ablation_takes_the_last_state(empty, mistral, pairs, tmp_path, capsys):
    dense = {**LORA, "head": "dense", "pooling": "last", "positions": "all", "train_head": "false"}
    arguments = settings(mistral, "null", pairs, tmp_path / "run", **dense)
    assert train([empty, *arguments]) == 0
    log = log_of(tmp_path / "run")
    assert log[-1]["contrastive"] < log[0]["contrastive"]
    model = lens.load(tmp_path / "run")
    found = model.encode([*SENTENCES, ""])
    assert found.shape == (len(SENTENCES) + 1, model.config.hidden_size)
    for text, embedding in zip(SENTENCES, found, strict=False):
        ids = torch.tensor([model.text([text], "document")[0].ids])
        with torch.no_grad():
            state = model.model.backbone(ids, torch.ones_like(ids)).last_hidden_state[0, -1]  # of EOS
        np.testing.assert_allclose(embedding, state / state.norm(), atol=1e-5)
    with pytest.raises(ValueError, match="has no clusters"):
        model.terms(found[0])
    assert train([empty, *arguments, "--pooling", "max"]) == 2
    assert 'pooling=max contradicts head=dense: set it to "last"' in capsys.readouterr().err

"""Whole training runs of several ranks under the real DeepSpeed launcher."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available
from train_helpers import LORA, deepspeed, log_of, settings, weights_of

import lens
from train.parallel import CONFIGURATIONS, deepspeed_config
from train.run import main as train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed's launcher runs on Linux"),
]

needs_compiler = pytest.mark.skipif(
    shutil.which(get_cxx_compiler()) is None or not is_ninja_available(),
    reason="on CPU ranks DeepSpeed compiles its communication at the first start: needs a C++ compiler and ninja",
)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_are_deepspeeds_own(name):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig(**deepspeed_config(name)["zero_optimization"])  # refuses fields that it does not know
    stage, _, offload = name.partition("-")
    assert stage == f"zero{int(zero.stage)}"
    for part, wanted in ((zero.offload_optimizer, offload), (zero.offload_param, offload and stage == "zero3")):
        assert part.device == "cpu" if wanted else part is None


@needs_compiler
@pytest.mark.parametrize(
    ("ranks", "name", "changes"),
    [(2, "zero2-offload", {"mini_batch_tokens": 40}), (1, "zero3-offload", {})],
    ids=["2 zero2 cached", "1 zero3"],
)
def test_off_load_to_cpu_memory_trains_the_weights_of_one_process(
    ranks, name, changes, empty, mistral, mistral_clusters, pairs, tmp_path
):
    plain = {**LORA, "lora_dropout": 0.0, "train_special_tokens": "false", "save_steps": 6}
    assert train([empty, *settings(mistral, mistral_clusters, pairs, tmp_path / "one", **plain)]) == 0
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "many", **plain, **changes, deepspeed=name)
    before = set(Path("/dev/shm").glob("deepspeed_*"))
    done = deepspeed(empty, arguments, ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= before
    one, many = weights_of(tmp_path / "one"), weights_of(tmp_path / "many")
    assert one.keys() == many.keys()
    for key, weight in one.items():  # six steps of 0.01 have moved them by up to 0.06
        torch.testing.assert_close(many[key], weight, atol=1e-3, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": 1}, "zero_optimization must be an object with a stage from 0 to 3, found 1"),
        ({"foo": 1}, "zero_optimization must be an object"),
        ({"zero_optimization": {"stage": 7}}, "with a stage from 0 to 3, found {'stage': 7}"),
    ],
)
def test_unusable_deepspeed_files_are_named(content, message, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="ds.json: .*" + message):
        deepspeed_config(str(tmp_path / "ds.json"))
    with pytest.raises(FileNotFoundError, match="zero9 is neither a file nor one of zero1, zero2"):
        deepspeed_config("zero9")


@needs_compiler
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {"deepspeed": "zero1"}),
        (4, {"deepspeed": "zero1", "mini_batch_tokens": 40}),
        (2, {"deepspeed": "zero2", "mini_batch_tokens": 40, "gradient_checkpointing": "true"}),
        (4, {"deepspeed": "zero2"}),
        (2, {"deepspeed": "zero3", "train_special_tokens": "false"}),
        (4, {"deepspeed": "zero3", "train_special_tokens": "false", "mini_batch_tokens": 40}),
    ],
    ids=["2 zero1", "4 zero1 cached", "2 zero2 cached", "4 zero2", "2 zero3", "4 zero3 cached"],
)
def test_ranks_under_the_deepspeed_launcher_equal_one_process(
    ranks, changes, empty, mistral, mistral_clusters, pairs, tmp_path
):
    plain = {**LORA, "lora_dropout": 0.0, "train_special_tokens": changes.get("train_special_tokens", "true")}
    assert train([empty, *settings(mistral, mistral_clusters, pairs, tmp_path / "one", **plain)]) == 0
    if changes["deepspeed"] == "zero3":  # which leaves so small weights whole unless it is told to scatter all
        config = deepspeed_config("zero3")
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (tmp_path / "zero3.json").write_text(json.dumps(config))
        changes = {**changes, "deepspeed": tmp_path / "zero3.json"}
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "many", **plain | changes)
    done = deepspeed(empty, arguments, ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for one, many in zip(log_of(tmp_path / "one"), log_of(tmp_path / "many"), strict=True):
        assert many["contrastive"] == pytest.approx(one["contrastive"], rel=2e-3)
        assert many["kd"] == pytest.approx(one["kd"], rel=2e-2, abs=1e-4)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2)
        assert many["active_per_passage"] == pytest.approx(one["active_per_passage"], rel=2e-2)
        assert many["dead_clusters"] == pytest.approx(one["dead_clusters"], abs=0.1)
    one, many = lens.load(tmp_path / "one"), lens.load(tmp_path / "many")
    similarity = (one.encode(SENTENCES) * many.encode(SENTENCES)).sum(1)
    assert similarity.min() > 0.999
    if ranks == 4 and changes["deepspeed"] in ("zero1", "zero2"):
        return
    # Continued from a checkpoint, they reach the same losses.
    losses = [r["loss"] for r in log_of(tmp_path / "many")]
    (tmp_path / "many" / "lens.json").unlink()
    shutil.rmtree(tmp_path / "many" / "checkpoint-6")
    done = deepspeed(empty, arguments, ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "checkpoint-4" in done.stdout
    assert [r["loss"] for r in log_of(tmp_path / "many")] == pytest.approx(losses, rel=1e-4)
    sizes = [file.stat().st_size for file in (tmp_path / "many" / "checkpoint-4").rglob("*") if file.is_file()]
    assert sum(sizes) < 1_000_000  # no frozen weights

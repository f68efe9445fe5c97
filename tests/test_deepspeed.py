"""Whole training runs of several ranks under the real DeepSpeed launcher."""

from __future__ import annotations

import shutil
import sys

import pytest
from conftest import SENTENCES
from train_helpers import LORA, deepspeed, log_of, settings

import lens
from train.run import main as train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed's launcher runs on Linux"),
]


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
    if ranks == 4 and changes["deepspeed"] != "zero3":
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

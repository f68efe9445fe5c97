"""Runs that are killed, asked to stop, or cannot write: nothing is lost, and the end is that of an unbroken run."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from train_helpers import LORA, log_of, settings, weights_of

import lens
from train.checkpoints import whole_checkpoints
from train.progress import LOG_FILE, Stopping, read_log
from train.run import main as train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and limits as on Linux")


def start(empty, arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-u", "train/run.py", empty, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for_step(output, step, process):
    """Returns when the log has a row of `step`; fails when the process ends before."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in read_log(output / LOG_FILE)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise AssertionError(f"no step {step}")


STEPS = {"max_steps": 60, "save_steps": 7, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def whole(mistral, mistral_clusters, pairs, tmp_path_factory):
    """An unbroken run: its folder, made in a process of one thread like the others."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "empty.yaml").write_text("")
    output = folder / "run"
    process = start(str(folder / "empty.yaml"), settings(mistral, mistral_clusters, pairs, output, **LORA, **STEPS))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def assert_same_end(one, other):
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    rows = [[(r["step"], r["loss"], r["grad_norm"]) for r in log_of(folder)] for folder in (one, other)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_killed_at_three_random_moments_ends_as_if_unbroken(whole, empty, mistral, mistral_clusters, pairs, tmp_path):
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "run", **LORA, **STEPS)
    rng = random.Random()  # other moments at every run of this test
    for step in sorted(rng.sample(range(1, 55), 3)):
        process = start(empty, arguments)
        wait_for_step(tmp_path / "run", step, process)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(empty, arguments)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "going on from" in out or step < 8
    assert_same_end(whole, tmp_path / "run")


def test_sigterm_saves_and_ends_in_order(whole, empty, mistral, mistral_clusters, pairs, tmp_path):
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "run", **LORA, **STEPS)
    process = start(empty, arguments)
    wait_for_step(tmp_path / "run", 3, process)
    process.terminate()
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "stopped by SIGTERM after step" in out
    stopped = int(out.rpartition("after step ")[2].split(";")[0])
    assert whole_checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{stopped}"
    assert not (tmp_path / "run" / "lens.json").exists()
    process = start(empty, arguments)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"checkpoint-{stopped}" in out
    assert_same_end(whole, tmp_path / "run")


def test_sigterm_to_all_processes_of_a_run_with_workers(empty, mistral, mistral_clusters, pairs, tmp_path):
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "run", **LORA, **STEPS, workers=1)
    process = start(empty, arguments, start_new_session=True)
    wait_for_step(tmp_path / "run", 3, process)
    os.killpg(process.pid, signal.SIGTERM)  # as torchrun and DeepSpeed's launcher do
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "stopped by SIGTERM after step" in out


def test_sigterm_while_ranks_agree_counts_at_the_next_step_and_is_read_one_later(monkeypatch):
    stopping = Stopping()
    state, control = SimpleNamespace(global_step=3, max_steps=9), SimpleNamespace(should_training_stop=False)
    arguments = SimpleNamespace(device=torch.device("cpu"))
    stopping.on_train_begin(arguments, state, control)
    monkeypatch.setattr("train.progress.dist.is_initialized", lambda: True)
    monkeypatch.setattr("train.progress.dist.all_reduce", lambda *_: stopping._receive(signal.SIGTERM, None))
    stopping.on_step_end(arguments, state, control)
    assert not control.should_training_stop  # other ranks did not know of it
    monkeypatch.setattr("train.progress.dist.all_reduce", lambda *_: None)
    stopping.on_step_end(arguments, state, control)
    assert not control.should_training_stop
    stopping.on_step_end(arguments, state, control)
    assert control.should_training_stop


def test_changed_save_and_log_steps_hold_after_a_restart(empty, mistral, mistral_clusters, pairs, tmp_path):
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "run", **LORA)
    assert train([empty, *arguments]) == 0
    (tmp_path / "run" / "lens.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert train([empty, *arguments, "--save_steps", "1", "--logging_steps", "2", "--save_total_limit", "9"]) == 0
    assert {path.name for path in whole_checkpoints(tmp_path / "run")} == {f"checkpoint-{n}" for n in (4, 5, 6)}
    assert [row["step"] for row in log_of(tmp_path / "run")] == [1, 2, 3, 4, 6]


def test_overwriting_with_a_model_deletes_no_run(empty, mistral, mistral_clusters, pairs, tmp_path):
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "run", **LORA)
    assert train([empty, *arguments]) == 0
    model = lens.load(tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds more than a model .*checkpoint-4"):
        model.save(tmp_path / "run", overwrite=True)
    assert whole_checkpoints(tmp_path / "run")
    model.save(tmp_path / "copy")
    model.save(tmp_path / "copy", overwrite=True)


def test_sigterm_before_the_first_step(empty, mistral, mistral_clusters, pairs, tmp_path):
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "run", **LORA, **STEPS)
    process = start(empty, arguments)
    while not (tmp_path / ".run.lock").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    time.sleep(0.05)  # the handler is set right after the lock
    process.terminate()
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "stopped by SIGTERM" in out


def test_a_full_disk_costs_no_finished_checkpoint(empty, mistral, mistral_clusters, pairs, tmp_path, capsys):
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "run", **LORA)
    assert train([empty, *settings(mistral, mistral_clusters, pairs, tmp_path / "whole", **LORA)]) == 0
    largest = max(f.stat().st_size for f in (tmp_path / "whole" / "checkpoint-4").rglob("*") if f.is_file())

    def no_room():  # files of that size fail to be written as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, largest - 1))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start(empty, arguments, preexec_fn=no_room)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    assert "checkpoint-2 could not be written" in errors
    assert "make room on the disk" in errors
    assert not (tmp_path / "run" / "checkpoint-2").exists()
    capsys.readouterr()
    assert train([empty, *arguments]) == 0
    assert "no whole checkpoint" not in capsys.readouterr().out  # nothing of the failed one is left
    for name, tensor in weights_of(tmp_path / "whole").items():
        assert torch.equal(tensor, weights_of(tmp_path / "run")[name]), name


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "Connection refused"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_named(error, empty, monkeypatch, capsys):
    def died(*_):
        raise error

    monkeypatch.setattr("train.run.load_recipe", died)
    assert train([empty]) == 2
    assert "train/run.py: a DataLoader worker died while it handed over a batch" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["interrupt", "killed worker", "bad row"])
def test_workers_never_outlive_an_end_that_was_not_planned(end, empty, mistral, mistral_clusters, pairs, tmp_path):
    output, data = tmp_path / "run", tmp_path / "data.jsonl"
    rows = Path(pairs).read_text().splitlines()
    data.write_text("\n".join([*rows * 5, '{"query": 5}' if end == "bad row" else rows[0], *rows]) + "\n")
    changes = {"max_steps": 4000, "save_steps": 4000, "workers": 2, "streaming": end == "bad row", "epochs": 1000}
    process = start(
        empty, settings(mistral, mistral_clusters, data, output, **LORA, **changes),
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        if end != "bad row":
            wait_for_step(output, 2, process)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            workers = [int(pid) for pid in children if "train/run.py" in Path(f"/proc/{pid}/cmdline").read_text()]
            assert len(workers) == 2
            os.kill(*((process.pid, signal.SIGINT) if end == "interrupt" else (workers[0], signal.SIGKILL)))
        _, errors = process.communicate(timeout=120)  # which all workers hold open
        assert process.returncode not in (0, None)
        expected = {
            "interrupt": "train/run.py: interrupted; the same command goes on",
            "killed worker": "DataLoader worker",
            "bad row": "`query` must be",
        }
        assert expected[end] in errors, process.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

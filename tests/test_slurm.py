"""scripts/slurm.sh with a stand-in for SLURM: two "nodes" on this machine, of one CPU rank each, equal one process."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SENTENCES, row, write_rows

import lens
from train.progress import read_log
from train.run import main as train

SCRIPT = ROOT / "scripts" / "slurm.sh"
HEADS = {
    "scontrol": 'printf "127.0.0.1\\n127.0.0.2\\n"',
    # One copy a node, as srun does it, the first failure being the step's status.
    "srun": """while [[ $1 == --* ]]; do shift; done
pids=()
for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status""",
}


def free_job() -> int:
    """A job number whose port, see the script, is free."""
    for job in random.sample(range(20_000), 100):
        with contextlib.suppress(OSError), socket.socket() as trial:
            trial.bind(("127.0.0.1", 20_000 + job))
            return job
    raise OSError("no free port from 20000 to 39999")


def submit(tmp_path: Path, *arguments: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Runs the script as a job whose commands scontrol and srun are stand-ins."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, body in HEADS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    venv = tmp_path / "venv" / "bin"
    if not venv.exists():  # the launchers stand beside this Python, wherever that is
        venv.parent.mkdir()
        venv.symlink_to(Path(sys.executable).parent)
    given = {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": str(free_job()),
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[0-1]", "LENS_RANKS": "1",
        "LENS_VENV": str(venv.parent), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        **variables,
    }  # fmt: skip
    environment = {**os.environ, **{name: value for name, value in given.items() if value is not None}}
    for name in (name for name, value in given.items() if value is None):
        environment.pop(name, None)
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=540
    )


@pytest.fixture
def arguments(mistral: Path, mistral_clusters: Path, tmp_path: Path) -> list[str]:
    rows = [
        row(
            query=" ".join(SENTENCES[n % 7].split()[:4]) + f" {n}", pos=[SENTENCES[n % 7]], neg=[SENTENCES[(n + 1) % 7]]
        )
        for n in range(24)
    ]
    data = write_rows(tmp_path / "pairs.jsonl", *rows)
    (tmp_path / "recipe.yaml").write_text(
        "backbone: lora\nlora_r: 4\nlora_dropout: 0.0\ntrain_head: true\nbatch_size: 8\ngroup_size: 2\nmax_steps: 4\n"
        "save_steps: 4\nlogging_steps: 1\nwarmup_steps: 1\nreport_to: []\ndevice: cpu\ntemperature: 0.1\n"
    )
    places = {"base": mistral, "clusters": mistral_clusters, "data": data}
    return [str(tmp_path / "recipe.yaml"), *(str(p) for name, value in places.items() for p in (f"--{name}", value))]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="SLURM and DeepSpeed's launcher run on Linux")
def test_two_nodes_equal_one_process_under_either_launcher(arguments: list[str], tmp_path: Path) -> None:
    assert train([*arguments, "--output", str(tmp_path / "one")]) == 0
    one = lens.load(tmp_path / "one")
    for launcher, extra in (("torchrun", []), ("deepspeed", [])):
        output = tmp_path / launcher
        done = submit(tmp_path, *arguments, "--output", str(output), *extra, LENS_LAUNCHER=launcher)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert "2 nodes x 1 ranks: 127.0.0.1 127.0.0.2" in done.stdout
        losses = [[r["loss"] for r in read_log(tmp_path / name / "training_log.jsonl")] for name in ("one", launcher)]
        assert len(losses[0]) == 4
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
        similarity = (one.encode(SENTENCES) * lens.load(output).encode(SENTENCES)).sum(1)
        assert similarity.min() > 0.9999
        assert not list(ROOT.glob("lens-*.hostfile"))


def test_what_the_script_refuses(arguments: list[str], tmp_path: Path) -> None:
    assert "sbatch" in submit(tmp_path, "--help").stdout
    for words, variables in (
        ("submit it with sbatch", {"SLURM_JOB_ID": None}),
        ("submit from the checkout", {"SLURM_SUBMIT_DIR": str(tmp_path)}),
        ("give --gpus-per-node, or LENS_RANKS", {"LENS_RANKS": None, "SLURM_GPUS_ON_NODE": None}),
        ("holds no Python", {"LENS_VENV": str(tmp_path / "none")}),
        ("torchrun or deepspeed, found 'mpirun'", {"LENS_LAUNCHER": "mpirun"}),
    ):
        done = submit(tmp_path, *arguments, **variables)
        assert done.returncode == 2
        assert words in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_no_objection() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

"""What tests of whole training runs share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file


def settings(base, clusters, pairs, output, **changes):
    values = {
        "base": str(base), "clusters": str(clusters), "data": str(pairs), "output": str(output), "batch_size": 8,
        "group_size": 3, "max_steps": 6, "save_steps": 2, "logging_steps": 1, "warmup_steps": 1, "report_to": "[]",
        "device": "cpu", "temperature": 0.1, "learning_rate": 0.01, **changes,
    }  # fmt: skip
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


LORA = {"backbone": "lora", "lora_r": 4, "train_head": "true"}
FROZEN = {"backbone": "frozen", "transform": "residual", "train_head": "true"}
GENTLE = {"learning_rate": 1e-4}  # so that float16's rounding does not grow from step to step
FULL = {"backbone": "full", "lora_dropout": 0.0}
TOP = {"backbone": "top", "train_head": "true", "transform": "context"}


def log_of(output):
    return [json.loads(line) for line in (Path(output) / "training_log.jsonl").read_text().splitlines()]


def weights_of(output):
    files = sorted(path for path in Path(output).glob("*.safetensors"))
    return {f"{path.name}:{name}": tensor for path in files for name, tensor in load_file(path).items()}


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def deepspeed(empty, arguments, ranks, timeout=540):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        str(launcher),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        "train/run.py",
        empty,
        *arguments,
    ]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip

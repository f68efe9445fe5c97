"""What a run shows while it trains: a bar, a log file; and how it stops when it is asked to."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

from lens.files import atomic_file

LOG_FILE = "training_log.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a training log; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


@contextmanager
def ending_workers() -> Iterator[None]:
    """Ends the loader's workers that are left when an error or Ctrl-C leads out of training.

    They ignore SIGTERM, by which the interpreter would end them, and for which it would then wait for ever.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        left = [process for process in multiprocessing.active_children() if process not in before]
        if left:
            handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise for each
            for process in left:
                process.kill()
            for process in left:
                process.join()
            signal.signal(signal.SIGCHLD, handler)


class Progress(TrainerCallback):  # type: ignore[misc]
    """A progress bar with loss parts and time left, and one JSON line per log step in `training_log.jsonl`."""

    def __init__(self, output: Path) -> None:
        self.log_path = output / LOG_FILE
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)  # the checkpoint's own would outlive changed fields
        self.started = time.monotonic()
        self.seconds = 0.0
        if state.is_world_process_zero:
            kept = [row for row in read_log(self.log_path) if row["step"] <= state.global_step]
            self.seconds = kept[-1]["seconds"] if kept else 0.0
            with atomic_file(self.log_path, overwrite=True) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.bar is None or not ("loss" in logs or any(name.startswith("eval_") for name in logs)):
            return
        if "loss" in logs:
            shown = ("loss", "contrastive", "kd", "accuracy")
            self.bar.set_postfix({name: f"{logs[name]:.3f}" for name in shown if name in logs})
        seconds = self.seconds + time.monotonic() - self.started
        row = {"step": state.global_step, **logs, "seconds": round(seconds, 2)}
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def say(self, message: str) -> None:
        """Prints a line above the bar; only where there is one, on the first rank."""
        if self.bar is not None:
            tqdm.write(message)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar's line, if there is one; again does nothing."""
        if self.bar is not None:
            self.bar.close()


class Stopping(TrainerCallback):  # type: ignore[misc]
    """Turns SIGTERM, by which clusters and launchers end a run, into a checkpoint and an orderly end."""

    def __init__(self) -> None:
        self.asked = self.training = self.stopped = False
        self._agreed: tuple[Tensor, torch.cuda.Event | None] | None = None

    @contextmanager
    def listening(self) -> Iterator[Stopping]:
        """Within, SIGTERM asks for a stop; before training it ends the process at once, with status 0."""
        before = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def _receive(self, number: int, frame: Any) -> None:
        if not self.training:
            print("stopped by SIGTERM before the first step; the same command starts again", flush=True)
            raise SystemExit(0)
        self.asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        stop = self._asked_anywhere(args.device) if dist.is_initialized() else self.asked
        if stop and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = control.should_save = True

    def _asked_anywhere(self, device: torch.device) -> bool:
        """Whether any rank had been asked by the end of the step before this one.

        The signal reaches the ranks at different steps, but all must stop after the same one, so they ask each
        other. The answer is read a step later, when it has long arrived: no step waits for a GPU.
        """
        before = self._agreed
        asked = torch.full((), int(self.asked), dtype=torch.int32, device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        if device.type == "cuda":
            asked = torch.empty_like(asked, device="cpu", pin_memory=True).copy_(asked, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(device))
            self._agreed = asked, arrived
        else:
            self._agreed = asked, None
        if before is None:
            return False
        if before[1] is not None:
            before[1].synchronize()
        return bool(before[0])

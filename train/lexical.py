"""What the lexical systems' training programs share: options, a run's folder, transformers' Trainer around it.

A run's folder holds `run.json` (what decides the result), `training_log.jsonl` and whole checkpoints; the finished
artifact is moved in at the end, its configuration last. The same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lens.devices import resolve_device
from lens.files import check_output, read_json, write_json
from lens.identity import digest, model_files
from lens.locks import alone
from train.checkpoints import COMPLETE_FILE, mark_whole, whole_checkpoints
from train.progress import Progress, Stopping
from train.sampler import Schedule

RUN_FILE = "run.json"
FREE = ("output", "save_steps", "logging_steps", "device")
"""Options that may change between a run and its continuation."""


def add_options(parser: argparse.ArgumentParser, batch_size: int, learning_rate: float, epochs: float) -> None:
    """The options of `train`, with a program's defaults."""
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="folder to write; the same command goes on where a run stopped")
    add("--batch-size", type=int, default=batch_size, help="examples of an optimizer step")
    add("--learning-rate", type=float, default=learning_rate)
    add("--epochs", type=float, default=epochs, help="passes over the data, unless --max-steps is given")
    add("--max-steps", type=int, help="optimizer steps")
    add("--warmup-steps", type=int, default=0, help="steps of linear warm-up; the rate then falls linearly")
    add("--weight-decay", type=float, default=0.01)
    add("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm; 0: never")
    add("--seed", type=int, default=42)
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic of the forward and backward pass")
    add("--save-steps", type=int, default=500, help="optimizer steps between checkpoints, of which two are kept")
    add("--logging-steps", type=int, default=10, help="optimizer steps between lines of training_log.jsonl")
    add("--device", help="cpu, cuda or mps; unset: the first GPU there is, else the CPU")


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError naming the option that training could not use."""
    limits = {"batch_size": 1, "max_steps": 1, "warmup_steps": 0, "save_steps": 1, "logging_steps": 1}
    for name, least in limits.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, found {value}")
    for name in ("learning_rate", "epochs"):
        value = getattr(options, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')} must be a number above 0, found {value}")
    for name in ("weight_decay", "max_grad_norm"):
        value = getattr(options, name)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')} must be a number of at least 0, found {value}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 4294967295, found {options.seed}")


class Steps(Dataset[Any]):
    """Item `step` is the batch of that step: `collate(step, rows)` of the rows that the schedule draws for it."""

    def __init__(self, schedule: Schedule, collate: Callable[[int, list[int]], dict[str, Any]]) -> None:
        self.schedule, self.collate = schedule, collate

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        return self.collate(step, self.schedule.batch(step)[1])


def schedule_of(options: argparse.Namespace, size: int, what: str) -> Schedule:
    """The batches of a run over `size` examples; raises ValueError when they are fewer than one batch."""
    once = Schedule([size], options.batch_size, options.seed, 1, names=[what])
    steps = options.max_steps or max(1, round(options.epochs * once.steps_per_epoch))
    if options.warmup_steps >= steps:
        raise ValueError(f"--warmup-steps {options.warmup_steps} takes up all {steps} steps: lower it")
    return Schedule([size], options.batch_size, options.seed, steps, names=[what])


@contextmanager
def begun(options: argparse.Namespace, files: Sequence[str | os.PathLike[str]], marker: str) -> Iterator[bool]:
    """Holds the lock of a run's folder; yields whether the run is finished, by its file `marker`.

    Raises FileExistsError when the folder holds something else or another run writes to it, and ValueError when its
    run had other options, other `files` or another model at `--base`.
    """
    output = Path(options.output)
    settings = {name: value for name, value in vars(options).items() if name not in FREE}
    settings["files"] = {os.fspath(file): digest(Path(file)) for file in files}
    settings["base_files"] = model_files(options.base)
    if (output / RUN_FILE).is_file():
        before = read_json(output / RUN_FILE)
        names = before.keys() | settings.keys()
        changed = sorted(name for name in names if before.get(name, ...) != settings.get(name, ...))
        if changed:
            raise ValueError(
                f"{output} holds a run with other options ({', '.join(changed)}): choose another --output or remove it"
            )
    else:
        for torn in output.glob(f".{RUN_FILE}.*"):  # a run killed while it wrote its first file
            torn.unlink()
        check_output(output)
    with alone(output):
        if not (output / marker).is_file():
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / RUN_FILE, settings)
        yield (output / marker).is_file()


def train(
    model: nn.Module,
    batches: Dataset[Any],
    options: argparse.Namespace,
    write: Callable[[Path], None],
    marker: str,
) -> bool:
    """Trains `model`, whose forward pass gives a mapping with `loss`, on the steps of `batches`, and moves the artifact
    that `write(folder)` makes into the run's folder; False when SIGTERM stopped it before.

    Raises FloatingPointError when loss or gradient is not finite.
    """
    output = Path(options.output)
    on_cpu = resolve_device(options.device).type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=len(batches),  # type: ignore[arg-type]
        per_device_train_batch_size=1,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup_steps,
        max_grad_norm=options.max_grad_norm,
        bf16=options.precision == "bf16",
        seed=options.seed,
        save_steps=options.save_steps,
        logging_steps=options.logging_steps,
        report_to="none",
        use_cpu=on_cpu,
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would cut batches apart
    with Stopping().listening() as stopping:
        trainer = LexicalTrainer(model, batches, arguments, stopping)
        checkpoint = next(reversed(whole_checkpoints(output)), None)
        if checkpoint is not None:
            print(f"going on from {checkpoint}", flush=True)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            trainer.progress.close()  # so that an error's message begins a line
    if stopping.stopped:
        print(f"stopped by SIGTERM after step {trainer.state.global_step}; the same command goes on from there")
        return False
    staged = output / ".finished"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    write(staged)
    mode = (staged / marker).stat().st_mode
    for file in staged.rglob("*.safetensors"):
        file.chmod(mode)  # safetensors' own is for the owner alone
    for file in sorted(staged.iterdir(), key=lambda file: file.name == marker):
        if (output / file.name).is_dir():  # of a run that was killed between two of these
            shutil.rmtree(output / file.name)
        file.replace(output / file.name)
    staged.rmdir()
    return True


class LexicalTrainer(Trainer):
    """transformers' Trainer with whole checkpoints, our log, and the parts of the loss in it."""

    def __init__(
        self, model: nn.Module, batches: Dataset[Any], arguments: TrainingArguments, stopping: Stopping
    ) -> None:
        super().__init__(model=model, args=arguments, train_dataset=batches)
        self.remove_callback(PrinterCallback)
        self.progress = Progress(Path(arguments.output_dir))
        self.add_callback(self.progress)
        self.add_callback(stopping)
        self.parts: dict[str, list[Tensor]] = defaultdict(list)

    def get_train_dataloader(self) -> DataLoader[Any]:
        sampler = BatchSampler(SequentialSampler(self.train_dataset), 1, drop_last=False)
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=_only)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss" and isinstance(value, Tensor) and value.dim() == 0:
                self.parts[name].append(value.detach())
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update({name: float(torch.stack(values).mean()) for name, values in self.parts.items()})
            self.parts.clear()
        if not all(math.isfinite(value) for value in logs.values() if isinstance(value, float)):
            raise FloatingPointError(
                f"loss or gradient is not finite at step {self.state.global_step}: lower --learning-rate; the last "
                "checkpoint is whole"
            )
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not bool(torch.isfinite(self._tr_loss)):
            raise FloatingPointError(f"loss is not finite at step {self.state.global_step}: lower --learning-rate")
        output = Path(self.args.output_dir)
        folder = output / f"checkpoint-{self.state.global_step}"
        (folder / COMPLETE_FILE).unlink(missing_ok=True)  # while it is replaced it must not pass for whole
        super()._save_checkpoint(model, trial)
        mark_whole(folder, self.state.global_step)
        for old in whole_checkpoints(output)[:-2]:
            shutil.rmtree(old, ignore_errors=True)


def _only(items: list[Any]) -> Any:
    return items[0]

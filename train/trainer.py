"""transformers' Trainer with LENS's loss, batches, artifact checkpoints, log and progress."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from lens.files import atomic_file, read_json, read_tensors, write_json
from lens.model import HEAD_FILE, LensModel, read_head
from train.config import Recipe
from train.data import Batches
from train.loss import Loss, contrastive_loss
from train.step import QueryPassageModel
from train.top import TopLayers

COMPLETE_FILE = "complete.json"  # the last file of a checkpoint; without it the checkpoint is not whole
LOG_FILE = "training_log.jsonl"
BACKBONE_FILE = "backbone.safetensors"


class LensTrainer(Trainer):
    """Trains a LensModel on Batches by a Recipe. A checkpoint is the artifact so far with what a run needs to go on."""

    def __init__(
        self,
        model: LensModel,
        tokenizer: Any,
        batches: Batches,
        recipe: Recipe,
        arguments: TrainingArguments,
        top: TopLayers | None = None,
    ) -> None:
        super().__init__(model=QueryPassageModel(model, top), args=arguments, train_dataset=batches)
        self.lens, self.tokenizer, self.recipe = model, tokenizer, recipe
        self.loss_is_scaled_for_ga = False
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress(Path(recipe.output)))
        self._sums: dict[str, Tensor] = {}
        self._counted = 0

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.train_dataset,
            batch_sampler=BatchSampler(SequentialSampler(self.train_dataset), 1, drop_last=False),
            collate_fn=_only,
            num_workers=self.recipe.workers,
            persistent_workers=self.recipe.workers > 0,
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        queries, passages = model(inputs["queries"], inputs["passages"], inputs["mini_batches"])
        recipe = self.recipe
        loss = contrastive_loss(
            queries,
            passages,
            inputs["teacher"],
            recipe.temperature,
            recipe.kd_weight,
            recipe.kd_temperature,
            inputs["in_batch"],
            inputs["teacher_vectors"],
            inputs["keys"],
        )
        self._count(loss, queries.detach(), passages.detach())
        return (loss.total, {"queries": queries, "passages": passages}) if return_outputs else loss.total

    def _count(self, loss: Loss, queries: Tensor, passages: Tensor) -> None:
        parts = {
            "contrastive": loss.contrastive,
            "kd": loss.kd,
            "accuracy": loss.accuracy,
            "active_per_query": (queries > 0).sum(1).float().mean(),
            "active_per_passage": (passages > 0).sum(1).float().mean(),
        }
        for name, value in parts.items():  # summed on the device; read only when logged
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._counted += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._counted:
            means = torch.stack(list(self._sums.values())) / self._counted
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(means)
                means /= dist.get_world_size()
            logs.update(zip(self._sums, means.tolist(), strict=True))
            self._sums, self._counted = {}, 0
        if not all(math.isfinite(value) for value in logs.values() if isinstance(value, float)):
            raise FloatingPointError(
                f"loss or gradient is not finite at step {self.state.global_step}: lower learning_rate, or use bf16 in "
                "place of fp16; the last checkpoint is whole"
            )
        if "epoch" in logs:
            batches: Any = self.train_dataset
            done = self.state.global_step * self.recipe.gradient_accumulation
            logs["epoch"] = done / batches.schedule.steps_per_epoch
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            recipe = self.recipe
            head_rate = recipe.learning_rate if recipe.head_learning_rate is None else recipe.head_learning_rate
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            groups = []
            rows = ("model.head.weight", "model.head.bias")
            for in_head, rate in ((False, recipe.learning_rate), (True, head_rate)):
                for decays in (True, False):
                    parameters = [p for n, p in named if (n in rows) == in_head and (p.dim() > 1) == decays]
                    if parameters:
                        decay = recipe.weight_decay if decays else 0.0
                        groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
            self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the artifact of the present state, a backbone that was trained itself with it, into `output_dir`."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.lens.write(folder, self.tokenizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.lens.head.load_state_dict(read_head(folder / HEAD_FILE, self.lens.config).state_dict())
        backbone = self.lens.backbone
        if isinstance(backbone, PeftModel):
            set_peft_model_state_dict(backbone, load_file(folder / "adapter_model.safetensors"))
        elif self.lens.backbone_is_own:
            trained = {name: tuple(p.shape) for name, p in backbone.named_parameters() if p.requires_grad}
            backbone.load_state_dict(read_tensors(folder / BACKBONE_FILE, trained), strict=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
            return
        if self.args.should_save and self.lens.backbone_is_own:
            # save_pretrained may rename or untie weights; the exact state is what a resumed run needs
            trained = ((k, v) for k, v in self.lens.backbone.named_parameters() if v.requires_grad)
            state = {k: v.detach().cpu().clone() for k, v in trained}
            save_file(state, Path(output_dir) / BACKBONE_FILE)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not bool(torch.isfinite(self._tr_loss)):
            raise FloatingPointError(f"loss is not finite at step {self.state.global_step}: lower learning_rate")
        output = Path(self.args.output_dir)
        folder = output / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # one of this step, damaged since, must not pass for whole while it is replaced
            (folder / COMPLETE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sizes = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
            write_json(folder / COMPLETE_FILE, {"step": self.state.global_step, "files": sizes})
            # Old checkpoints go only now that the new one is whole.
            for old in whole_checkpoints(output)[: -self.recipe.save_total_limit]:
                shutil.rmtree(old, ignore_errors=True)


def _only(items: list[Any]) -> Any:
    return items[0]


def whole_checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints in `output`, lowest step first: those with every file that they were finished with."""
    numbered = [path for path in output.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    whole = [path for path in numbered if (path / COMPLETE_FILE).is_file() and not damage(path)]
    return sorted(whole, key=lambda path: int(path.name.rpartition("-")[2]))


def damage(checkpoint: Path) -> list[str]:
    """Names of the files of a finished checkpoint that are missing or no longer of the size they were written with."""
    try:
        sizes: dict[str, int] = read_json(checkpoint / COMPLETE_FILE)["files"]
        return [name for name, size in sizes.items() if (checkpoint / name).stat().st_size != size]
    except FileNotFoundError as error:
        return [Path(error.filename).name]
    except (KeyError, ValueError):
        return [COMPLETE_FILE]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a training log; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


class Progress(TrainerCallback):  # type: ignore[misc]
    """A progress bar with loss parts and time left, and one JSON line per log step in `training_log.jsonl`."""

    def __init__(self, output: Path) -> None:
        self.log_path = output / LOG_FILE
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
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
        if self.bar is None or "loss" not in logs:
            return
        shown = {name: f"{logs[name]:.3f}" for name in ("loss", "contrastive", "kd", "accuracy") if name in logs}
        self.bar.set_postfix(shown)
        seconds = self.seconds + time.monotonic() - self.started
        row = {"step": state.global_step, **logs, "seconds": round(seconds, 2)}
        with self.log_path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

"""transformers' Trainer with LENS's loss, batches, artifact checkpoints, log and progress."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback

from lens.corpus import Beir
from lens.encoder import LENS
from lens.files import atomic_folder, read_tensors, write_json
from lens.model import CONFIG_FILE, HEAD_FILE, LensModel, read_head
from train.checkpoints import COMPLETE_FILE, mark_whole, whole_checkpoints
from train.config import Recipe
from train.data import Batches
from train.evaluate import EVALUATION_FILE, best_folder, best_so_far, evaluate
from train.loss import contrastive_loss
from train.parallel import SharedMemory, collected
from train.progress import Progress, Stopping
from train.refresh import Refresh
from train.sparsity import keep_top, regulariser, warmed_up
from train.step import QueryPassageModel, cached_backward
from train.top import TopLayers
from train.watch import Watch

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
        evaluation: Sequence[Beir] = (),
        stopping: Stopping | None = None,
        refresh: Refresh | None = None,
    ) -> None:
        wrapped = QueryPassageModel(model, top)
        super().__init__(model=wrapped, args=arguments, train_dataset=batches)
        self.lens, self.tokenizer, self.recipe = model, tokenizer, recipe
        self.loss_is_scaled_for_ga = False
        self.remove_callback(PrinterCallback)
        self.evaluation = evaluation
        self.progress = Progress(Path(recipe.output))
        self.add_callback(self.progress)
        self.add_callback(SharedMemory())
        self.refresh = refresh
        self.mined: dict[str, float] = {}  # of the mining since the last line of the log
        if evaluation:
            self.add_callback(_Evaluating(recipe.eval_steps))
        if stopping is not None:
            self.add_callback(stopping)
        if refresh is not None:
            self.add_callback(_Refreshing(self))
        self.watch = Watch(wrapped)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.train_dataset,
            batch_sampler=BatchSampler(SequentialSampler(self.train_dataset), 1, drop_last=False),
            collate_fn=_only,
            num_workers=self.recipe.workers,
            pin_memory=self.args.device.type == "cuda",
            persistent_workers=self.recipe.workers > 0,
            worker_init_fn=_ignore_sigterm,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, timed: what the training process waits for its batches."""
        start = time.perf_counter()
        samples = super().get_batch_samples(*args, **kwargs)
        self.watch.wait(time.perf_counter() - start)
        return samples

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The batch on the device, in the dtypes it has; a GPU copies it from pinned memory while the host goes on."""
        return send_to_device(inputs, self.args.device, non_blocking=self.args.device.type == "cuda")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        queries, passages = model(inputs["queries"], inputs["passages"], inputs["mini_batches"])
        total = self._loss(inputs, queries, passages)
        return (total, {"queries": queries, "passages": passages}) if return_outputs else total

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's; gradient caching under ZeRO-3 takes its own two passes."""
        if inputs["mini_batches"] is None or not any(hasattr(p, "ds_id") for p in model.parameters()):
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)

        def loss(embeddings: Tensor) -> Tensor:
            total = self._loss(inputs, embeddings[inputs["queries"]], embeddings[inputs["passages"]])
            return total / self.current_gradient_accumulation_steps

        def backward(surrogate: Tensor, last: bool) -> None:
            engine = self.accelerator.deepspeed_engine_wrapped
            engine.backward(surrogate, sync_gradients=last and self.accelerator.sync_gradients, scale_wrt_gas=False)

        return cached_backward(model, inputs["mini_batches"], loss, backward)

    def _loss(self, inputs: dict[str, Any], queries: Tensor, passages: Tensor) -> Tensor:
        recipe = self.recipe
        if recipe.contrastive_weight == 0 and inputs["teacher"] is None and inputs["teacher_vectors"] is None:
            raise ValueError(
                "contrastive_weight=0 leaves a batch without teacher scores nothing to learn: score the data with "
                "train/score.py"
            )
        queries = keep_top(queries, recipe.query_top_k, recipe.normalize)
        passages = keep_top(passages, recipe.passage_top_k, recipe.normalize)
        loss = contrastive_loss(
            queries,
            passages,
            inputs["teacher"],
            recipe.temperature,
            recipe.kd_weight,
            recipe.kd_temperature,
            inputs["in_batch"],
            inputs["teacher_vectors"],
            None if recipe.mask_false_negatives == "none" else inputs["keys"],
            recipe.false_negative_margin if recipe.mask_false_negatives == "teacher" else None,
            recipe.contrastive_weight,
            recipe.distillation,
        )
        if recipe.sparsity != "none":
            step = self.state.global_step + 1
            parts = [(recipe.query_sparsity, queries), (recipe.passage_sparsity, passages)]
            weighted = [
                warmed_up(weight, step, recipe.sparsity_warmup_steps) * regulariser(recipe.sparsity, embeddings)
                for weight, embeddings in parts
                if weight > 0
            ]
            loss = loss.with_sparsity(torch.stack(weighted).sum())
        self.watch.count(loss, queries.detach(), passages.detach(), inputs)
        return loss.total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            with self.accelerator.autocast():  # which the Trainer's own covers the wrapped forward pass alone
                figures = self.watch.figures()
            logs.update(figures)
            logs["temperature"] = self.recipe.temperature
            mined = None if self.refresh is None else self.refresh.refreshed.mined_at(self.state.global_step - 1)
            if mined is not None:
                logs["negatives_age"] = self.state.global_step - mined
            logs.update(self.mined)
            self.mined = {}
            if figures and self.recipe.head == "lexical" and self.state.global_step > self.recipe.warmup_steps:
                for warning in self.watch.warnings(figures):
                    self.progress.say(f"warning: step {self.state.global_step}: {warning}")
        # With fp16 a step whose gradients overflow is left out and the loss scale lowered.
        checked = [value for name, value in logs.items() if not (self.args.fp16 and name == "grad_norm")]
        if not all(math.isfinite(value) for value in checked if isinstance(value, float)):
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
        with collected(self.lens, every=self.lens.backbone_is_own):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                self.lens.write(folder, self.tokenizer)

    def refresh_negatives(self) -> None:
        """Mines hard negatives with the model as it is, where that is due."""
        if self.refresh is None or not self.refresh.due(self.state.global_step):
            return
        mode = self.lens.training
        with self.accelerator.autocast():
            model = LENS(self.lens, self.tokenizer, self.args.device, packed=self.recipe.packed)
            self.mined = self.refresh(model, self.state.global_step)
        self.lens.train(mode)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """nDCG@10 on the evaluation's data sets; the model's artifact goes to `best` when it is the best so far."""
        mode = self.lens.training
        with self.accelerator.autocast():
            model = LENS(self.lens, self.tokenizer, self.args.device, packed=self.recipe.packed)
            values = evaluate(model, self.evaluation, self.recipe.eval_instruction)
        self.lens.train(mode)
        self.log(values)
        if self.args.should_save:
            output = Path(self.args.output_dir)
            found = {"step": self.state.global_step, "instruction": self.recipe.eval_instruction, **values}
            best = best_so_far(output)
            same = best is not None and best.keys() == found.keys() and best["instruction"] == found["instruction"]
            if best is None or not same or found["eval_ndcg@10"] > best["eval_ndcg@10"]:
                with atomic_folder(best_folder(output), overwrite=True, marker=CONFIG_FILE) as folder:
                    self.lens.write(folder, self.tokenizer)
                    write_json(folder / EVALUATION_FILE, found)
        return values

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
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError | dist.DistError):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"checkpoint {folder} could not be written ({error}): make room on the disk and start the same command "
                "again, which goes on from the checkpoint before"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_whole(folder, self.state.global_step)
            # Old checkpoints go only now that the new one is whole.
            for old in whole_checkpoints(output)[: -self.recipe.save_total_limit]:
                shutil.rmtree(old, ignore_errors=True)


class _Evaluating(TrainerCallback):  # type: ignore[misc]
    """Asks for an evaluation every `steps` optimizer steps and after the last one."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = state.global_step % self.steps == 0 or state.global_step == state.max_steps


class _Refreshing(TrainerCallback):  # type: ignore[misc]
    """Has negatives mined after a step, before its checkpoint is written; of a run that was asked to stop, when it
    goes on."""

    def __init__(self, trainer: LensTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.refresh_negatives()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not control.should_training_stop:
            self.trainer.refresh_negatives()


def _ignore_sigterm(worker: int) -> None:
    """Launchers signal workers too, but the training process still needs their batches."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _only(items: list[Any]) -> Any:
    return items[0]

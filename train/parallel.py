"""DeepSpeed by one name, and whole weights where ZeRO-3 has scattered them over the ranks."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from lens.files import read_json, require
from train.config import Recipe

_AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}
_OFFLOAD = {"device": "cpu", "pin_memory": True}
_ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    "zero3": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
    "zero2-offload": {"stage": 2, "contiguous_gradients": True, "offload_optimizer": _OFFLOAD},
    "zero3-offload": {
        "stage": 3,
        "contiguous_gradients": True,
        "offload_optimizer": _OFFLOAD,
        "offload_param": _OFFLOAD,
    },
}
CONFIGURATIONS = tuple(_ZERO)


def deepspeed_config(name: str) -> dict[str, Any]:
    """The DeepSpeed configuration of one of CONFIGURATIONS, or of a JSON file of that path.

    Raises FileNotFoundError and ValueError naming the file, and ImportError without DeepSpeed.
    """
    require("train", "deepspeed")
    if name not in _ZERO:
        try:
            config = read_json(name)
        except FileNotFoundError as error:
            names = ", ".join(CONFIGURATIONS)
            raise FileNotFoundError(f"deepspeed: {name} is neither a file nor one of {names}") from error
        zero = config.get("zero_optimization")
        if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
            raise ValueError(
                f"deepspeed: {name}: zero_optimization must be an object with a stage from 0 to 3, found {zero}"
            )
        return config
    # The optimizer is torch's, so that its parameter groups hold; DeepSpeed's own would have to be compiled.
    return {"zero_optimization": copy.deepcopy(_ZERO[name]), "zero_force_ds_cpu_optimizer": False, **_AUTO}


def stage_of(config: dict[str, Any] | None) -> int:
    """The ZeRO stage of a DeepSpeed configuration; 0 for None."""
    return int(config["zero_optimization"]["stage"]) if config else 0


class SharedMemory(TrainerCallback):
    """Unlinks the 69 MB in /dev/shm by which DeepSpeed's ranks on CPUs reach each other, and which it never removes.

    The memory itself stays mapped until the processes end, whichever way they do.
    """

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """By now DeepSpeed is set up on this rank, and after the barrier on all."""
        if args.deepspeed is None or args.device.type != "cpu" or not dist.is_initialized():
            return
        dist.barrier()
        place = "_".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_{place}_{dist.get_rank()}"
        Path("/dev/shm", name).unlink(missing_ok=True)


@contextmanager
def whole_weights(arguments: TrainingArguments) -> Iterator[None]:
    """Within, models are built whole on every rank although ZeRO-3 will scatter them.

    transformers would scatter weights as it loads them, before vocabulary, adapter and probes have seen them.
    """
    config = getattr(arguments, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


@contextmanager
def collected(module: nn.Module, every: bool = True) -> Iterator[None]:
    """Within, the weights of `module` that ZeRO-3 has scattered are whole on every rank, which all must enter.

    Not `every`: those that are trained, and the head.
    """
    scattered = [
        parameter
        for name, parameter in module.named_parameters()
        if hasattr(parameter, "ds_id") and (every or parameter.requires_grad or ".head." in f".{name}")
    ]
    if not scattered:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(scattered):
        yield


def check_stage(recipe: Recipe, stage: int) -> None:
    """Raises ValueError naming the fields that ZeRO stage 3, which scatters weights over the ranks, cannot serve."""
    if stage < 3:
        return
    if recipe.backbone == "lora" and recipe.train_special_tokens:
        raise ValueError(
            "train_special_tokens=true contradicts ZeRO stage 3, which scatters the rows it trains: set it to false, "
            "or take zero2"
        )
    if recipe.quantization is not None:
        raise ValueError(f"quantization={recipe.quantization} contradicts ZeRO stage 3: take zero2")
    if recipe.backbone == "top":
        raise ValueError("backbone=top contradicts ZeRO stage 3: take zero2")
    if recipe.query_encoder == "bag":
        raise ValueError("query_encoder=bag contradicts ZeRO stage 3: take zero2")
    if recipe.refresh_steps is not None:
        raise ValueError("refresh_steps contradicts ZeRO stage 3: take zero2")
    if recipe.eval_data:
        raise ValueError("eval_data contradicts ZeRO stage 3: take zero2, or evaluate the finished model")

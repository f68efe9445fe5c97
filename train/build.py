"""A recipe -> the model it trains: loaded, given LoRA matrices, and frozen where nothing is to change."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from lens.attention import check_compiler, compile_layers
from lens.devices import resolve_device
from lens.model import LensModel, build_model
from lens.text import SPECIAL_TOKENS
from train.config import Recipe
from train.parallel import CONFIGURATIONS, deepspeed_config, stage_of


def build(recipe: Recipe) -> tuple[LensModel, Any]:
    """The model of a recipe with the parameters that it trains, and its tokenizer."""
    settings: dict[str, Any] = {
        name: getattr(recipe, name)
        for name in (
            "revision", "transform", "pooling", "positions", "prompt", "query_encoder", "bidirectional", "normalize",
            "query_max_length", "document_max_length",
        )
        if getattr(recipe, name) is not None
    }  # fmt: skip
    if recipe.head == "dense":
        settings["head"] = "dense"
    device = device_of(recipe)
    if recipe.attn_implementation == "flex_attention" and device.type == "cpu":
        raise ValueError("attn_implementation=flex_attention cannot train on the CPU: use sdpa")
    if recipe.compile:
        check_compiler(device)
    model, tokenizer = build_model(
        recipe.base,
        recipe.clusters,
        weight_dtype(recipe),
        attn_implementation=recipe.attn_implementation,
        whiten=recipe.whiten,
        device=device,
        quantization=recipe.quantization,
        head_dtype=torch.float32,
        **settings,
    )
    make_trainable(model, tokenizer, recipe)
    if recipe.compile:
        compile_layers(model.backbone, device)
    return model, tokenizer


def make_trainable(model: LensModel, tokenizer: Any, recipe: Recipe) -> None:
    """Frees the parameters that a recipe trains, adding LoRA matrices where it says so, and freezes all others."""
    backbone: Any = model.backbone
    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if recipe.quantization is not None:  # norms and embeddings in float32, as QLoRA trains
        prepare_model_for_kbit_training(backbone, recipe.gradient_checkpointing, **checkpointing)
    backbone.requires_grad_(recipe.backbone == "full")
    model.backbone_is_own = recipe.backbone in ("full", "top")
    if recipe.backbone == "lora":
        backbone = model.backbone = _add_lora(model, tokenizer, recipe)
    for name, parameter in model.head.named_parameters():
        trained = recipe.train_head and name != "query_weights"
        parameter.requires_grad_(trained or name.startswith("transform."))
    if recipe.gradient_checkpointing:
        backbone.gradient_checkpointing_enable(**checkpointing)


def weight_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype that the backbone is read in: that of `precision` for weights that stay frozen, and where DeepSpeed
    keeps the float32 masters itself; else float32. What is trained is float32 in either case."""
    half = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
    masters_elsewhere = recipe.deepspeed in CONFIGURATIONS
    return half if recipe.backbone in ("lora", "frozen") or masters_elsewhere else torch.float32


def device_of(recipe: Recipe) -> torch.device:
    """Where the Trainer will put this process's model, so that weights are read there at once; under ZeRO-3, which
    scatters them because they are too many for a GPU, the CPU."""
    if recipe.deepspeed is not None and stage_of(deepspeed_config(recipe.deepspeed)) == 3:
        return torch.device("cpu")
    device = resolve_device(recipe.device)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if device.type == "cuda" else device


def _add_lora(model: LensModel, tokenizer: Any, recipe: Recipe) -> Any:
    present = {name.rpartition(".")[2] for name, _ in model.backbone.named_modules()}
    unknown = [name for name in recipe.lora_targets if name not in present]
    every = recipe.lora_targets == ("all-linear",)
    if unknown and not every:
        linear = {n.rpartition(".")[2] for n, m in model.backbone.named_modules() if isinstance(m, torch.nn.Linear)}
        raise ValueError(
            f"lora_targets {', '.join(unknown)} do not occur in the backbone; its linear layers are "
            f"{', '.join(sorted(linear))}: name some of these, or all-linear"
        )
    tokens = None
    if recipe.train_special_tokens and model.config.prompt == "lens":
        embedding: Any = model.backbone.get_input_embeddings()  # type: ignore[operator]
        name = next(n for n, module in model.backbone.named_modules() if module is embedding).rpartition(".")[2]
        tokens = {name: tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))}
    lora = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear" if every else list(recipe.lora_targets),
        trainable_token_indices=tokens,
    )
    peft = get_peft_model(model.backbone, lora)
    for parameter in peft.parameters():  # the rows of added tokens come in the backbone's dtype
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft

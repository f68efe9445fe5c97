"""Recipe: everything that decides a training run, from YAML and command-line overrides, checked before work starts."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lens.config import Pooling, Positions, Prompt, Transform, check_fields


@dataclass(frozen=True)
class Recipe:
    """One training run. Lengths are in tokens, sizes in texts unless a field says otherwise."""

    base: str
    """Backbone: a folder or a hub id."""
    data: tuple[str, ...]
    """Training files, .jsonl or .jsonl.gz in the bge format (query, pos, neg, ...); each file is one data set, and
    every batch comes from one data set."""
    output: str
    """Folder of the run: the finished model's artifact, checkpoints, log and resolved recipe."""
    clusters: str | None = None
    """Clusters folder of clustering/run.py; None trains the full vocabulary head."""
    revision: str | None = None
    """Commit of the backbone on the hub."""

    whiten: bool = False
    """Whether the centroids are whitened before training: for sentence encoders, which have no LM head."""
    transform: Transform | None = None
    """Layer between hidden states and head, see LensConfig; None: the MLM head's own where it has one, else none."""
    pooling: Pooling = "max"
    """How positions become one vector, see LensConfig."""
    positions: Positions | None = None
    """Pooled positions, see LensConfig; None: shifted for decoders, content for encoders."""
    prompt: Prompt | None = None
    """Prompt form, see LensConfig; None: lens for decoders, plain for encoders."""
    bidirectional: bool = True
    """Whether a decoder's causal mask is lifted."""
    normalize: bool = True
    """Whether embeddings are L2-normalised."""
    query_max_length: int | None = None
    """Longest query in tokens, instruction included; None: 512, or what the backbone allows."""
    document_max_length: int | None = None
    """Longest passage in tokens; None: 512, or what the backbone allows."""
    attn_implementation: str | None = None
    """sdpa, eager, flash_attention_2, ...; None leaves the choice to transformers."""

    backbone: Literal["frozen", "top", "lora", "full"] = "lora"
    """What is trained of the backbone; `top`: its last layers."""
    top_layers: int = 1
    """Layers that backbone=top trains."""
    train_head: bool = False
    """Whether centroids (and bias) are trained; a transform always is."""
    lora_r: int = 32
    """Rank of the LoRA matrices."""
    lora_alpha: int = 64
    """LoRA scale: updates are multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.1
    """Dropout before the LoRA matrices, as a share."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get LoRA matrices."""
    train_special_tokens: bool = True
    """Whether the input rows of <instruct>, <query>, <response> are trained (LoRA with the lens prompt only)."""

    group_size: int = 8
    """Passages per query: one positive and group_size - 1 hard negatives."""
    batch_size: int = 512
    """Queries per contrastive batch over all ranks; must be a multiple of the number of ranks."""
    in_batch_negatives: bool = True
    """Whether retrieval data also takes the passages of the batch's other queries as negatives, over all ranks.
    Class and clustering data never do."""
    teacher_embeddings: str | None = None
    """File of a bi-encoder's embeddings of all training texts (train/score.py --embeddings). Distillation then covers
    all passages of a batch instead of each query's own; the scores in the data are not used."""
    temperature: float = 0.02
    """Scores are divided by it before the softmax."""
    kd_weight: float = 1.0
    """Weight of the distillation loss beside the contrastive one; 0 switches it off."""
    kd_temperature: float = 1.0
    """Teacher scores are divided by it: 1 for reranker logits, about 0.05 for cosine similarities."""

    epochs: float = 1.0
    """Passes over all data; ignored when max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps of the whole run."""
    gradient_accumulation: int = 1
    """Contrastive batches per optimizer step."""
    learning_rate: float = 1e-4
    """Peak learning rate (AdamW)."""
    head_learning_rate: float | None = None
    """Peak learning rate of centroids and bias; None: learning_rate."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Schedule after the warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 switches clipping off."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass."""
    mini_batch_tokens: int | None = None
    """Padded tokens of one forward pass: a batch is embedded in mini-batches of that size whose activations are
    computed again in the backward pass (gradient caching), so that batch_size is not bound by memory. None: the whole
    batch in two passes, queries and passages."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = 42
    """Decides batches, negatives, dropout and initial weights."""
    deepspeed: str | None = None
    """DeepSpeed configuration: `zero1`, or a JSON file."""

    save_steps: int = 500
    """Optimizer steps between checkpoints."""
    save_total_limit: int = 2
    """Checkpoints kept."""
    resume: bool = True
    """Whether to go on from the newest whole checkpoint in `output`."""
    logging_steps: int = 10
    """Optimizer steps between log lines."""
    report_to: tuple[str, ...] = field(default=("tensorboard",))
    """Trackers of transformers' Trainer: tensorboard, wandb, ...; none: []."""
    workers: int = 0
    """Processes that prepare batches; 0 prepares them in the training process."""
    cache_hidden: bool = True
    """With backbone=frozen or top: compute the states of all texts up to the first trained layer once, keep them in a
    file (2 bytes a value) in `output` and train on them."""
    include_backbone: bool = False
    """Whether the finished artifact holds the backbone's weights even when they are the base's or an adapter's."""
    device: str | None = None
    """cpu, cuda or mps; None: the first GPU there is, else the CPU."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, _typed(item.name, getattr(self, item.name), hints[item.name]))
        at_least = {
            "group_size": 1, "batch_size": 1, "gradient_accumulation": 1, "top_layers": 1, "lora_r": 1,
            "lora_alpha": 1, "warmup_steps": 0, "save_steps": 1, "save_total_limit": 1, "logging_steps": 1,
            "workers": 0, "mini_batch_tokens": 1, "query_max_length": 4, "document_max_length": 4, "kd_weight": 0.0,
            "weight_decay": 0.0, "max_grad_norm": 0.0,
        }  # fmt: skip
        for name, limit in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= limit:
                raise ValueError(f"{name} must be at least {limit}, found {value}")
        for name in ("temperature", "kd_temperature", "learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if self.epochs > 1e6 or not 0 <= self.seed < 2**32:
            raise ValueError(f"epochs must be at most 1e6, seed from 0 to 2**32 - 1; found {self.epochs}, {self.seed}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be from 0 to below 1, found {self.lora_dropout}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, found {self.max_steps}")
        if self.device is not None and self.device.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise ValueError(f"device must be cpu, cuda or mps; found {self.device!r}")
        if not self.data:
            raise ValueError("data must name at least one file")
        if self.backbone == "frozen":
            if not self.train_head and self.transform in (None, "none"):
                raise ValueError(
                    "nothing is trained: backbone=frozen contradicts train_head=false with transform=none; "
                    "set train_head: true or transform: residual"
                )
            if self.gradient_checkpointing:
                raise ValueError("gradient_checkpointing contradicts backbone=frozen: there is nothing to recompute")
        if self.top_layers != 1 and self.backbone != "top":
            raise ValueError(f"top_layers={self.top_layers} contradicts backbone={self.backbone}: it goes with top")
        if self.whiten and self.clusters is None:
            raise ValueError("whiten=true contradicts the full vocabulary head: give clusters, or whiten: false")
        if self.group_size == 1 and not self.in_batch_negatives:
            raise ValueError("group_size=1 contradicts in_batch_negatives=false: no negative is left")

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values, for YAML and JSON."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type, or ValueError naming the field, the value and what is accepted."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if typing.get_origin(option) is tuple:
            items = [value] if isinstance(value, str) else value
            if isinstance(items, list | tuple) and all(isinstance(entry, str) for entry in items):
                return tuple(items)
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if math.isfinite(value):
                return float(value)
        elif option is float and isinstance(value, str):
            try:  # YAML 1.1 reads 1e-4 as a string
                if math.isfinite(float(value)):
                    return float(value)
            except ValueError:
                continue
        elif option in (bool, int, str) and type(value) is option:
            return value
    raise ValueError(f"{name} must be {_accepted(options)}; found {value!r}")


def _accepted(options: Sequence[Any]) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "a string",
        type(None): "null",
    }
    texts = []
    for option in options:
        if typing.get_origin(option) is Literal:
            texts.append("one of " + ", ".join(map(str, typing.get_args(option))))
        else:
            texts.append(names.get(option, "a list of strings"))
    return " or ".join(texts)


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a YAML recipe and lays overrides over it.

    Raises FileNotFoundError, or ValueError naming the file and the field: unknown (with the nearest name), of the
    wrong type, missing, or contradicting another.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected fields and values, found {type(values).__name__}")
    values = {**values, **(overrides or {})}
    fields = dataclasses.fields(Recipe)
    try:
        check_fields(map(str, values), [item.name for item in fields], "recipe")
        for item in fields:
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if required and values.get(item.name) is None:
                raise ValueError(f"{item.name} is missing: set it in the recipe or pass --{item.name}")
        return Recipe(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turns `--field value ...` and `--field=value` into a mapping; numbers, true, false and null are read as YAML,
    texts and paths are taken as they stand (`null` and, for lists, `[]` excepted).

    Several values make a list. `--local_rank`, which launchers add, is dropped. Raises ValueError for a value
    without a field and a field without a value.
    """
    overrides: dict[str, Any] = {}
    name: str | None = None
    values: dict[str, list[Any]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, separator, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            values[name] = [_value(name, value)] if separator else []
        elif name is None:
            raise ValueError(f"{argument!r} follows no --field")
        else:
            values[name].append(_value(name, argument))
    for field_name, found in values.items():
        if field_name in ("local_rank", "local-rank"):
            continue
        if not found:
            raise ValueError(f"--{field_name} needs a value")
        overrides[field_name] = found[0] if len(found) == 1 else found
    return overrides


def _value(name: str, text: str) -> Any:
    """A command-line value by its field's type: paths and names stay as they are, whatever YAML would make of them."""
    hint = typing.get_type_hints(Recipe).get(name, str)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if text == "null" and type(None) in options:
        return None
    if text == "[]" and any(typing.get_origin(option) is tuple for option in options):
        return []
    if not {bool, int, float} & set(options):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text

"""A LoRA adapter and its backbone -> merged weights on disk, one layer at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

INDEX_FILE = "model.safetensors.index.json"


def save_merged(model: Any, folder: Path, max_shard_size: str | int = "5GB") -> None:
    """Writes config.json and model*.safetensors of a PeftModel's backbone with its adapter merged in.

    The model itself stays as it is, bit for bit. Beside it, memory holds one shard, and a copy while it is written.
    Raises ValueError for a quantised backbone.
    """
    backbone: nn.Module = model.get_base_model()
    if getattr(backbone, "is_quantized", False):
        raise ValueError(
            "an adapter cannot be merged into a quantised backbone without loss: load the model with the backbone in "
            "bfloat16 or float32, or save without the backbone, which keeps the adapter"
        )
    adapted = _adapted(backbone)
    owners: dict[str, str] = {}  # weight -> adapted layer
    weights: dict[str, Tensor] = {}  # as they are before merging
    for layer, module in adapted.items():
        for name, tensor in _inner(module).state_dict().items():
            owners[f"{layer}.{name}"], weights[f"{layer}.{name}"] = layer, tensor
    inside = tuple(f"{layer}." for layer in adapted)
    weights |= {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith(inside)}
    config: Any = copy.deepcopy(backbone.config)
    config.architectures = [type(backbone).__name__]
    config.dtype = str(next(backbone.parameters()).dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    shards = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
    for file, names in shards.filename_to_tensors.items():
        tensors = _merged((name for name in names if name in owners), owners, adapted)
        tensors |= {name: weights[name].detach().cpu().contiguous() for name in names if name not in owners}
        save_file(tensors, folder / file, {"format": "pt"})
        del tensors  # before the next shard is made
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _adapted(backbone: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that hold adapter weights, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in backbone.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not name.startswith(
            tuple(f"{outer}." for outer in found)
        ):
            found[name] = module
    return found


def _inner(module: Any) -> Any:
    """The backbone's own layer inside an adapted one."""
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()


def _merged(names: Iterable[str], owners: dict[str, str], adapted: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Merged weights of those names; each layer is copied, merged and dropped before the next."""
    wanted: dict[str, list[str]] = {}
    for name in names:
        wanted.setdefault(owners[name], []).append(name)
    merged: dict[str, Tensor] = {}
    for layer, parts in wanted.items():
        duplicate: Any = copy.deepcopy(adapted[layer])
        if isinstance(duplicate, AuxiliaryTrainingWrapper):
            plain = duplicate.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            duplicate.merge(safe_merge=True)
            plain = duplicate.get_base_layer()
        state = plain.state_dict()
        merged |= {name: state[name.removeprefix(f"{layer}.")].detach().cpu().contiguous() for name in parts}
    return merged

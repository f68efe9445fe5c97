"""How far a backbone's tokens see each other, and by which code: chosen, set, and probed layer by layer.

In transformers >= 5.2 a decoder's mask becomes bidirectional through `config.is_causal = False`. Alone it is not
enough: some models then still leave batches without padding causal, and those with linear or chunked attention some
layers. Hence the flags of the attention modules are set too, and whether it worked is not believed but probed.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lens.quantized import exact_rows

# Legend: B texts, L tokens, D hidden size.

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")
_FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_FLASH_COMMANDS = {
    "flash_attention_2": "pip install kernels, or pip install flash-attn --no-build-isolation",
    "flash_attention_3": "pip install kernels",
}
_KERNEL = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:[\w.-]+)?")
_UNLIMITED = 1 << 30  # tokens: a window that reaches everything
_SHARE = 1e-4  # of what a change does to later tokens; a causal layer gives 0, one that sees both ways 0.01 to 1


def is_flash(name: str | None) -> bool:
    """Whether an attention implementation takes bfloat16 and float16 only, as flash attention and its kernels do."""
    return name is not None and (name in _FLASH_PACKAGES or "flash" in name)


def check_implementation(name: str | None, device: torch.device | None = None) -> None:
    """Checks, before any weight is read, that `name` (None: transformers' choice) can run on `device`.

    Raises ValueError for unknown names and for flash attention on the CPU, ImportError with the pip command for
    packages that are not installed.
    """
    if name is None:
        return
    field = f"attn_implementation={name!r}"
    kernel = _KERNEL.fullmatch(name) is not None
    if name not in IMPLEMENTATIONS and not kernel:
        near = difflib.get_close_matches(name, IMPLEMENTATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"{field} is unknown{hint} Accepted are {', '.join(IMPLEMENTATIONS)}, and kernels of the hub such as "
            "kernels-community/flash-attn2"
        )
    if is_flash(name) and device is not None and device.type == "cpu":
        raise ValueError(f"{field} needs a GPU, and the device is the CPU: use 'sdpa'")
    if kernel and not _installed("kernels"):
        raise ImportError(f"{field} needs the package kernels; run: pip install kernels")
    package = _FLASH_PACKAGES.get(name)
    if package is not None and not _installed(package) and not _installed("kernels"):
        raise ImportError(f"{field} needs a package that is not installed; run: {_FLASH_COMMANDS[name]}")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def lift_causality(config: Any) -> None:
    """Changes the configuration of a decoder, before it is loaded, so that every token sees every other.

    Sliding windows go. Where layers differ in their kind of attention the window only becomes endless: the kinds stay,
    because rotary embeddings go by them (Gemma 3, Cohere 2, EXAONE 4).
    """
    text = config.get_text_config()
    text.is_causal = False
    if getattr(text, "sliding_window", None) is not None:
        kinds = getattr(text, "layer_types", None) or ()
        text.sliding_window = _UNLIMITED if "sliding_attention" in kinds else None


def free_modules(backbone: nn.Module) -> None:
    """Sets the flag of every attention module: without padding there is no mask, and then some models go by it."""
    for module in backbone.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = False  # type: ignore[assignment]


def layer_lists(backbone: nn.Module) -> list[nn.ModuleList]:
    """The lists of modules that could be a backbone's list of layers: those with as many as it has layers."""
    count = getattr(backbone.config, "num_hidden_layers", None)
    return [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) == count]


@torch.no_grad()
def probe_attention(
    backbone: nn.Module, bidirectional: bool, run: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> None:
    """Probes every layer, on the device and in the dtype that it has: does a changed token change what earlier ones
    get, in a padded batch and in one without padding?

    `run` takes backbone, ids (B, L) and mask (B, L) to hidden states (B, L, D). Raises ValueError naming the layers
    that are not as `bidirectional` says, and for hidden states that are NaN or infinite.
    """
    weight = backbone.get_input_embeddings().weight  # type: ignore[operator]
    rows = weight.shape[0]
    ids = (torch.arange(24, device=weight.device).view(2, 12) * 7 + 5) % rows
    changed = ids.clone()
    changed[:, 4:8] = (ids[:, 4:8] + rows // 2) % rows
    whole = torch.ones_like(ids)
    padded = whole.clone()
    padded[1, 10:] = 0
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    name = type(backbone).__name__
    try:
        with ExitStack() as stack:
            stack.enter_context(exact_rows(backbone))
            if is_flash(getattr(backbone.config, "_attn_implementation", None)) and weight.dtype == torch.float32:
                stack.enter_context(torch.autocast(weight.device.type, torch.bfloat16))  # as training will run it
            found = [_sees_later(backbone, ids, changed, mask, run) for mask in (padded, whole)]
    finally:
        for module, training in modes.items():
            module.training = training
    if any(seen is None for seen in found):
        raise ValueError(
            f"{name} gives NaN or infinite hidden states in {weight.dtype}: its weights are damaged, or need bfloat16 "
            "or float32"
        )
    wrong = sorted({i for seen in found if seen for i, value in seen.items() if value != bidirectional})
    if wrong:
        listed = f"{', '.join(map(str, wrong[:8]))}{' ...' if wrong[8:] else ''}"
        raise ValueError(
            f"{name} is {'causal' if bidirectional else 'bidirectional'} although bidirectional={bidirectional} was "
            f"asked for{'' if wrong == [-1] else f' (layers {listed})'}; transformers >= 5.2 and an attention "
            "implementation that honours config.is_causal are needed (try attn_implementation='sdpa'), and layers of "
            "linear, recurrent or chunked attention stay causal"
        )


def _sees_later(
    backbone: nn.Module, ids: Tensor, changed: Tensor, mask: Tensor, run: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> dict[int, bool] | None:
    """For each layer, or -1 for the whole backbone where it has no one list of layers, whether positions before 4 get
    something else when positions 4 to 7 change; None when states are not finite. Layers that mix no tokens are out.

    In the second run each layer gets the first run's states but for the changed positions, so that what the layers
    below it passed on counts for nothing.
    """
    lists = layer_lists(backbone)
    layers = list(lists[0]) if len(lists) == 1 else []
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, list[Tensor]] = {i: [] for i in range(len(layers))}

    def before(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        if i not in inputs:
            inputs[i] = states
            return args, kwargs
        mixed = inputs[i].clone()
        mixed[:, 4:8] = states[:, 4:8]
        return ((mixed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": mixed})

    handles = []
    for i, layer in enumerate(layers):
        handles.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, i=i: before(i, args, kwargs), with_kwargs=True, prepend=True
            )
        )
        handles.append(
            layer.register_forward_hook(
                lambda module, args, output, i=i: outputs[i].append(output[0] if isinstance(output, tuple) else output)
            )
        )
    try:
        final = [run(backbone, tokens, mask) for tokens in (ids, changed)]
    finally:
        for handle in handles:
            handle.remove()
    if not all(bool(torch.isfinite(states[mask.bool()]).all()) for states in final):
        return None
    pairs = {i: states for i, states in outputs.items() if len(states) == 2} or {-1: final}
    seen = {}
    for i, (first, second) in pairs.items():
        change = (first.double() - second.double()).norm(dim=2)  # (B, L)
        early, late = float(change[:, :4].mean()), float(change[:, 8:][mask[:, 8:].bool()].mean())
        if early + late > 0:
            seen[i] = early > _SHARE * late
    return seen


def check_compiler(device: torch.device) -> None:
    """Raises ValueError when torch.compile has no compiler to work with on `device`."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    if device.type == "cpu" and not any(name and shutil.which(name) for name in names):
        raise ValueError("compile=True needs a C++ compiler, and none is there: install g++, or leave compile out")
    if device.type == "cuda" and not _installed("triton"):
        raise ValueError("compile=True needs triton, which is not installed: pip install triton, or leave compile out")


def compile_layers(backbone: nn.Module, device: torch.device) -> None:
    """Compiles each layer for inputs of any shape; weights, names and hooks stay as they are.

    Layers are alike, so that one compilation serves all. Raises ValueError where there is no compiler or no one list
    of layers.
    """
    check_compiler(device)
    bare: Any = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone  # type: ignore[operator]
    lists = layer_lists(bare)
    if len(lists) != 1:
        raise ValueError(
            f"compile=True needs a backbone with one list of layers; {type(bare).__name__} has {len(lists)}"
        )
    for layer in lists[0]:
        layer.compile(dynamic=True)

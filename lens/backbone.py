"""Tokens -> hidden states: a Hugging Face decoder or encoder, read straight into its dtype and onto its device,
quantised where asked, bidirectional and proven so (lens/attention.py)."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from lens.attention import check_implementation, free_modules, lift_causality, probe_attention
from lens.config import Architecture
from lens.quantized import Quantization, keep_differentiable, quantization_config

# Legend: B texts, L tokens, D hidden size, V vocabulary.


def check_base(base: str | os.PathLike[str]) -> str:
    """Returns a hub id as it is, a folder absolute; raises FileNotFoundError for a folder that is not there."""
    base = os.fspath(base)
    looks_local = base.startswith((".", "/", "~")) or base.count("/") > 1 or (os.sep != "/" and os.sep in base)
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no config.json: it is no Hugging Face model folder")
        return str(path.resolve())
    if looks_local or path.exists():
        raise FileNotFoundError(f"model folder {path} does not exist")
    return base


def architecture_of(config: Any) -> Architecture:
    """`decoder` for causal LMs, `encoder` for models with a masked-LM form (BERT has both and is an encoder)."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder model; LENS needs a decoder or an encoder")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    return "decoder" if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "encoder"


def load_tokenizer(folder: str, revision: str | None = None) -> Any:
    """The fast tokenizer of a folder or hub id; raises ValueError when there is only a slow one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    except Exception as error:  # the tokenizers library raises bare Exceptions for damaged files
        raise ValueError(f"{folder} has no usable tokenizer ({' '.join(str(error).split())[:200]})") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def load_config(base: str, revision: str | None = None) -> Any:
    """The transformers configuration of a backbone; raises FileNotFoundError naming what could not be found."""
    name = check_base(base)
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{name} is neither a usable model folder nor a model on the hub ({reason})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' load reports off the terminal: what matters in them is checked here."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_backbone(
    base: str,
    revision: str | None = None,
    bidirectional: bool = True,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    with_head: bool = False,
    device: torch.device | None = None,
    quantization: Quantization | None = None,
) -> tuple[nn.Module, nn.Module | None, list[str]]:
    """Loads the backbone; with `with_head` also the language model around it (else None) and its missing weights.

    Weights go one by one into `dtype` and onto `device` (None: the CPU), so that memory holds them once. `quantization`
    turns linear layers into 4 or 8 bits meanwhile. Of a model of several modalities the language model is taken.

    A decoder gets `is_causal = not bidirectional` and no sliding window, then every layer is probed: attention that is
    not what was asked for raises ValueError. Backbone weights that are absent, NaN or infinite raise ValueError by
    name; what is not installed ImportError with the pip command, before any weight is read.
    """
    base = check_base(base)
    check_implementation(attn_implementation, device)
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, "output_loading_info": True}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype)
        options["device_map"] = {"": device or torch.device("cpu")}
    elif device is not None and device.type != "cpu" and importlib.util.find_spec("accelerate") is not None:
        options["device_map"] = {"": device}
    config = load_config(base, revision)
    architecture = architecture_of(config)
    if architecture == "decoder":
        if bidirectional:
            lift_causality(config)
        else:
            config.get_text_config().is_causal = True
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    auto: Any = AutoModel
    if with_head:
        auto = AutoModelForMaskedLM if architecture == "encoder" else AutoModelForCausalLM
    loaded, report = read_weights(auto, base, {**options, "config": config})
    backbone: Any = loaded.base_model if with_head else loaded
    missing = sorted(report["missing_keys"])
    inner = {name for name, _ in backbone.named_parameters() if not name.startswith("pooler.")}
    prefix = f"{loaded.base_model_prefix}."
    absent = [name for name in missing if (name.removeprefix(prefix) if with_head else name) in inner]
    if absent:
        raise ValueError(f"{base} lacks weights of its {config.model_type} backbone: {', '.join(absent[:5])} ...")
    if config.get_text_config() is not config:
        backbone = _language_model(backbone, base)
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # unused parameters would stall data-parallel training
    if device is not None and quantization is None:
        backbone.to(device)
    if quantization is not None:
        keep_differentiable(backbone)
    check_finite(backbone, base)
    if architecture == "decoder" and bidirectional:
        free_modules(backbone)
    check_attention(backbone, bidirectional or architecture == "encoder")
    return backbone, (loaded if with_head else None), missing


def read_weights(auto: Any, base: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model and transformers' report on its weights; raises ValueError naming what is wrong with `base`."""
    attention = options.get("attn_implementation")
    with quiet():
        try:
            loaded, report = auto.from_pretrained(base, **options)
        except SafetensorError as error:
            raise ValueError(f"{base}: a weight file is not whole safetensors ({error}); download it again") from error
        except (RuntimeError, ImportError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            if attention is not None and re.search("attention|kernel", reason, re.IGNORECASE):
                raise ValueError(
                    f"{base}: attn_implementation={attention!r} cannot be used ({reason}); try None"
                ) from error
            if not isinstance(error, RuntimeError):
                raise
            raise ValueError(f"{base}: weights and config.json do not fit together ({reason})") from error
    return loaded, report


def _language_model(backbone: Any, base: str) -> nn.Module:
    """The language model of a model that also takes images or sound."""
    found: Any = backbone.get_decoder()
    if found is backbone or not hasattr(found.config, "hidden_size"):
        raise ValueError(f"{base} is a {backbone.config.model_type} model, in which no language model could be found")
    model: nn.Module = found
    return model


def check_finite(module: nn.Module, source: str) -> None:
    """Raises ValueError naming the first parameter with a NaN or infinite value and where it came from."""
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.numel() > 0:
            ends = torch.stack(torch.aminmax(parameter.detach()))  # NaN wins; needs no copy of the weights
            if not bool(torch.isfinite(ends).all()):
                raise ValueError(f"{source}: weight {name} holds NaN or infinite values; the file is damaged")


def check_attention(backbone: nn.Module, bidirectional: bool) -> None:
    """Probes whether later tokens change earlier ones in every layer; raises ValueError where that is not as
    `bidirectional` says."""
    probe_attention(backbone, bidirectional, hidden_states)


def hidden_states(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last hidden states (B, L, D) of ids (B, L) under mask (B, L); padding may be on either side."""
    if input_ids.numel() == 0:  # texts without any token
        weight, bare = next(backbone.parameters()), cast(Any, bare_model(backbone))
        return weight.new_zeros(*input_ids.shape, bare.config.hidden_size)
    options: dict[str, Any] = {}
    if _takes_positions(backbone):
        options["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in inspect.signature(bare_model(backbone).forward).parameters:
        options["use_cache"] = False
    output = backbone(input_ids=input_ids, attention_mask=attention_mask, **options)
    states: Tensor = output.last_hidden_state
    return states


def bare_model(backbone: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper."""
    base = getattr(backbone, "get_base_model", None)
    bare: nn.Module = base() if base is not None else backbone
    return bare


def _takes_positions(backbone: nn.Module) -> bool:
    bare = bare_model(backbone)
    if "position_ids" not in inspect.signature(bare.forward).parameters:
        return False
    # RoBERTa and its relatives count positions from padding_idx and derive them from the ids themselves.
    return not hasattr(getattr(bare, "embeddings", None), "padding_idx")


def position_limit(backbone: nn.Module) -> int | None:
    """Longest input in tokens of a backbone with learnt absolute positions; None where there is no such limit."""
    for name, module in bare_model(backbone).named_modules():
        if name.endswith(("position_embeddings", "embed_positions", "wpe")) and isinstance(module, nn.Embedding):
            # RoBERTa's first positions are taken by its padding index, OPT's by its offset.
            taken = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            return module.num_embeddings - int(taken)
    return None


def resize_vocabulary(backbone: nn.Module, size: int) -> None:
    """Grows the input embeddings to at least `size` rows; new rows start at the mean of the old ones."""
    embeddings: Any = backbone.get_input_embeddings()  # type: ignore[operator]
    rows = embeddings.weight.shape[0]
    if size > rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backbone.resize_token_embeddings(size, mean_resizing=False)  # type: ignore[operator]
        weight = backbone.get_input_embeddings().weight  # type: ignore[operator]
        with torch.no_grad():
            weight[rows:] = weight[:rows].float().mean(0).to(weight.dtype)

"""Checkpoints of the released LENS code -> LensModel.

Two layouts are read: the hub's (`yibinlei/LENS-d4000`, `-d8000`: merged weights, tokenizer, `lm_head.pth`) and that of
a training run (`embedding/input_emb.pth`, `embedding/lm_head.pth`, a PEFT adapter in `checkpoint-N/` or beside them).
`LENS.save` then converts either, once, into our artifact.

The `.pth` files are pickles. They are read with `weights_only=True` and an allow-list of nn.Linear and nn.Embedding, so
that no code of theirs runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lens.backbone import architecture_of, check_base, load_backbone, load_config, load_tokenizer, resize_vocabulary
from lens.config import LensConfig
from lens.files import read_json
from lens.head import LexicalHead
from lens.model import LensModel
from lens.quantized import Quantization
from lens.text import SPECIAL_TOKENS

# Legend: V vocabulary, D hidden size, K clusters.

ADAPTER_FILE = "adapter_model.safetensors"
LORA_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "fan_in_fan_out", "bias",
)  # fmt: skip
HUB_HEAD, RUN_HEAD, RUN_EMBEDDING = "lm_head.pth", "embedding/lm_head.pth", "embedding/input_emb.pth"


def is_released(folder: Path) -> bool:
    """Whether `folder` has one of the two released layouts."""
    return (folder / HUB_HEAD).is_file() or (folder / RUN_HEAD).is_file()


def load_released(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    attn_implementation: str | None = None,
    official: bool = False,
    device: torch.device | None = None,
    quantization: Quantization | None = None,
) -> tuple[LensModel, Any]:
    """A released checkpoint as a model in eval mode, and its tokenizer.

    A run's backbone is `base`, else the one that its adapter names. `official` keeps the released truncation, see
    `LensConfig.truncation`; `device` and `quantization` are those of `load_backbone`. Raises FileNotFoundError and
    ValueError naming the file.
    """
    run = (folder / RUN_HEAD).is_file()
    if run and quantization is not None:
        raise ValueError(
            f"quantization={quantization!r}: the adapter of {folder} is merged, which 4 or 8 bits cannot take. Convert "
            "it once with lens.load(FOLDER).save(NEW, include_backbone=True), then load NEW with quantization"
        )
    weight = read_pickled(folder / (RUN_HEAD if run else HUB_HEAD), nn.Linear)  # (K, D)
    tokenizer = _tokenizer(folder)
    unknown = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
    if unknown:
        raise ValueError(f"{folder}: the tokenizer lacks {', '.join(unknown)}, which released checkpoints have")
    if not run and base is not None:
        raise ValueError(f"{folder} holds its own merged weights, which base={base!r} would replace: leave base out")
    place = str(folder)
    if run:
        adapter, facts = _adapter(folder)
        embedding = read_pickled(folder / RUN_EMBEDDING, nn.Embedding)  # (V, D)
        place = base or str(facts.get("base_model_name_or_path"))
    try:
        place = check_base(place)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: {error}; pass base= with the backbone's place") from error
    if architecture_of(load_config(place)) != "decoder":
        raise ValueError(f"{place} is no decoder; released checkpoints stand on Mistral")
    backbone, _, _ = load_backbone(
        place, None, True, dtype, attn_implementation, device=device, quantization=quantization
    )
    if run:
        resize_vocabulary(backbone, len(tokenizer))
        _put_embedding(backbone, embedding, folder / RUN_EMBEDDING)
        backbone = _merge(backbone, adapter, facts)
    config = LensConfig(
        base=place,
        architecture="decoder",
        dimensions=weight.shape[0],
        hidden_size=weight.shape[1],
        truncation="tail" if official else "text",
    )
    rows = backbone.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    head = LexicalHead(config, torch.full((rows,), -1, dtype=torch.int32))
    head.load_state_dict({**head.state_dict(), "weight": weight})
    model = LensModel(backbone, head.to(device=device, dtype=dtype), config)
    model.backbone_is_own = True
    return model.eval(), tokenizer


def read_pickled(path: Path, kind: type[nn.Module]) -> Tensor:
    """The finite 2-D weight, float32, of the pickled nn.Linear or nn.Embedding in `path`; nothing of it is executed.

    Raises FileNotFoundError, or ValueError for any other content.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint is not whole")
    try:
        with torch.serialization.safe_globals([nn.Linear, nn.Embedding]):
            module: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything at all for damaged files
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged, or holds more than a pickled {kind.__name__} ({reason})") from error
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, kind) or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"{path} should hold a pickled {kind.__name__} with a 2-D weight, found {type(module).__name__}"
        )
    if getattr(module, "bias", None) is not None:
        raise ValueError(f"{path}: a released head has no bias, this one has")
    finite: Tensor = weight.detach().float().clone()
    if not bool(torch.isfinite(finite).all()):
        raise ValueError(f"{path}: the weight holds NaN or infinite values; the file is damaged")
    return finite


def _tokenizer(folder: Path) -> Any:
    """The tokenizer exactly as tokenizer.json says: AutoTokenizer builds its own from the vocabulary where a folder
    names LlamaTokenizer and has no config.json, and that one splits spaces and added tokens otherwise."""
    if not (folder / "tokenizer.json").is_file():
        return load_tokenizer(str(folder))
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # the tokenizers library raises bare Exceptions for damaged files
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}/tokenizer.json is damaged ({reason})") from error


def _adapter(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a run's adapter, the run itself or its newest checkpoint, and its adapter_config.json."""
    numbered = [
        path.parent
        for path in folder.glob("checkpoint-*/adapter_config.json")
        if path.parent.name.rpartition("-")[2].isdigit()
    ]
    if (folder / "adapter_config.json").is_file():
        found = folder
    elif numbered:
        found = max(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    else:
        raise FileNotFoundError(f"{folder} holds no adapter_config.json, nor does a checkpoint-N folder in it")
    facts = read_json(found / "adapter_config.json")
    if facts.get("peft_type") != "LORA":
        raise ValueError(f"{found}/adapter_config.json: peft_type should be LORA, found {facts.get('peft_type')!r}")
    if not (found / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"{found / ADAPTER_FILE} is missing: the checkpoint is not whole")
    return found, facts


def _put_embedding(backbone: nn.Module, weight: Tensor, path: Path) -> None:
    rows = backbone.get_input_embeddings().weight  # type: ignore[operator]
    if weight.shape != rows.shape:
        raise ValueError(
            f"{path}: expected {tuple(rows.shape)} to fit backbone and tokenizer, found {tuple(weight.shape)}"
        )
    with torch.no_grad():
        rows.copy_(weight)


def _merge(backbone: nn.Module, adapter: Path, facts: dict[str, Any]) -> nn.Module:
    """The backbone with a run's LoRA matrices merged in; the adapter was made around the causal LM, one level out."""
    file = adapter / ADAPTER_FILE
    peft: Any = get_peft_model(backbone, LoraConfig(**{name: facts[name] for name in LORA_FIELDS if name in facts}))
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not whole safetensors ({error}); copy it again") from error
    state = {
        name.replace("base_model.model.model.", "base_model.model.", 1): tensor
        for name, tensor in tensors.items()
        if ".lora_" in name
    }
    try:
        report = set_peft_model_state_dict(peft, state)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the backbone ({' '.join(str(error).split())[:200]})") from error
    lost = [name for name in report.missing_keys if ".lora_" in name]
    if lost or report.unexpected_keys:
        raise ValueError(
            f"{file} does not fit the backbone: lacks {lost[:3]}, has unknown {report.unexpected_keys[:3]}"
        )
    merged: nn.Module = peft.merge_and_unload()
    return merged

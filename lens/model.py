"""LensModel = backbone + head, and its artifact: the folder a model is saved to and loaded from.

`lens.json` holds the LensConfig, `head.safetensors` the centroids and labels, `adapter_model.safetensors` a LoRA
adapter with trained token rows, `model*.safetensors` a backbone of the model's own when it is merged or was
trained itself. Without the last two the backbone is read from `LensConfig.base`. `README.md` and `card.json` are the
model card; `modules.json` and `config_sentence_transformers.json` let sentence-transformers load the folder (see
lens/sentence.py). There are no pickles.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import lens
from lens import products
from lens.backbone import (
    architecture_of,
    check_base,
    hidden_states,
    load_backbone,
    load_config,
    load_tokenizer,
    position_limit,
    resize_vocabulary,
)
from lens.card import Facts, model_card, read_facts, write_card
from lens.config import FORMAT_VERSION, LensConfig, check_fields
from lens.explain import ClusterTokens
from lens.files import atomic_folder, read_json, read_tensors
from lens.head import LexicalHead, whitened
from lens.int8 import is_int8
from lens.merge import save_merged
from lens.packed import packed_states
from lens.quantized import Quantization, is_quantized
from lens.text import add_special_tokens, tagged_prompt
from lens.vocabulary import clustered_transform, read_vocabulary_head

# Legend: B texts, L tokens, T tokens and P pooled tokens of all texts, D hidden size, V vocabulary, K clusters.

CONFIG_FILE, HEAD_FILE, CLUSTERS_FILE = "lens.json", "head.safetensors", "clusters.safetensors"
MODULES_FILE, SENTENCE_FILE = "modules.json", "config_sentence_transformers.json"


class LensModel(nn.Module):
    """Tokens in, embeddings out. `backbone` is a transformers model or a PeftModel around one."""

    def __init__(self, backbone: nn.Module, head: LexicalHead, config: LensConfig) -> None:
        super().__init__()
        check_width(config.hidden_size, backbone, config.base)
        self.backbone = backbone
        self.head = head
        self.config = config
        self.backbone_is_own = False
        """True when the backbone differs from `config.base` and must be saved with the artifact."""
        self.facts = Facts()
        """What the model card tells of training and results."""

    def train(self, mode: bool = True) -> LensModel:
        """As nn.Module's, but a frozen backbone stays in eval mode: its dropout would be noise that nothing learns."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        pooled: Tensor | None = None,
        pool_offsets: Tensor | None = None,
        hidden: Tensor | None = None,
        bag_ids: Tensor | None = None,
        bag_offsets: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (B, K) float32 of ids (B, L) under attention_mask (B, L), or of texts one after another, ids (T,)
        with offsets `cu_seqlens` (B+1,) and `lengths` (B) on the host (see lens.packed).

        `pooled` (P,) holds the places of the pooled tokens among the B*L or T, `pool_offsets` (B+1,) the texts'
        offsets among them. Instead of ids, `hidden` (P, D) with `pool_offsets` takes the pooled tokens' states that a
        frozen backbone gave before. `bag_ids` (T,) with `bag_offsets` (B+1,) are queries as bags of tokens, for which
        the backbone does nothing. Raises ValueError where a part is missing.
        """
        if not torch.is_grad_enabled():
            products.speed_up(self)  # here, because layers may have come since the model was made: LoRA's
        if bag_ids is not None and bag_offsets is not None:
            return self.head.bag(bag_ids, bag_offsets)
        if hidden is None:
            hidden = self.pooled_states(input_ids, attention_mask, cu_seqlens, lengths, pooled)
        if pool_offsets is None:
            raise ValueError("pool_offsets is missing: the offsets of the texts among the pooled tokens")
        embeddings: Tensor = self.head(hidden.to(self.head.weight.dtype), cu_seqlens=pool_offsets)
        return embeddings

    def pooled_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """The backbone's states (P, D) of the pooled tokens; arguments and errors as for `forward`."""
        if input_ids is not None and pooled is not None and attention_mask is not None:
            states = hidden_states(self.backbone, input_ids, attention_mask).flatten(0, 1)
        elif input_ids is not None and pooled is not None and cu_seqlens is not None and lengths is not None:
            states = packed_states(self.backbone, input_ids, cu_seqlens, lengths)
        else:
            raise ValueError(
                "give hidden, or input_ids and pooled with attention_mask (padded) or with cu_seqlens and lengths "
                "(packed)"
            )
        return states if len(pooled) == len(states) else states.index_select(0, pooled)

    def save(
        self,
        path: str | os.PathLike[str],
        tokenizer: Any,
        include_backbone: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Writes the artifact to a temporary folder and renames it to `path`.

        `include_backbone` adds the backbone's weights (LoRA merged in), so that the folder needs nothing else. Raises
        FileExistsError unless `overwrite`, and ValueError when quantised weights would be written.
        """
        self._check_writable(include_backbone)
        kept = sorted(entry.name for entry in Path(path).glob("*") if entry.is_dir() or entry.name == "recipe.json")
        if overwrite and kept:
            raise FileExistsError(
                f"{path} holds more than a model ({', '.join(kept[:4])}), which overwriting would delete: choose "
                "another folder"
            )
        with atomic_folder(path, overwrite, CONFIG_FILE) as folder:
            self.write(folder, tokenizer, include_backbone)

    def write(
        self, folder: Path, tokenizer: Any, include_backbone: bool = False, repository: str | None = None
    ) -> None:
        """Writes the artifact's files into an existing folder, which the caller makes atomic.

        `repository` is the hub id that the model card names.
        """
        self._check_writable(include_backbone)
        content = {"format_version": FORMAT_VERSION, "lens_version": lens.__version__, **self.config.to_dict()}
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        tensors = {"labels": self.head.labels, **_to_file_names(self.head.state_dict())}
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / HEAD_FILE, {"format": "pt"})
        if include_backbone or self.backbone_is_own:
            if isinstance(self.backbone, PeftModel):
                save_merged(self.backbone, folder)
            else:
                self.backbone.save_pretrained(folder)  # type: ignore[operator]
        elif isinstance(self.backbone, PeftModel):
            self.backbone.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / HEAD_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)  # safetensors' own is for the owner alone
        tokenizer.save_pretrained(folder)
        for name, facts in sentence_files(self.config).items():
            (folder / name).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        tokens = ClusterTokens(self.head.labels.cpu().numpy(), self.config.dimensions, tokenizer)
        adapter = (folder / "adapter_config.json").is_file()
        write_card(folder, self.facts, model_card(self.config, self.facts, tokens, adapter, repository))

    def _check_writable(self, include_backbone: bool) -> None:
        if is_int8(self):
            raise ValueError("a model in int8 cannot be saved: load it without quantization and save that")
        if is_quantized(self.backbone) and (include_backbone or self.backbone_is_own):
            raise ValueError(
                "include_backbone contradicts quantization: merging into 4 or 8 bits would lose what was trained. Load "
                "the model without quantization and save that: the adapter then goes into the unquantised backbone"
                if include_backbone
                else "a quantised backbone cannot be saved: load the model without quantization and save that"
            )


def check_width(width: int, backbone: nn.Module, base: str) -> None:
    """Raises ValueError unless a head of this width fits the states of the backbone, which came from `base`."""
    wanted = int(backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]
    if width != wanted:
        raise ValueError(
            f"the head is {width} wide but the backbone {base} has hidden size {wanted}: take clusters that were made "
            "from this backbone"
        )


def sentence_files(config: LensConfig) -> dict[str, Any]:
    """The two JSON files by which sentence-transformers finds lens.sentence.LensModule, by file name."""
    return {
        MODULES_FILE: [{"idx": 0, "name": "0", "path": "", "type": "lens.sentence.LensModule"}],
        SENTENCE_FILE: {
            "model_type": "SentenceTransformer",
            "requirements": {
                "lens-embeddings": {"specifier": f">={lens.__version__}", "reason": "It holds the LENS head."}
            },
            "prompts": {"query": tagged_prompt(config.instruction), "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if config.normalize else "dot",
        },
    }


def _to_file_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {("centroids" if name == "weight" else name): tensor for name, tensor in state.items()}


def read_config(folder: Path) -> LensConfig:
    """The LensConfig of an artifact; raises ValueError when it was written by a newer format version."""
    values = read_json(folder / CONFIG_FILE)
    version = values.pop("format_version", None)
    writer = values.pop("lens_version", "unknown")
    if not isinstance(version, int):
        raise ValueError(f"{folder / CONFIG_FILE}: format_version should be a whole number, found {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG_FILE} has format version {version} (written by lens {writer}); this lens "
            f"{lens.__version__} reads up to {FORMAT_VERSION}: pip install --upgrade lens-embeddings"
        )
    try:
        return LensConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error


def load_model(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    device: torch.device | None = None,
    quantization: Quantization | None = None,
) -> tuple[LensModel, Any]:
    """Loads an artifact, a folder or a hub repository, and returns the model, in eval mode, and its tokenizer.

    `base` replaces the backbone's recorded place; for the other options see `load_backbone`. Raises FileNotFoundError
    and ValueError naming the file.
    """
    folder = fetch(path, revision)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: it is no LENS model folder")
    config = read_config(folder)
    own_backbone = (folder / "config.json").is_file()
    if not own_backbone and any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(f"{folder} holds a backbone's weights but no config.json: the copy is not whole")
    if base is not None:
        config = config.replace(base=base)
    elif not own_backbone:
        try:
            check_base(config.base)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder / CONFIG_FILE}: {error}; pass base= with its new place") from error
    head = read_head(folder / HEAD_FILE, config)
    tokenizer = load_tokenizer(str(folder))
    place = str(folder) if own_backbone else config.base
    revision = None if own_backbone else config.revision
    backbone, _, _ = load_backbone(
        place, revision, config.bidirectional, dtype, attn_implementation, device=device, quantization=quantization
    )
    resize_vocabulary(backbone, len(tokenizer))
    if (folder / "adapter_config.json").is_file():
        try:  # in the backbone's own dtype: in float32 the small matrices would cost more than the large ones
            backbone = PeftModel.from_pretrained(backbone, str(folder), autocast_adapter_dtype=False)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{folder}: adapter_config.json or adapter_model.safetensors is damaged, or made for another backbone "
                f"than {place} ({error})"
            ) from error
    model = LensModel(backbone, head, config)
    limit = position_limit(backbone)
    if limit is not None and config.longest > limit:
        raise ValueError(f"{folder / CONFIG_FILE}: lengths exceed the {limit} positions of the backbone {place}")
    rows = backbone.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if len(head.labels) > rows:
        raise ValueError(f"{folder / HEAD_FILE}: labels for {len(head.labels)} tokens, but the backbone knows {rows}")
    model.backbone_is_own = own_backbone
    model.facts = read_facts(folder)
    model.head.to(device=device, dtype=dtype)
    return model.eval(), tokenizer


def fetch(path: str | os.PathLike[str], revision: str | None = None, **options: Any) -> Path:
    """The folder of a model: `path` itself, or the hub repository of that name, downloaded.

    `options` go to huggingface_hub.snapshot_download.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "lm_head.pth"]  # the one pickle: see lens/compat.py
    name = check_base(path)
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"], **options))


def read_head(path: Path, config: LensConfig) -> LexicalHead:
    """Reads head.safetensors; raises ValueError naming tensor and shapes where it does not fit the configuration."""
    labels = read_tensors(path, {"labels": (None,)})["labels"]
    head = LexicalHead(config, labels)
    shapes = {name: tuple(tensor.shape) for name, tensor in _to_file_names(head.state_dict()).items()}
    tensors = read_tensors(path, shapes)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ValueError(f"{path}: tensor {name} holds NaN or infinite values; the file is damaged")
    check_labels(labels, config.dimensions, path)
    tensors["weight"] = tensors.pop("centroids")
    head.load_state_dict(tensors)
    return head


def check_labels(labels: Tensor, clusters: int, path: Path) -> None:
    """Raises ValueError unless labels are integers in -1 ... clusters-1."""
    if len(labels) == 0 or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{path}: labels must be int32, one for every token; found {len(labels)} of {labels.dtype}")
    if int(labels.min()) < -1 or int(labels.max()) >= clusters:
        raise ValueError(
            f"{path}: labels must be whole numbers from -1 to {clusters - 1}, found {labels.dtype} from "
            f"{labels.min().item()} to {labels.max().item()}"
        )


def build_model(
    base: str,
    clusters: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    whiten: bool = False,
    device: torch.device | None = None,
    quantization: Quantization | None = None,
    head_dtype: torch.dtype | None = None,
    **settings: Any,
) -> tuple[LensModel, Any]:
    """An untrained model: `base` with the centroids of a clusters folder, or with its full vocabulary head.

    `whiten` evens out the centroids, see `whitened`, for backbones that no LM head was trained on. `device` and
    `quantization` are those of `load_backbone`; `head_dtype` is the head's dtype where it is not `dtype`.

    With head="dense" (and pooling="last") there is no head, see LensConfig.

    `settings` are LensConfig fields; what is not given follows from the backbone: decoders take the lens prompt (the
    three special tokens are added) and shifted positions, encoders the plain prompt and content positions.

    With clusters, transform="mlm" takes the base's MLM head along, if it has one: see
    `lens.vocabulary.clustered_transform`.
    """
    base = check_base(base)
    revision = settings.get("revision")
    architecture = architecture_of(load_config(base, revision))
    defaults: dict[str, Any] = (
        {"positions": "shifted", "prompt": "lens"}
        if architecture == "decoder"
        else {"positions": "content", "prompt": "plain"}
    )
    known = [field.name for field in dataclasses.fields(LensConfig)]
    check_fields(settings, known, "model settings")
    derived = [name for name in ("architecture", "head", "dimensions", "hidden_size") if name in settings]
    dense = settings.get("head") == "dense"
    if dense and clusters is not None:
        raise ValueError(f"head='dense' contradicts clusters={os.fspath(clusters)!r}: leave the clusters out")
    if derived and not (dense and derived == ["head"]):
        raise ValueError(f"{', '.join(derived)} follow from backbone and clusters and cannot be set")
    facts = {**defaults, **settings, "base": base, "architecture": architecture}
    if clusters is not None:  # read before the backbone, so that a bad folder costs nothing
        facts["head"] = "clusters"
        centroids, labels = read_clusters(Path(clusters))
        facts["dimensions"], facts["hidden_size"] = centroids.shape
    elif dense:
        facts["head"] = "dense"
    elif whiten:
        raise ValueError("whiten=True contradicts the full vocabulary head: give clusters, or leave the head as it is")
    else:
        facts["head"] = "vocabulary"
    tokenizer = load_tokenizer(base, revision)
    with_transform = clusters is not None and architecture == "encoder" and facts.get("transform") == "mlm"
    mlm = architecture == "encoder" and ((clusters is None and not dense) or with_transform)
    if quantization is not None and mlm:
        also = "; transform='mlm' reads it where the base has one: take another transform" if with_transform else ""
        raise ValueError(f"quantization contradicts the MLM head of an encoder, which would be quantised too{also}")
    backbone, wrapper, missing = load_backbone(
        base,
        revision,
        facts.get("bidirectional", True),
        dtype,
        attn_implementation,
        with_head=mlm or (clusters is None and not dense),
        device=device,
        quantization=quantization,
    )
    if wrapper is not None and clusters is None:
        state, facts = read_vocabulary_head(wrapper, missing, facts)
        labels = torch.arange(facts["dimensions"], dtype=torch.int32)
    elif dense:
        width = int(backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]
        facts |= {"dimensions": width, "hidden_size": width}
        state, labels = {}, torch.full((backbone.get_input_embeddings().weight.shape[0],), -1, dtype=torch.int32)  # type: ignore[operator]
    else:
        check_width(centroids.shape[1], backbone, base)
        state = {"weight": centroids}
        if whiten:
            try:
                state["weight"] = whitened(centroids)
            except ValueError as error:
                raise ValueError(f"{clusters}: {error}; whiten: false takes them as they are") from error
        if wrapper is not None:
            found, facts = clustered_transform(wrapper, missing, facts, labels, state["weight"])
            state |= found
    backbone_vocabulary = backbone.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    limit = position_limit(backbone)
    bag = facts.get("query_encoder") == "bag"  # of which the backbone sees nothing
    for name in ("document_max_length",) if bag else ("query_max_length", "document_max_length"):
        if limit is not None and settings.get(name, 0) > limit:
            raise ValueError(f"{name}={settings[name]} is more than the {limit} positions that {base} was trained with")
        if limit is not None:
            facts.setdefault(name, min(512, limit))
    if facts["prompt"] == "lens":
        add_special_tokens(tokenizer)
        resize_vocabulary(backbone, len(tokenizer))
    config = LensConfig.from_dict(facts)
    head = LexicalHead(config, labels)
    head.load_state_dict({**head.state_dict(), **state})
    vocabulary = len(labels) if clusters is None else backbone_vocabulary
    model = LensModel(backbone, head.to(device=device, dtype=head_dtype or dtype), config)
    if len(labels) != vocabulary:
        raise ValueError(
            f"{clusters}: labels for {len(labels)} tokens, but the backbone {base} knows {vocabulary}: "
            "take clusters that were made from this backbone"
        )
    return model.eval(), tokenizer


def read_clusters(folder: Path) -> tuple[Tensor, Tensor]:
    """Centroids (K, D) and labels (V,) of a clusters folder as clustering/run.py writes it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"clusters folder {folder} does not exist: make it with clustering/run.py")
    path = folder / CLUSTERS_FILE
    tensors = read_tensors(path, {"centroids": (None, None), "labels": (None,)})
    centroids, labels = tensors["centroids"].float(), tensors["labels"]
    if not bool(torch.isfinite(centroids).all()):
        raise ValueError(f"{path}: tensor centroids holds NaN or infinite values; cluster again")
    check_labels(labels, len(centroids), path)
    return centroids, labels

"""A LENS model as a module of sentence-transformers, for `SentenceTransformer` and `SparseEncoder`.

Every artifact names this class in its `modules.json`, so both load the folder that `lens.load` loads and give the same
vectors. Its prompts are those of LENS, `<query>` and `<instruct>{instruction}\\n<query>`, for models with the plain
prompt too; they are read here, not glued to the text, so that pooling starts where it should.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lens.backbone import hidden_states, position_limit
from lens.card import model_card
from lens.devices import resolve_device, resolve_dtype
from lens.explain import ClusterTokens
from lens.files import read_json, require, write_json
from lens.model import SENTENCE_FILE, LensModel, fetch, load_model
from lens.packed import choose_packed, packed_states
from lens.text import Kind, TextProcessor, Tokens, check_texts, tagged_prompt
from lens.vectors import prune

require("sentence-transformers", "sentence_transformers")

from sentence_transformers import SparseEncoder  # noqa: E402
from sentence_transformers.base.modules import InputModule  # noqa: E402
from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder  # noqa: E402

# Legend: B texts, L tokens, K clusters.

MODEL_OPTIONS = ("dtype", "torch_dtype", "attn_implementation", "base")
HUB_OPTIONS = ("token", "trust_remote_code", "revision", "local_files_only")  # SparseEncoder adds them to all options
NAME_TOKENS = 5
_PLACEHOLDER = 4  # see on_model_ready


class LensModule(InputModule):  # type: ignore[misc]
    """The only module of a SentenceTransformer or SparseEncoder: texts to embeddings (B, K)."""

    save_in_root = True
    forward_kwargs = {"max_active_dims"}  # noqa: RUF012 (sentence-transformers declares it so)

    def __init__(self, model: LensModel, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.text = TextProcessor(tokenizer, model.config)
        self.ready = False

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **_: Any,
    ) -> LensModule:
        """Loads an artifact, a folder or a hub repository, in the dtype that `lens.load` takes.

        `model_kwargs` may hold `dtype`, `attn_implementation` and `base`, the backbone's place where it has moved.
        Raises ValueError for other options, and what `lens.load` raises.
        """
        if backend != "torch":
            raise ValueError(f"backend must be 'torch' for a LENS model, found {backend!r}")
        for name, options in (("processor_kwargs", processor_kwargs), ("config_kwargs", config_kwargs)):
            if unknown := [key for key in options or {} if key not in HUB_OPTIONS]:
                raise ValueError(f"{name}: a LENS model takes no {', '.join(unknown)}: lens.json decides")
        options = {key: value for key, value in (model_kwargs or {}).items() if key not in HUB_OPTIONS}
        if unknown := [key for key in options if key not in MODEL_OPTIONS]:
            raise ValueError(f"model_kwargs: a LENS model takes no {', '.join(unknown)}, only {MODEL_OPTIONS}")
        dtype = options.get("dtype", options.get("torch_dtype"))
        folder = fetch(
            model_name_or_path, revision, token=token, cache_dir=cache_folder, local_files_only=local_files_only
        )
        model, tokenizer = load_model(
            folder,
            resolve_dtype(None if dtype == "auto" else dtype, resolve_device()),
            options.get("base"),
            attn_implementation=options.get("attn_implementation"),
        )
        return cls(model, tokenizer)

    def on_model_ready(self, model: Any) -> None:
        """Makes the finished model whole: prompts, card, and for a SparseEncoder no autoencoder but readable clusters.

        SparseEncoder appends a freshly initialised autoencoder to what a SentenceTransformer saved. It is taken off
        here; until then `get_embedding_dimension` gives a placeholder, so that it stays tiny.
        """
        if len(model) == 2 and isinstance(model[1], SparseAutoEncoder) and model[1].input_dim == _PLACEHOLDER:
            model._modules = {"0": self}  # a new dict, for the caller walks over the old one
        self.ready = True
        config = self.model.config
        model.prompts["query"] = model.prompts.get("query") or tagged_prompt(config.instruction)
        if isinstance(model, SparseEncoder):
            model.decode = functools.partial(_decode, self)
        if model._model_card_text is None:
            model._model_card_text = model_card(config, self.model.facts, self.clusters())

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the three added tokens where the model's prompt needs them."""
        return self.text.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.text = TextProcessor(tokenizer, self.model.config)

    @property
    def max_seq_length(self) -> int:
        """Longest text in tokens, the greater of the limits of queries and documents; setting it sets both."""
        return max(self.model.config.query_max_length, self.model.config.document_max_length)

    @max_seq_length.setter
    def max_seq_length(self, length: int) -> None:
        limit = position_limit(self.model.backbone)
        if limit is not None and isinstance(length, int) and length > limit:
            raise ValueError(f"max_seq_length={length} is more than the {limit} positions of the backbone")
        self.model.config = self.model.config.replace(query_max_length=length, document_max_length=length)
        self.text = TextProcessor(self.tokenizer, self.model.config)

    def get_embedding_dimension(self) -> int:
        """K."""
        return self.model.config.dimensions if self.ready else _PLACEHOLDER

    def get_config_dict(self) -> dict[str, Any]:
        """The fields of LensConfig."""
        return self.model.config.to_dict()

    def clusters(self) -> ClusterTokens:
        """The readable tokens of each dimension."""
        return ClusterTokens(self.model.head.labels.cpu().numpy(), self.model.config.dimensions, self.tokenizer)

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """Texts to `input_ids`, `attention_mask` and `pool_mask` (B, L), and where queries are bags of tokens to `bag`
        (B,), true for these.

        A text is a query when `task` says so or, without a task, when it has a prompt; else a document. `prompt` is
        `<query>`, `<instruct>{instruction}\\n<query>`, or an instruction alone. Without task and prompt, a text may
        begin with either tag itself, as where a framework glues prefix and text. Raises TypeError and ValueError
        naming the text, the prompt or the task.
        """
        texts = check_texts(inputs)
        if task not in (None, "query", "document"):
            raise ValueError(f"task must be 'query' or 'document', found {task!r}")
        kind: Kind = "query" if task == "query" or (task is None and prompt) else "document"
        if task is None and not prompt and self.model.config.prompt == "lens":
            asked = [_split(text) for text in texts]
        else:
            asked = [(kind, read_prompt(prompt), text) for text in texts]
        groups: dict[tuple[Kind, str | None], list[int]] = {}
        for index, (kind, instruction, _text) in enumerate(asked):
            groups.setdefault((kind, instruction), []).append(index)
        tokens: dict[int, Tokens] = {}
        for (kind, instruction), rows in groups.items():
            found = self.text([asked[row][2] for row in rows], kind, instruction)
            tokens |= dict(zip(rows, found, strict=True))
        batch = self.text.collate([tokens[row] for row in range(len(texts))])
        mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)  # whose rows losses with gradient caching may cut
        mask.view(-1)[batch.pooled] = True
        features = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "pool_mask": mask}
        if self.model.config.query_encoder == "bag":
            features["bag"] = torch.tensor([kind == "query" for kind, _, _ in asked])
        return features

    def forward(self, features: dict[str, Any], max_active_dims: int | None = None) -> dict[str, Any]:
        """Adds `sentence_embedding` (B, K) float32; `max_active_dims` keeps the largest values as `top_k` of LENS does.

        Texts go through the backbone without their padding where it can take them so and it pays, see lens.packed.
        Raises FloatingPointError in eval mode when values are not finite.
        """
        bags = features.get("bag")
        if bags is None:
            embeddings = self._embed(features)
        else:
            ids, mask = features["input_ids"][bags], features["attention_mask"][bags].bool()
            queries = self.model.head.bag(ids[mask], F.pad(mask.sum(1).cumsum(0), (1, 0)))
            rest = {name: features[name][~bags] for name in ("input_ids", "attention_mask", "pool_mask")}
            parts = [queries] if bool(bags.all()) else [queries, self._embed(rest)]
            embeddings = torch.cat(parts)[(~bags).long().argsort(stable=True).argsort()]
        if not self.training and not bool(torch.isfinite(embeddings).all()):
            raise FloatingPointError(
                "embeddings hold NaN or infinite values: load with model_kwargs={'dtype': 'bfloat16'} or 'float32'"
            )
        if max_active_dims is not None:
            embeddings = prune(embeddings, None, max_active_dims, self.model.config.normalize)
        return {**features, "sentence_embedding": embeddings}

    def _embed(self, features: dict[str, Any]) -> Tensor:
        """Embeddings (B, K) of texts that go through the backbone."""
        ids, mask, pool_mask = features["input_ids"], features["attention_mask"].bool(), features["pool_mask"]
        head, lengths = self.model.head, mask.sum(1)
        half = head.weight.dtype in (torch.bfloat16, torch.float16)
        if choose_packed(self.model.backbone, ids.shape[1], None, half):
            offsets = F.pad(lengths.cumsum(0), (1, 0))
            hidden = packed_states(self.model.backbone, ids[mask], offsets, lengths.tolist())[pool_mask[mask]]
            where = {"cu_seqlens": F.pad(pool_mask.sum(1).cumsum(0), (1, 0))}
        else:
            hidden = hidden_states(self.model.backbone, ids, features["attention_mask"])
            where = {"mask": pool_mask}
        embeddings: Tensor = head(hidden.to(head.weight.dtype), **where)
        return embeddings

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Writes the whole artifact; sentence-transformers calls it, after it wrote its own configuration.

        Raises ValueError for `safe_serialization=False`.
        """
        if not safe_serialization:
            raise ValueError("LENS models are saved as safetensors only: leave safe_serialization at True")
        folder = Path(output_path)
        path = folder / SENTENCE_FILE
        settings = read_json(path) if path.is_file() else {}
        self.model.write(folder, self.tokenizer)
        # What a SparseEncoder saves is loaded by a SentenceTransformer only if it bears that name.
        write_json(path, {**read_json(path), **settings, "model_type": "SentenceTransformer"})


def read_prompt(prompt: str | None) -> str | None:
    """The instruction in a prompt of LENS: None without a prompt, "" for `<query>`; other prompts are instructions.

    Raises ValueError for `<instruct>` without `\\n<query>` at the end.
    """
    if not prompt:
        return None if prompt is None else ""
    if prompt == tagged_prompt(None):
        return ""
    if prompt.startswith("<instruct>"):
        instruction = prompt.removeprefix("<instruct>").removesuffix("\n<query>")
        if tagged_prompt(instruction) != prompt:
            raise ValueError(f"prompt should be '<instruct>...\\n<query>' or '<query>', found {prompt[:80]!r}")
        return instruction
    return prompt.removesuffix(" ")


def _split(text: str) -> tuple[Kind, str | None, str]:
    """Kind, instruction and rest of a text that may begin with a prompt."""
    before, query, after = text.partition("<query>")
    if query and (not before or (before.startswith("<instruct>") and before.endswith("\n"))):
        return "query", read_prompt(before + query), after
    return "document", None, text


class _ClusterNames:
    """Stands for a tokenizer where SparseEncoder.decode asks for the names of dimensions."""

    def __init__(self, clusters: ClusterTokens) -> None:
        self.clusters = clusters

    def convert_ids_to_tokens(self, dimensions: Sequence[int]) -> list[str]:
        return [", ".join(self.clusters(d)[:NAME_TOKENS]) or f"cluster {d}" for d in dimensions]


def _decode(module: LensModule, embeddings: Tensor, top_k: int | None = None) -> Any:
    """SparseEncoder.decode, with each dimension named by tokens of its cluster."""
    names = types.SimpleNamespace(tokenizer=_ClusterNames(module.clusters()))
    return SparseEncoder.decode(names, embeddings, top_k)

"""LENS: texts in, embeddings out. Batching, devices, progress, output formats, explanations."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lens import int8, pipeline
from lens.attention import compile_layers, is_flash
from lens.backbone import resolve_device
from lens.compat import is_released, load_released
from lens.explain import ClusterTokens, Explanation, explain, terms
from lens.model import LensModel, build_model, fetch, load_model
from lens.packed import choose_packed
from lens.quantized import Quantization
from lens.text import Kind, TextProcessor, check_texts
from lens.vectors import Array, check_dims, check_top_k, prune, to_csr, to_dense

# Legend: N texts, K clusters.

Output = Literal["numpy", "torch", "csr"]
Compat = Literal["official"]
Embeddings = Array | Tensor | scipy.sparse.csr_matrix

_BATCH_TOKENS = {"cuda": 1 << 15, "mps": 1 << 13, "cpu": 1 << 11}
_PROGRESS_BATCHES = 8


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, attention: str | None = None) -> torch.dtype:
    """The dtype asked for, or bfloat16 on GPUs that have it and float32 elsewhere; raises ValueError for others, and
    for float32 with flash attention."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16; found {dtype!r}")
    if found == torch.float32 and is_flash(attention):
        raise ValueError(f"dtype=float32 contradicts attn_implementation={attention!r}: take bfloat16 or float16")
    return found


class LENS:
    """A model with its tokenizer on a device.

    Get one from `lens.load` or `LENS.build`. `config` holds its facts, `model` the torch module.
    """

    def __init__(
        self,
        model: LensModel,
        tokenizer: Any,
        device: str | torch.device | None = None,
        compile: bool = False,
        packed: bool | None = None,
    ) -> None:
        self.packed = packed
        self.device = resolve_device(device)
        self.model = model.to(self.device).eval()
        if compile:
            compile_layers(model.backbone, self.device)
        self.tokenizer = tokenizer
        self.text = TextProcessor(tokenizer, model.config)
        self.config = model.config
        self.tokens = ClusterTokens(model.head.labels.cpu().numpy(), model.config.dimensions, tokenizer)

    @classmethod
    def build(
        cls,
        backbone: str | os.PathLike[str],
        clusters: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        whiten: bool = False,
        quantization: Quantization | None = None,
        compile: bool = False,
        packed: bool | None = None,
        **config: Any,
    ) -> LENS:
        """An untrained model from a backbone (folder or hub id) and a clusters folder (None: full vocabulary head).

        `whiten` evens out the centroids, see `lens.head.whitened`, for sentence encoders; for the further options see
        `lens.load`; `config` takes fields of LensConfig. Raises FileNotFoundError, or ValueError naming the field or
        the file.
        """
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where, attn_implementation)
        model, tokenizer = build_model(
            os.fspath(backbone), clusters, kind, attn_implementation, whiten, where, quantization, **config
        )
        return cls(model, tokenizer, where, compile, packed)

    def save(self, path: str | os.PathLike[str], include_backbone: bool = False, overwrite: bool = False) -> None:
        """Writes the artifact (see lens.model), atomically; sentence-transformers loads it too.

        A LoRA adapter is kept as it is; with `include_backbone` it is merged into the backbone's weights, which are
        then saved, so that the folder needs nothing else. Raises FileExistsError unless `overwrite`.
        """
        self.model.save(path, self.tokenizer, include_backbone, overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        include_backbone: bool = False,
        token: str | None = None,
    ) -> str:
        """Uploads the artifact to the hub, without paths of this machine, and returns the repository's URL.

        The options and what is raised are those of `lens.export.push`.
        """
        from lens.export import push

        return push(self.model, self.tokenizer, repo_id, private, commit_message, revision, include_backbone, token)

    def encode_queries(self, texts: Sequence[str], instruction: str | None = None, **options: Any) -> Any:
        """`encode` with kind="query"."""
        return self.encode(texts, "query", instruction, **options)

    def encode_documents(self, texts: Sequence[str], **options: Any) -> Any:
        """`encode` with kind="document"."""
        return self.encode(texts, "document", **options)

    @torch.inference_mode()
    def encode(
        self,
        texts: Sequence[str],
        kind: Kind = "document",
        instruction: str | None = None,
        output: Output = "numpy",
        top_k: int | None = None,
        dims: Sequence[int] | None = None,
        batch_tokens: int | None = None,
        show_progress: bool | None = None,
    ) -> Any:
        """Embeds N texts: (N, K) float32 as numpy array, torch tensor on the CPU, or scipy CSR matrix.

        `kind` chooses prompt and maximum length; `instruction` is attended to, not pooled. `dims` keeps those
        columns, `top_k` the largest values of each row; normalised models are normalised again after either.
        `batch_tokens` bounds the tokens of one batch, padding included where there is any. A text without tokens gives
        a zero row.
        Raises TypeError or ValueError naming the offending text or option.
        """
        texts = check_texts(texts)
        if kind not in ("query", "document"):
            raise ValueError(f"kind must be 'query' or 'document'; found {kind!r}")
        if output not in ("numpy", "torch", "csr"):
            raise ValueError(f"output must be 'numpy', 'torch' or 'csr'; found {output!r}")
        if instruction is not None and not isinstance(instruction, str):
            raise TypeError(f"instruction must be a str or None, found {type(instruction).__name__}")
        if instruction is not None:
            check_texts([instruction])
        if top_k is not None:
            check_top_k(top_k)
        columns = None if dims is None else check_dims(dims, self.config.dimensions)
        budget = _BATCH_TOKENS.get(self.device.type, 1 << 12) if batch_tokens is None else batch_tokens
        if budget < 1:
            raise ValueError(f"batch_tokens must be at least 1 token, found {batch_tokens}")
        width = self.config.dimensions if columns is None else len(columns)
        packed = self._packs()
        blocks = pipeline.plan(self.text, texts, kind, instruction, budget, packed)
        first = next(blocks, [])
        if show_progress is None:
            show_progress = len(texts) > pipeline.BLOCK or len(first) >= _PROGRESS_BATCHES
        batches = pipeline.prepare(self.text, chain(first, chain.from_iterable(blocks)), packed, self.device)
        kept = None if columns is None else torch.tensor(columns, device=self.device)
        shrink = functools.partial(prune, dims=kept, top_k=top_k, normalize=self.config.normalize)
        results = pipeline.compute(self.model, batches, shrink, self.device, self.model.head.weight.dtype)
        parts: list[Any] = []
        order: list[int] = []
        dense = None if output == "csr" else torch.zeros(len(texts), width)
        bar = tqdm(total=len(texts), desc="encode", unit="text", disable=not show_progress, leave=False)
        with bar, closing(blocks), closing(results):  # so that threads that work ahead end with an error, too
            for rows, embeddings in results:
                if dense is None:
                    parts.append(to_csr(embeddings))
                    order += rows
                else:
                    dense[rows] = embeddings
                bar.update(len(rows))
        if dense is not None:
            return dense.numpy() if output == "numpy" else dense
        if not parts:
            return scipy.sparse.csr_matrix((0, width), dtype=np.float32)
        restored = np.empty(len(texts), dtype=np.int64)
        restored[order] = np.arange(len(texts))
        return scipy.sparse.vstack(parts, format="csr")[restored]

    def _packs(self) -> bool:
        """Whether texts go through the backbone without padding."""
        longest = max(self.config.query_max_length, self.config.document_max_length)
        half = self.model.head.weight.dtype in (torch.bfloat16, torch.float16)
        return choose_packed(self.model.backbone, longest, self.packed, half)

    def similarity(self, queries: Any, documents: Any) -> NDArray[np.float32]:
        """Inner products (Q, N) of embeddings (Q, K) and (N, K) in any of the output formats."""
        if scipy.sparse.issparse(queries) or scipy.sparse.issparse(documents):
            return np.asarray((to_csr(queries) @ to_csr(documents).T).toarray(), dtype=np.float32)
        return np.asarray(to_dense(queries) @ to_dense(documents).T, dtype=np.float32)

    def terms(self, embedding: Any, k: int = 10) -> list[tuple[int, list[str], float]]:
        """The k heaviest clusters of one embedding (K,) or of one text, as (cluster, tokens, weight).

        Raises ValueError for a dense model, which has none.
        """
        self._check_lexical()
        if isinstance(embedding, str):
            seen = self.token_ids(embedding)
            return terms(self._vector(embedding, "document", None), self.tokens, k, seen)
        return terms(self._vector(embedding, "document", None), self.tokens, k)

    def explain(self, query: Any, document: Any, k: int | None = 10, instruction: str | None = None) -> Explanation:
        """Which clusters matched between a query and a document (texts, or embeddings (K,)) and each one's share.

        Raises ValueError for a dense model, which has none.
        """
        self._check_lexical()
        vectors = self._vector(query, "query", instruction), self._vector(document, "document", None)
        return explain(*vectors, self.tokens, k, self.token_ids(query, document))

    def _check_lexical(self) -> None:
        if self.config.head == "dense":
            raise ValueError("a model with head='dense' has no clusters: its dimensions cannot be read")

    def token_ids(self, *texts: Any) -> frozenset[int]:
        """Ids of all tokens in those of `texts` that are strings; explanations name these tokens first."""
        words = [text for text in texts if isinstance(text, str)]
        return frozenset(token for item in self.text(words) for token in item.ids)

    def _vector(self, value: Any, kind: Kind, instruction: str | None) -> Array:
        if isinstance(value, str):
            value = self.encode([value], kind, instruction)
        vector = to_dense(value).reshape(-1)
        if len(vector) != self.config.dimensions:
            raise ValueError(f"expected one embedding of {self.config.dimensions} values, found {len(vector)}")
        return vector


def load(
    path_or_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    base: str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    compat: Compat | None = None,
    quantization: Quantization | Literal["int8"] | None = None,
    compile: bool = False,
    packed: bool | None = None,
) -> LENS:
    """Loads a model from a folder or a hub id, on cuda, mps or cpu (the first there is), in eval mode.

    `dtype` is bfloat16 on GPUs that have it and float32 elsewhere; `base` is the backbone's place where it has moved.
    `attn_implementation` is sdpa, eager, flex_attention, flash_attention_2, flash_attention_3 or a kernel of the hub
    (org/name); None leaves the choice to transformers. `quantization` ("4bit", "8bit") quantises the backbone while it
    is read, with bitsandbytes; "int8" multiplies in 8 bits, which on a CPU is faster (see lens/int8.py). `compile`
    compiles the backbone's layers, at the first texts, which pays on GPUs for many texts.
    `packed` lays texts one after another without padding: False never, True or an error, None where the backbone can
    and it pays.
    Checkpoints of the released LENS code are read too; `compat="official"` then embeds as that code does (see
    docs/compat.md). Raises FileNotFoundError, or ValueError naming the file, what was expected and what was found.
    """
    where = resolve_device(device)
    if compat not in (None, "official"):
        raise ValueError(f"compat must be 'official' or None; found {compat!r}")
    kind = resolve_dtype(dtype, where, attn_implementation)
    if quantization == "int8" and (where.type != "cpu" or kind != torch.float32):
        raise ValueError(
            f"quantization='int8' is for a CPU in float32, and this is {where.type} in {kind}: leave dtype out with "
            "device='cpu', or use '8bit' to save memory on a GPU"
        )
    read = None if quantization == "int8" else quantization
    folder = fetch(path_or_id, revision)
    if is_released(folder):
        official = compat == "official"
        model, tokenizer = load_released(folder, kind, base, attn_implementation, official, where, read)
    elif compat is not None:
        raise ValueError(f"compat={compat!r} is for checkpoints of the released LENS code, and {folder} is none")
    else:
        model, tokenizer = load_model(folder, kind, base, None, attn_implementation, where, read)
    if quantization == "int8":
        int8.quantize(model)
    return LENS(model, tokenizer, where, compile, packed)


def encode(
    texts: Sequence[str],
    model: str | os.PathLike[str] | LENS | None = None,
    compat: Compat | None = None,
    **options: Any,
) -> Any:
    """Embeds texts with a model given by folder, hub id or LENS (default: the environment's LENS_MODEL).

    Models are loaded once and kept. `compat` is that of `lens.load`, `options` are those of `LENS.encode`.
    """
    model = model if model is not None else os.environ.get("LENS_MODEL")
    if model is None:
        raise ValueError("no model: pass model= a folder or hub id, or set the environment variable LENS_MODEL")
    if isinstance(model, LENS):
        if compat is not None:
            raise ValueError(f"compat={compat!r} is decided when a model is loaded: pass it to lens.load")
        return model.encode(texts, **options)
    return _cached(os.fspath(model), compat).encode(texts, **options)


@functools.lru_cache(maxsize=2)
def _cached_load(path: str, stamp: int, compat: Compat | None) -> LENS:
    return load(path, compat=compat)


def _cached(path: str, compat: Compat | None) -> LENS:
    file = Path(path) / "lens.json"
    return _cached_load(path, file.stat().st_mtime_ns if file.is_file() else 0, compat)

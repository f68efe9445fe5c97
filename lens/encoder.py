"""LENS: texts in, embeddings out. Batching, devices, progress, output formats, explanations."""

from __future__ import annotations

import functools
import os
from collections.abc import Generator, Sequence
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

from lens import bag, int8, pipeline
from lens.attention import compile_layers
from lens.compat import is_released, load_released
from lens.devices import Device, Devices, resolve_device, resolve_devices, resolve_dtype
from lens.explain import ClusterTokens, Explanation, explain, terms
from lens.layout import is_splade
from lens.model import LensModel, build_model, fetch, load_model
from lens.packed import choose_packed
from lens.quantized import Quantization
from lens.splade import SpladePooling, load_splade
from lens.text import Kind, TextProcessor, check_texts
from lens.vectors import Array, check_count, check_dims, prune, to_csr, to_dense
from lens.workers import Pool, split

# Legend: N texts, K clusters.

Output = Literal["numpy", "torch", "csr"]
Compat = Literal["official"]
Embeddings = Array | Tensor | scipy.sparse.csr_matrix

_BATCH_TOKENS = {"cuda": 1 << 15, "mps": 1 << 13, "cpu": 1 << 11}
_PROGRESS_STEPS = 8


def _budget(device: torch.device, batch_tokens: int | None) -> int:
    return batch_tokens or _BATCH_TOKENS.get(device.type, 1 << 12)


class LENS:
    """A model with its tokenizer on a device.

    Get one from `lens.load` or `LENS.build`. `config` holds its facts, `model` the torch module.
    """

    def __init__(
        self,
        model: LensModel,
        tokenizer: Any,
        device: Devices = None,
        compile: bool = False,
        packed: bool | None = None,
    ) -> None:
        """A list of devices starts a process for each, which then encode; the model here stays on the CPU."""
        several = None if device is None or isinstance(device, Device) else list(device)
        if packed not in (True, False, None):
            raise ValueError(f"packed must be True, False or None; found {packed!r}")
        self.packed, self.compiled = packed, compile
        self.device = resolve_device(device if several is None else "cpu")  # type: ignore[arg-type]
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer
        self.text = TextProcessor(tokenizer, model.config)
        self.config = model.config
        self.tokens = ClusterTokens(model.head.labels.cpu().numpy(), model.config.dimensions, tokenizer)
        self.pool: Pool | None = None
        if several is not None:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # it may have been read onto the first device
            self.pool = self.start_multi_process_pool(several)
        elif packed or compile:
            self._packs()  # says at once where texts cannot be packed, and probes layers that are not compiled yet
        if compile and several is None:
            compile_layers(model.backbone, self.device)

    @classmethod
    def build(
        cls,
        backbone: str | os.PathLike[str],
        clusters: str | os.PathLike[str] | None = None,
        device: Devices = None,
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
        where = resolve_devices(device, quantization)[0]
        kind = resolve_dtype(dtype, where, attn_implementation)
        model, tokenizer = build_model(
            os.fspath(backbone), clusters, kind, attn_implementation, whiten, where, quantization, **config
        )
        return cls(model, tokenizer, device, compile, packed)

    def start_multi_process_pool(self, devices: Sequence[Device] | None = None) -> Pool:
        """Starts a process for each device, such as ["cuda:0", "cuda:1"] or ["cpu", "cpu"] (None: every GPU), with this
        model as it now is, for `encode(..., pool=pool)`.

        The pool is a context manager; `close` ends its processes. A program that starts processes needs
        `if __name__ == "__main__":` around what it does. Raises what lens.workers.Pool raises.
        """
        if devices is None:
            devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
            if not devices:
                raise ValueError("there is no GPU: name the devices, such as ['cpu', 'cpu']")
        return Pool(self, devices)

    def close(self) -> None:
        """Ends the processes of a model that was loaded onto several devices."""
        if self.pool is not None:
            self.pool.close()

    def __enter__(self) -> LENS:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        pool: Pool | None = None,
    ) -> Any:
        """Embeds N texts: (N, K) float32 as numpy array, torch tensor on the CPU, or scipy CSR matrix.

        `kind` chooses prompt and maximum length; `instruction` is attended to, not pooled. `dims` keeps those
        columns, `top_k` the largest values of each row; normalised models are normalised again after either.
        `batch_tokens` bounds the tokens of one batch, padding included where there is any. The processes of `pool` do
        the work where there is one, see `start_multi_process_pool`. A text without pooled tokens gives a zero row.
        Raises TypeError or ValueError naming the offending text or option, and with a pool ChildProcessError naming
        the device whose process died.
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
            check_count("top_k", top_k)
        if dims is not None:
            dims = check_dims(dims, self.config.dimensions)
        if batch_tokens is not None:
            check_count("batch_tokens", batch_tokens)
        width = self.config.dimensions if dims is None else len(dims)
        if pool is not None and not isinstance(pool, Pool):
            raise TypeError(f"pool must be one of start_multi_process_pool, found {type(pool).__name__}")
        pool = pool or self.pool
        if pool is not None:
            pool.check(self.model)
        if pool is None:
            steps, results = self._compute(texts, kind, instruction, top_k, dims, batch_tokens)
        else:
            limit = self.config.query_max_length if kind == "query" else self.config.document_max_length
            chunks = split(texts, width, limit, _budget(pool.devices[0], batch_tokens), len(pool.devices))
            form = "csr" if output == "csr" else "numpy"
            options = {"output": form, "top_k": top_k, "dims": dims, "batch_tokens": batch_tokens}
            results = pool.encode(texts, chunks, kind=kind, instruction=instruction, **options)
            steps = len(chunks)
        if show_progress is None:
            show_progress = steps >= _PROGRESS_STEPS
        parts: list[Any] = []
        order: list[int] = []
        dense = None if output == "csr" else torch.zeros(len(texts), width)
        bar = tqdm(total=len(texts), desc="encode", unit="text", disable=not show_progress, leave=False)
        with bar, closing(results):  # so that what works ahead ends with an error, too
            for rows, embeddings in results:
                if dense is None:
                    parts.append(to_csr(embeddings))
                    order += rows
                else:
                    dense[rows] = torch.as_tensor(embeddings)
                bar.update(len(rows))
        if dense is not None:
            return dense.numpy() if output == "numpy" else dense
        if not parts:
            return scipy.sparse.csr_matrix((0, width), dtype=np.float32)
        restored = np.empty(len(texts), dtype=np.int64)
        restored[order] = np.arange(len(texts))
        return scipy.sparse.vstack(parts, format="csr")[restored]

    def _compute(
        self,
        texts: list[str],
        kind: Kind,
        instruction: str | None,
        top_k: int | None,
        dims: Sequence[int] | None,
        batch_tokens: int | None,
    ) -> tuple[int, Generator[tuple[list[int], Tensor]]]:
        """About how many batches there are, and each one's rows and embeddings, computed in this process."""
        bags = kind == "query" and self.config.query_encoder == "bag"
        packed = bags or self._packs()
        lay_out = bag.lay_out if bags else self.text.pack if packed else self.text.collate
        blocks = pipeline.plan(self.text, texts, kind, instruction, _budget(self.device, batch_tokens), packed)
        first = next(blocks, [])
        batches = pipeline.prepare(lay_out, chain(first, chain.from_iterable(blocks)), self.device)
        columns = None if dims is None else torch.tensor(dims, device=self.device)
        shrink = functools.partial(prune, dims=columns, top_k=top_k, normalize=self.config.normalize)

        def results() -> Generator[tuple[list[int], Tensor]]:
            with closing(blocks):
                yield from pipeline.compute(self.model, batches, shrink, self.device, self.model.head.weight.dtype)

        return len(first) * -(-len(texts) // pipeline.BLOCK), results()

    def _packs(self) -> bool:
        """Whether texts go through the backbone without padding."""
        half = self.model.head.weight.dtype in (torch.bfloat16, torch.float16)
        return choose_packed(self.model.backbone, self.config.longest, self.packed, half)

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
    device: Devices = None,
    dtype: str | torch.dtype | None = None,
    base: str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    compat: Compat | None = None,
    quantization: Quantization | Literal["int8"] | None = None,
    compile: bool = False,
    packed: bool | None = None,
    pooling: SpladePooling | None = None,
) -> LENS:
    """Loads a model from a folder or a hub id, on cuda, mps or cpu (the first there is), in eval mode.

    With several devices, such as ["cuda:0", "cuda:1"], a process for each encodes until `close`, see
    `LENS.start_multi_process_pool`; the model is a context manager.
    `dtype` is bfloat16 on GPUs that have it and float32 elsewhere; `base` is the backbone's place where it has moved.
    `attn_implementation` is sdpa, eager, flex_attention, flash_attention_2, flash_attention_3 or a kernel of the hub
    (org/name); None leaves the choice to transformers. `quantization` ("4bit", "8bit") quantises the backbone while it
    is read, with bitsandbytes; "int8" multiplies in 8 bits, which on a CPU is faster (see lens/int8.py). `compile`
    compiles the backbone's layers, at the first texts: on a CPU it did not pay (docs/performance.md), on a GPU it may.
    `packed` lays texts one after another without padding: False never, True or an error, None where the backbone can
    and it pays.
    Checkpoints of the released LENS code are read too; `compat="official"` then embeds as that code does (see
    docs/compat.md). So are masked LMs and sparse encoders of sentence-transformers, as SPLADE; `pooling` ("max", "sum")
    is a masked LM's, which does not say its own (see docs/splade.md).
    Raises FileNotFoundError, or ValueError naming the file, what was expected and what was found.
    """
    where, *others = resolve_devices(device, quantization)
    if compat not in (None, "official"):
        raise ValueError(f"compat must be 'official' or None; found {compat!r}")
    if quantization not in (None, "4bit", "8bit", "int8"):
        raise ValueError(f"quantization must be one of 4bit, 8bit, int8 or None; found {quantization!r}")
    kind = resolve_dtype(dtype, where, attn_implementation)
    places = " and ".join(sorted({where.type, *(device.type for device in others)}))
    if quantization == "int8" and (places != "cpu" or kind != torch.float32):
        raise ValueError(
            f"quantization='int8' is for a CPU in float32, and this is {places} in {kind}: leave dtype out with "
            "device='cpu', or use '8bit' to save memory on a GPU"
        )
    read = None if quantization == "int8" else quantization
    folder = fetch(path_or_id, revision)
    if pooling is not None and not is_splade(folder):
        raise ValueError(f"pooling={pooling!r} is for SPLADE checkpoints that do not say theirs; {folder} is none")
    if is_released(folder):
        official = compat == "official"
        model, tokenizer = load_released(folder, kind, base, attn_implementation, official, where, read)
    elif compat is not None:
        raise ValueError(f"compat={compat!r} is for checkpoints of the released LENS code, and {folder} is none")
    elif is_splade(folder):
        model, tokenizer = load_splade(path_or_id, revision, kind, base, attn_implementation, where, read, pooling)
    else:
        model, tokenizer = load_model(folder, kind, base, None, attn_implementation, where, read)
    if quantization == "int8":
        int8.quantize(model)
    return LENS(model, tokenizer, device, compile, packed)


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

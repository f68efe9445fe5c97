"""Embeddings as arrays: pruning dimensions, keeping the largest, dense <-> CSR, files.

Pruning needs no Matryoshka training: embeddings are sparse and each dimension stands for itself (arXiv 2501.09749).
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from lens.files import atomic_file

# Legend: N texts, K clusters.

Array = NDArray[np.float32]


def prune(
    embeddings: Tensor, dims: Sequence[int] | Tensor | None = None, top_k: int | None = None, normalize: bool = False
) -> Tensor:
    """Keeps the columns `dims`, then in each row the `top_k` largest values; with `normalize` rows get length one.

    (N, K) -> (N, len(dims) or K). A tensor of dims, on the embeddings' device, is taken as checked. Raises ValueError
    for dims out of range or repeated, and top_k below 1.
    """
    if dims is not None:
        if not isinstance(dims, Tensor):
            dims = torch.tensor(check_dims(dims, embeddings.shape[1]), device=embeddings.device)
        embeddings = embeddings[:, dims]
    if top_k is not None:
        check_count("top_k", top_k)
        if top_k < embeddings.shape[1]:
            best = embeddings.topk(top_k, dim=1)
            embeddings = torch.zeros_like(embeddings).scatter(1, best.indices, best.values)
    if normalize and (dims is not None or top_k is not None):
        embeddings = F.normalize(embeddings, dim=1)
    return embeddings


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless option `name` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, found {value!r}")


def check_dims(dims: Sequence[int], dimensions: int) -> list[int]:
    """Returns `dims` as a list; raises ValueError unless they are distinct columns of `dimensions`."""
    try:
        columns = [operator.index(column) for column in dims]
    except TypeError as error:
        raise ValueError(f"dims must be whole numbers, found {list(dims)[:5]}") from error
    if not columns or len(set(columns)) != len(columns) or min(columns) < 0 or max(columns) >= dimensions:
        raise ValueError(f"dims must be distinct columns from 0 to {dimensions - 1}, at least one of them")
    return columns


def rank_dims(embeddings: Any) -> list[int]:
    """Columns of (N, K) embeddings by falling mean square: `rank_dims(D)[:1000]` suits `dims=`."""
    squares = np.asarray(to_csr(embeddings).power(2).mean(axis=0)).ravel()
    return [int(column) for column in np.argsort(-squares, kind="stable")]


def to_csr(embeddings: Any) -> scipy.sparse.csr_matrix:
    """A (N, K) numpy array, torch tensor or scipy matrix as float32 CSR."""
    if isinstance(embeddings, Tensor):
        embeddings = embeddings.detach().cpu().numpy()
    return scipy.sparse.csr_matrix(embeddings, dtype=np.float32)


def to_dense(embeddings: Any) -> Array:
    """A (N, K) numpy array, torch tensor or scipy matrix as a float32 array."""
    if isinstance(embeddings, Tensor):
        embeddings = embeddings.detach().cpu().numpy()
    if scipy.sparse.issparse(embeddings):
        embeddings = embeddings.toarray()
    return np.asarray(embeddings, dtype=np.float32)


def save_embeddings(path: str | os.PathLike[str], embeddings: Any, ids: Sequence[str], overwrite: bool = False) -> None:
    """Writes embeddings (N, K) and the ids of their texts atomically: .npz (CSR, as scipy.sparse.load_npz reads it,
    plus `ids`) or .safetensors (dense `embeddings`, ids in the metadata). Raises ValueError for other endings."""
    ending = embeddings_ending(path)
    if len(ids) != embeddings.shape[0]:
        raise ValueError(f"{len(ids)} ids do not fit {embeddings.shape[0]} embeddings")
    with atomic_file(path, overwrite) as temporary:
        if ending == ".npz":
            csr = to_csr(embeddings)
            np.savez_compressed(
                temporary,
                data=csr.data,
                indices=csr.indices,
                indptr=csr.indptr,
                shape=np.array(csr.shape),
                format=np.array(b"csr"),
                ids=np.array(ids, dtype=np.str_),
            )
        else:
            dense = torch.from_numpy(to_dense(embeddings))
            save_file({"embeddings": dense}, temporary, {"format": "pt", "ids": json.dumps(list(ids))})


def load_embeddings(path: str | os.PathLike[str]) -> tuple[scipy.sparse.csr_matrix, list[str]]:
    """Reads what `save_embeddings` wrote; raises FileNotFoundError or ValueError naming the file."""
    from safetensors import safe_open

    ending = embeddings_ending(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if ending == ".npz":
            with np.load(path, allow_pickle=False) as file:
                csr = scipy.sparse.csr_matrix((file["data"], file["indices"], file["indptr"]), shape=file["shape"])
                ids = [str(name) for name in file["ids"]]
            csr.check_format(full_check=True)  # indices out of range would crash, not raise, in a product
        else:
            with safe_open(str(path), framework="pt") as file:
                ids = json.loads((file.metadata() or {})["ids"])
            csr = to_csr(load_file(path)["embeddings"])
        if len(ids) != csr.shape[0] or not np.isfinite(csr.data).all():
            raise ValueError(f"{len(ids)} ids for {csr.shape[0]} rows, or values that are not finite")
        return csr, ids
    except Exception as error:
        raise ValueError(f"{path} holds no embeddings as `lens encode` writes them ({error})") from error


def embeddings_ending(path: str | os.PathLike[str]) -> str:
    """`.npz` or `.safetensors`; raises ValueError for any other ending."""
    ending = os.path.splitext(path)[1]
    if ending not in (".npz", ".safetensors"):
        raise ValueError(f"{path}: embeddings are written as .npz or .safetensors, found {ending or 'no ending'!r}")
    return ending

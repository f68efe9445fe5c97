"""Embeddings on the disk, so that other runs and analyses of a model, and runs that were killed, take them from there.

    FOLDER/MODEL/model.json               whose they are
    FOLDER/MODEL/MANNER/*.safetensors     of some texts each: `texts` (N, 16), with `values` (N, K), or `values`,
                                          `indices` and `indptr` of a CSR matrix, whichever is smaller

A text is known by a hash, together with all else that decides its embedding: model, revision, options, dtype (MODEL),
query or document, instruction (MANNER). Files are written whole and never changed, so that processes may share FOLDER.
A change of ours that changes embeddings raises FORMAT; other versions of torch and transformers begin anew too.

Legend: N texts, K dimensions.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy import sparse

import lens
from lens.files import atomic_file, write_json
from lens.vectors import to_dense

Matrix = Any
"""Embeddings (N, K): a scipy CSR matrix or a numpy array."""
DIGEST = 16
"""Bytes of a text's hash."""
BLOCK = 4096
"""Texts that are embedded before they are kept: those that `lens.pipeline` sorts by length together."""
FORMAT = 1
"""Embeddings that were kept under another number are not taken."""


class KeptEmbeddings:
    """The embeddings of one model in `folder`; `facts` is what decides them beside text and manner, as JSON holds it.

    Raises OSError for a folder that cannot be written.
    """

    def __init__(self, folder: Path, facts: Any) -> None:
        made_by = {module.__name__: str(module.__version__) for module in (lens, torch, transformers)}
        self.content = json.loads(json.dumps([facts, FORMAT, made_by], default=str))
        self.folder = folder / _digest(json.dumps(self.content, sort_keys=True)).hex()
        self._known: dict[Path, dict[bytes, tuple[Path, int]]] = {}
        try:
            self._describe()
        except OSError as error:
            raise OSError(f"--embeddings {folder}: {error}; name a folder that can be written") from error

    def _describe(self) -> None:
        if not (self.folder / "model.json").is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "model.json", {"model": self.content})

    def vectors(
        self, texts: Sequence[str], manner: Any, output: str, embed: Callable[[Sequence[str]], Matrix]
    ) -> tuple[Matrix, int]:
        """The embeddings (N, K) of distinct texts as `output` ("numpy", "csr"), and how many of them `embed` computed,
        which then are kept, unless one is not finite.

        Raises ValueError naming a file that cannot be read, OSError where the disk is full, and what `embed` raises.
        """
        place = self.folder / _digest(json.dumps(manner)).hex()
        known = self._known.get(place)
        if not known:
            known = self._known[place] = _index(place)
        names = [_digest(text) for text in texts]
        new = [number for number, name in enumerate(names) if name not in known]
        files: dict[Path, list[int]] = {}  # places in `texts` by file
        for number, name in enumerate(names):
            if name in known:
                files.setdefault(known[name][0], []).append(number)
        parts, order = [], []
        for path, numbers in files.items():
            try:
                matrix = _matrix(path)
            except FileNotFoundError:  # somebody made room
                new += numbers
                continue
            parts.append(_as(matrix[[known[names[number]][1] for number in numbers]], output))
            order += numbers
        for start in range(0, len(new), BLOCK):
            block = new[start : start + BLOCK]
            fresh = embed([texts[number] for number in block])
            self._keep(place, known, [names[number] for number in block], fresh)
            parts.append(fresh)
            order += block
        if not parts:
            return embed(texts), 0
        stacked = sparse.vstack(parts, format="csr") if output == "csr" else np.concatenate(parts)
        return stacked[np.argsort(order)], len(new)

    def _keep(self, place: Path, known: dict[bytes, tuple[Path, int]], names: Sequence[bytes], vectors: Matrix) -> None:
        values = vectors.data if sparse.issparse(vectors) else vectors
        if not names or not np.isfinite(values).all():
            return
        path = place / f"{uuid.uuid4().hex}.safetensors"
        tensors = {"texts": np.frombuffer(b"".join(names), dtype=np.uint8).reshape(-1, DIGEST)}
        if 2 * np.count_nonzero(values) < vectors.shape[0] * vectors.shape[1]:
            matrix = sparse.csr_matrix(vectors, dtype=np.float32)
            tensors |= {"values": matrix.data, "indices": matrix.indices.astype(np.int32)}
            tensors |= {"indptr": matrix.indptr.astype(np.int64), "width": np.array([matrix.shape[1]])}
        else:
            tensors["values"] = to_dense(vectors)
        self._describe()  # which somebody may have deleted
        with atomic_file(path) as temporary:
            try:
                save_file(tensors, temporary, {"checksum": _checksum(tensors)})
            except SafetensorError as error:  # so it calls a full disk
                raise OSError(f"cannot write {path}: {error}") from error
        known |= {name: (path, number) for number, name in enumerate(names)}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def _checksum(tensors: dict[str, NDArray[Any]]) -> str:
    found = hashlib.blake2b(digest_size=DIGEST)
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].shape} {tensors[name].dtype}".encode())
        found.update(np.ascontiguousarray(tensors[name]).tobytes())
    return found.hexdigest()


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(f"{path} is damaged ({why}): remove it, and its texts are embedded again")


def _index(place: Path) -> dict[bytes, tuple[Path, int]]:
    """Where each text's embedding lies. Raises ValueError naming a file that is damaged."""
    found: dict[bytes, tuple[Path, int]] = {}
    for path in sorted(place.glob("[!.]*.safetensors")):  # those with a dot are being written
        try:
            with safe_open(path, framework="numpy") as file:
                found |= {bytes(row): (path, number) for number, row in enumerate(file.get_tensor("texts"))}
        except FileNotFoundError:
            continue
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    return found


def _matrix(path: Path) -> Matrix:
    """The embeddings of a file. Raises ValueError naming one that is damaged, FileNotFoundError where it is gone."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            held = {name: file.get_tensor(name) for name in names}
            checksum = (file.metadata() or {}).get("checksum")
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    if _checksum(held) != checksum:
        raise _damaged(path, "its content is not what was written")
    if held["values"].ndim == 2:
        return held["values"]
    shape = (len(held["texts"]), int(held["width"][0]))
    return sparse.csr_matrix((held["values"], held["indices"], held["indptr"]), shape=shape)


def _as(matrix: Matrix, output: str) -> Matrix:
    return sparse.csr_matrix(matrix) if output == "csr" else to_dense(matrix)

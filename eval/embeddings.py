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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy import sparse

from lens.files import atomic_file, write_json
from lens.vectors import to_dense

Matrix = Any
"""Embeddings (N, K): a scipy CSR matrix or a numpy array."""
DIGEST = 16
"""Bytes of a text's hash."""
FORMAT = 1
"""Embeddings that were kept under another number are not taken."""


class KeptEmbeddings:
    """The embeddings of one model in `folder`; `facts` is what decides them beside text and manner, as JSON holds it.

    Raises OSError for a folder that cannot be written.
    """

    def __init__(self, folder: Path, facts: Any) -> None:
        made_by = {name: version(name) for name in ("lens-embeddings", "torch", "transformers")}
        content = json.loads(json.dumps([facts, FORMAT, made_by], default=str))
        self.folder = folder / _digest(json.dumps(content, sort_keys=True)).hex()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "model.json", {"model": content})
        self._known: dict[Any, dict[bytes, tuple[Path, int]]] = {}

    def vectors(
        self, texts: Sequence[str], manner: Any, output: str, embed: Callable[[Sequence[str]], Matrix]
    ) -> tuple[Matrix, int]:
        """The embeddings (N, K) of distinct texts as `output` ("numpy", "csr"), and how many of them `embed` computed,
        which then are kept, unless one is not finite.

        Raises ValueError naming a file that cannot be read, OSError where the disk is full, and what `embed` raises.
        """
        place = self.folder / _digest(json.dumps(manner)).hex()
        known = self._known.setdefault(place, {})
        if not known:
            for path in sorted(place.glob("[!.]*.safetensors")):  # those with a dot are being written
                known |= {bytes(row): (path, number) for number, row in enumerate(_read(path, "texts")["texts"])}
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
        if not parts:
            fresh = embed(texts)
            self._keep(place, known, names, fresh)
            return fresh, len(texts)
        if new:
            fresh = embed([texts[number] for number in new])
            self._keep(place, known, [names[number] for number in new], fresh)
            parts.append(fresh)
            order += new
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
        with atomic_file(path) as temporary:
            try:
                save_file(tensors, temporary)
            except SafetensorError as error:  # so it calls a full disk
                raise OSError(f"cannot write {path}: {error}") from error
        known |= {name: (path, number) for number, name in enumerate(names)}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST).digest()


def _read(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and its texts are embedded again") from error


def _matrix(path: Path) -> Matrix:
    held = _read(path, "texts", "values")
    if held["values"].ndim == 2:
        return held["values"]
    held |= _read(path, "indices", "indptr", "width")
    shape = (len(held["texts"]), int(held["width"][0]))
    return sparse.csr_matrix((held["values"], held["indices"], held["indptr"]), shape=shape)


def _as(matrix: Matrix, output: str) -> Matrix:
    return sparse.csr_matrix(matrix) if output == "csr" else to_dense(matrix)

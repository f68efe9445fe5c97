"""What tells a model folder from another that stands at the same path later: hashes of its files.

A run that goes on, or that finds its output finished, compares them with those that it began with.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

_WHOLE = 1 << 30
_END = 1 << 20
_FILES = ("config.json", "lens.json", "tokenizer.json", "*.safetensors", "*.bin")


def digest(path: Path) -> str:
    """SHA-256 of a file; of one above 1 GiB only size, first and last MiB count, since runs wait for this."""
    stat = path.stat()
    return _digest_of(path, stat.st_size, stat.st_mtime_ns)


def sha256(path: Path) -> str:
    """SHA-256 of a whole file, however large."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache  # a resumed run asks several times
def _digest_of(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        if size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        first = file.read(_END)
        file.seek(-_END, os.SEEK_END)
        return hashlib.sha256(repr(size).encode() + first + file.read()).hexdigest()


def model_files(model: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of a model folder's configuration, tokenizer and weights by file name; nothing for a hub id."""
    folder = Path(model).expanduser()
    files = sorted({file for pattern in _FILES for file in folder.glob(pattern) if file.is_file()})
    return {file.name: digest(file) for file in files}

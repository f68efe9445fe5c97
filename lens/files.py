"""Files that are never half written and never half read: atomic outputs, checked tensors, located errors.

Every program writes through this room, so that a killed run leaves the old result whole, and reads through it,
so that a damaged file is named together with what was expected and what was found.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


def check_output(path: str | os.PathLike[str], overwrite: bool = False, marker: str | None = None) -> Path:
    """Checks, before any long work, that `path` may be written, and returns it as a Path.

    Raises FileExistsError when something is there already (an empty folder does not count) and `overwrite` is
    false, or when a folder that would be overwritten lacks the file `marker` of its kind; PermissionError or
    NotADirectoryError when its nearest existing parent cannot hold it.
    """
    path = Path(path)
    if marker and path.is_file():
        raise FileExistsError(f"{path} is a file, and a folder is to be written: choose another output")
    if overwrite and marker and path.is_dir() and any(path.iterdir()) and not (path / marker).is_file():
        raise FileExistsError(f"{path} holds no {marker}, so it is not overwritten: choose another output")
    if not overwrite and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise FileExistsError(f"{path} exists and is not empty: choose another output, or overwrite it (--overwrite)")
    if path.is_dir() and os.path.ismount(path):
        raise PermissionError(f"cannot write {path}: it is a mount point, which cannot be renamed; name a folder in it")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(f"cannot write {path}: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: no permission to write in {parent}")
    return path


@contextmanager
def atomic_file(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it becomes `path` in one rename, on error it vanishes."""
    path = check_output(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it becomes `path`, on error it vanishes.

    With `overwrite` an old folder, which must hold the file `marker`, is moved aside first and removed only once the
    new one is in place.
    """
    path = check_output(path, overwrite, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
                _sync(file)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.replace(old / path.name)
            try:
                temporary.replace(path)
            except BaseException:
                (old / path.name).replace(path)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: str | os.PathLike[str], content: Any, overwrite: bool = True) -> None:
    """Writes `content` as indented UTF-8 JSON, atomically."""
    with atomic_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads one JSON object; raises FileNotFoundError or ValueError naming the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_tensors(path: str | os.PathLike[str], expected: Mapping[str, Sequence[int | None]]) -> dict[str, torch.Tensor]:
    """Reads the named tensors of a safetensors file, each checked against a shape (None = any size).

    Raises FileNotFoundError when the file is missing, and ValueError naming the file, what was expected and what
    was found when it is truncated, is no safetensors file, lacks a tensor, or holds one of another shape.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected a safetensors file with {', '.join(expected)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a safetensors file with {', '.join(expected)}")
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            missing = [name for name in expected if name not in names]
            if missing:
                raise ValueError(
                    f"{path}: expected tensors {', '.join(expected)}; {', '.join(missing)} missing, "
                    f"found {', '.join(sorted(names)) or 'none'}"
                )
            tensors = {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} is not a whole safetensors file ({size} bytes: {error}); write or download it again"
        ) from error
    for name, shape in expected.items():
        found = tuple(tensors[name].shape)
        if len(found) != len(shape) or any(
            want is not None and want != have for want, have in zip(shape, found, strict=True)
        ):
            wanted = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
            raise ValueError(f"{path}: tensor {name} should have shape {wanted}, found {found}")
    return tensors


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its end) of a UTF-8 text file, through gzip when its name ends in .gz.

    Raises ValueError "FILE:LINE: ..." for a line that is not UTF-8 and for a damaged gzip file.
    """
    number = 0
    with gzip.open(path) if Path(path).suffix == ".gz" else Path(path).open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 text: {error}") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: damaged gzip file: {error}") from error


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a .jsonl or .jsonl.gz file; blank lines are skipped.

    Raises ValueError "FILE:LINE: ..." for a line that is not a JSON object.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json_object(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        yield number, row


def json_object(line: str) -> dict[str, Any]:
    """The JSON object that a line holds; raises ValueError when it is none, or holds a lone surrogate."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error}): {line[:80]!r}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    if "\\ud" in line.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a lone surrogate (\\ud800 to \\udfff) is not valid text") from error
    return row


def require(extra: str, *modules: str) -> None:
    """Raises ImportError naming the pip command when a module of an extra is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed; run: pip install 'lens-embeddings[{extra}]'")

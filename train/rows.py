"""The rows of one file or split, each where it lies: lines, Arrow files of the `datasets` library, streams.

Mapped, a row is read where it lies: in the lines of a .jsonl file, or in the Arrow files that the `datasets` library
makes of everything else in its cache. Streamed, a file is read in blocks of rows, of which one is in memory, and
nothing is stored.
"""

from __future__ import annotations

import gzip
import mmap
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lens.files import json_object, require


class Rows(Protocol):
    """One file of rows, or one split of the hub."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, Any]:
        """A row; raises ValueError, without the place, when it cannot be read."""

    def where(self, index: int) -> str:
        """The place of a row, for messages: file and line, or file and row."""


class Lines:
    """The rows of a .jsonl file, mapped into memory: 16 bytes a row are held, a row is parsed when it is asked for."""

    def __init__(self, path: str) -> None:
        self.path = path
        offsets, numbers, position = [], [], 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    offsets.append(position)
                    numbers.append(number)
                position += len(line)
        self.offsets, self.numbers = np.array(offsets, dtype=np.int64), np.array(numbers, dtype=np.int64)
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a map belongs to its process

    def __len__(self) -> int:
        return len(self.offsets)

    def row(self, index: int) -> dict[str, Any]:
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = int(self.offsets[index])
        end = self._map.find(b"\n", start)
        return _parse(self._map[start : end if end >= 0 else len(self._map)])

    def where(self, index: int) -> str:
        return f"{self.path}:{self.numbers[index]}"


class CompressedLines:
    """The lines of a .jsonl.gz file in an Arrow file, which is mapped into memory."""

    def __init__(self, path: str) -> None:
        stat = Path(path).stat()
        # A changed file is another entry of the cache.
        self.path, self.table = path, _unpacked(path, (stat.st_size, stat.st_mtime_ns))

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> dict[str, Any]:
        return _parse(self.table[index]["content"])

    def where(self, index: int) -> str:
        return f"{self.path}:{self.table[index]['number']}"


class Table:
    """The rows of a `datasets.Dataset`, whose Arrow files are mapped into memory."""

    def __init__(self, name: str, table: Any) -> None:
        self.name, self.table = name, table

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.table[index]
        return row

    def where(self, index: int) -> str:
        return f"{self.name}: row {index + 1}"


class Stream:
    """The rows of a file, local or of the hub, that is read from the front, a block at a time."""

    def __init__(self, url: str, block_size: int) -> None:
        self.url, self.block_size = url, block_size
        self.parquet = url.endswith(".parquet")
        if url.endswith(".json") and Path(url).is_file() and _is_array(url):
            raise ValueError(f"{url} is one JSON array, which cannot be streamed: write an object a line (.jsonl)")
        if self.parquet:
            with _parquet(url) as file:
                self.size = int(file.metadata.num_rows)
        else:
            self.size = sum(1 for _ in _lines(url))
        self.blocks = [min(block_size, self.size - start) for start in range(0, self.size, block_size)]
        """Rows of every block."""
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rest": (-1, iter(())), "_block": (-1, [])}

    def __len__(self) -> int:
        return self.size

    def row(self, index: int) -> dict[str, Any]:
        if self._process != os.getpid():  # a worker's place in a file must not move its parent's
            self.close()
        number, offset = divmod(index, self.block_size)
        if self._block[0] != number:
            following, rest = self._rest
            if following != number:
                rest = self._from(number * self.block_size)
            self._block = (number, list(islice(rest, self.blocks[number])))
            self._rest = (number + 1, rest)
        rows = self._block[1]
        if offset >= len(rows):
            raise ValueError("the file has fewer rows than when reading began: it was changed")
        row: dict[str, Any] = rows[offset] if self.parquet else _parse(rows[offset][1])
        return row

    def where(self, index: int) -> str:
        number, offset = divmod(index, self.block_size)
        if not self.parquet and self._block[0] == number and offset < len(self._block[1]):
            return f"{self.url}:{self._block[1][offset][0]}"
        return f"{self.url}: row {index + 1}"

    def close(self) -> None:
        """Lets go of the block and of the open file."""
        self._rest: tuple[int, Iterator[Any]] = (-1, iter(()))  # number of the next block, rows from there on
        self._block: tuple[int, list[Any]] = (-1, [])
        self._process = os.getpid()

    def _from(self, start: int) -> Iterator[Any]:
        """Rows of a parquet file, or numbered lines, from row `start` on."""
        if not self.parquet:
            yield from islice(_lines(self.url), start, None)
            return
        with _parquet(self.url) as file:
            ends = list(accumulate(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)))
            first = bisect_right(ends, start)  # the groups before it are not even read
            skipped = start - (ends[first - 1] if first else 0)
            for batch in file.iter_batches(batch_size=512, row_groups=list(range(first, len(ends)))):
                yield from batch.slice(min(skipped, len(batch))).to_pylist()
                skipped = max(skipped - len(batch), 0)


def local_rows(path: str) -> Rows:
    """The rows of a local file, mapped; raises ValueError naming it when it cannot be read."""
    if path.endswith(".parquet") or (path.endswith(".json") and _is_array(path)):
        kind = "parquet" if path.endswith(".parquet") else "json"
        return Table(path, _load(path, kind, data_files=[path], split="train"))
    return CompressedLines(path) if path.endswith(".gz") else Lines(path)


def _is_array(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(1024).lstrip().startswith(b"[")


def _load(path: str, *arguments: Any, **options: Any) -> Any:
    require("train", "datasets")
    import datasets

    try:
        return datasets.load_dataset(*arguments, **options)
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {brief(error.__cause__ or error)}") from error


def _unpacked(path: str, stamp: tuple[int, int]) -> Any:
    require("train", "datasets")
    import datasets

    features = datasets.Features({"number": datasets.Value("int64"), "content": datasets.Value("binary")})
    try:
        return datasets.Dataset.from_generator(_numbered, features=features, gen_kwargs={"path": path, "stamp": stamp})
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(brief(error.__cause__ or error)) from error


def _numbered(path: str, stamp: tuple[int, int]) -> Iterator[dict[str, Any]]:
    for number, line in _lines(path):
        yield {"number": number, "content": line}


def _lines(url: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of the lines of a local or remote file that are not blank, through gzip for .gz."""
    import fsspec

    number = 0
    try:
        with fsspec.open(url, "rb", compression="infer") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{url}:{number + 1}: damaged gzip file: {error}") from error


@contextmanager
def _parquet(url: str) -> Iterator[Any]:
    """A local or remote parquet file; raises ValueError naming it when it is none."""
    require("train", "datasets")
    import fsspec
    from pyarrow import ArrowInvalid, parquet

    try:
        with fsspec.open(url, "rb") as file:
            yield parquet.ParquetFile(file)
    except ArrowInvalid as error:
        raise ValueError(f"{url} cannot be read: {brief(error)}") from error


def _parse(line: bytes) -> dict[str, Any]:
    try:
        return json_object(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error}") from error


def brief(error: BaseException) -> str:
    """An error's message on one line, cut short."""
    return " ".join(str(error).split())[:300]

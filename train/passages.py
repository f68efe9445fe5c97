"""What mining reads: a corpus that need not fit into memory, and the questions with their positives.

Of every passage 16 bytes are held while the corpus is first read, 8 bytes after that: the hash of its text, which tells
copies from different passages. Texts come in shards, and those that are wanted at the end in one more pass.
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lens.corpus import find_file, qrels_file, read_qrels, read_texts, repeated_id, stream_texts, texts_file
from lens.files import atomic_file, read_jsonl
from train.data import parse_example


def key_of(text: str) -> int:
    """A 64-bit hash of a text, in which runs of white space count as one blank and those at its ends as nothing."""
    return int.from_bytes(blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "big", signed=True)


BLANK = key_of("")


@dataclass(frozen=True)
class Question:
    """One example to be: a query, its positives, and what goes into the row as it is."""

    name: str
    text: str
    pos: list[str]
    prompt: str | None = None
    type: str = "retrieval"


@dataclass
class Questions:
    """The questions in order, how many were left out and why, and the files they came from."""

    rows: list[Question]
    files: list[Path]
    left_out: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.known: dict[int, set[int]] = {}
        """Keys of a query's text -> keys of all texts that are never its negatives, over all rows with that query."""
        for row in self.rows:
            self.known.setdefault(key_of(row.text), {key_of(row.text), BLANK}).update(map(key_of, row.pos))

    def banned(self, number: int) -> set[int]:
        """Keys of what is never a negative of question `number`: positives, the query itself, blank text."""
        return self.known[key_of(self.rows[number].text)]


class Corpus:
    """The passages of a file, in its order; `wanted` ids are kept with their texts in `found`.

    Raises FileNotFoundError, and ValueError for an empty file and, as "FILE:LINE: ...", for a malformed row and an id
    that stands twice.
    """

    def __init__(self, path: Path, wanted: set[str] | None = None) -> None:
        self.path = texts_file(path)
        self.found: dict[str, str] = {}
        wanted = wanted or set()
        keys, names = array("q"), array("q")
        for _, name, text in tqdm(
            stream_texts(self.path), desc="read the corpus", unit="passage", leave=False, disable=None
        ):
            keys.append(key_of(text))
            names.append(key_of(name))
            if name in wanted:
                self.found[name] = text
        if not keys:
            raise ValueError(f"{self.path} holds no passages")
        self.keys: NDArray[np.int64] = np.frombuffer(keys, dtype=np.int64)
        """(N,) the key of every passage."""
        self._check_names(np.frombuffer(names, dtype=np.int64))

    def _check_names(self, hashes: NDArray[np.int64]) -> None:
        hashes.sort()
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if suspects:  # rarely another name of the same hash
            first: dict[str, int] = {}
            for number, name, _ in stream_texts(self.path):
                if key_of(name) in suspects and first.setdefault(name, number) != number:
                    raise ValueError(repeated_id(self.path, number, name, first[name]))

    def __len__(self) -> int:
        return len(self.keys)

    def shards(self, size: int, first: int = 0) -> Iterator[tuple[int, list[str]]]:
        """Yields (position of the first passage, texts) of `size` passages at a time, from shard `first` on."""
        start, texts = first * size, []
        for position, (_, _, text) in enumerate(stream_texts(self.path)):
            if position < start:
                continue
            texts.append(text)
            if len(texts) == size:
                yield start, texts
                start, texts = start + size, []
        if texts:
            yield start, texts

    def fetch(self, positions: NDArray[np.int64], path: Path) -> Texts:
        """The texts at these positions, sorted and distinct, by one more pass; they are kept in the file `path`."""
        ends, wanted = [0], iter(positions.tolist())
        following = next(wanted, None)
        with atomic_file(path, overwrite=True) as temporary, temporary.open("wb") as file:
            for position, (_, _, text) in enumerate(stream_texts(self.path)):
                if position == following:
                    ends.append(ends[-1] + file.write(text.encode()))
                    following = next(wanted, None)
        return Texts(path, positions, np.array(ends, dtype=np.int64))


class Texts:
    """Texts of a corpus by position, read from a file of them when asked for."""

    def __init__(self, path: Path, positions: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self._positions, self.ends = positions, ends
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if ends[-1] else b""

    def __getitem__(self, position: int) -> str:
        place = int(np.searchsorted(self._positions, position))
        return self._bytes[self.ends[place] : self.ends[place + 1]].decode()


def distinct(texts: Sequence[str]) -> list[str]:
    """The texts without blank ones and copies, in order."""
    first: dict[int, str] = {}
    for text in texts:
        first.setdefault(key_of(text), text)
    first.pop(BLANK, None)
    return list(first.values())


def read_folder(folder: Path, split: str, prompt: str | None) -> tuple[Questions, Corpus]:
    """The judged queries of a BEIR folder, and its corpus.

    Queries that are blank and those without a positive that holds text are left out and counted. Raises what
    read_beir of lens.corpus raises, and ValueError where nothing is judged relevant.
    """
    path = qrels_file(folder, split)
    queries_path = find_file(folder, "queries")
    queries = dict(zip(*read_texts(queries_path), strict=True))
    qrels = read_qrels(path, queries)
    if not any(score > 0 for judged in qrels.values() for score in judged.values()):
        raise ValueError(f"{path} judges no document relevant: mining needs positives")
    wanted = {name for judged in qrels.values() for name in judged}
    corpus = Corpus(folder, wanted)
    if len(corpus.found) < len(wanted):
        read_qrels(path, queries, corpus.found)  # raises, naming the line
    rows, left_out = [], Counter[str]()
    for query, judged in qrels.items():
        relevant = [name for name, score in judged.items() if score > 0]
        pos = distinct([corpus.found[name] for name in relevant])
        if not queries[query].strip():
            left_out["blank query"] += 1
        elif not pos:
            left_out["blank positives" if relevant else "no positive"] += 1
        else:
            rows.append(Question(query, queries[query], pos, prompt))
    return Questions(rows, [queries_path, path], left_out), corpus


def read_pairs(path: Path, corpus: Path | None, work: Path, prompt: str | None) -> tuple[Questions, Corpus]:
    """The rows of a .jsonl(.gz) file in the bge format, of which `neg` may be missing, and the corpus: a file or BEIR
    folder, or without one all passages of the rows, which then go into a file in the folder `work`.

    Raises FileNotFoundError, and ValueError as "FILE:LINE: ..." for a row without a query or positives, and for one
    whose negatives follow from labels.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: --pairs takes a .jsonl or .jsonl.gz file")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: --pairs takes .jsonl or .jsonl.gz: convert it, or rename it")
    rows = []
    passages: dict[int, None] = {}
    with atomic_file(work / "corpus.jsonl", overwrite=True) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, row in read_jsonl(path):
            try:
                example = parse_example(row)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            if example.own_negatives_only:
                raise ValueError(
                    f"{path}:{number}: passages of other rows may bear this row's label, so none is mined for type "
                    f"{example.type}: leave such rows out"
                )
            instruction = example.prompt if prompt is None else prompt
            rows.append(
                Question(f"line {number}", example.query, distinct(example.pos), instruction, example.type),
            )
            for text in (*example.pos, *example.neg) if corpus is None else ():
                if (key := key_of(text)) not in passages:
                    passages[key] = None
                    file.write(json.dumps({"_id": str(len(passages)), "text": text}, ensure_ascii=False) + "\n")
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return Questions(rows, [path]), Corpus(work / "corpus.jsonl" if corpus is None else corpus)


def file_facts(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": file_digest(file, "sha256").hexdigest()}

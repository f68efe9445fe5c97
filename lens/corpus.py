"""Texts with names, from the layouts people have: plain text, jsonl(.gz), and BEIR folders.

A BEIR folder holds `corpus.jsonl(.gz)` with `_id`, `title` (optional) and `text`, `queries.jsonl(.gz)` with `_id`
and `text`, and `qrels/SPLIT.tsv` with a header and the columns query-id, corpus-id, score.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from lens.files import read_jsonl, read_lines


@dataclass(frozen=True)
class Beir:
    """A retrieval data set: corpus and queries map ids to texts, qrels map query id -> document id -> score."""

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def find_file(folder: str | os.PathLike[str], stem: str) -> Path:
    """The file `stem`.jsonl or `stem`.jsonl.gz in a folder; raises FileNotFoundError naming both."""
    for suffix in (".jsonl", ".jsonl.gz"):
        path = Path(folder) / f"{stem}{suffix}"
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} has neither {stem}.jsonl nor {stem}.jsonl.gz")


def read_texts(path: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """Ids and texts of a file or folder as `stream_texts` takes it, all in memory.

    Raises what that raises, and ValueError "FILE:LINE: ..." for a row that repeats an id.
    """
    texts: dict[str, str] = {}
    first_line: dict[str, int] = {}
    path = texts_file(path)
    for number, name, text in stream_texts(path):
        if name in texts:
            raise ValueError(repeated_id(path, number, name, first_line[name]))
        texts[name] = text
        first_line[name] = number
    return list(texts), list(texts.values())


def stream_texts(path: str | os.PathLike[str]) -> Iterator[tuple[int, str, str]]:
    """Yields (line number from 1, id, text) of a .txt file (one text a line, ids are line numbers), of a .jsonl(.gz)
    file, or of the corpus of a BEIR folder; one row is in memory at a time.

    A jsonl row needs `_id` (or `id`) and `text`; `title`, where present, goes before the text.
    Raises FileNotFoundError, and ValueError "FILE:LINE: ..." for a row that is malformed.
    """
    path = texts_file(path)
    if ".jsonl" not in path.suffixes:
        for number, line in read_lines(path):
            yield number, str(number), line
        return
    for number, row in read_jsonl(path):
        name = row.get("_id", row.get("id"))
        if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
            raise ValueError(f"{path}:{number}: no usable `_id` (found {name!r}); give each row a unique string")
        parts = [row.get("title") or "", row.get("text")]
        if not all(isinstance(part, str) for part in parts):
            found = {key: type(row.get(key)).__name__ for key in ("title", "text")}
            raise ValueError(f"{path}:{number}: `text` (and `title`) must be strings, found {found}")
        yield number, str(name), " ".join(str(part) for part in parts if part)


def texts_file(path: str | os.PathLike[str]) -> Path:
    """A file of texts: `path` itself, or the corpus of a BEIR folder; raises FileNotFoundError."""
    path = Path(path)
    if path.is_dir():
        path = find_file(path, "corpus")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return path


def repeated_id(path: Path, number: int, name: str, first: int) -> str:
    """What is wrong with an id that two lines of a file bear."""
    return f"{path}:{number}: `_id` {name!r} was already used in line {first}"


def read_qrels(
    path: str | os.PathLike[str],
    queries: Container[str] | None = None,
    corpus: Container[str] | None = None,
    skip_unknown: bool | None = None,
) -> dict[str, dict[str, int]]:
    """Reads qrels/SPLIT.tsv; with `queries` and `corpus`, ids that are not in them are an error, or are skipped with
    a warning that counts them. `skip_unknown` is None where the program has no such option, which errors then do not
    name.

    Raises ValueError "FILE:LINE: ..." for a row without three columns or an integer score, for one that contradicts
    an earlier one, and for an unknown id.
    """
    qrels: dict[str, dict[str, int]] = {}
    skipped: list[str] = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        columns = line.split("\t")
        if number == 1 and columns[-1].strip().lower() == "score":
            continue
        try:
            query, document, score = columns
            value = int(score)
            if abs(value) > 1_000_000:
                raise ValueError("score out of range")
        except ValueError as error:
            raise ValueError(
                f"{path}:{number}: expected query-id<TAB>corpus-id<TAB>integer score, found {line[:80]!r}"
            ) from error
        unknown = [
            f"{kind} {name!r}"
            for kind, name, known in (("query", query, queries), ("document", document, corpus))
            if known is not None and name not in known
        ]
        if unknown and not skip_unknown:
            how = "remove the line" if skip_unknown is None else "leave such judgements out (--skip-unknown)"
            raise ValueError(f"{path}:{number}: unknown {' and '.join(unknown)}: complete the folder, or {how}")
        if unknown:
            skipped += unknown
        elif qrels.setdefault(query, {}).setdefault(document, value) != value:
            raise ValueError(f"{path}:{number}: query {query!r} judges document {document!r} twice, differently")
    if skipped:
        warnings.warn(
            f"{path} names {len(skipped)} unknown queries or documents (first: {skipped[0]}); their judgements are "
            "left out",
            stacklevel=3,
        )
    return qrels


def qrels_file(folder: str | os.PathLike[str], split: str | None = None) -> Path:
    """The judgements of one split of a BEIR folder (default: test, else dev, else the only one); raises
    FileNotFoundError for a folder that is none and for a split that it lacks."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected one in BEIR layout")
    splits = sorted(file.stem for file in (folder / "qrels").glob("*.tsv"))
    if not splits:
        raise FileNotFoundError(f"{folder}/qrels has no .tsv file")
    if split is None:
        split = next((name for name in ("test", "dev") if name in splits), splits[0])
    if split not in splits:
        raise FileNotFoundError(f"{folder}/qrels has no {split}.tsv; found {', '.join(splits)}")
    return folder / "qrels" / f"{split}.tsv"


def read_beir(folder: str | os.PathLike[str], split: str | None = None, skip_unknown: bool | None = None) -> Beir:
    """Reads a BEIR folder with the judgements of one split (default: test, else dev, else the only one).

    Queries without a judgement are dropped. Raises FileNotFoundError for what is missing, and ValueError
    "FILE:LINE: ..." for what is malformed or, unless `skip_unknown`, judges unknown ids.
    """
    path = qrels_file(folder, split)
    folder = Path(folder)
    corpus = dict(zip(*read_texts(folder), strict=True))
    queries = dict(zip(*read_texts(find_file(folder, "queries")), strict=True))
    qrels = read_qrels(path, queries, corpus, skip_unknown)
    if not qrels:
        raise ValueError(f"{path}: no judgement names a known query and a known document")
    return Beir(Path(os.path.abspath(folder)).name, corpus, {query: queries[query] for query in qrels}, qrels)

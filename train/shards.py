"""Teachers' scores of a file of examples, shard by shard, kept in a folder until all are there.

A shard is a run of examples, and its scores are a function of those examples and the teachers alone: a run that was
killed goes on with the shards that are missing, and ends with the same bytes. `state.json` says what the shards are
of; the scores of a shard lie in one array (T teachers, n pairs), each example's positives before its negatives.
`moved.json` names the file of embeddings, which is moved into place before the output is.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lens.files import atomic_file, read_json, write_json
from train.data import Example, text_key
from train.sources import DataSet
from train.teacher_pool import Here, Processes, chunks_of
from train.teachers import Pair, Scores, Teacher

STATE, MOVED = "state.json", "moved.json"


class Shards:
    """The folder of unfinished work beside an output."""

    def __init__(self, folder: Path, examples: DataSet, size: int) -> None:
        self.folder, self.examples, self.size = folder, examples, size
        self.count = math.ceil(len(examples) / size)

    def open(self, state: Mapping[str, Any], overwrite: bool) -> str | None:
        """Makes the folder, or takes up the one that is there; returns a line to print about that.

        Raises FileExistsError where it holds work on other inputs or with other options, unless `overwrite`, and
        where it is no such folder.
        """
        said = None
        for torn in self.folder.glob(f".{STATE}.*"):  # a run killed while it wrote its first file
            torn.unlink()
        if self.folder.exists() and any(self.folder.iterdir()):
            if not (self.folder / STATE).is_file():
                raise FileExistsError(f"{self.folder} is in the way and holds no {STATE} of an unfinished run: move it")
            before = read_json(self.folder / STATE)
            changed = sorted(name for name in {*before, *state} if before.get(name) != state.get(name))
            if not changed:
                done = self.count - len(self.missing())
                return f"going on: {done} of {self.count} shards are done in {self.folder}"
            if not overwrite:
                raise FileExistsError(
                    f"{self.folder} holds an unfinished run in which this differs: {', '.join(changed)}; run it as it "
                    "was begun, or begin anew (--overwrite)"
                )
            shutil.rmtree(self.folder)
            said = f"beginning anew, because this changed: {', '.join(changed)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / STATE, state)
        return said

    def close(self, finished: bool) -> None:
        """Removes the folder when the work is finished, or when nothing in it is worth keeping."""
        if finished or ((self.folder / STATE).is_file() and not any(self.folder.glob("part-*"))):
            shutil.rmtree(self.folder)

    def move(self, path: Path) -> None:
        """Notes that `path` is about to become this run's file of embeddings, see `moved`."""
        write_json(self.folder / MOVED, {"embeddings": str(path.resolve())})

    def part(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"part-{number:06d}.npz"

    def missing(self) -> list[int]:
        """Shards that are not done."""
        return [number for number in range(self.count) if not self.part(number).is_file()]

    def rows(self, number: int) -> range:
        """Numbers of the examples of a shard."""
        return range(number * self.size, min((number + 1) * self.size, len(self.examples)))

    def compute(
        self,
        number: int,
        teachers: Sequence[Teacher],
        pool: Here | Processes,
        embeddings: bool,
        step: Callable[[], Any],
    ) -> None:
        """Scores a shard and writes its file; `step` is called after every chunk of work. With `embeddings` those of
        the first teacher are kept too. Raises ValueError naming example and teacher for a score that is not finite."""
        examples = [self.examples[row] for row in self.rows(number)]
        pairs = [pair for example in examples for pair in pairs_of(example)]
        scores, kept = [], {}
        for place, teacher in enumerate(teachers):
            items = teacher.items(pairs)
            computed = _collect(pool, place, items, step)
            found = teacher.scores(pairs, items, computed)
            if not np.isfinite(found).all():
                first = int(np.flatnonzero(~np.isfinite(found))[0])
                row, name = self._place(number, examples, first)
                raise ValueError(
                    f"{self.examples.where(row)}: teacher {teacher.name} gives {name} the score {found[first]}: leave "
                    "the example out, or choose another --dtype or teacher"
                )
            scores.append(found)
            if embeddings and place == 0:
                keys = np.array([text_key(text) for text, *_ in items], dtype=np.int64)
                kept = {"embeddings": computed.astype(np.float16), "keys": keys}
        with atomic_file(self.part(number), overwrite=True) as temporary:
            np.savez(temporary, scores=np.stack(scores), **kept)

    def _place(self, number: int, examples: Sequence[Example], pair: int) -> tuple[int, str]:
        """Example and name of a pair of a shard."""
        for row, example in zip(self.rows(number), examples, strict=True):
            if pair < len(example.pos):
                return row, f"pos[{pair}]"
            if pair < len(example.pos) + len(example.neg):
                return row, f"neg[{pair - len(example.pos)}]"
            pair -= len(example.pos) + len(example.neg)
        raise IndexError(pair)

    def load(self, number: int, name: str = "scores") -> NDArray[Any]:
        """An array of a shard; raises ValueError naming a damaged file."""
        try:
            with np.load(self.part(number), allow_pickle=False) as file:
                array: NDArray[Any] = file[name]
                return array
        except Exception as error:  # zipfile's, numpy's and the system's
            raise ValueError(f"{self.part(number)} is damaged ({error}): remove it and start again") from error

    def embeddings(self) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
        """Embeddings (N, E) and keys (N,) of all distinct texts, in order of appearance."""
        keys = np.concatenate([self.load(number, "keys") for number in range(self.count)])
        first = np.sort(np.unique(keys, return_index=True)[1])
        starts = np.cumsum([0, *(len(self.load(number, "keys")) for number in range(self.count))])
        parts = []
        for number in range(self.count):
            mine = first[(first >= starts[number]) & (first < starts[number + 1])] - starts[number]
            parts.append(self.load(number, "embeddings")[mine])
        return np.concatenate(parts), keys[first]

    def combined(
        self, teachers: Sequence[str], weights: Sequence[float], standardise: bool, total: dict[str, Statistics]
    ) -> Iterator[tuple[int, Example, Scores]]:
        """(number, example, scores (n,)) of every example: the weighted mean of the teachers' scores, each less its
        mean and over its standard deviation over all pairs where `standardise`. Fills `total`, the statistics of
        every teacher and of `combined`, on the way."""
        shift, scale = np.zeros(len(teachers)), np.ones(len(teachers))
        if standardise:
            shift, scale = self._moments()
        share = np.array(weights, dtype=np.float64) / np.sum(weights)
        total.update({name: Statistics() for name in (*teachers, "combined")})
        for number in range(self.count):
            scores = self.load(number).astype(np.float64)  # (T, n)
            examples = [self.examples[row] for row in self.rows(number)]
            if scores.shape != (len(teachers), sum(len(item.pos) + len(item.neg) for item in examples)):
                raise ValueError(f"{self.part(number)} does not fit its examples: remove it and start again")
            mean = share @ ((scores - shift[:, None]) / scale[:, None])  # (n,)
            start = 0
            for row, example in zip(self.rows(number), examples, strict=True):
                end = start + len(example.pos) + len(example.neg)
                for name, values in zip((*teachers, "combined"), (*scores, mean), strict=True):
                    total[name].add(values[start:end], len(example.pos))
                yield row, example, mean[start:end].astype(np.float32)
                start = end

    def _moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation (T,) of each teacher over all pairs; a deviation of 0 counts as 1."""
        counts = [self.load(number).shape[1] for number in range(self.count)]
        mean = sum(self.load(number).sum(axis=1, dtype=np.float64) for number in range(self.count)) / sum(counts)
        squares = sum(
            ((self.load(number) - mean[:, None]) ** 2).sum(axis=1, dtype=np.float64) for number in range(self.count)
        )
        deviation = np.sqrt(squares / sum(counts))
        return mean, np.where(deviation > 0, deviation, 1.0)


@dataclass
class Statistics:
    """Means and standard deviations of the scores of positives and negatives, and how often a negative of an example
    scores above its best positive."""

    sums: dict[str, list[float]] = field(default_factory=lambda: {"positives": [0, 0, 0], "negatives": [0, 0, 0]})
    above: int = 0

    def add(self, scores: NDArray[Any], positives: int) -> None:
        """Adds an example's scores (n,), of which the first `positives` are those of its positives."""
        for name, values in (("positives", scores[:positives]), ("negatives", scores[positives:])):
            for place, value in enumerate((len(values), values.sum(), (values * values).sum())):
                self.sums[name][place] += float(value)
        self.above += int((scores[positives:] > scores[:positives].max()).sum())

    def result(self) -> dict[str, Any]:
        """The figures by name; None where there is nothing to count."""
        figures: dict[str, Any] = {}
        for name, (count, total, squares) in self.sums.items():
            mean = total / count if count else None
            figures[name] = {
                "mean": mean,
                "std": None if mean is None else math.sqrt(max(squares / count - mean * mean, 0.0)),
            }
        negatives = self.sums["negatives"][0]
        figures["negatives_above_the_best_positive"] = self.above / negatives if negatives else None
        return figures


def moved(folder: Path, path: Path) -> bool:
    """Whether the unfinished run in `folder` has moved its embeddings to `path`, or was about to when it was killed."""
    note = folder / MOVED
    return note.is_file() and read_json(note).get("embeddings") == str(path.resolve())


def pairs_of(example: Example) -> list[Pair]:
    """The pairs of an example, positives first."""
    instruction = example.prompt or ""
    return [Pair(example.query, text, instruction, example.symmetric) for text in (*example.pos, *example.neg)]


def _collect(pool: Here | Processes, teacher: int, items: Sequence[Any], step: Callable[[], Any]) -> Any:
    """What a teacher computes for its items, in their order: an array, or a CSR matrix."""
    chunks = chunks_of(items)
    found: dict[int, Any] = {}
    for place, computed in pool.run(teacher, [[items[number] for number in chunk] for chunk in chunks]):
        found[place] = computed
        step()
    order = np.argsort(np.concatenate(chunks))
    parts = [found[place] for place in range(len(chunks))]
    if sparse.issparse(parts[0]):
        return sparse.vstack(parts, format="csr")[order]
    return np.concatenate(parts)[order]

"""Hard negatives mined again, every so many steps, with the model that is being trained (ANCE, arXiv 2007.00808).

    step S done -> embed the corpus and the queries of the next batches -> search -> choose -> negatives/step-S.npz

What is mined after step S serves the `steps` steps from S + 1 on (counting from 0), and is mined for the queries of
these alone. The step in between is already laid out when mining begins. So the negatives of a batch follow from the
weights at one step and from nothing else: a run that was killed goes on to the same batches. The ranks share out the
corpus and meet through files in the run's folder, which all must see.

Legend: Q queries, k passages kept, W ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info

from lens.files import atomic_file
from train.checkpoints import whole_checkpoints
from train.config import Recipe
from train.data import Batches, Example
from train.negatives import Rules, choose
from train.passages import BLANK, Corpus, Texts, key_of
from train.ranking import Best
from train.retrievers import EmbeddingRetriever, LensEncoder, Query, Shards
from train.sources import distinct_passages

FOLDER = "negatives"
CORPUS_FILE = "corpus.jsonl"
BLOCK = 4096
"""Examples whose positives are embedded together."""
SHARD = 10_000
"""Passages that are embedded and searched at a time."""
REFRESHED = ("retrieval", "only_1neg")
"""Types whose negatives are mined; those of class and clustering data follow from labels."""
_WAIT = 0.2  # seconds


class Refreshed:
    """The mined negatives of examples, read from files as they are needed; goes along to the loader's workers."""

    def __init__(self, folder: Path, steps: int, accumulation: int) -> None:
        self.folder, self.steps, self.accumulation = folder, steps, accumulation
        self._read: tuple[int, dict[tuple[int, int], list[int]], Texts] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": None}

    def mined_at(self, step: int) -> int | None:
        """After how many steps the negatives of optimizer step `step` (from 0) were mined; None: never."""
        found = max(step - 1, 0) // self.steps * self.steps
        return found or None

    def __call__(self, batch: int, source: int, index: int, example: Example) -> Example:
        """The example with the negatives that batch `batch` (from 0) is to see; teacher scores are gone with the old
        ones."""
        step = self.mined_at(batch // self.accumulation)
        if step is None or example.type not in REFRESHED:
            return example
        rows, texts = self._generation(step)
        found = rows.get((source, index))
        if not found:
            return example
        return dataclasses.replace(
            example, neg=[texts[position] for position in found], pos_scores=None, neg_scores=None
        )

    def _generation(self, step: int) -> tuple[dict[tuple[int, int], list[int]], Texts]:
        if self._read is None or self._read[0] != step:
            path = self.folder / f"step-{step}.npz"
            self._await(path)
            with np.load(path, allow_pickle=False) as file:
                chosen = file["chosen"].tolist()
                parts = [chosen[first:last] for first, last in itertools.pairwise(file["starts"].tolist())]
                owners = zip(file["sources"].tolist(), file["indices"].tolist(), strict=True)
                rows = dict(zip(owners, parts, strict=True))
                self._read = step, rows, Texts(path.with_suffix(".bin"), file["positions"], file["ends"])
        return self._read[1], self._read[2]

    def _await(self, path: Path) -> None:
        """A worker that runs ahead of training waits until the file is there."""
        while not path.is_file():
            if get_worker_info() is None:
                raise FileNotFoundError(f"{path} is missing, which was mined for this step")
            parent = multiprocessing.parent_process()
            if parent is not None and not parent.is_alive():
                raise RuntimeError("the training process is gone")
            time.sleep(_WAIT)


def open_corpus(recipe: Recipe, sources: Sequence[Sequence[Example]]) -> Corpus | None:
    """The corpus of `refresh_corpus`, None where the training data's passages are mined, or nothing is.

    Raises what Corpus raises, and ValueError where no data is of a type that is mined.
    """
    if recipe.refresh_steps is not None and not _mined(sources):
        raise ValueError(f"refresh_steps mines for data of type {' and '.join(REFRESHED)}, and there is none")
    return Corpus(Path(recipe.refresh_corpus)) if recipe.refresh_corpus else None


def _mined(sources: Sequence[Sequence[Example]]) -> list[Sequence[Example]]:
    return [source for source in sources if source[0].type in REFRESHED]


class Refresh:
    """Mines for a run; every rank holds one and all call it together."""

    def __init__(self, recipe: Recipe, batches: Batches, output: Path, corpus: Corpus | None = None) -> None:
        """`corpus` is that of `open_corpus`; without one, rank 0 lays out the passages of the data."""
        assert recipe.refresh_steps is not None
        self.recipe, self.batches = recipe, batches
        self.folder = output / FOLDER
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rules = Rules(
            recipe.refresh_negatives,
            recipe.refresh_depth,
            recipe.refresh_skip,
            max_share=recipe.refresh_max_share,
            seed=recipe.seed,
        )
        self.refreshed = batches.refreshed = Refreshed(self.folder, recipe.refresh_steps, recipe.gradient_accumulation)
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(".*"):  # unfinished files of a run that was killed
                path.unlink()
            if corpus is None:
                with (
                    atomic_file(self.folder / CORPUS_FILE, overwrite=True) as temporary,
                    temporary.open("w", encoding="utf-8") as file,
                ):
                    for number, text in enumerate(distinct_passages(_mined(batches.sources))):
                        file.write(json.dumps({"_id": str(number), "text": text}, ensure_ascii=False) + "\n")
        self._meet()
        self.corpus = Corpus(self.folder / CORPUS_FILE) if corpus is None else corpus

    def go_on(self, step: int) -> None:
        """Prepares a run that goes on after `step` steps: removes what was mined later. Raises FileNotFoundError, on
        every rank, where what serves the next step is missing."""
        if self.rank == 0:
            for path in self.folder.glob("step-*"):
                later = re.match(r"step-(\d+)", path.name)
                if later and (int(later[1]) > step or path.is_dir()):  # folders are of minings that were killed
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._meet()
        served = self.refreshed.mined_at(step)
        if served is not None and not self._file(served).is_file():
            raise FileNotFoundError(
                f"{self._file(served)}, which checkpoint {step} goes on with, is missing: bring the folder back, or "
                "begin anew in another output"
            )

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step}.npz"

    def _tidy(self, step: int) -> None:
        """Removes what neither the batches under way nor a checkpoint needs any more."""
        saved = [int(path.name.partition("-")[2]) for path in whole_checkpoints(self.folder.parent)]
        needed = [step - self.refreshed.steps, *(self.refreshed.mined_at(at) or 0 for at in saved)]
        for path in self.folder.glob("step-*.*"):
            if int(path.stem.partition("-")[2]) < min(needed):
                path.unlink()

    def due(self, step: int) -> bool:
        """Whether to mine after this many steps; not what is there already."""
        batches = self.batches.schedule.steps
        wanted = step > 0 and step % self.refreshed.steps == 0
        return wanted and (step + 1) * self.refreshed.accumulation < batches and not self._file(step).is_file()

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        """Mines with a LENS model after `step` steps; for the log the seconds, the mean number of negatives, and the
        share of them that are random passages, for lack of others."""
        begun = time.monotonic()
        work = self.folder / f"step-{step}.work"
        if self.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        self._meet()
        owners: list[tuple[int, int]] = []
        numbers: list[int] = []  # of each owner's query
        places: dict[Query, int] = {}
        for source, index in self._coming(step):
            example = self.batches.sources[source][index]
            owners.append((source, index))
            numbers.append(places.setdefault((example.query, example.prompt), len(places)))
        retriever = None
        if places:
            retriever = EmbeddingRetriever("the model that is trained", LensEncoder(model), list(places))
            best = Best(len(places), self.rules.depth)
            for _ in retriever.search(Share(self.corpus, self.rank, self.world), SHARD, 0, best):
                pass
            best.save(work / f"best-{self.rank}.npz", 0)
        self._meet()
        counts = torch.zeros(2)
        if self.rank == 0:
            counts += torch.tensor(self._write(step, owners, numbers, work, retriever))
            shutil.rmtree(work)
            self._tidy(step)
        self._meet()
        if dist.is_initialized():
            counts = counts.to(model.device)
            dist.broadcast(counts, 0)
        total, drawn = counts.tolist()
        return {
            "refresh_seconds": round(time.monotonic() - begun, 3),
            "refresh_negatives": total / max(len(owners), 1),
            "refresh_random": drawn / max(total, 1),
        }

    def _coming(self, step: int) -> Iterator[tuple[int, int]]:
        """(data set, example) of the steps that are served, each once, of the types that are mined."""
        refreshed, schedule = self.refreshed, self.batches.schedule
        first = (step + 1) * refreshed.accumulation
        seen: set[tuple[int, int]] = set()
        for batch in range(first, min(first + refreshed.steps * refreshed.accumulation, schedule.steps)):
            source, indices = schedule.batch(batch)
            for owner in ((source, index) for index in indices):
                if owner not in seen and self.batches.sources[source][owner[1]].type in REFRESHED:
                    seen.add(owner)
                    yield owner

    def _write(
        self,
        step: int,
        owners: Sequence[tuple[int, int]],
        numbers: Sequence[int],
        work: Path,
        retriever: EmbeddingRetriever | None,
    ) -> tuple[int, int]:
        """Chooses and writes the negatives; returns how many there are, and how many of them are random."""
        chosen: list[list[int]] = []
        banned: dict[int, set[int]] = {}
        examples = (self.batches.sources[source][index] for source, index in owners)
        for example in examples:  # all positives of equal queries, over the examples at hand
            known = banned.setdefault(key_of(example.query), {key_of(example.query), BLANK})
            known.update(map(key_of, example.pos))
        counts = Counter[str]()
        if retriever is not None:
            lists = merged([work / f"best-{rank}.npz" for rank in range(self.world)], self.rules.depth)
            for first in range(0, len(owners), BLOCK):
                part = slice(first, first + BLOCK)
                chosen += self._choose(step, owners[part], numbers[part], lists, retriever, banned, counts)
        positions = np.unique([position for found in chosen for position in found]).astype(np.int64)
        path = self._file(step)
        texts = self.corpus.fetch(positions, path.with_suffix(".bin"))
        with atomic_file(path, overwrite=True) as temporary:
            np.savez(
                temporary,
                sources=np.array([source for source, _ in owners], dtype=np.int64),
                indices=np.array([index for _, index in owners], dtype=np.int64),
                starts=np.cumsum([0, *map(len, chosen)]),
                chosen=np.array([position for found in chosen for position in found], dtype=np.int64),
                positions=positions,
                ends=texts.ends,
            )
        return sum(map(len, chosen)), counts["random"]

    def _choose(
        self,
        step: int,
        owners: Sequence[tuple[int, int]],
        numbers: Sequence[int],
        lists: Best,
        retriever: EmbeddingRetriever,
        banned: dict[int, set[int]],
        counts: Counter[str],
    ) -> list[list[int]]:
        """The positions of some owners' negatives."""
        examples = [self.batches.sources[source][index] for source, index in owners]
        sizes = [len(example.pos) for example in examples]
        ends = np.cumsum([0, *sizes])
        own = np.zeros(ends[-1])
        if self.rules.filters:
            texts = [text for example in examples for text in example.pos]
            own = retriever.pairs(np.repeat(numbers, sizes), texts).astype(np.float64)
        chosen = []
        for place, ((source, index), example, number) in enumerate(zip(owners, examples, numbers, strict=True)):
            found = choose(
                self.rules,
                int.from_bytes(f"{step} {source} {index}".encode(), "big"),
                *lists.of(number),
                own[ends[place] : ends[place + 1]],
                self.corpus.keys,
                banned[key_of(example.query)],
                counts,
            )
            chosen.append([position for position, _ in found])
        return chosen

    def _meet(self) -> None:
        if dist.is_initialized():
            dist.barrier()


class Share:
    """Every W-th shard of a corpus, for one rank."""

    def __init__(self, corpus: Shards, rank: int, world: int) -> None:
        self.corpus, self.rank, self.world = corpus, rank, world

    def shards(self, size: int, first: int = 0) -> Iterator[tuple[int, list[str]]]:
        """As Corpus.shards."""
        for number, shard in enumerate(self.corpus.shards(size, first)):
            if number % self.world == self.rank:
                yield shard


def merged(files: Sequence[Path], k: int) -> Best:
    """The k best of each query over the lists that `Best.save` wrote, ties by position."""
    lists = []
    for file in files:
        best = Best(1, 1)
        best.load(file)
        lists.append(best)
    positions = np.concatenate([best.positions for best in lists], axis=1)  # (Q, W*k)
    scores = np.concatenate([best.scores for best in lists], axis=1)
    order = np.lexsort((positions, -scores), axis=1)[:, :k]
    lists[0].positions = np.take_along_axis(positions, order, axis=1)
    lists[0].scores = np.take_along_axis(scores, order, axis=1)
    return lists[0]

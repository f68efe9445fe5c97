"""Which examples make the batch of a step: a pure function of (seed, epoch, step), the same for any number of ranks."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

Blocks = Sequence[Sequence[int]]
"""Rows of every block of every file of a data set that is read as it comes."""


class Schedule:
    """Batches of examples, each from one data set.

    Every epoch shuffles each data set, cuts it into whole batches (the remainder waits for another shuffle) and
    shuffles the batches of all data sets together. A data set of weight w gives w times its rows, cut off to whole
    batches: several passes in different order, or the beginning of one. `batch_size` is one number or one for each
    data set. A data set with `blocks` is shuffled by file and within blocks only, so that it can be read in order.
    `steps` batches are served, over as many epochs as that takes.
    Raises ValueError naming a data set that is smaller than one batch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int | Sequence[int],
        seed: int,
        steps: int,
        weights: Sequence[float] | None = None,
        blocks: Sequence[Blocks | None] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.sizes = list(sizes)
        self.batch_sizes = [batch_size] * len(sizes) if isinstance(batch_size, int) else list(batch_size)
        self.weights = [1.0] * len(sizes) if weights is None else list(weights)
        self.blocks = [None] * len(sizes) if blocks is None else list(blocks)
        self.seed = seed
        self.steps = steps
        self.counts: list[int] = []
        """Batches of every data set in an epoch."""
        for source, (size, batch, weight) in enumerate(zip(self.sizes, self.batch_sizes, self.weights, strict=True)):
            name = f"data set {source + 1} of {len(sizes)}" if names is None else names[source]
            if size < batch:
                raise ValueError(
                    f"{name} has {size} examples, fewer than batch_size={batch}: lower batch_size or join data sets"
                )
            served = int(weight * size + 1e-6)
            self.counts.append(served // batch)
            if not self.counts[-1]:
                raise ValueError(
                    f"{name} gives {served} of its {size} examples with weight {weight:g}, fewer than "
                    f"batch_size={batch}: raise its weight or lower batch_size"
                )
        self.steps_per_epoch = sum(self.counts)
        self._epoch: int | None = None
        self._batches: list[tuple[int, int]] = []
        self._orders: dict[tuple[int, int], _Shuffled | _ShuffledBlocks] = {}

    def batch(self, step: int) -> tuple[int, list[int]]:
        """(data set, indices of its examples) of the batch of `step`; raises IndexError past the last step."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch != epoch:
            self._epoch, self._orders = epoch, {}
            self._batches = [(source, number) for source, count in enumerate(self.counts) for number in range(count)]
            random.Random(f"{self.seed} {epoch}").shuffle(self._batches)
            if any(self.blocks):
                self._batches = self._in_turn(self._batches)
        source, number = self._batches[position]
        size = self.batch_sizes[source]
        # Batches never span two passes, so that none holds an example twice.
        turn, place = divmod(number, self.sizes[source] // size)
        return source, self._order(source, epoch, turn).take(place * size, (place + 1) * size)

    def _in_turn(self, batches: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The batches of every data set with blocks in the order in which they are read, in the places they have."""
        seen = [0] * len(self.sizes)
        ordered = []
        for source, number in batches:
            ordered.append((source, number if self.blocks[source] is None else seen[source]))
            seen[source] += 1
        return ordered

    def _order(self, source: int, epoch: int, turn: int) -> _Shuffled | _ShuffledBlocks:
        order = self._orders.get((source, turn))
        if order is None:
            seed = f"{self.seed} {epoch} {source}" + (f" {turn}" if turn else "")
            blocks = self.blocks[source]
            whole = (turn + 1) * (self.sizes[source] // self.batch_sizes[source]) <= self.counts[source]
            order = _Shuffled(self.sizes[source], seed) if blocks is None else _ShuffledBlocks(blocks, seed, whole)
            self._orders[source, turn] = order
        return order

    def rng(self, step: int, position: int) -> random.Random:
        """The random numbers of one place in one batch."""
        return random.Random(f"{self.seed} {step} {position} choice")


class _Shuffled:
    """Rows of a data set in random order."""

    def __init__(self, size: int, seed: str) -> None:
        order = list(range(size))
        random.Random(seed).shuffle(order)
        self.order = np.array(order)

    def take(self, start: int, stop: int) -> list[int]:
        rows: list[int] = self.order[start:stop].tolist()
        return rows


class _ShuffledBlocks:
    """Rows of a data set: its files in random order, the blocks of a file in their own, the rows of a block in random
    order. A pass that is not taken whole begins at any block, or one file would always give its beginning."""

    def __init__(self, files: Blocks, seed: str, whole: bool = True) -> None:
        self.seed = seed
        rng = random.Random(seed)
        starts = list(accumulate((sum(file) for file in files), initial=0))
        order = list(range(len(files)))
        rng.shuffle(order)
        self.starts: list[int] = []  # first row of every block
        self.counts: list[int] = []
        for file in order:
            self.starts += [starts[file] + offset for offset in list(accumulate(files[file], initial=0))[:-1]]
            self.counts += files[file]
        first = 0 if whole else rng.randrange(len(self.counts))
        self.starts = self.starts[first:] + self.starts[:first]
        self.counts = self.counts[first:] + self.counts[:first]
        self.ends = list(accumulate(self.counts))
        self._rows: tuple[int, list[int]] = (-1, [])

    def take(self, start: int, stop: int) -> list[int]:
        rows: list[int] = []
        while start < stop:
            block = bisect_right(self.ends, start)
            offset = start - (self.ends[block] - self.counts[block])
            part = self._block(block)[offset : offset + stop - start]
            rows += part
            start += len(part)
        return rows

    def _block(self, block: int) -> list[int]:
        if self._rows[0] != block:
            rows = list(range(self.starts[block], self.starts[block] + self.counts[block]))
            random.Random(f"{self.seed} block {self.starts[block]}").shuffle(rows)
            self._rows = (block, rows)
        return self._rows[1]

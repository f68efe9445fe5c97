"""Which examples make the batch of a step: a pure function of (seed, step), the same for any number of ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence


class Schedule:
    """Batches of `batch_size` examples, each from one data set.

    Every epoch shuffles each data set, cuts it into whole batches (the remainder waits for another epoch's shuffle)
    and shuffles the batches of all data sets together. `steps` batches are served, over as many epochs as that takes.
    Raises ValueError when a data set is smaller than one batch.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int, steps: int) -> None:
        for source, size in enumerate(sizes):
            if size < batch_size:
                raise ValueError(
                    f"data set {source + 1} of {len(sizes)} has {size} examples, fewer than batch_size={batch_size}: "
                    "lower batch_size or join data sets"
                )
        self.sizes = list(sizes)
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.steps_per_epoch = sum(size // batch_size for size in sizes)
        self._epoch: tuple[int, list[tuple[int, list[int]]]] | None = None

    def batch(self, step: int) -> tuple[int, list[int]]:
        """(data set, indices of its examples) of the batch of `step`; raises IndexError past the last step."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1][position]

    def _shuffled(self, epoch: int) -> list[tuple[int, list[int]]]:
        batches: list[tuple[int, list[int]]] = []
        for source, size in enumerate(self.sizes):
            order = list(range(size))
            random.Random(f"{self.seed} {epoch} {source}").shuffle(order)
            whole = size // self.batch_size * self.batch_size
            batches += [(source, order[i : i + self.batch_size]) for i in range(0, whole, self.batch_size)]
        random.Random(f"{self.seed} {epoch}").shuffle(batches)
        return batches

    def rng(self, step: int, position: int) -> random.Random:
        """The random numbers of one place in one batch."""
        return random.Random(f"{self.seed} {step} {position} choice")

"""Texts -> embeddings in stages that work ahead of each other.

    texts -> tokens, a block at a time -> batches of like length -> inputs on the device -> embeddings in memory

A block of texts is tokenised in a thread while the model computes the one before, so that memory holds the tokens of
three blocks at most. On a GPU the next batch is laid out in pinned memory and sent in a thread as well, and a batch's
embeddings are waited for when the next batch is already under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lens.bag import BagBatch
from lens.text import Batch as PaddedBatch
from lens.text import Kind, PackedBatch, TextProcessor, Tokens, token_batches

# Legend: B texts of a batch, K clusters.

BLOCK = 4096
"""Texts that are tokenised, and sorted by length, together: on a CPU, sorting more than 512 at once saved no time."""

T = TypeVar("T")
Batch = tuple[list[int], list[Tokens]]  # which texts of the whole list, and their tokens
Prepared = tuple[list[int], dict[str, Any]]  # the same texts, and the arguments of LensModel
_END: Any = object()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items of an iterator, each made in a thread while the one before is in use; errors come as they are."""
    with ThreadPoolExecutor(1, thread_name_prefix="lens-ahead") as thread:
        coming = thread.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, items, _END)
            yield item


def plan(
    text: TextProcessor, texts: Sequence[str], kind: Kind, instruction: str | None, budget: int, packed: bool
) -> Generator[list[Batch]]:
    """The batches of each block of texts, of `budget` tokens at most, see `token_batches`; the next block is tokenised
    ahead. Raises what `TextProcessor` raises."""

    def block(start: int) -> list[Batch]:
        tokens = text(texts[start : start + BLOCK], kind, instruction)
        batches = token_batches([len(item.ids) for item in tokens], budget, packed)
        return [([start + place for place in batch], [tokens[place] for place in batch]) for batch in batches]

    blocks = map(block, range(0, len(texts), BLOCK))
    yield from ahead(blocks) if len(texts) > BLOCK else blocks


def prepare(
    lay_out: Callable[[Sequence[Tokens]], PaddedBatch | PackedBatch | BagBatch],
    batches: Iterable[Batch],
    device: torch.device,
) -> Generator[Prepared]:
    """Batches, each laid out, as the model's arguments on `device`; on a GPU the next one is sent ahead, in the
    caller's stream."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def send(batch: Batch) -> Prepared:
        rows, tokens = batch
        laid_out = lay_out(tokens)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return rows, laid_out.inputs(device)

    def sent() -> Generator[Prepared]:
        yield from map(send, batches) if stream is None else ahead(map(send, batches))

    return sent()


@dataclass(frozen=True, slots=True)
class _Pending:
    """A batch's embeddings (B, K) that the device may still be computing or copying."""

    rows: list[int]
    embeddings: Tensor
    finite: Tensor
    copied: torch.cuda.Event | None

    def result(self, dtype: torch.dtype) -> tuple[list[int], Tensor]:
        if self.copied is not None:
            self.copied.synchronize()
        if not bool(self.finite):
            raise FloatingPointError(
                f"embeddings hold NaN or infinite values in {dtype}; load with dtype='bfloat16' or 'float32'"
            )
        return self.rows, self.embeddings.cpu()


def compute(
    model: Callable[..., Tensor],
    batches: Generator[Prepared],
    shrink: Callable[[Tensor], Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Generator[tuple[list[int], Tensor]]:
    """Rows and embeddings (B, K), passed through `shrink`, of each batch on the CPU, in the order of the batches.

    Where the device works beside the CPU a batch is waited for once the next has been started. Raises
    FloatingPointError, naming the model's `dtype`, for values that are not finite.
    """
    pending: deque[_Pending] = deque()
    with closing(batches):
        for rows, inputs in batches:
            pending.append(_start(model, rows, inputs, shrink, device))
            if device.type == "cpu" or len(pending) > 1:
                yield pending.popleft().result(dtype)
        while pending:
            yield pending.popleft().result(dtype)


def _start(
    model: Callable[..., Tensor],
    rows: list[int],
    inputs: dict[str, Any],
    shrink: Callable[[Tensor], Tensor],
    device: torch.device,
) -> _Pending:
    embeddings = model(**inputs)
    finite = torch.isfinite(embeddings).all()
    embeddings = shrink(embeddings)
    if device.type != "cuda":
        return _Pending(rows, embeddings, finite, None)
    embeddings, finite = (
        torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in (embeddings, finite)
    )
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(device))
    return _Pending(rows, embeddings, finite, copied)

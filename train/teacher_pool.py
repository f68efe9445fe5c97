"""Teachers on one device in this process, or on several with a process for each.

Both take chunks of items and give back what was computed for each, so that results do not depend on how many devices
there are. A process has one chunk at a time; when one dies or fails, all are ended.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from lens.workers import deaf
from train.rows import brief
from train.teachers import Compute, Item, Teacher

CHUNK_TOKENS = 1 << 16
"""Tokens of a chunk at least, where there are so many; four letters are taken for a token."""
Failure = tuple[bool, str]  # whether a library is missing, message


def chunks_of(items: Sequence[Item]) -> list[list[int]]:
    """Numbers of the items, the longest first, in chunks of about CHUNK_TOKENS."""
    costs = [2 + sum(map(len, item)) // 4 for item in items]
    chunks: list[list[int]] = []
    cost = CHUNK_TOKENS
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        if cost >= CHUNK_TOKENS:
            chunks.append([])
            cost = 0
        chunks[-1].append(number)
        cost += costs[number]
    return chunks


class Here:
    """Teachers in this process."""

    def __init__(self, teachers: Sequence[Teacher], device: torch.device) -> None:
        """Raises ValueError or ImportError for a teacher that cannot be loaded."""
        self.teachers, self.device = teachers, device
        self.loaded = [teacher.load(device) for teacher in teachers]

    def run(self, number: int, chunks: Sequence[Sequence[Item]]) -> Iterator[tuple[int, Any]]:
        """(chunk, what teacher `number` computed for it); raises ValueError naming the teacher where that fails."""
        for place, items in enumerate(chunks):
            yield place, _compute(self.teachers[number], self.loaded[number], items)

    def close(self) -> None:
        """Does nothing: there is nothing to end."""


class Processes:
    """Teachers in a process for each device."""

    def __init__(self, teachers: Sequence[Teacher], devices: Sequence[torch.device]) -> None:
        """Starts them and waits until each has loaded the teachers; raises as Here, and ChildProcessError."""
        context = multiprocessing.get_context("spawn")  # neither GPUs nor OpenMP survive a fork
        threads = max(1, torch.get_num_threads() // len(devices))
        self.devices = devices
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        try:
            for device in devices:
                ours, theirs = context.Pipe()
                self.connections.append(ours)
                process = context.Process(target=_work, args=(theirs, teachers, str(device), threads), daemon=True)
                self.processes.append(process)
                with deaf():
                    process.start()
                theirs.close()
            for worker in range(len(devices)):
                self._receive(worker)
        except BaseException:
            self.close()
            raise

    def run(self, number: int, chunks: Sequence[Sequence[Item]]) -> Iterator[tuple[int, Any]]:
        """As Here.run, chunks as they are done; raises ChildProcessError for a process that died."""
        waiting = list(enumerate(chunks))[::-1]
        held: dict[int, int] = {}  # worker -> chunk
        while waiting or held:
            for worker in range(len(self.devices)):
                if waiting and worker not in held:
                    held[worker], items = waiting.pop()
                    try:
                        self.connections[worker].send((number, items))
                    except OSError:
                        raise self._died(worker) from None
            for connection in wait([self.connections[worker] for worker in held]):
                worker = self.connections.index(connection)  # type: ignore[arg-type]
                yield held.pop(worker), self._receive(worker)

    def _receive(self, worker: int) -> Any:
        try:
            found, failure = self.connections[worker].recv()
        except (EOFError, OSError):
            raise self._died(worker) from None
        if failure is not None:
            missing, message = failure
            raise (ImportError if missing else ValueError)(message)
        return found

    def _died(self, worker: int) -> ChildProcessError:
        process = self.processes[worker]
        process.join(5)
        return ChildProcessError(
            f"the process for {self.devices[worker]} died (exit code {process.exitcode}; -9: killed, as Linux does "
            "when memory runs out); what is done is kept: start again to go on"
        )

    def close(self) -> None:
        """Ends the processes."""
        for connection in self.connections:
            connection.close()
        started = [process for process in self.processes if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _compute(teacher: Teacher, loaded: Compute, items: Sequence[Item]) -> Any:
    try:
        return loaded(items)
    except FloatingPointError as error:
        raise ValueError(f"teacher {teacher.name} failed: {brief(error)}") from error
    except RuntimeError as error:  # torch's, running out of memory among them
        raise ValueError(
            f"teacher {teacher.name} failed: {brief(error)}; where memory ran out, lower --batch-tokens"
        ) from error


def _work(connection: Connection, teachers: Sequence[Teacher], device: str, threads: int) -> None:
    """Loads the teachers and computes what comes, until the pipe ends, also because the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    torch.set_num_threads(threads)

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    with suppress(EOFError, OSError):
        try:
            here = Here(teachers, torch.device(device))
        except Exception as error:
            connection.send((None, _failure(device, error)))
            return
        connection.send((None, None))
        while True:
            number, items = connection.recv()
            try:
                ((_, found),) = here.run(number, [items])
            except Exception as error:
                connection.send((None, _failure(device, error)))
            else:
                connection.send((found, None))


def _failure(device: str, error: Exception) -> Failure:
    return isinstance(error, ImportError), f"on {device}: {brief(error)}"

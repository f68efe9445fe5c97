"""Many tasks on several devices: a process for each, which takes the next system and task until none is left.

Every process loads all systems on its own device. Results reach the folder as without it, so that a run goes on where
it was ended, on whatever devices. `lens.workers` shares the texts of each task among devices instead.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from eval.cache import WholeCache
from eval.snapshot import parts_of, unload
from lens.devices import resolve_devices
from lens.workers import as_error, begin, deaf, death, end, failure_of, process_names

Job = tuple[str, str]
"""The names of a system and a task."""


@dataclass(frozen=True)
class Worker:
    """A process and the pipe to it; `name` is that of its device."""

    name: str
    process: Any
    connection: Connection

    def send(self, job: Job, doing: str) -> None:
        """Gives it the next job; raises ChildProcessError as `receive` does."""
        try:
            self.connection.send(job)
        except OSError:
            raise self._died(doing) from None

    def receive(self, doing: str) -> Any:
        """What it found; raises what it raised, or ChildProcessError where it died, naming device and job."""
        try:
            found, failure = self.connection.recv()
        except (EOFError, OSError):
            raise self._died(doing) from None
        if failure is not None:
            kind, message, trace = failure
            raise as_error(self.name, kind, f"{doing}: {message}" if doing else message, trace)
        return found

    def _died(self, doing: str) -> ChildProcessError:
        where = f"; {doing} is not finished, what was stays, and the same command goes on" if doing else ""
        return ChildProcessError(f"{death(self.name, self.process)}{where}")


def by_task(options: argparse.Namespace, tasks: Sequence[Any], keep: Sequence[str] = ()) -> dict[Job, Any]:
    """What `eval.board.evaluated` gave for every system and task of a command line, by their names.

    `tasks` are those that the command line names, `keep` the systems whose hits are fused later. Raises ValueError for
    a device that is not there; what loading raised, with the device; ChildProcessError for a process that died, naming
    device, system and task. All processes are ended in the end, also by an error or Ctrl-C.
    """
    names: set[str] = set()
    for task in tasks:
        for part in parts_of(task):
            if part.metadata.name in names:
                raise ValueError(f"{part.metadata.name} is asked for twice, once in an aggregate: not with --by task")
            names.add(part.metadata.name)
    size = {task.metadata.name: cost(task) for task in tasks}
    done: dict[Job, Any] = {}
    waiting: deque[Job] | None = None
    with workers(options, keep) as team:
        held: dict[Any, tuple[Worker, Job | None]] = {worker.connection: (worker, None) for worker in team}
        while held:
            for connection in wait(list(held)):
                worker, job = held.pop(connection)  # no job: it was loading
                found = worker.receive(" on ".join(job or ()))
                if job is None:
                    if waiting is None:  # all find the same ones
                        waiting = deque(sorted(found, key=lambda job: size[job[1]], reverse=True))
                        total = len(waiting)
                else:
                    done[job] = found
                    how = "failed" if found[0] is None else "done"  # why is told in the end
                    print(f"{' on '.join(job)}: {how} by {worker.name}, {len(done)} of {total}", file=sys.stderr)
                if waiting:
                    job = waiting.popleft()
                    worker.send(job, " on ".join(job))
                    held[connection] = worker, job
    return done


def on_one(options: argparse.Namespace, device: str) -> argparse.Namespace:
    """The command line with one device in place of several, whose snapshot was verified."""
    return argparse.Namespace(**{**vars(options), "device": device, "devices": None, "verify": False})


def cost(task: Any) -> tuple[int, bool]:
    """What a task costs, to begin with the longest: the letters of what is evaluated, as far as mteb knows them, then
    whether it is retrieval."""
    letters = 0
    for part in parts_of(task):
        stats = part.metadata.descriptive_stats or {}
        columns = [column for split in part.eval_splits for column in stats.get(split, {}).values()]
        letters += sum(column.get("total_text_length") or 0 for column in columns if isinstance(column, dict))
    return letters, task.metadata.type == "Retrieval"


@contextmanager
def workers(options: argparse.Namespace, keep: Sequence[str] = ()) -> Iterator[list[Worker]]:
    """A process for each of `options.devices`, ended with the block."""
    devices = resolve_devices(options.devices)
    threads = max(1, torch.get_num_threads() // len(devices))
    lock = options.output / "work" / ".saving.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")  # neither GPUs nor OpenMP survive a fork
    team: list[Worker] = []
    try:
        for device, name in zip(devices, process_names(devices), strict=True):
            ours, theirs = context.Pipe()
            arguments = theirs, on_one(options, str(device)), threads, lock, frozenset(keep)
            process = context.Process(target=_work, args=arguments, name=f"eval {name}", daemon=True)
            team.append(Worker(name, process, ours))
            with deaf():
                process.start()
            theirs.close()
        yield team
    finally:
        end([worker.connection for worker in team], [worker.process for worker in team])
        lock.unlink(missing_ok=True)


def _work(connection: Connection, options: argparse.Namespace, threads: int, lock: Path, keep: frozenset[str]) -> None:
    """Loads systems and tasks and evaluates what comes, until the pipe ends."""
    begin(threads)
    threadpool_limits(threads)  # scikit-learn's
    _without_bars()
    from eval import benchmark
    from eval.board import evaluated
    from eval.peers import takes

    benchmark.quiet()
    if options.device.startswith("cuda"):
        torch.cuda.set_device(options.device)
    with suppress(EOFError, OSError):  # the parent is gone
        try:
            tasks = {task.metadata.name: task for task in benchmark.tasks_of(options)}
            systems = benchmark.systems(options)
            cache = WholeCache(options.output, lock)
            with cache.lock:
                benchmark.check_arithmetic(options.output / "systems.json", systems)
        except Exception as error:
            connection.send((None, failure_of(error)))
            return
        pairs = [(name, other) for name in systems for other, task in tasks.items() if takes(systems[name], task)]
        connection.send((pairs, None))
        for name, other in iter(connection.recv, None):
            try:
                answer = evaluated(systems[name], tasks[other], cache, name in keep), None
                unload(tasks[other])
            except Exception as error:
                answer = None, failure_of(error)
            connection.send(answer)


def _without_bars() -> None:
    """Turns progress bars off: those of several processes would be written over each other."""
    start = tqdm.__init__

    def disabled(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **{**options, "disable": True})

    tqdm.__init__ = disabled

"""One model on several devices: a process for each, kept between calls, fed with chunks of texts.

The processes get the model as it is in memory, not from its folder, so that one that was changed, built or never saved
gives the same vectors there. Its tensors lie once in memory that all processes see, in which workers on the CPU leave
them; the rest travels as a pickle. Chunks go out by a pipe to each worker, the next before the last is done; results
come back by the same pipe. The end of a pipe tells of a dead worker, or of a dead parent, so that neither waits for
ever.
"""

from __future__ import annotations

import builtins
import io
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lens.devices import resolve_device
from lens.packed import forget_limits
from lens.pipeline import ahead
from lens.quantized import is_quantized

# Legend: n texts of a chunk, K clusters.

_AHEAD = 2  # chunks that a worker has: one that it computes, and the next
_SHARES = 8  # chunks for each worker, so that all end at about the same time
_CHUNK_BATCHES = 2  # batches of a chunk at least
_CHUNK_VALUES = 1 << 24  # values of a chunk's embeddings at most
_LETTERS = 4  # letters of a token, about
_ALIGNMENT = 64  # bytes
_ERRORS = (ValueError, TypeError, FloatingPointError, OSError, ImportError, MemoryError, NotImplementedError)

Failure = tuple[str, str, str]  # an error's class, message and traceback


class Pool:
    """Processes that each hold a model on a device of their own; a context manager.

    `LENS.start_multi_process_pool` makes one and `LENS.encode(..., pool=pool)` uses it. The model is the one at the
    start: later changes do not reach the processes. When one dies, or a call is interrupted, all are ended.
    """

    def __init__(self, encoder: Any, devices: Sequence[str | torch.device]) -> None:
        """Starts the processes with the model of a LENS and waits until each has it on its device.

        Raises TypeError for one device without a list, ValueError for devices that are not there and for quantised
        backbones; what a worker raised, or ChildProcessError where it died, naming its device.
        """
        if isinstance(devices, str | torch.device):
            raise TypeError(f"devices must be a list, found {devices!r}: write [{str(devices)!r}]")
        self.devices = [resolve_device(device) for device in devices]
        self.names = process_names(self.devices)
        if not self.devices:
            raise ValueError("no device is named: give a list such as ['cuda:0', 'cuda:1']")
        if is_quantized(encoder.model.backbone):
            raise ValueError("a backbone in 4 or 8 bits works on one device only: load it without quantization")
        skeleton, tensors = _taken_apart((encoder.model, encoder.tokenizer, encoder.compiled, encoder.packed))
        threads = max(1, torch.get_num_threads() // len(self.devices))
        context = multiprocessing.get_context("spawn")  # neither GPUs nor OpenMP survive a fork
        self._model = weakref.ref(encoder.model)
        self._calling = threading.Lock()
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._end = weakref.finalize(self, end, self._connections, self._processes)
        try:
            for device, name in zip(self.devices, self.names, strict=True):
                ours, theirs = context.Pipe()
                self._connections.append(ours)
                arguments = theirs, tensors, str(device), threads
                process = context.Process(target=_work, args=arguments, name=f"lens {name}", daemon=True)
                self._processes.append(process)
                with deaf():
                    process.start()
                theirs.close()
            # Not with the arguments: a process that died before it read them would be waited for, for ever.
            for worker in range(len(self.devices)):
                self._send(worker, skeleton)
            for worker in range(len(self.devices)):
                if isinstance(failure := self._receive(worker), Exception):
                    raise failure
        except BaseException:
            self.close()
            raise

    def check(self, model: nn.Module) -> None:
        """Raises ValueError unless the processes were started with this model."""
        if self._model() is not model:
            raise ValueError("this pool was started with another model: start one with this model")

    def close(self) -> None:
        """Ends the processes; a second call does nothing."""
        self._end()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode(
        self, texts: Sequence[str], chunks: Sequence[list[int]], **options: Any
    ) -> Generator[tuple[list[int], Any]]:
        """Rows and embeddings (n, K) of each chunk of rows, as they are done.

        `options` are those of `LENS.encode`. Raises what a worker raised, naming its device; ChildProcessError for
        one that died, ValueError for a pool that was closed.
        """
        with self._calling:
            if not self._end.alive:
                raise ValueError("these processes were ended: start another pool, or load the model again")
            try:
                failure = yield from self._exchange(texts, chunks, options)
            except BaseException:  # what is left in the pipes belongs to nobody
                self.close()
                raise
            if failure is not None:
                raise failure

    def _exchange(
        self, texts: Sequence[str], chunks: Sequence[list[int]], options: dict[str, Any]
    ) -> Generator[tuple[list[int], Any], None, Exception | None]:
        """Yields as `encode`; returns the first error of a worker, with nothing left in the pipes."""
        held = [0] * len(self.devices)
        failure: Exception | None = None
        sent = 0
        while True:
            while sent < len(chunks) and failure is None and min(held) < _AHEAD:
                worker = held.index(min(held))
                self._send(worker, (sent, [texts[row] for row in chunks[sent]], options))
                held[worker] += 1
                sent += 1
            if not any(held):
                return failure
            for connection in wait(self._connections):
                worker = self._connections.index(connection)  # type: ignore[arg-type]
                found = self._receive(worker)
                held[worker] -= 1
                if isinstance(found, Exception):
                    failure = failure or found
                elif failure is None:
                    number, embeddings = found
                    yield chunks[number], embeddings

    def _send(self, worker: int, task: Any) -> None:
        try:
            self._connections[worker].send(task)
        except OSError:
            raise self._died(worker) from None

    def _receive(self, worker: int) -> Any:
        """What a worker found, or its error."""
        try:
            found, failure = self._connections[worker].recv()
        except (EOFError, OSError):
            raise self._died(worker) from None
        return found if failure is None else as_error(self.names[worker], *failure)

    def _died(self, worker: int) -> ChildProcessError:
        return death(self.names[worker], self._processes[worker])


def process_names(devices: Sequence[torch.device]) -> list[str]:
    """What processes for these devices are called in messages, those of the same device with their numbers."""
    names = list(map(str, devices))
    return [name if names.count(name) == 1 else f"{name} (process {number})" for number, name in enumerate(names, 1)]


def death(name: str, process: Any) -> ChildProcessError:
    """The error that tells how a process for a device, called `name`, ended though it should not have."""
    process.join(5)
    code = process.exitcode
    if code is not None and code < 0:
        why = f"by signal {-code}: it was killed, as Linux does when memory runs out"
    else:
        why = (
            f'(exit code {code}): it could not start, or the program lacks `if __name__ == "__main__":` around '
            "what it does, which it needs when it starts processes"
        )
    return ChildProcessError(f"the process for {name} died {why}")


def as_error(worker: str, name: str, message: str, trace: str) -> Exception:
    """The error of a worker, from what `failure_of` made of it there, with the worker's name."""
    error: Exception = getattr(builtins, name)(f"on {worker}: {message}")
    error.add_note(f"In the process for {worker}:\n{trace}")
    return error


@contextmanager
def deaf() -> Iterator[None]:
    """Ctrl-C waits here until the end, and processes started here never hear it, not even while they import: their
    parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # when the first process starts it, it unblocks Ctrl-C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(connections: Sequence[Connection], processes: Sequence[Any]) -> None:
    """Ends processes, at once, those that were started."""
    for connection in connections:
        connection.close()
    started = [process for process in processes if process.pid is not None]
    for process in started:
        process.terminate()
    for process in started:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


def split(texts: Sequence[str], width: int, limit: int, budget: int, workers: int) -> list[list[int]]:
    """Rows of texts, which are cut at `limit` tokens, the longest first, in chunks of about equal cost for `workers`.

    A chunk makes two batches of `budget` tokens where there is so much text, and 64 MB of embeddings of `width` values
    at most. A token is taken as four letters, and the workers' pace evens out the rest.
    """
    costs = [2 + min(len(text) // _LETTERS, limit) for text in texts]
    share = max(sum(costs) // (_SHARES * workers), _CHUNK_BATCHES * budget)
    most = max(1, _CHUNK_VALUES // width)
    chunks: list[list[int]] = []
    cost = share
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        if cost >= share or len(chunks[-1]) == most:
            chunks.append([])
            cost = 0
        chunks[-1].append(row)
        cost += costs[row]
    return chunks


# --- in the worker --------------------------------------------------------------------------------------------------


def _work(connection: Connection, tensors: Any, device: str, threads: int) -> None:
    """Puts the model together on its device and embeds what comes, until the pipe ends."""
    begin(threads)
    with suppress(EOFError, OSError):  # the parent is gone
        skeleton = connection.recv()
        try:
            encoder = _encoder(skeleton, tensors, device)
        except Exception as error:
            connection.send((None, failure_of(error)))
            return
        connection.send((None, None))

        def run(task: tuple[int, list[str], dict[str, Any]]) -> tuple[Any, Failure | None]:
            number, texts, options = task
            try:
                with _current(device):  # each thread has its own current device
                    return (number, encoder.encode(texts, show_progress=False, **options)), None
            except Exception as error:
                return None, failure_of(error)

        # While a chunk is computed the next one comes in and the last one's embeddings go out.
        for answer in ahead(map(run, ahead(iter(connection.recv, None)))):
            connection.send(answer)


def begin(threads: int) -> None:
    """What a process does first: it leaves Ctrl-C to its parent, ends with it, and takes its share of the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where another thread than the main one started this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizer's
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is ended would leave behind


def _end_with_parent() -> None:
    """Ends this process, in the middle of a chunk too, when its parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encoder(skeleton: bytes, tensors: Any, device: str) -> Any:
    from lens.encoder import LENS

    model, tokenizer, compiled, packed = _put_together(skeleton, tensors)
    forget_limits(model.backbone)
    with _current(device):
        return LENS(model, tokenizer, device, compiled, packed)


def _current(device: str) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.startswith("cuda") else nullcontext()


def failure_of(error: Exception) -> Failure:
    """The error that is being handled, as it goes to the parent: in the nearest of the plain classes, else as a
    RuntimeError."""
    name = next((kind.__name__ for kind in _ERRORS if isinstance(error, kind)), "RuntimeError")
    return name, str(error), traceback.format_exc()


# --- a model in shared memory ---------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Leaves plain tensors and parameters out, to be put into shared memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: dict[int, tuple[int, Tensor]] = {}  # id -> offset, tensor
        self.size = 0  # bytes

    def persistent_id(self, item: Any) -> Any:
        if type(item) not in (Tensor, nn.Parameter) or item.layout != torch.strided:
            return None
        if id(item) not in self.tensors:
            self.tensors[id(item)] = self.size, item
            self.size += -(-item.numel() * item.itemsize // _ALIGNMENT) * _ALIGNMENT
        offset, _ = self.tensors[id(item)]
        learnt = item.requires_grad if isinstance(item, nn.Parameter) else None
        return id(item), offset, tuple(item.shape), item.dtype, learnt


class _Unpickler(pickle.Unpickler):
    """Puts tensors in shared memory in their places; one that stands in two stands in both again."""

    def __init__(self, file: io.BytesIO, memory: Tensor) -> None:
        super().__init__(file)
        self.memory = memory
        self.tensors: dict[int, Tensor] = {}

    def persistent_load(self, key: Any) -> Tensor:
        name, offset, shape, dtype, learnt = key
        if name not in self.tensors:
            count = torch.Size(shape).numel() * dtype.itemsize
            tensor = self.memory[offset : offset + count].view(dtype).view(shape)
            self.tensors[name] = tensor if learnt is None else nn.Parameter(tensor, requires_grad=learnt)
        return self.tensors[name]


def _taken_apart(parts: Any) -> tuple[bytes, Any]:
    """A pickle without tensors, and the shared memory that holds these, in /dev/shm or where it is too small a file."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(parts)
    shared = multiprocessing.get_context("spawn").RawArray("B", max(pickler.size, 1))
    memory = torch.frombuffer(shared, dtype=torch.uint8)
    for offset, tensor in pickler.tensors.values():
        count = tensor.numel() * tensor.itemsize
        memory[offset : offset + count].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    return file.getvalue(), shared


def _put_together(skeleton: bytes, shared: Any) -> Any:
    return _Unpickler(io.BytesIO(skeleton), torch.frombuffer(shared, dtype=torch.uint8)).load()

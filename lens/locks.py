"""One run at a time writes to a place: a lock file beside it, which the system lets go when its run is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds the lock `.NAME.lock` beside `path`, whose folder is made; raises FileExistsError where a run holds it."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FileExistsError(f"another run is writing to {path}: wait for it, or choose another --output") from error
    try:
        yield
    finally:
        # Before the release: afterwards the file may be held by a run that has just begun.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()

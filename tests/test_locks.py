"""train/locks.py: a second run is refused, also while a first one ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lens.locks import alone


def test_a_second_run_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    place = tmp_path / "new" / "out"
    with alone(place):
        with pytest.raises(FileExistsError, match="another run is writing to .*out: wait"), alone(place):
            pass
        with alone(tmp_path / "new" / "other"):
            pass
        with pytest.raises(FileExistsError, match="another run"), alone(place):
            pass
    with alone(place):
        pass
    assert list(place.parent.iterdir()) == []


def test_a_run_that_begins_as_another_ends_keeps_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next_run = FileLock(tmp_path / ".out.lock")
    release = FileLock.release

    def then_begins(self: FileLock, *arguments: Any, **options: Any) -> None:
        release(self, *arguments, **options)
        if self is not next_run and not next_run.is_locked:
            next_run.acquire(timeout=0)

    with monkeypatch.context() as patched:
        patched.setattr(FileLock, "release", then_begins)
        with alone(tmp_path / "out"):
            pass
    assert next_run.is_locked
    with pytest.raises(FileExistsError, match="another run"), alone(tmp_path / "out"):
        pass
    next_run.release()

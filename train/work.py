"""The folder in which a run of train/mine.py keeps what it found until its output is written.

Its file `plan.json` tells that the folder is mining's, and what the search depends on: {} before anything is searched.
It is written first and goes last, so that a run that is killed at any moment leaves either a search that the same
command takes up or a folder that the next run clears; a folder without it is somebody else's and stays as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lens.files import read_json, write_json

PLAN, LOCK = "plan.json", "lock"


@contextmanager
def working(work: Path) -> Iterator[None]:
    """Holds the folder alone; removes it at the end, and after a failure where nothing has been searched yet.

    Raises FileExistsError where the folder is not mining's, and where another run holds it.
    """
    check_ours(work)
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / LOCK, timeout=0):
            _begin(work)
            try:
                yield
            except BaseException:  # SIGTERM and Ctrl-C among them
                if not _searched(work):
                    _remove(work)
                raise
            _remove(work)
    except Timeout as error:
        raise FileExistsError(f"another run is working in {work}: wait for it") from error


def check_ours(work: Path) -> None:
    """Raises FileExistsError where something else than mining made the folder, which is removed at the end."""
    if work.exists() and not work.is_dir():
        raise FileExistsError(f"{work}, where a folder is to be made, is a file: move it, or choose another output")
    if not work.is_dir() or (work / PLAN).is_file():
        return
    # `lock` is made before the plan, and removed after it; a kill may tear the plan itself.
    others = sorted(file.name for file in work.iterdir() if file.name != LOCK and not file.name.startswith(f".{PLAN}."))
    if others:
        raise FileExistsError(
            f"{work} holds {others[0]} and no {PLAN}, so mining did not make it: move it, or choose another output"
        )


def check_plan(work: Path, plan: Mapping[str, Any]) -> None:
    """Notes what the search depends on; raises ValueError where a killed run in the folder searched otherwise."""
    before = read_json(work / PLAN)
    if before and _searched(work):
        changed = [f"--{name}".replace("_", "-").replace("--inputs", "input files") for name in plan
                   if before.get(name) != plan[name]]  # fmt: skip
        if changed:
            raise ValueError(
                f"{work} is of an unfinished run with other {', '.join(changed)}: give that run's options and "
                "files to go on, or remove the folder to start anew"
            )
    write_json(work / PLAN, plan)


def _begin(work: Path) -> None:
    """Takes up the search of a killed run, or clears what one left that had none to go on from."""
    if not (work / PLAN).is_file():
        write_json(work / PLAN, {})
    elif not read_json(work / PLAN):
        _clear(work)


def _searched(work: Path) -> bool:
    return any(work.glob("*.npz"))


def _clear(work: Path) -> None:
    for entry in work.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in (PLAN, LOCK):
            entry.unlink()


def _remove(work: Path) -> None:
    write_json(work / PLAN, {})
    _clear(work)
    (work / PLAN).unlink()
    shutil.rmtree(work)

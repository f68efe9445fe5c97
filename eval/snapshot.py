"""A folder with the data sets of benchmarks, made where there is a network and read where there is none.

    SNAPSHOT/manifest.json            data set -> revision, tasks, files with size and SHA-256
    SNAPSHOT/data/OWNER__NAME/REVISION/...   the files as they lie in the data set's repository

`scripts/fetch_benchmarks.py` makes it. mteb's tasks then read their data set from the folder; everything else about
them, the revision in the results too, stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lens.files import read_json, write_json
from lens.identity import sha256

MANIFEST = "manifest.json"
FORMAT = 1


def parts_of(task: Any) -> Iterator[Any]:
    """The tasks that read data: the task itself, or those that it is the mean of."""
    if getattr(task, "is_aggregate", False):
        for part in task.metadata.tasks:
            yield from parts_of(part)
    else:
        yield task


def unload(task: Any) -> None:
    """Lets go of the data of a task and of its parts, but not of where it reads them, which mteb's own way forgets."""
    for part in [*parts_of(task), task]:
        if part.data_loaded:
            own = part.__dict__.get("metadata")
            part.unload_data()
            if own is not None:
                part.metadata = own


class Snapshot:
    """Raises FileNotFoundError where the folder has no manifest, ValueError for one of another format."""

    def __init__(self, folder: str | os.PathLike[str], create: bool = False) -> None:
        self.folder = Path(folder).resolve()
        path = self.folder / MANIFEST
        if create and not path.is_file():
            self.datasets: dict[str, dict[str, Any]] = {}
            return
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder} is no snapshot: {MANIFEST} is missing (scripts/fetch_benchmarks.py)"
            )
        content = read_json(path)
        if content.get("format") != FORMAT or not isinstance(content.get("datasets"), dict):
            raise ValueError(f"{path}: expected a manifest of format {FORMAT}, found {content.get('format')!r}")
        self.datasets = content["datasets"]

    def place(self, name: str, revision: str) -> Path:
        """The folder of a data set at a revision."""
        return self.folder / "data" / name.replace("/", "__") / revision

    def add(self, name: str, revision: str, tasks: Sequence[str]) -> None:
        """Enters a data set that was just fetched, and writes the manifest."""
        place = self.place(name, revision)
        files = sorted(p for p in place.rglob("*") if p.is_file() and ".cache" not in p.relative_to(place).parts)
        if not files:
            raise ValueError(f"{place} holds no files")
        known = self.datasets.get(f"{name}@{revision}", {}).get("tasks", [])
        self.datasets[f"{name}@{revision}"] = {
            "tasks": sorted({*known, *tasks}),
            "files": {
                path.relative_to(place).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
                for path in files
            },
        }
        write_json(self.folder / MANIFEST, {"format": FORMAT, "datasets": self.datasets})

    def lend(self, name: str, revision: str, tasks: Sequence[str]) -> None:
        """Notes that tasks read a data set that is entered; what was written of its files stays."""
        entry = self.datasets[f"{name}@{revision}"]
        entry["tasks"] = sorted({*entry["tasks"], *tasks})
        write_json(self.folder / MANIFEST, {"format": FORMAT, "datasets": self.datasets})

    def check(self, name: str, revision: str, verify: bool = False) -> Path:
        """The folder of a data set whose files are all there, in full; with `verify` their hashes are compared too.

        Raises FileNotFoundError or ValueError naming data set and file, what was expected and what was found.
        """
        entry = self.datasets.get(f"{name}@{revision}")
        if entry is None:
            others = [key.split("@")[1] for key in self.datasets if key.split("@")[0] == name]
            held = f"it has revision {', '.join(others)}" if others else "it has none of that data set"
            raise FileNotFoundError(f"snapshot {self.folder} lacks {name} at revision {revision}: {held}; fetch it")
        place = self.place(name, revision)
        for file, facts in entry["files"].items():
            path = place / file
            size = path.stat().st_size if path.is_file() else None
            if size != facts["size"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"{name}: {path} {found}, expected {facts['size']} bytes: fetch it again")
            if verify and sha256(path) != facts["sha256"]:
                raise ValueError(f"{name}: {path} has another content than when it was fetched: fetch it again")
        return place

    def use(self, task: Any, verify: bool = False) -> None:
        """Makes a task, or the parts of an aggregate, read from here. Raises what `check` raises."""
        for part in parts_of(task):
            data = part.metadata.dataset
            place = self.check(data["path"], data["revision"], verify)
            part.metadata = part.metadata.model_copy(update={"dataset": {**data, "path": str(place)}})

"""The published scores, and which of their columns a run may be compared with: those of exactly the same tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.run_folders import Runs
from eval.significance import Units
from lens.files import read_json

FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Published:
    """Published means by type of task, and the tasks of the benchmark that they are of: their splits and subsets."""

    content: Mapping[str, Any]

    def rows(self) -> dict[str, Any]:
        """Source, benchmark, tasks, number of tasks by type, and systems -> type -> mean as printed."""
        kinds = self.content["tasks"]
        names = [name for tasks in kinds.values() for name in tasks]
        facts = {key: self.content[key] for key in ("source", "benchmark", "systems")}
        counts = {kind: len(tasks) for kind, tasks in kinds.items()} | {"all": len(names)}
        return facts | {"tasks": names, "counts": counts}

    def fits(self, task: str, units: Units) -> bool:
        """Whether units are of the split, and the subset where it has several, that the benchmark takes of a task."""
        split = self.content["other_splits"].get(task, self.content["split"])
        subset = self.content["one_subset"].get(task)
        return all(part.split == split and subset in (None, part.subset) for part in units.parts)


PUBLISHED = Published(read_json(FILE))


def comparable_types(runs: Runs, units: Mapping[str, Mapping[str, Units]]) -> tuple[list[str], list[str]]:
    """The types of which a run has exactly the tasks of the benchmark, on their splits and subsets; "all" with them
    where it has all types and no other task; and notes on what was in the way or could not be checked."""
    wanted: Mapping[str, list[str]] = PUBLISHED.content["tasks"]
    present: dict[str, set[str]] = {}
    for name, task in runs.tasks.items():
        present.setdefault(task.type, set()).add(name)
    found, notes = [], []
    for kind, names in wanted.items():
        if present.get(kind) != set(names):
            continue
        held = {name: [mine[name] for mine in units.values() if name in mine] for name in names}
        other = [name for name in names if not all(PUBLISHED.fits(name, one) for one in held[name])]
        if other:
            notes.append(f"other splits or subsets than the published mean of {kind} has: {', '.join(other)}")
            continue
        unknown = [name for name in names if not held[name]]
        if unknown:
            notes.append(f"splits and subsets are taken to be the published ones, without units: {', '.join(unknown)}")
        found.append(kind)
    if set(found) == set(wanted) == set(present):
        found.append("all")
    return found, notes

"""Folders of `eval/run.py`, one or several -> their systems, tasks, scores, units, costs and explanations, checked."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.significance import KINDS, Part, Units
from lens.files import read_json, read_lines

MEASURE = "nDCG@10"
"""What is taken from the results on BEIR folders."""
COSTS = ("seconds", "texts", "embedding_seconds", "dimensions", "active", "bytes_per_document")
LARGEST = 1e300
"""Figures beyond this, and integers that no float holds, are taken for damage."""
ROUNDING = 1e-3
"""Scores of units and of the summary that differ by more are of different evaluations."""


@dataclass
class Task:
    """A task: its type, measure, revision of its data (None: unknown), and the run that it was first seen in."""

    type: str
    measure: str
    revision: str | None
    run: str


@dataclass
class System:
    """A system of a run: scores in 0..1 and costs by task, losses to other systems explained, and where its units are.

    `identity` is its model and revision, None where unknown; `variant` the folder of its units, which tells variants of
    a model apart. `units` maps a task to its file there, or for results on BEIR folders to the units themselves.
    """

    name: str
    run: str
    role: str
    identity: tuple[str, ...] | None
    scores: dict[str, float]
    variant: str | None = None
    units: dict[str, Path | Units] = field(default_factory=dict)
    costs: dict[str, dict[str, float | None]] = field(default_factory=dict)
    explained: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass
class Runs:
    """What several run folders hold together; `systems` by the name that the report shows, in their order."""

    tasks: dict[str, Task]
    systems: dict[str, System]
    failures: list[str]
    notes: list[str]


def run_folder(argument: str) -> tuple[str, Path]:
    """Name and folder of [NAME=]DIR; the name is the folder's own unless it is given."""
    name, separator, folder = argument.partition("=")
    if not separator or Path(argument).exists():
        return Path(argument).resolve().name, Path(argument)
    return name, Path(folder)


def read_runs(arguments: Sequence[str]) -> Runs:
    """Reads the folders [NAME=]DIR. A system that two runs share (same name, revision, and scores on the same tasks)
    is one; another of the same name is called RUN/SYSTEM.

    Raises FileNotFoundError for a folder without results, and ValueError naming the file or the task for damaged files,
    two folders of one name, and a task whose data, type or measure differ between runs.
    """
    folders: dict[str, Path] = {}
    for argument in arguments:
        name, folder = run_folder(argument)
        if name in folders:
            raise ValueError(f"two runs are named {name!r}: tell them apart with NAME={folder}")
        folders[name] = folder
    tasks: dict[str, Task] = {}
    found: list[System] = []
    kept: dict[tuple[str, str], System] = {}  # what a system of a run became
    losses: list[tuple[str, System, dict[str, list[dict[str, Any]]]]] = []
    failures: list[str] = []
    notes: list[str] = []
    for name, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder: expected a run of eval/run.py")
        if (folder / "summary.json").is_file():
            read = _read_mteb
        elif (folder / "results.json").is_file():
            read = _read_beir
        else:
            raise FileNotFoundError(f"{folder} holds neither summary.json nor results.json of eval/run.py")
        run = read(name, folder)
        for task, facts in run.tasks.items():
            _same_task(task, tasks.setdefault(task, facts), facts)
        prefix = f"{name}: " if len(folders) > 1 else ""
        failures += [prefix + line for line in run.failures]
        notes += [prefix + line for line in run.notes]
        for system in run.systems.values():
            twin = next((other for other in found if _same_system(other, system)), None)
            if twin is None:
                found.append(system)
            else:
                _merge(twin, system)
            kept[name, system.name] = twin or system
            losses.append((name, twin or system, system.explained))
    counts = [system.name for system in found]
    systems = {}
    for system in found:
        shown_name = system.name if counts.count(system.name) == 1 else f"{system.run}/{system.name}"
        if shown_name in systems:
            raise ValueError(f"two systems are named {shown_name!r}: name the runs with NAME=DIR")
        systems[shown_name] = system
        system.explained = {}
    shown = {id(system): name for name, system in systems.items()}
    for run_name, system, explained in losses:
        for other, entries in explained.items():
            twin = kept.get((run_name, other))
            held = system.explained.setdefault(other if twin is None else shown[id(twin)], [])
            known = {(entry["task"], entry["query"]) for entry in held}
            held += [entry for entry in entries if (entry["task"], entry["query"]) not in known]
    return Runs(tasks, systems, failures, notes)


def _merge(kept: System, more: System) -> None:
    """Adds what the same system has in another run."""
    kept.scores = more.scores | kept.scores
    kept.units = more.units | kept.units
    kept.costs = more.costs | kept.costs
    kept.variant = kept.variant or more.variant


def _same_task(name: str, known: Task, facts: Task) -> None:
    for what, one, other in (
        ("type", known.type, facts.type),
        ("measure", _plain(known.measure), _plain(facts.measure)),
        ("data revision", known.revision, facts.revision),
    ):
        if one is not None and other is not None and one != other:
            raise ValueError(f"task {name} has {what} {one} in {known.run} and {other} in {facts.run}")
    known.revision = known.revision or facts.revision


def _plain(measure: str) -> str:
    """mteb's and ir-measures' name of one measure, as one."""
    return measure.lower().replace("_at_", "@")


def _same_system(one: System, other: System) -> bool:
    if one.name != other.name or one.identity != other.identity:
        return False
    if one.variant is not None and other.variant is not None and one.variant != other.variant:
        return False
    if one.identity is None:  # nothing tells but the scores
        return one.scores == other.scores
    return all(one.scores[task] == score for task, score in other.scores.items() if task in one.scores)


def _expect(condition: bool, path: Path, expected: str) -> None:
    if not condition:
        raise ValueError(f"{path} is damaged: expected {expected}; evaluate again")


def _figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _read_mteb(run: str, folder: Path) -> Runs:
    """A folder of `eval/run.py --benchmark`, `--tasks` or `--local`."""
    path = folder / "summary.json"
    content = read_json(path)
    tasks, systems, failures = (content.get(key) for key in ("tasks", "systems", "failures"))
    _expect(isinstance(tasks, dict) and isinstance(systems, dict) and bool(systems), path, "tasks and systems")
    _expect(isinstance(failures, list) and all(isinstance(line, str) for line in failures), path, "failures as texts")
    notes: list[str] = []
    found = Runs({}, {}, failures, notes)
    for name, facts in tasks.items():
        good = isinstance(facts, dict) and all(isinstance(facts.get(key), str) for key in ("type", "measure"))
        revision = facts.get("revision") if good else None
        _expect(good and isinstance(revision, str | None), path, f"type, measure and revision of the task {name}")
        found.tasks[name] = Task(facts["type"], facts["measure"], revision, run)
    for name, facts in systems.items():
        scores = facts.get("scores") if isinstance(facts, dict) else None
        known = isinstance(scores, dict) and set(scores) <= set(tasks)
        _expect(known, path, f"scores of {name} on tasks that are there")
        _expect(all(map(_figure, scores.values())), path, f"finite scores of {name}")
        role = facts.get("role", "baseline" if name in ("bm25", "dense") else "model")
        units, revision = facts.get("units"), facts.get("revision")
        _expect(isinstance(units, str | None), path, f"the folder of the units of {name}")
        identity = None if revision is None else (str(facts.get("model")), str(revision))
        system = System(name, run, str(role), identity, dict(scores), units)
        if units is not None:
            places = {task: folder / units / f"{task}.json" for task in scores}
            system.units = {task: place for task, place in places.items() if place.is_file()}
        found.systems[name] = system
    if not any(system.units for system in found.systems.values()):
        notes.append("no units in the run: its systems are not tested against others")
    costs = {}
    if (folder / "costs.json").is_file():
        costs = read_json(folder / "costs.json")
    else:
        notes.append("no costs.json in the run: what its systems cost is not shown")
    for name, system in found.systems.items():
        system.costs = _checked_costs(folder / "costs.json", name, costs.get(name))
    _add_members(folder / "hybrids.json", found.systems)
    _add_explained(folder / "explained", found)
    return found


def _add_members(path: Path, systems: Mapping[str, System]) -> None:
    """Adds to the seconds of each hybrid, which are those of fusing, its members': without all of them, none."""
    hybrids = read_json(path) if path.is_file() else {}
    for name, system in systems.items():
        if system.role != "hybrid":
            continue
        facts = hybrids.get(name, {})
        members = facts.get("members", []) if isinstance(facts, dict) else None
        _expect(isinstance(members, list) and all(isinstance(one, str) for one in members), path, f"members of {name}")
        parts = [system, *(systems[member] for member in members if member in systems)]
        for task, figures in system.costs.items():
            held = [s for part in parts if (s := part.costs.get(task, {}).get("seconds")) is not None]
            whole = bool(members) and len(held) == len(members) + 1
            figures |= {"seconds": sum(held) if whole else None, "texts": None, "embedding_seconds": None}


def _add_explained(folder: Path, found: Runs) -> None:
    """Adds the losses that are explained of the scores, units and data that the summary tells, with a note on others.

    Each file holds {"of": {"task": revision of the data, "systems": {system: "UNITS@SCORE"}}, "rows": {system: {other:
    losses}}}.
    """
    files = {task: folder / f"{task}.json" for task in found.tasks}
    files = {task: file for task, file in files.items() if file.is_file()}
    if not files:
        found.notes.append("no explained losses in the run: none are shown")
    for task, file in files.items():
        content = read_json(file)
        of, explained = content.get("of"), content.get("rows")
        _expect(isinstance(explained, dict), file, "rows by system")
        same = isinstance(of, dict) and of.get("task") == found.tasks[task].revision
        of_systems = of.get("systems") if same else None
        of_systems = of_systems if isinstance(of_systems, dict) else {}
        current = {
            name: task in system.scores and of_systems.get(name) == f"{system.variant}@{system.scores[task]:.6f}"
            for name, system in found.systems.items()
        }
        stale = []
        for name, rows in explained.items():
            for other, entries in _checked_explained(file, name, rows).items():
                if current.get(name) and current.get(other):
                    found.systems[name].explained.setdefault(other, []).extend(entries)
                elif entries:
                    stale.append(f"{name} to {other}")
        if stale:
            found.notes.append(f"losses on {task} explained of other results than these: {', '.join(stale)}: not shown")


def _checked_costs(path: Path, system: str, costs: Any) -> dict[str, dict[str, float | None]]:
    """The costs of a system by task; what is null, missing, NaN or infinite is None."""
    _expect(costs is None or isinstance(costs, dict), path, f"costs of {system} by task")
    found = {}
    for task, figures in (costs or {}).items():
        _expect(figures is None or isinstance(figures, dict), path, f"costs of {system} on {task}")
        given = {key: (figures or {}).get(key) for key in COSTS}
        held = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in given.items()}
        good = all(value is None or _figure(value) for value in held.values())
        _expect(good, path, f"{', '.join(COSTS)} of {system} on {task} as figures")
        found[task] = held
    return found


def _checked_explained(path: Path, system: str, explained: Any) -> dict[str, list[dict[str, Any]]]:
    _expect(isinstance(explained, dict), path, f"losses of {system} by the other system")
    for other, entries in explained.items():
        _expect(isinstance(entries, list), path, f"a list of losses of {system} to {other}")
        for entry in entries:
            good = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("task", "query", "text"))
            good = good and all(_figure(entry.get(key)) for key in ("value", "other_value"))
            _expect(
                good and all(_explained_document(entry.get(key)) for key in ("relevant", "found")),
                path,
                f"task, query, text, values and documents of each loss of {system} to {other}",
            )
    return {other: list(entries) for other, entries in explained.items()}


def _explained_document(document: Any) -> bool:
    if document is None:
        return True
    if not isinstance(document, dict) or not isinstance(document.get("matches"), list):
        return False
    texts = all(isinstance(document.get(key), str) for key in ("document", "text"))
    return texts and _figure(document.get("score")) and all(
        isinstance(match, list) and len(match) == 3 and isinstance(match[1], list) and _figure(match[2])
        for match in document["matches"]
    )  # fmt: skip


def read_units(path: Path) -> Units:
    """The units of a system on a task, from the file of a run; without parts where its score does not split.

    Raises ValueError naming the file when it is damaged.
    """
    content = read_json(path)
    kind, parts = content.get("kind"), content.get("parts")
    _expect(kind in KINDS and isinstance(parts, list), path, f"parts, and a kind of {', '.join(KINDS)}")
    found = []
    for part in parts:
        _expect(isinstance(part, dict), path, "parts with split, subset, names, values and gold")
        names, values, gold = part.get("names"), part.get("values"), part.get("gold")
        _expect(isinstance(names, list) and bool(names), path, "names of units")
        for column in (values, gold) if kind != "mean" else (values,):
            good = isinstance(column, list) and len(column) == len(names) and all(map(_figure, column))
            _expect(good, path, f"a finite value for each of {len(names)} units")
        golden = None if kind == "mean" else np.array(gold, dtype=np.float64)
        _expect(kind != "ap" or bool(np.isin(golden, (0, 1)).all()), path, "gold values 0 and 1")
        where = str(part.get("split")), str(part.get("subset"))
        found.append(Part(*where, tuple(map(str, names)), np.array(values, dtype=np.float64), golden))
    return Units(kind, tuple(found))


def _read_beir(run: str, folder: Path) -> Runs:
    """A folder of `eval/run.py --beir`: each data set is a retrieval task in nDCG@10."""
    path = folder / "results.json"
    datasets = read_json(path).get("datasets")
    _expect(isinstance(datasets, dict) and bool(datasets), path, "datasets")
    found = Runs({}, {}, [], [])
    for name, dataset in datasets.items():
        systems = dataset.get("systems") if isinstance(dataset, dict) else None
        _expect(isinstance(systems, dict) and bool(systems), path, f"systems on {name}")
        found.tasks[name] = Task("Retrieval", MEASURE, None, run)
        units = _per_query(folder / "per_query" / f"{name}.tsv", found.notes)
        for system, facts in systems.items():
            good = isinstance(facts, dict) and _figure(facts.get(MEASURE))
            _expect(good, path, f"{MEASURE} of {system} on {name}")
            role = "hybrid" if facts.get("parts") else "baseline" if system in ("bm25", "dense", "tfidf") else "model"
            one = found.systems.setdefault(system, System(system, run, role, None, {}))
            one.scores[name] = facts[MEASURE]
            if system in units:
                one.units[name] = units[system]
            size, documents = facts.get("index_mb"), dataset.get("documents")
            sized = _figure(size) and _figure(documents) and documents > 0
            one.costs |= _checked_costs(path, system, {name: {
                "seconds": facts.get("seconds"),
                "dimensions": facts.get("dimensions"),
                "active": facts.get("active_per_document"),
                "bytes_per_document": 2**20 * size / documents if sized else None,
            }})  # fmt: skip
    found.notes.append("a run on BEIR folders does not explain losses, nor does it tell its texts per second")
    return found


def _per_query(path: Path, notes: list[str]) -> dict[str, Units]:
    """System -> units, from the values per query of a data set."""
    if not path.is_file():
        notes.append(f"no {path.parent.name}/{path.name} in the run: its systems are not tested on {path.stem}")
        return {}
    rows = list(csv.reader((line for _, line in read_lines(path)), delimiter="\t", quoting=csv.QUOTE_NONE))
    head = rows[0] if rows else []
    _expect(head[:2] == ["query-id", "system"] and MEASURE in head, path, f"query-id, system and {MEASURE} as its head")
    column = head.index(MEASURE)
    values: dict[str, dict[str, float]] = {}
    for number, row in enumerate(rows[1:], 2):
        try:
            good = len(row) == len(head) and math.isfinite(float(row[column]))
        except ValueError:
            good = False
        _expect(good, path, f"a finite value in line {number}")
        values.setdefault(row[1], {})[row[0]] = float(row[column])
    return {
        system: Units("mean", (Part("test", "default", tuple(held), np.array(list(held.values())), None),))
        for system, held in values.items()
    }

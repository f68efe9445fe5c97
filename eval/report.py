"""The report of one or several runs of eval/run.py: scores beside the published ones, tests, losses explained, costs.

    python eval/report.py runs/mteb
    python eval/report.py mine=runs/mteb other=runs/other --against bm25 --output runs/report

Writes report.md, report.html (one file that loads nothing) and report.json with every figure of the two.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm.auto import tqdm

from eval.comparable import PUBLISHED, comparable_types
from eval.metrics import holm
from eval.page import Document
from eval.report_parts import (
    TYPES,
    show_comparisons,
    show_costs,
    show_method,
    show_overview,
    show_queries,
    show_tasks,
)
from eval.run_folders import ROUNDING, Runs, read_runs, read_units, run_folder
from eval.significance import SAME, MeanTest, Units, compare_tasks
from lens.files import atomic_file, write_json
from lens.program import interruptible


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="eval/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="[NAME=]DIR", help="folders that eval/run.py wrote")
    add("--output", type=Path, metavar="DIR", help="folder for the report (the only run itself)")
    add("--against", metavar="SYSTEM", help="test every other system against this one (the first against each other)")
    add("--resamples", type=int, default=2000, metavar="N", help="of each test (2000)")
    add("--seed", type=int, default=0, metavar="N", help="of the resamples (0)")
    add("--published", action=argparse.BooleanOptionalAction, default=True, help="show the paper's rows (yes)")
    return parser


def write(
    output: Path,
    runs: Sequence[str],
    against: str | None = None,
    resamples: int = 2000,
    seed: int = 0,
    published: bool = True,
) -> dict[str, Any]:
    """Writes report.md, report.html and report.json of the runs ([NAME=]DIR) into `output`, and returns the content of
    the last: scores and differences in 0..1, published ones as printed.

    Raises ValueError for an unknown system `against`, and what `read_runs` and `read_units` raise.
    """
    if (output / "results.json").is_file():
        raise ValueError(f"{output} has a report of its own on BEIR folders: choose another --output")
    found = read_runs(runs)
    if against is not None and against not in found.systems:
        raise ValueError(f"--against {against!r} is no system of the runs; there are {', '.join(found.systems)}")
    units = all_units(found)
    names = list(found.systems)
    pairs = [(name, against) for name in names if name != against] if against else [(names[0], n) for n in names[1:]]
    content: dict[str, Any] = {"runs": list(runs), "against": against, "resamples": resamples, "seed": seed}
    content |= {"tasks": {name: asdict(task) for name, task in ordered(found)}, "overview": means(found)}
    content["scores"] = {name: system.scores for name, system in found.systems.items()}
    content["comparisons"] = comparisons(found, units, pairs, resamples, seed)
    content["costs"] = costs(found)
    if published:
        comparable, reasons = comparable_types(found, units)
        content["published"] = PUBLISHED.rows() | {"comparable": comparable}
        found.notes += reasons
    content |= {"failures": found.failures, "notes": found.notes}
    document = Document("Evaluation")
    show_overview(document, content)
    show_tasks(document, content)
    show_comparisons(document, content)
    show_queries(document, found, units, pairs)
    show_costs(document, content, found)
    show_method(document, content)
    output.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.md", document.markdown()), ("report.html", document.html())):
        with atomic_file(output / name, overwrite=True) as file:
            file.write_text(text, encoding="utf-8", errors="replace")
    write_json(output / "report.json", content)
    return content


def all_units(runs: Runs) -> dict[str, dict[str, Units]]:
    """System -> task -> units. Those whose score is not the summary's are left out with a note in `runs.notes`; another
    tells which systems have no units on a task."""
    found: dict[str, dict[str, Units]] = {}
    whole: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    for name, system in runs.systems.items():
        found[name] = {}
        if system.variant is not None and system.units:
            for task in (task for task in runs.tasks if task in system.scores and task not in system.units):
                missing.setdefault(task, []).append(name)
        for task in (task for task in runs.tasks if task in system.units):
            given = system.units[task]
            units = given if isinstance(given, Units) else read_units(given)
            if not units.parts:
                whole.setdefault(task, []).append(name)
                continue
            score = units.score
            if not abs(score - system.scores[task]) <= ROUNDING:
                facts = f"give {score:.4f}, and its score is {system.scores[task]:.4f}"
                runs.notes.append(f"the units of {name} on {task} {facts}: left out of the tests")
            else:
                found[name][task] = units
    for held, why in ((whole, "its score does not split into units"), (missing, "no units in the run")):
        runs.notes += [f"{', '.join(names)} on {task}: {why}: not tested" for task, names in held.items()]
    return found


def ordered(runs: Runs) -> list[tuple[str, Any]]:
    """The tasks by type, in the order of the published tables, and by name."""
    place = {kind: number for number, kind in enumerate(TYPES)}
    return sorted(runs.tasks.items(), key=lambda item: (place.get(item[1].type, len(place)), item[1].type, item[0]))


def groups(runs: Runs) -> dict[str, list[str]]:
    """The tasks of each type, and all of them."""
    found: dict[str, list[str]] = {}
    for name, task in ordered(runs):
        found.setdefault(task.type, []).append(name)
    return found | {"all": list(runs.tasks)}


def means(runs: Runs) -> dict[str, Any]:
    """The number of tasks of each type, and every system's mean over them: None where one has no score."""
    kinds = groups(runs)
    systems = runs.systems.items()
    return {
        "tasks": {kind: len(names) for kind, names in kinds.items()},
        "systems": {
            name: {kind: mean_over(system.scores, names) for kind, names in kinds.items()} for name, system in systems
        },
    }


def mean_over(scores: Mapping[str, float], tasks: Sequence[str]) -> float | None:
    """The mean score over tasks; None without any, or where one of them has no score."""
    held = [scores.get(task) for task in tasks]
    return None if not held or None in held else float(np.mean([score for score in held if score is not None]))


def comparisons(
    runs: Runs, units: Mapping[str, Mapping[str, Units]], pairs: Sequence[tuple[str, str]], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Tests of each pair on every task that both have a score on, and on the mean over those that can be tested."""
    rows: list[dict[str, Any]] = []
    tests: list[MeanTest | None] = []
    for one, other in tqdm(pairs, desc="tests", unit="pair", disable=None, leave=False):
        mine, theirs = runs.systems[one].scores, runs.systems[other].scores
        both = [name for name, _ in ordered(runs) if name in mine and name in theirs]
        held = [name for name in both if name in units[one] and name in units[other]]
        paired = [name for name in held if units[one][name].paired_with(units[other][name])]
        for name in (name for name in held if name not in paired):
            runs.notes.append(f"{one} and {other} were measured on different units of {name}: not tested there")
        chosen = ({name: units[system][name] for name in paired} for system in (one, other))
        tasks, mean = compare_tasks(*chosen, resamples, seed)
        tests.append(mean)
        gains = [mine[name] - theirs[name] for name in both]
        rows.append({
            "system": one,
            "other": other,
            "wins": sum(gain > SAME for gain in gains),
            "ties": sum(abs(gain) <= SAME for gain in gains),
            "losses": sum(gain < -SAME for gain in gains),
            "mean": None if mean is None else asdict(mean),
            "tasks": {
                name: asdict(tasks[name]) if name in tasks else {"difference": gain}
                for name, gain in zip(both, gains, strict=True)
            },
        })  # fmt: skip
    corrected = iter(holm([test.p for test in tests if test is not None]))
    for row in rows:
        if row["mean"] is not None:
            row["mean"]["p_holm"] = next(corrected)
    return rows


def costs(runs: Runs) -> dict[str, Any]:
    """What each system costs on the tasks that all systems with a score have, beside its mean score there."""
    scored = {name: system for name, system in runs.systems.items() if system.scores}
    shared = [task for task, _ in ordered(runs) if scored and all(task in system.scores for system in scored.values())]
    found: dict[str, Any] = {"tasks": shared, "systems": {}}
    for name, system in scored.items():
        figures = [system.costs[task] for task in shared if task in system.costs]
        if not figures:
            continue
        seconds = [row["seconds"] for row in figures if row["seconds"] is not None]
        embedded = [
            (row["texts"], row["embedding_seconds"]) for row in figures if row["texts"] and row["embedding_seconds"]
        ]
        speed = sum(texts for texts, _ in embedded) / sum(took for _, took in embedded) if embedded else None
        found["systems"][name] = {
            "score": mean_over(system.scores, shared),
            "texts_per_second": speed,
            "seconds": sum(seconds) if len(seconds) == len(shared) else None,
            **{key: _mean([row[key] for row in figures]) for key in ("dimensions", "active", "bytes_per_document")},
        }
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return float(np.mean(held)) if held else None


@interruptible("eval/report.py")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code: 0, or 2 with one line on standard error for bad input."""
    options = parser().parse_args(arguments)
    try:
        if options.output is None and len(options.runs) > 1:
            raise ValueError(f"{len(options.runs)} runs have no folder for their report: give --output")
        if options.resamples < 100:
            raise ValueError(f"--resamples is {options.resamples}: at least 100 are needed")
        if options.seed < 0:
            raise ValueError(f"--seed is {options.seed}: at least 0 is needed")
        output = options.output or run_folder(options.runs[0])[1]
        write(output, options.runs, options.against, options.resamples, options.seed, options.published)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"report: {output / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

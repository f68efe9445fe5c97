"""What the leaderboard's results repository checks of a submission, and what it asks of a model's metadata.

The rules are those that the repository's own checks had in 2026 (github.com/embeddings-benchmark/results): the folder,
the files' names and sizes, mteb's version, the settings of each run, one revision for each task, a model and tasks that
mteb knows. The last group are questions of its pull-request template that metadata can answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mteb
from mteb.cache import ResultCache
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult
from packaging.version import InvalidVersion, Version

from eval.tasks import known_tasks

LARGEST = 10 * 2**20
"""Bytes of a file at most."""
AFTER = Version("2.0.0")
"""mteb's version has to be a later one."""
NO_REVISION = ("no_revision_available", "external")
ASKED = (
    "release_date", "languages", "license", "open_weights", "public_training_code", "public_training_data",
    "training_datasets", "reference", "n_parameters", "max_tokens", "embed_dim",
)  # fmt: skip
"""Fields of model_meta.json that the leaderboard shows."""


def problems(results: Path, meta: ModelMeta, tasks: Iterable[str], known: Mapping[str, str] | None = None) -> list[str]:
    """What stands in the way of submitting the results of a model below `results`, a line each; empty for nothing.

    `tasks` are those that should be there, `known` mteb's own (task -> type) where others than the registry's count.
    """
    folder = ResultCache(results.parent).get_task_result_path("any", meta).parent
    if not folder.is_dir():
        return [f"{folder} does not exist: evaluate first"]
    known = known_tasks() if known is None else known
    return [
        *_model(meta),
        *_meta_file(folder, meta),
        *_tasks(folder, list(tasks), known),
        *_other_revisions(folder),
    ]


def _model(meta: ModelMeta) -> Iterator[str]:
    registered = next((found for found in mteb.get_model_metas() if found.name == meta.name), None)
    if registered is None:
        yield (
            f"mteb has no model {meta.name}: add its ModelMeta and loader to mteb/models/model_implementations in a "
            "pull request first, and evaluate through it"
        )
    elif registered.revision != meta.revision:
        yield f"mteb knows {meta.name} at revision {registered.revision}, and these are results of {meta.revision}"
    if meta.revision in NO_REVISION or not meta.revision:
        yield f"{meta.name} has no revision"
    if meta.experiment_kwargs:
        yield f"results with {dict(meta.experiment_kwargs)} are experiments, which the leaderboard does not show"
    missing = [field for field in ASKED if getattr(meta, field) is None]
    if missing:
        yield f"model_meta.json leaves open: {', '.join(missing)}"


def _meta_file(folder: Path, meta: ModelMeta) -> Iterator[str]:
    path = folder / "model_meta.json"
    content = _json(path)
    if isinstance(content, str):
        yield content
        return
    for field, wanted in (("name", meta.name), ("revision", meta.revision)):
        if content.get(field) != wanted:
            yield f"{path}: {field} should be {wanted!r}, found {content.get(field)!r}"


def _tasks(folder: Path, tasks: list[str], known: Mapping[str, str]) -> Iterator[str]:
    missing = [task for task in tasks if not (folder / f"{task}.json").is_file()]
    if missing:
        yield f"{len(missing)} of {len(tasks)} tasks have no result, {missing[0]} for one"
    settings, found = _settings(folder / "run_settings.jsonl")
    yield from found
    for path in sorted(folder.glob("*.json")):
        if path.stat().st_size > LARGEST:
            yield f"{path} is larger than 10 MB"
        if path.name == "model_meta.json":
            continue
        try:
            result = TaskResult.from_disk(path)
        except Exception as error:  # pydantic's and mteb's own are many
            yield f"{path} is no result of mteb: {' '.join(str(error).split())[:200]}"
            continue
        if result.task_name != path.stem:
            yield f"{path} holds the task {result.task_name}: the file should be named after it"
        if result.task_name not in known:
            yield f"{path}: mteb has no task {result.task_name}"
        yield from _version(f"{path}: mteb_version", result.mteb_version)
        for split, blocks in result.scores.items():
            for block in blocks:
                where = f"{path}: {split}, {block['hf_subset']}"
                yield from _version(f"{where}: mteb_version", block.get("mteb_version"))
                if (result.task_name, split, block["hf_subset"]) not in settings:
                    yield f"{where}: run_settings.jsonl has no entry for it"


def _settings(path: Path) -> tuple[set[tuple[str, str, str]], list[str]]:
    """(task, split, subset) of each run that run_settings.jsonl tells of, and what is wrong with the file."""
    if not path.is_file():
        return set(), [f"{path} is missing"]
    covered, found = set(), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            splits = entry.get("splits") or [entry["split"]]
            subsets = entry.get("subsets") or [entry["subset"]]
            found += _version(f"{path}:{number}: version.mteb", entry["version"]["mteb"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            found.append(f"{path}:{number}: expected task, split, subset and version, found {line:.60} ({error})")
            continue
        covered |= {(entry["task"], split, subset) for split in splits for subset in subsets}
    return covered, found


def _version(where: str, found: Any) -> list[str]:
    try:
        later = Version(found) > AFTER
    except (InvalidVersion, TypeError):
        return [f"{where} should be a version, found {found!r}"]
    return [] if later else [f"{where} should be later than {AFTER}, found {found}"]


def _other_revisions(folder: Path) -> Iterator[str]:
    own = {path.name for path in folder.glob("*.json")} - {"model_meta.json"}
    for other in sorted(folder.parent.iterdir()):
        twice = sorted(own & {path.name for path in other.glob("*.json")}) if other != folder else []
        if twice:
            yield f"{other} holds results of the same tasks of another revision, {twice[0]} for one: submit one of them"


def _json(path: Path) -> dict[str, Any] | str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path} is missing"
    except ValueError as error:
        return f"{path} is not JSON: {error}"
    return content if isinstance(content, dict) else f"{path} should hold an object"

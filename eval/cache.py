"""mteb's folder of results, kept whole: a kill leaves no half-written file, and several processes lose no entry.

mteb writes TASK.json, model_meta.json and run_settings.jsonl in place, the last after reading what is there.
"""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from filelock import FileLock
from mteb.cache import ResultCache
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult

DRAFT = ".saving"
"""Folder beside `results` in which files are written before they take their places."""


class WholeCache(ResultCache):
    """mteb's cache for one process, or with the path of a lock file for several: `lock` is held while one of them
    saves, and is there for what else they write in turn."""

    def __init__(self, path: str | os.PathLike[str], lock: str | os.PathLike[str] | None = None) -> None:
        super().__init__(os.fspath(path))
        self.lock: AbstractContextManager[Any] = nullcontext() if lock is None else FileLock(lock)

    def save_to_cache(self, task_result: TaskResult, model_name: str | ModelMeta, *rest: Any, **options: Any) -> None:
        """As mteb's, for which each file appears in one rename, TASK.json last: where it is, its settings are."""
        target = self.get_task_result_path(task_result.task_name, model_name, *rest)
        with self.lock:
            shutil.rmtree(self.cache_path / DRAFT, ignore_errors=True)  # a killed run's
            draft = ResultCache(self.cache_path / DRAFT)
            try:
                written = draft.cache_path / target.relative_to(self.cache_path)
                written.parent.mkdir(parents=True, exist_ok=True)
                settings = target.with_name("run_settings.jsonl")
                if settings.is_file():  # for mteb to add to
                    shutil.copyfile(settings, written.with_name(settings.name))
                draft.save_to_cache(task_result, model_name, *rest, **options)
                target.parent.mkdir(parents=True, exist_ok=True)
                for path in sorted(written.parent.iterdir(), key=lambda path: path == written):
                    path.replace(target.with_name(path.name))
            finally:
                shutil.rmtree(draft.cache_path, ignore_errors=True)

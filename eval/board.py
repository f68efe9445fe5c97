"""The scores of a run as they come in: a system on a task, by mteb, with what the score is made of."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mteb
import numpy as np

from eval.baselines import BM25Search
from eval.cache import WholeCache
from eval.encoder import ChunkedEncoder
from eval.peers import dimensions_of
from eval.units import Kept, main_score, too_many

Outcome = tuple[float | None, list[str]]
"""A main score, or None and why there is none."""


class Board:
    """The scores of a run as they come in, and what failed; `keep` names the systems whose hits are fused later."""

    def __init__(self, output: Path, keep: Iterable[str] = ()) -> None:
        self.output = output
        self.cache = WholeCache(output)
        self.keep = set(keep)
        self.systems: dict[str, Any] = {}
        self.scores: dict[str, dict[str, float]] = {}
        self.costs: dict[str, dict[str, Any]] = {}
        self.failures: list[str] = []

    def evaluate(self, name: str, system: Any, task: Any, done: Outcome | None = None) -> None:
        """Evaluates a system on a task, or reads what is there, and says so; `done` is what another process found."""
        self.systems.setdefault(name, system)
        score, reasons = done or evaluated(system, task, self.cache, name in self.keep)
        for reason in reasons:
            self.failures.append(f"{name} on {reason}")
            print(f"failed: {self.failures[-1]}", file=sys.stderr, flush=True)
        if score is not None:
            self.scores.setdefault(name, {})[task.metadata.name] = score
            content = Kept(self.output, system.mteb_model_meta, task).content()
            self.costs.setdefault(name, {})[task.metadata.name] = (content or {}).get("cost", {})
            print(f"{task.metadata.name}  {name}  {score:.4f}", flush=True)


def evaluated(system: Any, task: Any, cache: WholeCache, keep: bool = False, split: bool = True) -> Outcome:
    """The main score of a system on a task, over the splits and subsets that were asked for, or why there is none.
    With `keep` what it retrieved stays in the folder's predictions/, without `split` no units are written.

    The parts of an aggregate come first, each by itself, because mteb stores the mean of what did not fail.
    """
    meta, output = system.mteb_model_meta, cache.cache_path
    reasons: list[str] = []
    parts = list(getattr(task.metadata, "tasks", None) or [])
    for part in [*parts, task]:
        if reasons:
            break
        kept = Kept(output, meta, part)
        stored = None
        with suppress(ValueError):  # a torn file
            stored = cache.load_task_result(part.metadata.name, meta)
        current = stored is not None and stored.dataset_revision == part.metadata.revision
        done = current and not stored.get_missing_evaluations(part)
        if stored is not None and not current:
            kept.forget()  # of other data
        own = part is not task or not parts
        content = kept.content() if done else None
        if content is None:
            kept.drop_torn()
        again = bool(done and keep and own and kept.lack_predictions(content))
        if again:
            print(f"{part.metadata.name}  {meta.name}  searched again, to be fused", file=sys.stderr, flush=True)
        missing = split and (content is None or again)
        if missing and own:
            with suppress(Exception):  # mteb meets it again, and tells it
                part.load_data()
        if hasattr(part, "rng_state"):  # a clustering draws from it: every system gets the same draws
            part.rng_state, part.np_rng = random.Random(part.seed), np.random.default_rng(part.seed)
        result = mteb.evaluate(
            system,
            part,
            cache=cache,
            raise_error=False,
            show_progress_bar=False,
            co2_tracker=False,
            prediction_folder=kept.folder if split and own and not too_many(part) else None,
            overwrite_strategy="always" if again or (stored is not None and not current) else "only-missing",
        )
        reasons += [f"{error.task_name}: {' '.join(error.exception.split())}" for error in result.exceptions or []]
        if isinstance(system, ChunkedEncoder):
            system.forget(remove=not reasons)
        known = isinstance(system, ChunkedEncoder | BM25Search)
        cost = system.cost() if known else {"dimensions": dimensions_of(meta)}
        if missing and not reasons:
            kept.write(result.task_results[0], cost, [Kept(output, meta, one) for one in parts if part is task])
        if not keep and not reasons:
            kept.predictions.unlink(missing_ok=True)
    if reasons:
        return None, reasons
    (outcome,) = result.task_results
    return main_score(outcome, task), []

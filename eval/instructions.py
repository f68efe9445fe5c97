"""The instruction of every mteb task, as the released LENS evaluation gives it to queries.

`instructions.json` holds them: `tasks` for MTEB(eng, v1), `aliases` from other versions of a task to that one, `types`
for the rest. They are inputs of the model, so every letter counts; all end with a full stop. STS, SummEval and the
twelve parts of CQADupstack have none of their own in the released evaluation, and take those of their types.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

ASYMMETRIC = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking")
"""Task types whose documents get no instruction; in all others both sides carry it."""


@functools.cache
def _table() -> dict[str, dict[str, str]]:
    return json.loads(Path(__file__).with_name("instructions.json").read_text(encoding="utf-8"))


def instruction_for(task: TaskMetadata) -> str:
    """What stands before the texts of a task: the paper's instruction, else the task's own prompt for queries, else
    its type's."""
    table = _table()
    name = table["aliases"].get(task.name, task.name)
    if name in table["tasks"]:
        return table["tasks"][name]
    prompt = task.prompt.get("query") if isinstance(task.prompt, dict) else task.prompt
    found = prompt or table["types"].get(task.type, table["types"]["Retrieval"])
    return found if found.endswith((".", "?", "!")) else found + "."

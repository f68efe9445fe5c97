"""Where a LENS model loses most to another system, and which clusters led it astray."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mteb.types import PromptType

from eval.encoder import LensEncoder, texts_of
from eval.instructions import instruction_for
from eval.units import RETRIEVES, Kept
from lens.files import read_json, write_json

CLUSTERS = 8
"""Clusters that are listed of each match."""


def explained(output: Path, task: Any, systems: Mapping[str, Any], count: int) -> None:
    """Writes OUTPUT/explained/TASK.json, {"of": what it was made of, "rows": system -> other -> `losses`}, for the LENS
    models among the systems, unless it is there."""
    if task.metadata.type not in RETRIEVES or getattr(task.metadata, "tasks", None):
        return
    units = {}
    for name, system in systems.items():
        content = Kept(output, system.mteb_model_meta, task).content()
        if content and content["parts"]:
            units[name] = content
    models = [name for name in units if isinstance(systems[name], LensEncoder)]
    models = [name for name in models if systems[name].model.config.head != "dense"]
    made = {
        name: f"{Kept(output, systems[name].mteb_model_meta, task).relative.as_posix()}@{content['score']:.6f}"
        for name, content in units.items()
    }
    of = {"count": count, "task": task.metadata.revision, "systems": made}
    path = output / "explained" / f"{task.metadata.name}.json"
    if not models or len(units) < 2:
        path.unlink(missing_ok=True)
        return
    with suppress(ValueError):  # a torn file
        if path.is_file() and read_json(path).get("of") == of:
            return
    if not task.data_loaded:
        task.load_data()
    rows = {
        name: {other: losses(task, systems[name], units[name], units[other], count) for other in units if other != name}
        for name in models
    }
    write_json(path, {"of": of, "rows": rows})


def losses(
    task: Any, encoder: LensEncoder, own: Mapping[str, Any], other: Mapping[str, Any], count: int
) -> list[dict[str, Any]]:
    """The `count` queries on which a model loses most to another system, worst first, each with the clusters that match
    its most relevant document and those that match the wrong one it found first.

    `own` and `other` are stored units (eval/units.py) of both on the task, whose data are loaded.
    """
    lost = []
    for mine, theirs in zip(own["parts"], other["parts"], strict=True):
        values = dict(zip(theirs["names"], theirs["values"], strict=True))
        for name, value, first in zip(mine["names"], mine["values"], mine["first"], strict=True):
            if values.get(name, value) > value:
                lost.append((values[name] - value, name, value, values[name], first, mine))
    lost.sort(key=lambda row: (-row[0], row[1]))
    found = []
    names = {"queries": {row[1] for row in lost[:count]}, "corpus": set[str]()}
    for _, name, _, _, first, part in lost[:count]:
        judged = task.dataset[part["subset"]][part["split"]]["relevant_docs"][name]
        names["corpus"] |= {first, max(judged, key=lambda document: judged[document])}
    places = _Places(task, names)
    for _, name, value, better, first, part in lost[:count]:
        data = task.dataset[part["subset"]][part["split"]]
        judged = data["relevant_docs"][name]
        relevant = max(judged, key=lambda document: judged[document])
        wrong = None if judged.get(first, 0) > 0 else first
        text = places.text("queries", name, part)
        row = {"task": task.metadata.name, "query": name, "text": text, "value": value, "other_value": better}
        row["relevant"] = _match(encoder, task, text, relevant, places.text("corpus", relevant, part))
        row["found"] = None if wrong is None else _match(encoder, task, text, wrong, places.text("corpus", wrong, part))
        found.append(row)
    return found


class _Places:
    """Where the texts of some ids stand in a task's data, found in one pass over each part."""

    def __init__(self, task: Any, names: Mapping[str, set[str]]) -> None:
        self.task = task
        self.names = names
        self.rows: dict[tuple[str, str, str], dict[str, int]] = {}

    def text(self, column: str, name: str, part: Mapping[str, Any]) -> str:
        """The text of a query or a document ("queries", "corpus")."""
        data = self.task.dataset[part["subset"]][part["split"]][column]
        key = column, part["subset"], part["split"]
        if key not in self.rows:
            self.rows[key] = {found: i for i, found in enumerate(data["id"]) if found in self.names[column]}
        side = PromptType.query if column == "queries" else PromptType.document
        return texts_of(data.select([self.rows[key][name]]), self.task.metadata, side)[0]


def _match(encoder: LensEncoder, task: Any, query: str, document: str, text: str) -> dict[str, Any]:
    instruction = None if encoder.model.config.prompt == "plain" else instruction_for(task.metadata)
    why = encoder.model.explain(query, text, CLUSTERS, instruction)
    matches = [[match.cluster, match.tokens[:6], round(match.weight, 5)] for match in why.matches]
    return {
        "document": document,
        "text": " ".join(text.split())[:400],
        "score": round(why.score, 5),
        "matches": matches,
    }

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
    of = [count, task.metadata.revision, {name: systems[name].mteb_model_meta.revision for name in units}]
    path = output / "explained" / f"{task.metadata.name}.json"
    with suppress(ValueError):  # a torn file
        if not models or len(units) < 2 or (path.is_file() and read_json(path)["of"] == of):
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
    for _, name, value, better, first, part in lost[:count]:
        data = task.dataset[part["subset"]][part["split"]]
        judged = data["relevant_docs"][name]
        relevant = max(judged, key=lambda document: judged[document])
        wrong = None if judged.get(first, 0) > 0 else first
        text = _text(data["queries"], name, task, PromptType.query)
        row = {"task": task.metadata.name, "query": name, "text": text, "value": value, "other_value": better}
        row["relevant"] = _match(encoder, task, text, relevant, data)
        row["found"] = None if wrong is None else _match(encoder, task, text, wrong, data)
        found.append(row)
    return found


def _text(rows: Any, name: str, task: Any, side: PromptType) -> str:
    return texts_of(rows.select([list(rows["id"]).index(name)]), task.metadata, side)[0]


def _match(encoder: LensEncoder, task: Any, query: str, document: str, data: Mapping[str, Any]) -> dict[str, Any]:
    text = _text(data["corpus"], document, task, PromptType.document)
    instruction = None if encoder.model.config.prompt == "plain" else instruction_for(task.metadata)
    why = encoder.model.explain(query, text, CLUSTERS, instruction)
    matches = [[match.cluster, match.tokens[:6], round(match.weight, 5)] for match in why.matches]
    return {
        "document": document,
        "text": " ".join(text.split())[:400],
        "score": round(why.score, 5),
        "matches": matches,
    }

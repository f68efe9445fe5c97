"""A recipe's YAML file and the command line's overrides -> Recipe."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lens.config import check_fields
from train.config import Recipe
from train.fields import options_of, read_yaml


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a YAML recipe and lays overrides over it.

    Raises FileNotFoundError, or ValueError naming the file and the field: unknown (with the nearest name), of the
    wrong type, missing, or contradicting another.
    """
    values = {**read_yaml(Path(path)), **(overrides or {})}
    fields = dataclasses.fields(Recipe)
    try:
        check_fields(map(str, values), [item.name for item in fields], "recipe")
        for item in fields:
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if required and values.get(item.name) is None:
                raise ValueError(f"{item.name} is missing: set it in the recipe or pass --{item.name}")
        return Recipe(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turns `--field value ...` and `--field=value` into a mapping; numbers, true, false and null are read as YAML,
    texts and paths are taken as they stand (`null` and, for lists, `[]` excepted).

    Several values make a list. `--local_rank`, which launchers add, is dropped. Raises ValueError for a value
    without a field, a field without a value, a list that is given twice, and `-field` with one dash.
    """
    overrides: dict[str, Any] = {}
    name: str | None = None
    values: dict[str, list[Any]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, separator, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if not name:
                raise ValueError(f"{argument!r} names no field")
            if name in values and any(typing.get_origin(option) in (tuple, dict) for option in _options(name)):
                raise ValueError(f"--{name} is given twice: give it once, with all values after it")
            values[name] = [_value(name, value)] if separator and value else []
        elif re.match("-[A-Za-z]", argument) and argument != "-inf":
            raise ValueError(f"{argument!r} begins with one dash, fields with two: --{argument[1:]}")
        elif name is None:
            raise ValueError(f"{argument!r} follows no --field")
        else:
            values[name].append(_value(name, argument))
    for field_name, found in values.items():
        if field_name in ("local_rank", "local-rank"):
            continue
        if not found:
            raise ValueError(f"--{field_name} needs a value")
        overrides[field_name] = found[0] if len(found) == 1 else found
    return overrides


def _value(name: str, text: str) -> Any:
    """A command-line value by its field's type: paths and names stay as they are, whatever YAML would make of them."""
    options = _options(name)
    if text == "null" and type(None) in options:
        return None
    if text == "[]" and any(typing.get_origin(option) is tuple for option in options):
        return []
    if not {bool, int, float} & set(options):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _options(name: str) -> tuple[Any, ...]:
    """The types that a field of the recipe accepts; a string for a name that is none."""
    return options_of(typing.get_type_hints(Recipe).get(name, str))

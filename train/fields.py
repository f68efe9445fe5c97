"""Values from YAML and the command line -> the types of a dataclass's fields."""

from __future__ import annotations

import contextlib
import math
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

LARGEST_RECIPE = 1 << 20  # bytes


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which no key stands twice: the first value would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is given twice: keep one")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file; raises FileNotFoundError or ValueError naming it when there are none to be read."""
    if path.is_dir():
        raise ValueError(f"recipe {path} is a folder: name a YAML file")
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} does not exist")
    size = path.stat().st_size
    if size > LARGEST_RECIPE:
        raise ValueError(f"{path} is no recipe, its {size:,} bytes are too many: name a YAML file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no recipe, it holds no UTF-8 text: name a YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected fields and values, found {type(values).__name__}")
    return values


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types that a field accepts."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type, or ValueError naming the field, the value and what is accepted."""
    options = options_of(hint)
    texts = value if isinstance(value, list | tuple) else [value]
    if {str, tuple[str, ...]} & set(options) and any(isinstance(text, str) and not text.strip() for text in texts):
        raise ValueError(f"{name} must not be an empty text; found {value!r}")
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if typing.get_origin(option) is tuple:
            kind = typing.get_args(option)[0]
            items = value if isinstance(value, list | tuple) else [value]
            if kind is str and all(isinstance(entry, str) for entry in items):
                return tuple(items)
            if kind is float:
                with contextlib.suppress(ValueError):
                    return tuple(typed(name, entry, float) for entry in items)
        elif typing.get_origin(option) is dict:
            sizes = _mapping(name, value)
            if sizes is not None:
                return sizes
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if math.isfinite(value):
                return float(value)
        elif option is float and isinstance(value, str):
            try:  # YAML 1.1 reads 1e-4 as a string
                if math.isfinite(float(value)):
                    return float(value)
            except ValueError:
                continue
        elif option in (bool, int, str) and type(value) is option:
            return value
    raise ValueError(f"{name} must be {_accepted(options)}; found {value!r}")


def _mapping(field: str, value: Any) -> dict[str, int] | None:
    """Whole numbers by name, from a mapping or from NAME=NUMBER texts; None when it is neither.

    Raises ValueError naming the field when a name is given twice.
    """
    if not isinstance(value, Mapping):
        items = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(item, str) and "=" in item for item in items):
            return None
        pairs = [item.partition("=") for item in items]
        names = [name for name, _, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                found = ", ".join(item for item in items if item.partition("=")[0] == name)
                raise ValueError(f"{field}: {name} is given twice ({found}): keep one")
        value = {name: int(number) if number.lstrip("-").isdecimal() else number for name, _, number in pairs}
    sizes = dict(value)
    return sizes if all(type(name) is str and type(size) is int for name, size in sizes.items()) else None


def _accepted(options: Sequence[Any]) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "a string",
        type(None): "null",
    }
    texts = []
    for option in options:
        if typing.get_origin(option) is Literal:
            texts.append("one of " + ", ".join(map(str, typing.get_args(option))))
        elif typing.get_origin(option) is dict:
            texts.append("whole numbers by name ({NAME: NUMBER}, or NAME=NUMBER)")
        elif option == tuple[float, ...]:
            texts.append("a list of finite numbers")
        else:
            texts.append(names.get(option, "a list of strings"))
    return " or ".join(texts)

"""Values from YAML and the command line -> the types of a dataclass's fields."""

from __future__ import annotations

import contextlib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type, or ValueError naming the field, the value and what is accepted."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
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
            sizes = _mapping(value)
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


def _mapping(value: Any) -> dict[str, int] | None:
    """Whole numbers by name, from a mapping or from NAME=NUMBER texts; None when it is neither."""
    if not isinstance(value, Mapping):
        items = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(item, str) and "=" in item for item in items):
            return None
        pairs = [item.partition("=") for item in items]
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

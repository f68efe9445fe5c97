"""What the benchmarks share: the machine and versions behind a figure, and sections of docs/results.md."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lens.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"


def machine() -> dict[str, Any]:
    """What the figures were measured on: processor, cores, GPU."""
    import torch

    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"cpu": found[1] if found else platform.processor(), "cores": os.cpu_count(), "gpu": gpu}


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those of `packages` that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def listed(facts: dict[str, Any]) -> str:
    """`name value, name value`."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def p_value(p: float) -> str:
    """A p value for a table."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def write_section(name: str, lines: list[str], page: Path = PAGE) -> None:
    """Writes the lines between the page's marks of section `name`, and at its end where it has none yet."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = "\n".join([begin, *lines, end])
    text = page.read_text(encoding="utf-8") if page.is_file() else "# Results\n"
    if begin in text and end in text:
        before, _, rest = text.partition(begin)
        text = before + section + rest.partition(end)[2]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    with atomic_file(page, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")

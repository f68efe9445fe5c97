"""What the speed benchmarks share: rounds taken in turn, medians with their spread, peaks of memory, plots."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.page import ROOT

PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "plots"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def wait(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device | None = None
) -> dict[str, dict[str, float]]:
    """Seconds of each contender: median, least and most of `rounds` runs, taken in turn after one run to warm up.

    Every round begins with another contender, so that none always follows the same one.
    """
    device = device or torch.device("cpu")
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        contenders[name]()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wait(device)
            start = time.perf_counter()
            contenders[name]()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: spread(values) for name, values in seconds.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def peak(function: Callable[[], Any], device: torch.device | None = None) -> float:
    """MB that `function` takes at its peak beyond what was held before: of the GPU's memory, or of the process's.

    On the CPU best called in a process of its own, because freed memory may be used again. Linux only there.
    """
    if device is not None and device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = _resident("VmRSS")
    _CLEAR.write_text("5")  # the peak starts again from here (proc(5))
    function()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def load() -> float:
    """The machine's load just before a measurement: more than a few tenths means that others were measured too."""
    return round(os.getloadavg()[0], 2)


def plot(name: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> str:
    """Draws lines on logarithmic axes into docs/plots/NAME.svg and returns the link for the page."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = name  # the same figures give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    for label, (across, up) in series.items():
        axes.loglog(across, up, marker="o", label=label)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return f"![{y} against {x}](plots/{name}.svg)"

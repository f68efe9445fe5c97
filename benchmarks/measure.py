"""What the speed benchmarks share: rounds in turn, medians with their spread, peaks of memory and of FLOP/s, plots."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.page import ROOT
from lens import products
from lens.int8 import Int8Linear

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


def matmul_peak(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> float:
    """The machine's measured peak in GFLOP/s: the best of eight products of two large matrices, on a CPU by whichever
    of torch's libraries is faster."""
    device = device or torch.device("cpu")
    rows, inner = (4096, 1024) if device.type == "cpu" else (8192, 8192)
    first = torch.randn(rows, inner, device=device).to(dtype)
    second = torch.randn(inner, rows, device=device).to(dtype)
    out = torch.empty(rows, rows, device=device, dtype=dtype)
    best = _quickest(lambda: torch.mm(first, second, out=out), device)
    if device.type == "cpu":
        with torch.no_grad():
            best = min(best, _quickest(lambda: products.linear(first, second.t()), device))
    return 2 * rows * inner * rows / best / 1e9


def int8_peak() -> float:
    """The same, in 10^9 operations, of the CPU's product of whole numbers of 8 bits that lens/int8.py calls."""
    linear = Int8Linear(torch.nn.Linear(4096, 4096))
    tokens = torch.randint(1, 128, (1024, 4096), dtype=torch.uint8)
    return 2 * 1024 * 4096 * 4096 / _quickest(lambda: linear.packed(tokens), torch.device("cpu")) / 1e9


def _quickest(function: Callable[[], Any], device: torch.device) -> float:
    best = math.inf
    for _ in range(8):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and height at 0 of the least-squares line through points of which at least two lie apart in x."""
    middle, height = statistics.fmean(x), statistics.fmean(y)
    spreads = sum((a - middle) ** 2 for a in x)
    slope = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / spreads
    return slope, height - slope * middle


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms: 1 means that cost grows in proportion."""
    return line([math.log(v) for v in x], [math.log(v) for v in y])[0]


def load() -> float:
    """The machine's load just before a measurement: more than a few tenths means that others were measured too."""
    return round(os.getloadavg()[0], 2)


def plot(
    name: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, points: bool = False
) -> str:
    """Draws lines on logarithmic axes into docs/plots/NAME.svg and returns the link for the page.

    `points` is for series of one point each: y is then linear, and the legend stands beside them.
    """
    figure, axes = _figure(name, 3.6)
    for label, (across, up) in series.items():
        axes.loglog(across, up, marker="o", linestyle="" if points else "-", label=label)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if points:
        axes.set_yscale("linear")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.legend(frameon=False)
    return _saved(figure, name, f"{y} against {x}")


def bars(name: str, parts: Mapping[str, Mapping[str, float]], x: str) -> str:
    """Draws one horizontal bar for each name of `parts`, made of its parts' lengths, and returns the link."""
    figure, axes = _figure(name, 1.2 + 0.45 * len(parts))
    bars = list(parts)[::-1]  # the first on top
    left = [0.0] * len(bars)
    for kind in dict.fromkeys(kind for lengths in parts.values() for kind in lengths):
        lengths = [parts[bar].get(kind, 0.0) for bar in bars]
        axes.barh(bars, lengths, left=left, label=kind)
        left = [start + length for start, length in zip(left, lengths, strict=True)]
    axes.set_xlabel(x)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _saved(figure, name, x)


def _figure(name: str, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = name  # the same figures give the same file
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6, height))


def _saved(figure: Any, name: str, alternative: str) -> str:
    import matplotlib.pyplot as plt

    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return f"![{alternative}](plots/{name}.svg)"

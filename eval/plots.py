"""Plots of reports, as SVG: differences by task, wins and losses by query, quality against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from eval.page import INK, LENS, LINE, LOSS, OTHER, canvas, svg

STEPS = 500
"""Queries that a plot of wins and losses shows at most, evenly from all."""


def plain(name: str, length: int = 32) -> str:
    """A name as matplotlib writes it, without its mathematics, cut to a length."""
    cut = name if len(name) <= length else name[: length - 1] + "…"
    return cut.replace("$", r"\$")


def differences(rows: Sequence[tuple[str, float, float | None, float | None, bool]]) -> str:
    """Differences with their intervals: rows of name, difference, low, high and whether it is significant. A
    significant gain and a significant loss have their colours; the last row, a mean, stands below a line."""
    axes = canvas(0.27 * len(rows) + 0.7)
    for place, (_, difference, low, high, significant) in enumerate(rows):
        colour = (LENS if difference > 0 else LOSS) if significant else OTHER
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot([difference], [place], marker="D" if place == len(rows) - 1 else "o", color=colour, markersize=5)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.axhline(len(rows) - 1.5, color=LINE, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [plain(row[0]) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color=LINE)
    axes.set_xlabel("difference × 100")
    return svg(axes)


def win_loss(difference: NDArray[np.float64]) -> str:
    """The differences of all queries (n,) on a measure between 0 and 1, sorted, gains and losses in two colours."""
    ordered = np.sort(difference)[::-1]
    better, worse = int((ordered > 0).sum()), int((ordered < 0).sum())
    if len(ordered) > STEPS:
        ordered = ordered[np.linspace(0, len(ordered) - 1, STEPS).round().astype(int)]
    axes = canvas(2.2)
    edges = np.linspace(0, len(difference), len(ordered) + 1)
    steps = np.append(ordered, ordered[-1:])
    for sign, colour, text, place, height, align in (
        (1, LENS, f"{better} better", 0.02, 0.06, "left"),
        (-1, LOSS, f"{worse} worse", 0.98, 0.94, "right"),
    ):
        axes.fill_between(edges, np.clip(steps * sign, 0, None) * sign, step="post", color=colour, linewidth=0)
        axes.text(place, height, text, transform=axes.transAxes, ha=align, va="center", color=INK)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlim(0, len(difference))
    axes.set_ylim(-1.05, 1.05)
    axes.grid(axis="y", color=LINE)
    axes.set_xlabel("queries, best first")
    return svg(axes)


def trade_off(points: Mapping[str, tuple[float, float]], stressed: Sequence[str], label: str) -> str:
    """Systems as points (cost above 0 on a logarithmic axis called `label`, quality); `stressed` in the colour of
    LENS."""
    axes = canvas(3.2)
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter  # after canvas has told how to install it

    for place, (name, (cost, quality)) in enumerate(sorted(points.items(), key=lambda item: item[1])):
        axes.plot([cost], [quality], marker="o", color=LENS if name in stressed else OTHER, markersize=7)
        shift = 8 if place % 2 else -12
        axes.annotate(
            plain(name, 24), (cost, quality), (0, shift), textcoords="offset points", ha="center", color=INK, fontsize=9
        )
    axes.set_xscale("log")
    axes.margins(0.2)
    axes.minorticks_off()
    costs = [cost for cost, _ in points.values()]
    spread = max(costs) / min(costs)  # ticks that neither run into each other nor are missing
    ticks = MaxNLocator(4) if spread < 5 else LogLocator(subs=(1, 2, 5) if spread < 50 else (1,))
    axes.xaxis.set_major_locator(ticks)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axes.grid(color=LINE)
    axes.set_xlabel(label)
    axes.set_ylabel("mean score × 100", color=INK)
    return svg(axes)

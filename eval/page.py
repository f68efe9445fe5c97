"""What the reports share: tables in markdown and HTML, plots as SVG, and one page that loads nothing."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lens.files import require

INK, LINE, LENS, OTHER, LOSS = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
"""Placeholder colours of the plots, replaced by variables of the page so that they follow light and dark."""
VARIABLES = {INK: "--ink", LINE: "--line", LENS: "--lens", OTHER: "--other", LOSS: "--loss"}


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; `best` holds (row, column) of the cells to stress. Cells of `prose` wrap."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    prose: bool = False

    def markdown(self) -> str:
        """The table in markdown, with its special characters escaped."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        rows = [[literal(cell) for cell in row] for row in (self.header, *self.rows)]
        for row, column in self.best:
            rows[row + 1][column] = f"**{rows[row + 1][column]}**"
        rule = "| --- |" + " ---: |" * (len(self.header) - 1)
        return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])

    def html(self) -> str:
        """The table in HTML, escaped, in a box that scrolls sideways on a narrow screen."""
        head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in self.header)
        body = ""
        for i, row in enumerate(self.rows):
            cells = [f"<b>{escape(cell)}</b>" if (i, j) in self.best else escape(cell) for j, cell in enumerate(row)]
            body += f"<tr><th scope=row>{cells[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in cells[1:]) + "</tr>\n"
        kind = "table prose" if self.prose else "table"
        return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def literal(text: str) -> str:
    """Text in one line of markdown that shows as it is."""
    return re.sub(r"([\\|`*_<>\[\]$~&])", r"\\\1", " ".join(text.split()))


class Document:
    """A report in markdown and HTML at once, part by part; all text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.lines = [f"# {literal(title)}"]
        self.parts: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        self.lines.append(f"{'#' * level} {literal(text)}")
        self.parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        self.lines.append(literal(text))
        self.parts.append(f"<p>{escape(text)}</p>")

    def items(self, lines: Sequence[str]) -> None:
        self.lines.append("\n".join(f"- {literal(line)}" for line in lines))
        self.parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")

    def table(self, table: Table) -> None:
        self.lines.append(table.markdown())
        self.parts.append(table.html())

    def plots(self, plots: Sequence[tuple[str, str]], caption: str | None = None) -> None:
        """Pairs of SVG and caption, in HTML alone; behind `caption` where one is given."""
        content = "<div class=plots>" + "".join(figure(*plot) for plot in plots) + "</div>"
        self.parts.append(content if caption is None else fold(caption, content))

    def folded(self, caption: str, table: Table, plots: Sequence[tuple[str, str]] = (), short: bool = False) -> None:
        """A table and plots that show when their caption is opened; the table in markdown too, unless `short`."""
        if not short:
            self.lines += [f"**{literal(caption)}**", table.markdown()]
        self.parts.append(fold(caption, table.html() + "".join(figure(*plot) for plot in plots)))

    def markdown(self) -> str:
        return "\n\n".join(self.lines) + "\n"

    def html(self) -> str:
        return page(self.title, self.parts)


def number(value: float | None, digits: int = 3) -> str:
    """A figure for a table cell; a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def p_value(p: float | None) -> str:
    """A p value with three decimals, or "<0.001"."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def fold(caption: str, content: str) -> str:
    """HTML that shows when its caption is opened."""
    return f"<details><summary>{escape(caption)}</summary>{content}</details>"


def figure(svg: str, caption: str) -> str:
    """A plot with its caption, which is also its text for screen readers."""
    label = escape(caption)
    image = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure>{image}<figcaption>{label}</figcaption></figure>"


def canvas(height: float) -> Any:
    """Empty matplotlib axes, 4.8 inches wide and `height` inches high, in the placeholder colours."""
    require("eval", "matplotlib")
    from matplotlib.figure import Figure

    axes = Figure(figsize=(4.8, height), layout="constrained").add_subplot()
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=INK, labelsize=10)
    axes.xaxis.label.set_color(INK)
    return axes


def svg(axes: Any) -> str:
    """The figure of `axes` as SVG that scales with the page and takes its colours and font."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lens"}):
        axes.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r' (?:id|width|height)="[^"]*"', "", text[: text.index(">")]) + text[text.index(">") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text


def page(title: str, parts: Sequence[str]) -> str:
    """One HTML page of a title and its parts, in HTML."""
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return PAGE.replace("@TITLE@", escape(title), 1).replace("@BODY@", body, 1)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #dde2e9; --page: #fbfcfd; --card: #fff;
  --lens: #2f6fde; --other: #a9b4c4; --loss: #d9743a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a4b5; --line: #303844; --page: #12161c;
  --card: #191f27; --lens: #6ea2ff; --other: #56627a; --loss: #e58a52; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; } p, li, figcaption { color: var(--soft); } p { margin: 0 0 .8rem; }
ul { padding-left: 1.2rem; font-size: .9rem; overflow-wrap: anywhere; }
.table { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 500; } tbody tr + tr > * { border-top: 1px solid var(--line); }
td b { color: var(--lens); }
figure { margin: 1rem 0 0; padding: .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
figure svg { display: block; width: 100%; max-width: 34rem; height: auto; margin: 0 auto; font-family: inherit; }
figcaption { font-size: .85rem; text-align: center; margin-top: .4rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 1rem; }
details { margin-top: 1rem; } summary { cursor: pointer; padding: .3rem 0; }
details tbody th { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
.prose tbody th { min-width: 0; vertical-align: top; } .prose thead th, .prose td { text-align: left; }
.prose thead th, .prose td { white-space: normal; min-width: 13rem; overflow-wrap: anywhere; vertical-align: top; }
.prose th:first-child { min-width: 0; }
</style></head><body>
@BODY@
</body></html>
"""

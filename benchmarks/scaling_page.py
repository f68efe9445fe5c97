"""The section of docs/performance.md on how cost grows, from the figures of benchmarks/scaling.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.measure import exponent, line, plot
from benchmarks.page import listed


def medians(spreads: Sequence[dict[str, float]]) -> list[float]:
    """The medians alone."""
    return [facts["median"] for facts in spreads]


def table(sizes: Sequence[int], name: str, cells: dict[str, list[float]], form: str = ".2f") -> list[str]:
    """A table with a row for each size."""
    lines = [f"| {name} | {' | '.join(cells)} |", "| ---: |" + " ---: |" * len(cells)]
    for number, size in enumerate(sizes):
        lines.append(f"| {size:,} | " + " | ".join(f"{values[number]:{form}}" for values in cells.values()) + " |")
    return [*lines, ""]


def powers(sizes: Sequence[int], seconds: dict[str, list[float]]) -> str:
    """`0.98 (name), 1.01 (name)`."""
    return ", ".join(f"{exponent(sizes, values):.2f} ({name})" for name, values in seconds.items())


def drawn(name: str, sizes: Sequence[int], seconds: dict[str, list[float]], x: str) -> list[str]:
    """The plot of seconds against sizes."""
    return [plot(f"scaling-{name}", {who: (sizes, values) for who, values in seconds.items()}, x, "seconds"), ""]


def page(content: dict[str, Any]) -> list[str]:
    """The section of docs/performance.md."""
    lines = [
        "## Scaling (CPU)",
        "",
        f"Written by `benchmarks/scaling.py`; do not edit. Machine: {listed(content['machine'])}. "
        f"Versions: {listed(content['versions'])}. Medians of {content['rounds']} rounds in turn. An exponent is the "
        "slope of the least-squares line through the logarithms: 1 means that cost grows in proportion.",
        "",
    ]
    for part, write in (
        ("tokens", tokens_page),
        ("clusters", clusters_page),
        ("documents", documents_page),
        ("ranks", ranks_page),
    ):
        if part in content:
            found = content[part]
            seconds = {name: medians(values) for name, values in found["seconds"].items()}
            lines += write(content, found, seconds)
    return lines[:-1]


def tokens_page(content: dict[str, Any], found: dict[str, Any], seconds: dict[str, list[float]]) -> list[str]:
    """Encode against tokens."""
    return [
        "### Tokens",
        "",
        f"An encode of texts of {', '.join(content['sources'])}, cut at {content['length']} tokens; machine's load "
        f"before: {found['load_before']}. Seconds grow as tokens to the power: {powers(found['sizes'], seconds)}; "
        f"memory beyond the model: {powers(found['sizes'], found['memory_mb'])}.",
        "",
        *drawn("tokens", found["sizes"], seconds, "tokens"),
        *table(found["sizes"], "tokens, seconds", seconds),
        *table(found["sizes"], "tokens, MB", found["memory_mb"], ",.0f"),
    ]


def clusters_page(content: dict[str, Any], found: dict[str, Any], seconds: dict[str, list[float]]) -> list[str]:
    """Encode against K."""
    slope, base = line(found["sizes"], seconds["LENS"])
    alone = found["backbone"]["median"]
    series = seconds | {"backbone alone": [alone] * len(found["sizes"])}
    return [
        "### Clusters",
        "",
        f"An encode of {found['tokens']:,} tokens, random centroids; machine's load before: {found['load_before']}. "
        f"Seconds grow as K to the power {exponent(found['sizes'], seconds['LENS']):.2f}, because the backbone costs "
        f"the same for all; a line fits: {base:.2f} s and {1000 * slope:.3f} s for every 1,000 clusters. The backbone "
        f"alone takes {alone:.2f} s.",
        "",
        *drawn("clusters", found["sizes"], series, "clusters"),
        *table(found["sizes"], "clusters", seconds | {"MB": found["memory_mb"]["LENS"]}),
    ]


def documents_page(content: dict[str, Any], found: dict[str, Any], seconds: dict[str, list[float]]) -> list[str]:
    """Search against documents."""
    single, made = ({name: medians(values) for name, values in found[key].items()} for key in ("one query", "index"))
    return [
        "### Documents",
        "",
        f"The 10 best of all documents; {found['dimensions']:,} dimensions, of which {found['active']:.0f} are active "
        f"in a sparse document; machine's load before: {found['load_before']}. LENS keeps no index: every search turns "
        "sparse documents into columns, which shows in what a single query costs. Seconds of "
        f"{found['queries']} queries grow as documents to the power: {powers(found['sizes'], seconds)}; of one query: "
        f"{powers(found['sizes'], single)}; of making the index: {powers(found['sizes'], made)}.",
        "",
        *drawn("documents", found["sizes"], seconds, "documents"),
        *table(found["sizes"], f"documents, {found['queries']} queries", seconds, ".3f"),
        *table(found["sizes"], "documents, one query", single, ".4f"),
        *table(found["sizes"], "documents, index", made, ".3f"),
    ]


def ranks_page(content: dict[str, Any], found: dict[str, Any], seconds: dict[str, list[float]]) -> list[str]:
    """Training step against ranks."""
    first = seconds["exchanging"][0]
    kept = {"efficiency, %": [100 * first / value for value in seconds["exchanging"]]}
    return [
        "### Ranks",
        "",
        f"A step of AdamW on {found['clusters']:,} clusters and all weights of MiniLM, float32: {found['batch']} "
        f"queries of {content['judged']} with two documents each on every rank, whatever their number. Ranks are "
        f"processes with one thread each on this machine's {content['machine']['cores']} cores, joined by gloo; "
        "`apart` are as many that exchange neither embeddings nor gradients, which tells what they take from each "
        f"other by sharing the machine. Its load before: {found['load_before']}. Seconds of a step grow as ranks to "
        f"the power: {powers(found['sizes'], seconds)}; 0 would be perfect.",
        "",
        *drawn("ranks", found["sizes"], seconds, "ranks"),
        *table(found["sizes"], "ranks", seconds | kept),
    ]

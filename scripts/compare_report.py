"""A finished comparison -> its table, its plot, and which of the papers' orderings held.

    python scripts/compare_report.py runs/compare

Reads the evaluations that scripts/compare_lexical.py made there; writes results.json, report.md and plot.svg.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import page
from eval.metrics import MEASURES, Values, compare
from eval.page import number, p_value
from lens.files import atomic_file, read_json, require, write_json
from lens.program import interruptible

MAIN = MEASURES[0]
LABELS = {
    "bm25": "BM25",
    "tfidf": "TF-IDF",
    "doc2query": "doc2query",
    "DeepCT": "DeepCT",
    "SparTerm-literal": "SparTerm, literal-only",
    "SparTerm-expansion": "SparTerm, expansion-only",
    "SparTerm-enhanced": "SparTerm, expansion-enhanced",
    "splade-v1-l1": "SPLADE v1, L1",
    "splade-v1-flops": "SPLADE v1, FLOPS",
    "splade-max": "SPLADE-max",
    "splade-doc": "SPLADE-doc",
    "splade-distil": "SPLADE-distil",
    "splade-clusters": "SPLADE-max over clusters",
    "LENS": "LENS",
    "dense": "dense backbone",
}
ORDERINGS = (
    ("bm25", "tfidf", "BM25's saturation and lengths (Robertson)"),
    ("DeepCT", "bm25", "arXiv 1910.10687"),
    ("doc2query", "bm25", "arXiv 1904.08375"),
    ("doc2query", "DeepCT", "MS MARCO, .277 and .243"),
    ("SparTerm-enhanced", "SparTerm-literal", "arXiv 2010.00768"),
    ("SparTerm-enhanced", "SparTerm-expansion", "arXiv 2010.00768"),
    ("SparTerm-enhanced", "DeepCT", "MS MARCO, .279 and .243"),
    ("splade-v1-flops", "SparTerm-enhanced", "arXiv 2107.05720, .322 and .279"),
    ("splade-max", "splade-v1-flops", "arXiv 2109.10086, .340 and .322"),
    ("splade-max", "splade-doc", "arXiv 2109.10086, .340 and .322"),
    ("splade-distil", "splade-max", "arXiv 2109.10086, .368 and .340"),
    ("LENS", "dense", "arXiv 2501.09749"),
)
"""What the papers found: the first system above the second, and where."""
STEPS = {
    "LENS": "lens",
    "DeepCT": "deepct",
    "doc2query": "generator",
    **{f"SparTerm-{mode}": "sparterm" for mode in ("literal", "expansion", "enhanced")},
}


def per_query(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """per_query/DATASET.tsv of eval/run.py: system -> measure -> query id -> value."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if None in row.values() or not {"system", "query-id", *MEASURES} <= row.keys():
                raise ValueError(f"{path} is not complete: run the evaluation again")
            for measure in MEASURES:
                found.setdefault(row["system"], {}).setdefault(measure, {})[row["query-id"]] = float(row[measure])
    return found


def gather(output: Path) -> dict[str, Any]:
    """The content of results.json; raises OSError or ValueError for an output that is not complete."""
    results = read_json(output / "eval" / "results.json")
    settings = read_json(output / ".steps" / "settings.json")
    stamps = {name: output / ".steps" / f"{name}.json" for name in settings["plan"]}
    seconds = {name: read_json(path)["seconds"] for name, path in stamps.items() if path.is_file()}
    datasets = {}
    for name, data in results["datasets"].items():
        systems = dict(data["systems"])
        values = per_query(output / "eval" / "per_query" / f"{name}.tsv")
        other = output / "eval-doc2query" / name
        if "doc2query" in settings["rows"]:
            systems["doc2query"] = read_json(other / "results.json")["datasets"]["expanded"]["systems"]["bm25"]
            values["doc2query"] = per_query(other / "per_query" / "expanded.tsv")["bm25"]
        datasets[name] = {
            **{key: data[key] for key in ("queries", "documents")},
            "systems": {system: systems[system] for system in LABELS if system in systems},
            "comparisons": tested(values, [(system, "bm25") for system in LABELS if system in values]),
            "orderings": tested(values, [(one, two) for one, two, _ in ORDERINGS]),
        }
    return {
        "settings": settings,
        "data": read_json(output / "data" / "data.json"),
        "seconds": seconds,
        "datasets": datasets,
        "machine": results["machine"],
        "cpu": page.machine(),
        "versions": results["versions"],
    }


def tested(
    values: Mapping[str, Mapping[str, Mapping[str, float]]], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Paired tests of the main measure for those pairs (system, other) that are there, Holm-corrected over them."""
    there = [(one, two) for one, two in pairs if one in values and two in values and one != two]
    queries = list(values["bm25"][MAIN])
    for system in {name for pair in there for name in pair}:
        if values[system][MAIN].keys() != set(queries):
            raise ValueError(f"{system} and bm25 were evaluated on other queries: run the comparison with --restart")
    arrays: dict[str, Values] = {
        system: {MAIN: np.array([found[MAIN][query] for query in queries])} for system, found in values.items()
    }
    return [asdict(row) for row in compare(arrays, there)] if there else []


def table(data: Mapping[str, Any], seconds: Mapping[str, float]) -> list[str]:
    """The rows of one data set in markdown."""
    against = {row["system"]: row for row in data["comparisons"]}
    header = [
        "", MAIN, "Δ to BM25", "p (Holm)", "R@100", "FLOPS", "active, query", "active, document", "index MB",
        "ms a query", "training s",
    ]  # fmt: skip
    rows = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for name, facts in data["systems"].items():
        row = against.get(name)
        cells = [
            LABELS[name],
            number(facts[MAIN]),
            f"{row['difference']:+.3f}" if row else "–",
            p_value(row["p_holm"]) if row else "–",
            number(facts["R@100"]),
            number(facts["flops"], 2),
            number(facts["active_per_query"], 0),
            number(facts["active_per_document"], 0),
            number(facts["index_mb"], 1),
            number(facts["milliseconds"]["median"], 1),
            number(seconds.get(STEPS.get(name, name)), 0),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def verdict(row: Mapping[str, Any]) -> str:
    """Whether an ordering held: a difference that the test tells from chance, either way."""
    if row["p_holm"] is None or row["p_holm"] >= 0.05:
        return "undecided"
    return "held" if row["difference"] > 0 else "reversed"


def orderings(datasets: Mapping[str, Any]) -> list[str]:
    """A row for each of the papers' orderings, a column for each data set."""
    shown = ["| the papers' ordering | " + " | ".join(datasets) + " | source |"]
    shown.append("| --- |" + " --- |" * (len(datasets) + 1))
    found = {name: {(row["system"], row["other"]): row for row in data["orderings"]} for name, data in datasets.items()}
    for one, two, source in ORDERINGS:
        if not all((one, two) in rows for rows in found.values()):
            continue
        cells = []
        for rows in found.values():
            row = rows[one, two]
            cells.append(f"{verdict(row)} ({row['difference']:+.3f}, p {p_value(row['p_holm'])})")
        shown.append(f"| {LABELS[one]} > {LABELS[two]} | " + " | ".join(cells) + f" | {source} |")
    return shown


def summary(datasets: Mapping[str, Any]) -> str:
    """The table of orderings in words."""
    found: dict[str, list[str]] = {"held": [], "reversed": [], "undecided": [], "mixed": []}
    for one, two, _ in ORDERINGS:
        rows = [
            row
            for data in datasets.values()
            for row in data["orderings"]
            if (row["system"], row["other"]) == (one, two)
        ]
        kinds = {verdict(row) for row in rows}
        if kinds:
            found[kinds.pop() if len(kinds) == 1 else "mixed"].append(f"{LABELS[one]} > {LABELS[two]}")
    texts = {
        "held": "Held on every data set",
        "mixed": "Not the same verdict on every data set",
        "reversed": "Reversed",
        "undecided": "Not to be told from chance",
    }
    return " ".join(f"{texts[kind]}: {'; '.join(items)}." for kind, items in found.items() if items)


def plot(datasets: Mapping[str, Any]) -> str:
    """SVG: effectiveness against cost, a panel for each data set, a point for each system."""
    require("eval", "matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "lens", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9.5, 4.2 * len(datasets)), layout="constrained")
        panels = figure.subplots(len(datasets), 1, squeeze=False)[:, 0]
        for axes, (name, data) in zip(panels, datasets.items(), strict=True):
            # a collapsed model has no FLOPS, and no place on a logarithmic axis
            cheapest = min((f["flops"] for f in data["systems"].values() if f["flops"] > 0), default=1) / 2
            for place, (system, facts) in enumerate(data["systems"].items()):
                marker = "os^Dv*P"[place // 10 * 3 + place % 3]
                axes.plot(
                    max(facts["flops"], cheapest), facts[MAIN], marker, color=f"C{place % 10}", label=LABELS[system]
                )
            axes.set_xscale("log")
            axes.set_xlabel("FLOPS: multiplications per query and document")
            axes.set_ylabel(MAIN)
            axes.set_title(name)
            axes.grid(alpha=0.3)
        panels[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def made(content: Mapping[str, Any]) -> list[str]:
    """How the rows came about, in sentences."""
    settings, data, machine = content["settings"], content["data"], content["machine"]
    rows = set(settings["rows"])
    splade = {row for row in rows if row.startswith("splade-")}
    source = ", ".join(settings["pairs"]) or f"qrels/train.tsv of {settings['trained_on_folder'][0]}"
    found = [
        f"Training: {data['queries']:,} queries with {data['passages']:,} passages ({source}), backbone "
        f"{settings['backbone']}, {settings['steps']} steps of {settings['batch_size']} examples where nothing else is "
        "said.",
    ]
    whole = [name for row, name in (("deepct", "DeepCT"), ("sparterm", "SparTerm")) if row in rows]
    last = [name for name, those in (("LENS", {"lens"}), ("the SPLADE rows", splade)) if those & rows]
    for names, what in ((last, "the last layer and the head"), (whole, "all layers")):
        if names:
            found.append(f"Of {' and '.join(names)} {what} are trained.")
    if {"lens", "splade-distil"} & rows:
        found.append("The teacher of LENS and SPLADE-distil is the backbone itself.")
    if splade:
        found.append("Rows with sums (SPLADE v1) take smaller steps than those with maxima; the commands say which.")
    if "mlm" in settings["plan"]:
        text = f" and {', '.join(settings['text'])}" if settings["text"] else ""
        who = " and ".join(["SPLADE"] * bool(splade) + ["SparTerm"] * ("sparterm" in rows))
        start = "begin" if " and " in who else "begins"
        found.append(
            f"The MLM head with which {who} {start} was trained on the frozen backbone in {settings['mlm_steps']} "
            f"steps on the pairs{text}; its logits are pointwise mutual information."
        )
    if "doc2query" in rows:
        found.append(
            f"doc2query's generator, an encoder-decoder made of the backbone, learnt in {settings['generator_steps']} "
            f"steps of half a batch and wrote {settings['queries']} queries a document."
        )
    if "deepct" in rows:
        found.append(f"DeepCT's frequencies are scaled by {settings['deepct_scale']:,}.")
    words = [
        name
        for row, name in (("tfidf", "TF-IDF"), ("doc2query", "doc2query's index"), ("deepct", "DeepCT"))
        if row in rows
    ]
    found.append(
        f"{' and '.join([', '.join(['BM25', *words[:-1]]), *words[-1:]])} {'read' if words else 'reads'} whole "
        f"documents, all others the first {settings['length']} tokens."
    )
    if settings["trained_on_folder"]:
        found.append(
            f"The documents of {settings['trained_on_folder'][0]} were seen in training, its test queries were not."
        )
    else:
        found.append(
            "No training pair is a query or a document of the data below; raw text was not compared with them."
        )
    found.append(
        f"{machine['cores']} cores, GPU {machine['gpu'] or 'none'}; "
        f"{sum(content['seconds'].values()) / 60:.0f} minutes in all."
    )
    return found


def lines(content: Mapping[str, Any]) -> list[str]:
    """The report in markdown."""
    datasets = content["datasets"]
    own = {STEPS.get(name, name) for name in LABELS}
    shared = {name: value for name, value in content["seconds"].items() if name not in own}
    found = [" ".join(made(content)), ""]
    for name, facts in datasets.items():
        found += [
            f"**{name}**: {facts['queries']:,} queries, {facts['documents']:,} documents.",
            "",
            *table(facts, content["seconds"]),
            "",
        ]
    found += [
        "FLOPS are expected multiplications per query and document. Milliseconds go from one query's text to its ten "
        "best documents, encoding included, by exact search and with the threads that torch and BLAS take. Training "
        "seconds are those of the row's own step; the other steps: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in shared.items())
        + ".",
        "",
        *orderings(datasets),
        "",
        "`held` and `reversed`: the paired randomisation test tells the difference from chance (p < .05, "
        "Holm-corrected over the orderings of a data set).",
        "",
        summary(datasets),
    ]
    return found


@interruptible("scripts/compare_report.py")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="output folder of scripts/compare_lexical.py")
    options = parser.parse_args(arguments)
    try:
        content = gather(options.output)
        write_json(options.output / "results.json", content)
        for name, text in (("plot.svg", plot(content["datasets"])), ("report.md", "\n".join(lines(content)) + "\n")):
            with atomic_file(options.output / name, overwrite=True) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except KeyError as error:
        print(f"error: {options.output} holds no whole comparison: {error} is missing in it", file=sys.stderr)
        return 2
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

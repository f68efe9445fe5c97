"""Retrieval figures of docs/results.md and docs/evaluation.md: LENS-mini, its backbone and BM25 on BEIR folders.

    python benchmarks/retrieval.py --quickstart runs/quickstart --beir DIR [DIR ...]

Takes the quick start's own evaluation of its held-out part, runs eval/run.py on each further folder with the same
model, and BM25 with and without stems; writes benchmarks/results/retrieval.json and, from it, a section of
docs/results.md. `--page` writes the section only.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments
from benchmarks.page import RESULTS as FOLDER
from benchmarks.page import ROOT, write_section
from lens.files import read_json, write_json

RESULTS = FOLDER / "retrieval.json"
PLACES = ("base", "data", "output", "clusters", "teacher_embeddings", "inputs")  # paths say nothing elsewhere
SHOWN = ("nDCG@10", "RR@10", "R@100")


def evaluate(arguments: list[str]) -> dict[str, Any]:
    """The results.json of one call of eval/run.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "eval/run.py", *arguments, "--output", f"{folder}/eval"]
        subprocess.run(command, cwd=ROOT, check=True)
        return read_json(Path(folder) / "eval" / "results.json")


def collect(quickstart: Path, folders: list[Path], note: str) -> dict[str, Any]:
    """All figures: the held-out part, the further folders, BM25's two settings, the quick start's own record."""
    model = ["--model", f"LENS={quickstart / 'model'}", "--baselines", "bm25", "dense", "--fuse"]
    heldout = read_json(quickstart / "eval" / "results.json")
    others = evaluate([*model, "--beir", *map(str, folders), "--split", "test"])
    plain = evaluate(["--beir", *map(str, folders), "--split", "test", "--baselines", "bm25", "--bm25-stemmer", "none"])
    report = read_json(quickstart / "report.json")
    recipe = read_json(quickstart / "model" / "recipe.json")
    cpu = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    return {
        "note": note,
        "heldout": heldout["datasets"]["heldout"],
        "others": others["datasets"],
        "bm25_plain_words": {name: data["systems"]["bm25"] for name, data in plain["datasets"].items()},
        "quickstart": {name: report[name] for name in ("seconds", "peak_rss_mb", "counts")},
        "recipe": {name: value for name, value in recipe.items() if name not in PLACES},
        "machine": {
            "cpu": cpu[1] if cpu else platform.processor(),
            "cores": heldout["machine"]["cores"],
            "gpu": heldout["machine"]["gpu"] or "none",
        },
        "versions": heldout["versions"],
    }


def table(datasets: dict[str, Any], measure: str) -> list[str]:
    """Rows of systems x data sets for one measure."""
    systems = list(dict.fromkeys(name for data in datasets.values() for name in data["systems"]))
    lines = [f"| {measure} | " + " | ".join(datasets) + " |", "| --- |" + " ---: |" * len(datasets)]
    for system in systems:
        cells = [f"{data['systems'][system][measure]:.3f}" for data in datasets.values()]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return lines


def comparisons(data: dict[str, Any], measure: str = "nDCG@10") -> list[str]:
    """Rows of paired differences for one data set."""
    lines = ["| system | against | difference | 95% interval | p |", "| --- | --- | ---: | --- | ---: |"]
    for row in data["comparisons"]:
        if row["measure"] == measure:
            interval = f"{row['low']:+.3f} to {row['high']:+.3f}"
            p = "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
            lines.append(f"| {row['system']} | {row['other']} | {row['difference']:+.3f} | {interval} | {p} |")
    return lines


def verdict(heldout: dict[str, Any]) -> str:
    """What the comparison of LENS with BM25 says, in a sentence."""
    row = next(
        row
        for row in heldout["comparisons"]
        if (row["system"], row["other"], row["measure"]) == ("LENS", "bm25", "nDCG@10")
    )
    scores = {name: heldout["systems"][name]["nDCG@10"] for name in ("dense", "bm25")}
    if row["p"] < 0.05:
        verb = "beats" if row["difference"] > 0 else "stays behind"
        sentence = f"LENS-mini {verb} BM25 on this task ({row['difference']:+.3f}, p = {row['p']:.3f})."
    else:
        sentence = (
            f"LENS-mini and BM25 cannot be told apart on this task ({row['difference']:+.3f}, p = {row['p']:.2f}): "
            f"BM25 with stems reaches {scores['bm25']:.3f}, the dense backbone {scores['dense']:.3f}."
        )
    alone, both = (heldout["systems"][name]["nDCG@10"] for name in ("LENS", "LENS + dense"))
    if both < alone:
        sentence += f" LENS + dense ({both:.3f}) is no gain over LENS alone ({alone:.3f})."
    return sentence


def page(content: dict[str, Any]) -> list[str]:
    """The section of docs/results.md."""
    report = content["quickstart"]
    heldout = content["heldout"]
    total = sum(report["seconds"].values())
    ratio = heldout["systems"]["LENS"]["nDCG@10"] / heldout["systems"]["dense"]["nDCG@10"]
    lines = [
        "Written by `benchmarks/retrieval.py` from `benchmarks/results/retrieval.json`; do not edit.",
        "",
        f"Machine: {', '.join(f'{k} {v}' for k, v in content['machine'].items())}. "
        f"Versions: {', '.join(f'{k} {v}' for k, v in content['versions'].items())}.",
        "",
        "## The quick start: LENS-mini on Python's documentation",
        "",
        f"{report['counts']['train_queries']:,} training queries, {heldout['queries']:,} held-out ones (summaries of "
        f"modules that training never saw) over "
        f"{heldout['documents']:,} passages. LENS reaches {ratio:.1%} of the dense backbone's nDCG@10.",
        "",
        *table({"held-out summaries": heldout}, "nDCG@10"),
        "",
        *table({"held-out summaries": heldout}, "R@100"),
        "",
        "Paired differences of nDCG@10 on the held-out summaries (randomisation test, bootstrap interval):",
        "",
        *comparisons(heldout),
        "",
        verdict(heldout),
        "",
        content["note"],
        "",
        f"The whole run took {total / 60:.1f} minutes and {report['peak_rss_mb']:,.0f} MB of memory at most:",
        "",
        "| step | seconds |",
        "| --- | ---: |",
        *(f"| {name} | {seconds:.0f} |" for name, seconds in report["seconds"].items()),
        "",
        "## The same model elsewhere",
        "",
        "Nothing of these sets was seen in training: the model knows only Python's documentation.",
        "",
    ]
    for measure in SHOWN:
        lines += [*table(content["others"], measure), ""]
    lines += ["Paired differences of nDCG@10:", ""]
    for name, data in content["others"].items():
        lines += [
            f"**{name}** ({data['queries']:,} queries, {data['documents']:,} documents)",
            "",
            *comparisons(data),
            "",
        ]
    lines += [
        "## BM25's settings",
        "",
        "Stems make the stronger baseline, so they are the default of `eval/run.py`; nDCG@10:",
        "",
        "| | " + " | ".join(content["others"]) + " |",
        "| --- |" + " ---: |" * len(content["others"]),
        "| stems | " + " | ".join(f"{d['systems']['bm25']['nDCG@10']:.3f}" for d in content["others"].values()) + " |",
        "| plain words | " + " | ".join(f"{d['nDCG@10']:.3f}" for d in content["bm25_plain_words"].values()) + " |",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, help="finished output folder of scripts/quickstart.sh")
    parser.add_argument(
        "--beir", type=arguments.judged, nargs="+", help="further folders in BEIR layout, with a test split"
    )
    parser.add_argument("--note", default="", help="a sentence for the page: how often this part was looked at before")
    parser.add_argument("--page", action="store_true", help="write the section from the stored figures, no more")
    options = parser.parse_args()
    arguments.check(parser, options, RESULTS)
    if not options.page:
        if not options.quickstart or not options.beir:
            parser.error("give --quickstart and --beir, or --page")
        folders = [folder.resolve() for folder in options.beir]
        write_json(RESULTS, collect(options.quickstart.resolve(), folders, options.note))
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_section("retrieval", page(content))


if __name__ == "__main__":
    main()

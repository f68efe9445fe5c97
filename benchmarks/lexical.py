"""The classic table of lexical systems in docs/results.md, from a finished run of scripts/compare_lexical.sh.

    python benchmarks/lexical.py --comparison runs/compare [--note "A sentence."]

Writes benchmarks/results/lexical.json, a plot beside docs/results.md, and the section. `--page` writes the latter two
from the stored figures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compare_report import lines, plot

from benchmarks import arguments, page
from lens.files import atomic_file, read_json, write_json

RESULTS = page.RESULTS / "lexical.json"
PLOT = "lexical.svg"


def section(content: dict[str, Any]) -> list[str]:
    """The section of docs/results.md."""
    return [
        "## The lexical systems on the same pairs",
        "",
        "Written by `benchmarks/lexical.py` from `benchmarks/results/lexical.json`; do not edit. Made by "
        "`scripts/compare_lexical.sh`.",
        "",
        f"Machine: {page.listed(content['cpu'])}. Versions: {page.listed(content['versions'])}.",
        "",
        *lines(content),
        "",
        f"![nDCG@10 against FLOPS](plots/{PLOT})",
        *(["", content["note"]] if content["note"] else []),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparison", type=Path, help="output folder of scripts/compare_lexical.sh")
    parser.add_argument("--note", default="", help="a paragraph for the page")
    parser.add_argument("--page", action="store_true", help="write the section from the stored figures, no more")
    options = parser.parse_args()
    arguments.check(parser, options, RESULTS)
    if options.page and options.note:
        parser.error("--page takes the stored note: leave --note out")
    if options.page:
        content = read_json(RESULTS)
    else:
        if options.comparison is None or not (options.comparison / "results.json").is_file():
            parser.error("give --comparison, a folder with results.json, or --page")
        content = {**read_json(options.comparison / "results.json"), "note": options.note}
    try:
        text, picture = section(content), plot(content["datasets"])
    except (KeyError, TypeError) as error:
        parser.error(f"{options.comparison or RESULTS} holds no comparison: {error}")
    if not options.page:
        write_json(RESULTS, content)
    with atomic_file(page.PAGE.parent / "plots" / PLOT, overwrite=True) as temporary:
        temporary.write_text(picture, encoding="utf-8")
    page.write_section("lexical", text)


if __name__ == "__main__":
    main()

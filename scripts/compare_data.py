"""Training examples of the lexical comparison: pairs of queries and passages, none of which the evaluation asks.

    python scripts/compare_data.py --pairs pairs.jsonl.gz [...] --exclude EVAL_DIR [...] --output runs/compare/data
    python scripts/compare_data.py --beir DIR --split train --exclude DIR --output runs/compare/data

Pairs are rows with `query` and `positive` (a text), or `pos` (one text or several). Of a folder in BEIR layout the
judgements above 0 of a split are pairs. Writes `pairs.jsonl` in the bge format, one row a query, and `data.json` with
the counts. Texts are compared by their words alone: a query worded like one that an excluded folder judges is left out,
and so is, of pairs, a passage that is one of its documents or, from 8 words on, a part of one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from quickstart_data import wording

from lens.corpus import read_beir, stream_texts
from lens.files import atomic_folder, check_output, read_jsonl, write_json
from lens.program import interruptible

GRAM = 8  # words


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """(query, passage) of a file; raises ValueError "FILE:LINE: ..." for a row that has none."""
    for number, row in read_jsonl(path):
        query, found = row.get("query"), row.get("positive") or row.get("pos")
        passages = [found] if isinstance(found, str) else found
        texts = [query, *passages] if isinstance(passages, list) and passages else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}:{number}: expected a text as query, and as positive (or pos) one text or several")
        for passage in texts[1:]:
            yield query, passage


def judged_pairs(folder: Path, split: str) -> Iterator[tuple[str, str]]:
    """(query, passage) of the judgements above 0 of a folder in BEIR layout."""
    beir = read_beir(folder, split)
    for query, judged in beir.qrels.items():
        for document, score in judged.items():
            if score > 0 and beir.queries[query].strip() and beir.corpus[document].strip():
                yield beir.queries[query], beir.corpus[document]


def known(passages: Iterable[str], folders: Sequence[Path]) -> set[str]:
    """The wordings among `passages` that are a document of the folders or, from GRAM words on, stand in one."""
    begins: dict[tuple[str, ...], set[str]] = {}  # first words of a passage -> passages
    for text in map(wording, passages):
        begins.setdefault(tuple(text.split()[:GRAM]), set()).add(text)
    found: set[str] = set()
    for folder in folders:
        for _, _, text in stream_texts(folder):
            words = wording(text).split()
            whole = f" {' '.join(words)} "
            found |= {part for part in begins.get(tuple(words[:GRAM]), ()) if whole == f" {part} "}
            for place in range(len(words) - GRAM + 1):
                for part in begins.get(tuple(words[place : place + GRAM]), ()):
                    if f" {part} " in whole:
                        found.add(part)
    return found


def examples(
    pairs: Iterable[tuple[str, str]], queries: set[str], passages: set[str], limit: int | None, seed: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of the bge format in an order drawn by `seed`, at most `limit`, and counts. `queries` and `passages` are the
    wordings that are left out."""
    rows: dict[str, dict[str, None]] = {}
    counts = {"pairs": 0, "queries_left_out": 0, "passages_left_out": 0}
    for query, passage in pairs:
        counts["pairs"] += 1
        if wording(query) in queries:
            counts["queries_left_out"] += 1
        elif wording(passage) in passages:
            counts["passages_left_out"] += 1
        else:
            rows.setdefault(query, {})[passage] = None
    kept = [{"query": query, "pos": list(found), "neg": []} for query, found in rows.items()]
    random.Random(seed).shuffle(kept)
    kept = kept[:limit]
    return kept, {**counts, "queries": len(kept), "passages": len({text for row in kept for text in row["pos"]})}


@interruptible("scripts/compare_data.py")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", type=Path, nargs="+", metavar="FILE")
    source.add_argument("--beir", type=Path, metavar="DIR")
    parser.add_argument("--split", default="train")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], metavar="DIR", help="folders of the evaluation")
    parser.add_argument("--limit", type=int, help="training queries at most")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        if options.limit is not None and options.limit < 1:
            raise ValueError(f"--limit must be at least 1, found {options.limit}")
        check_output(options.output, False, "data.json")
        queries: set[str] = set()
        for folder in options.exclude:
            beir = read_beir(folder)
            queries |= {wording(beir.queries[query]) for query in beir.qrels}
        if options.pairs:
            found = [pair for path in options.pairs for pair in read_pairs(path)]
        else:
            found = list(judged_pairs(options.beir, options.split))
        others = [folder for folder in options.exclude if not options.beir or not folder.samefile(options.beir)]
        passages = known((passage for _, passage in found), others)
        rows, counts = examples(found, queries, passages, options.limit, options.seed)
        if not rows:
            raise ValueError(f"no pair is left for training: {json.dumps(counts)}")
        with atomic_folder(options.output, False, "data.json") as folder:
            with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_json(folder / "data.json", counts)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{counts['queries']:,} training queries, {counts['passages']:,} passages -> {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

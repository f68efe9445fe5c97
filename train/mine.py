"""Mines hard negatives with BM25: a BEIR folder in, training examples out.

    python train/mine.py --beir DIR --split train --output FILE.jsonl [--negatives 15] [--depth 100]

Example: python train/mine.py --beir data/scifact --split train --output mined.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from lens.corpus import Beir, read_beir
from lens.files import atomic_file, check_output
from lens.program import interruptible
from lens.search.bm25 import BM25
from lens.search.exact import top
from lens.text import check_texts


def mine(
    data: Beir, negatives: int, depth: int, skip: int, seed: int, prompt: str | None = None
) -> list[dict[str, Any]]:
    """One example per judged query: all its positives, and `negatives` passages drawn from BM25 ranks skip to depth.

    Passages judged relevant to the query, and passages of the same text, are never negatives. When the ranks give
    too few, random passages fill up.
    """
    ids, texts = list(data.corpus), list(data.corpus.values())
    positions = {name: i for i, name in enumerate(ids)}
    index = BM25(texts)
    blank = [name for name in data.queries if not data.queries[name].strip()]
    blank += [
        name
        for judged in data.qrels.values()
        for name, s in judged.items()
        if s > 0 and not texts[positions[name]].strip()
    ]
    if blank:
        raise ValueError(f"{data.name}: {len(blank)} judged queries or documents are empty (first: {blank[0]!r})")
    filled = list(dict.fromkeys(text for text in texts if text.strip()))
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    queries = [(query, judged) for query, judged in data.qrels.items() if any(s > 0 for s in judged.values())]
    block = max(1, (1 << 24) // max(len(texts), 1))
    for start in tqdm(range(0, len(queries), block), desc="mine", unit="block", leave=False):
        part = queries[start : start + block]
        scores = index.score([data.queries[query] for query, _ in part])
        ranked, values = top(np.asarray(scores), min(depth, len(texts)))
        for (query, judged), order, value in zip(part, ranked, values, strict=True):
            positive = [positions[document] for document, score in judged.items() if score > 0]
            banned = {texts[i] for i in positive}
            pool = [int(i) for i, v in zip(order[skip:], value[skip:], strict=True) if v > 0]
            distinct = list(dict.fromkeys(texts[i] for i in pool if texts[i].strip() and texts[i] not in banned))
            chosen = rng.sample(distinct, min(negatives, len(distinct)))
            if len(chosen) < negatives:
                others = [text for text in filled if text not in banned and text not in set(chosen)]
                chosen += rng.sample(others, min(negatives - len(chosen), len(others)))
            rows.append(
                {
                    "query": data.queries[query],
                    "pos": sorted(banned),
                    "neg": chosen,
                    "pos_scores": None,
                    "neg_scores": None,
                    "prompt": prompt,
                    "type": "retrieval",
                }
            )
    return rows


@interruptible("train/mine.py")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train/mine.py"
    )
    parser.add_argument("--beir", required=True, help="folder in BEIR layout")
    parser.add_argument("--split", default="train", help="split of qrels/ whose queries become examples")
    parser.add_argument("--output", required=True, help="file to write, .jsonl, in the bge format")
    parser.add_argument("--negatives", type=int, default=15, help="hard negatives per query (15)")
    parser.add_argument("--depth", type=int, default=100, help="BM25 ranks that negatives are drawn from (100)")
    parser.add_argument("--skip", type=int, default=0, help="best ranks left out, where unjudged positives hide (0)")
    parser.add_argument("--prompt", help="instruction written into every example")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    options = parser.parse_args(arguments)
    try:
        if options.negatives < 1 or options.depth < 1 or not 0 <= options.skip < options.depth:
            raise ValueError(
                f"--negatives and --depth must be at least 1 and --skip from 0 to below --depth; found "
                f"{options.negatives}, {options.depth}, {options.skip}"
            )
        check_output(options.output, options.overwrite)
        if Path(options.output).resolve().is_relative_to(Path(options.beir).resolve()):
            raise ValueError(f"--output {options.output} lies in the folder --beir that is read: choose another place")
        if options.prompt is not None:
            check_texts([options.prompt])
        data = read_beir(options.beir, options.split)
        rows = mine(data, options.negatives, options.depth, options.skip, options.seed, options.prompt)
        if not rows:
            raise ValueError(f"{options.beir}/qrels/{options.split}.tsv judges no document relevant")
        with atomic_file(options.output, options.overwrite) as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except (ValueError, OSError, ImportError) as error:
        print(f"train/mine.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    fewest = min(len(row["neg"]) for row in rows)
    print(f"{len(rows):,} examples with {fewest} hard negatives or more in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Trains DeepCT: a passage's words learn what share of its queries holds them.

    python train/deepct.py --base MODEL --data FILE.jsonl ... --output DIR
    python train/deepct.py --base MODEL --beir DIR --split train --output DIR

Example: python train/deepct.py --base sentence-transformers/all-MiniLM-L6-v2 --data mined.jsonl --output runs/deepct
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lens  # noqa: F401  before transformers, so that bitsandbytes, which that imports, is kept quiet

# isort: split
import torch
from torch import Tensor
from transformers import set_seed

from lens.corpus import find_file, read_beir
from lens.deepct import CONFIG_FILE, DeepCT, Window
from lens.program import interruptible
from train.lexical import Steps, add_options, begun, check_options, schedule_of, train
from train.sources import read_examples


def query_term_recall(terms: Sequence[str], queries: Sequence[Sequence[str]]) -> list[float]:
    """For each term of a passage, the share of the passage's queries, each given as its terms, that hold it."""
    sets = [set(query) for query in queries]
    return [sum(term in query for query in sets) / len(sets) for term in terms]


def passages_of_examples(files: Sequence[str]) -> dict[str, list[str]]:
    """Passage -> its distinct queries, from the positives of training examples."""
    found: dict[str, dict[str, None]] = {}
    for file in files:
        for example in read_examples(file):
            for passage in example.pos:
                found.setdefault(passage, {})[example.query] = None
    return {passage: list(queries) for passage, queries in found.items()}


def passages_of_beir(folder: str, split: str) -> dict[str, list[str]]:
    """Passage -> its distinct queries, from the judgements above 0 of a BEIR folder.

    Raises ValueError where there is none.
    """
    data = read_beir(folder, split)
    found: dict[str, dict[str, None]] = {}
    for query, judged in data.qrels.items():
        for document, score in judged.items():
            if score > 0 and data.corpus[document].strip() and data.queries[query].strip():
                found.setdefault(data.corpus[document], {})[data.queries[query]] = None
    if not found:
        raise ValueError(f"{folder}/qrels/{split}.tsv judges no document relevant")
    return {passage: list(queries) for passage, queries in found.items()}


def targets(model: DeepCT, passages: Mapping[str, Sequence[str]]) -> list[tuple[Window, list[float]]]:
    """The windows of all passages that hold a word, each with the query term recall of its words."""
    distinct = list(dict.fromkeys(query for queries in passages.values() for query in queries))
    terms = dict(zip(distinct, model.words(distinct), strict=True))
    found: list[tuple[Window, list[float]]] = []
    for windows, queries in zip(model.windows(list(passages)), passages.values(), strict=True):
        asked = [terms[query] for query in queries]
        kept = [window for window in windows if window.words]
        found += [(window, query_term_recall([word.term for word in window.words], asked)) for window in kept]
    return found


@interruptible("train/deepct.py", "the same command goes on from the last checkpoint")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one training; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train/deepct.py"
    )
    parser.add_argument("--base", required=True, metavar="PATH", help="encoder to begin with, a folder or hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", nargs="+", metavar="FILE", help="examples in the bge format: their positives count")
    source.add_argument("--beir", metavar="DIR", help="folder in BEIR layout: judgements above 0 count")
    parser.add_argument("--split", default="train", help="split of the folder's qrels (train)")
    parser.add_argument("--max-length", type=int, default=128, metavar="TOKENS", help="length of a window (128)")
    parser.add_argument("--stopwords", default="english", metavar="LANGUAGE", help="stopword list of bm25s, or none")
    parser.add_argument("--stemmer", default="english", metavar="LANGUAGE", help="Snowball stemmer, or none")
    add_options(parser, batch_size=16, learning_rate=2e-5, epochs=3)
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"train/deepct.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Trains by the options; raises ValueError, OSError, ImportError or FloatingPointError with one clear line."""
    check_options(options)
    if options.beir:
        passages = passages_of_beir(options.beir, options.split)
        files = [find_file(options.beir, "corpus"), find_file(options.beir, "queries")]
        files.append(Path(options.beir) / "qrels" / f"{options.split}.tsv")
    else:
        passages = passages_of_examples(options.data)
        files = [Path(file) for file in options.data]
    with begun(options, files, CONFIG_FILE) as finished:
        if finished:
            print(f"{options.output} holds the finished model of these options; nothing to do")
            return 0
        set_seed(options.seed)
        settings = {"max_length": options.max_length, "stopwords": options.stopwords, "stemmer": options.stemmer}
        model = DeepCT.build(options.base, options.device, **settings)
        examples = targets(model, passages)
        if not examples:
            raise ValueError("no passage holds a word that is indexed: check --stopwords and the data")

        def batch(step: int, rows: list[int]) -> dict[str, Tensor]:
            chosen = [examples[row] for row in rows]
            values = [value for _, recall in chosen for value in recall]
            return {**model.collate([window for window, _ in chosen]), "targets": torch.tensor(values)}

        schedule = schedule_of(options, len(examples), "the data")
        print(f"{len(passages):,} passages in {len(examples):,} windows, {schedule.steps:,} steps", flush=True)
        set_seed(options.seed)
        if train(model.model, Steps(schedule, batch), options, model.write, CONFIG_FILE):
            print(f"model in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

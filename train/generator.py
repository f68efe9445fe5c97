"""Trains a query generator for doc2query: a sequence-to-sequence model reads a passage and writes its query.

    python train/generator.py --base MODEL --data FILE.jsonl ... --output DIR

Example: python train/generator.py --base bert-base-uncased --data pairs.jsonl --output runs/generator
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lens  # noqa: F401  before transformers, so that bitsandbytes, which that imports, is kept quiet

# isort: split
from transformers import set_seed

from lens.backbone import quiet
from lens.program import interruptible
from train.lexical import Steps, add_options, begun, check_options, schedule_of, train
from train.seq2seq import Pairs, load_base
from train.sources import read_examples

MARKER = "config.json"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train/generator.py"
    )
    add = parser.add_argument
    add("--base", required=True, metavar="PATH", help="sequence-to-sequence model, or encoder, a folder or hub id")
    add("--data", required=True, nargs="+", metavar="FILE", help="examples in the bge format: their positives count")
    add("--passage-length", type=int, default=128, metavar="TOKENS", help="tokens that a passage is cut to (128)")
    add("--query-length", type=int, default=32, metavar="TOKENS", help="tokens that a query is cut to (32)")
    add(
        "--encoder-layers",
        type=int,
        metavar="N",
        help="of an encoder as base: read with its first N layers; unset: all",
    )
    add(
        "--decoder-layers",
        type=int,
        metavar="N",
        help="of an encoder as base: write with its first N layers; unset: all",
    )
    add("--freeze-encoder", action="store_true", help="train what writes only")
    add("--dropout", type=float, metavar="P", help="share that is dropped out while training; unset: the base's own")
    add_options(parser, batch_size=32, learning_rate=3e-4, epochs=3)
    return parser


@interruptible("train/generator.py", "the same command goes on from the last checkpoint")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one training; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"train/generator.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Trains by the options; raises ValueError, OSError, ImportError or FloatingPointError with one clear line."""
    check_options(options)
    for name, least in {"passage_length": 3, "query_length": 2}.items():
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, found {getattr(options, name)}")
    if options.dropout is not None and not 0 <= options.dropout < 1:
        raise ValueError(f"--dropout must be at least 0 and below 1, found {options.dropout}")
    found = {
        (passage, example.query): None
        for file in options.data
        for example in read_examples(file)
        for passage in example.pos
    }
    with begun(options, [Path(file) for file in options.data], MARKER) as finished:
        if finished:
            print(f"{options.output} holds the finished model of these options; nothing to do")
            return 0
        set_seed(options.seed)
        model, tokenizer = load_base(options.base, options.encoder_layers, options.decoder_layers, options.dropout)
        pairs = Pairs(model, tokenizer, list(found), options.passage_length, options.query_length)
        if options.freeze_encoder:
            writing = {id(parameter) for parameter in model.get_decoder().parameters()}
            for parameter in model.get_encoder().parameters():
                parameter.requires_grad = id(parameter) in writing  # T5's embeddings are of both

        def write(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        schedule = schedule_of(options, len(pairs), "the data")
        print(f"{len(pairs):,} pairs, {schedule.steps:,} steps", flush=True)
        set_seed(options.seed)
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Version v4.12.0 introduces a better way", category=FutureWarning)
            if train(model, Steps(schedule, pairs.batches(schedule)), options, write, MARKER):
                print(f"model in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

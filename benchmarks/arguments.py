"""What the benchmarks' command lines share: input that cannot be measured is refused in one line, before any work."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lens.corpus import find_file


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


def above_zero(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, found {text}")
    return value


def beir(text: str) -> Path:
    """A folder with a corpus and queries."""
    try:
        for stem in ("corpus", "queries"):
            find_file(Path(text), stem)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def judged(text: str) -> Path:
    """The same with judgements."""
    if not (beir(text) / "qrels").is_dir():
        raise argparse.ArgumentTypeError(f"{text} has no folder qrels")
    return Path(text)


def artifact(text: str) -> Path:
    """A folder with a LENS model."""
    if not (Path(text) / "lens.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no LENS model: it has no lens.json")
    return Path(text)


def check(parser: argparse.ArgumentParser, options: argparse.Namespace, *stored: Path) -> None:
    """Ends the program for --page where none of the files with figures is there, and for a GPU that is not there."""
    if options.page and not any(file.is_file() for file in stored):
        parser.error(f"--page: there are no stored figures in {' or '.join(map(str, stored))}")
    if getattr(options, "device", "cpu") == "cuda" and not options.page and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")

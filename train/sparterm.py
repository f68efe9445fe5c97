"""Trains SparTerm: importance by ranking a query's passage above others, the gate by the terms of a passage's queries.

    python train/sparterm.py --base MODEL --data FILE.jsonl ... --output DIR [--mode literal|expansion|enhanced]

Example: python train/sparterm.py --base bert-base-uncased --data mined.jsonl --output runs/sparterm
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lens  # noqa: F401  before transformers, so that bitsandbytes, which that imports, is kept quiet

# isort: split
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import set_seed

from lens.model import CLUSTERS_FILE, read_clusters
from lens.program import interruptible
from lens.sparterm import CONFIG_FILE, MODES, SparTerm, SparTermConfig, SparTermModel
from train.data import Example, choose
from train.lexical import Steps, add_options, begun, check_options, schedule_of, train
from train.sources import read_examples

# Legend: Q queries, P passages per query, K terms, M tokens.


def ranking_loss(queries: Tensor, passages: Tensor, in_batch: bool = False, temperature: float = 1.0) -> Tensor:
    """Mean over queries (Q, K) of -log softmax of the first passage's inner product among those of its own passages
    (Q*P, K), or with `in_batch` of all; products are divided by `temperature`."""
    size = len(passages) // len(queries)
    if in_batch:
        scores = queries @ passages.T  # (Q, Q*P)
        first = torch.arange(len(queries), device=queries.device) * size
    else:
        scores = torch.einsum("qk,qpk->qp", queries, passages.unflatten(0, (len(queries), size)))
        first = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    return F.cross_entropy(scores / temperature, first)


def gate_loss(logits: Tensor, wanted: Tensor, positive: float = 1.0, negative: float = 1.0) -> Tensor:
    """Balanced cross-entropy of gate logits (B, K) with the terms that are wanted (B, K) bool: `positive` times the
    mean of -log G over wanted terms plus `negative` times the mean of -log(1 - G) over the others."""
    parts = (positive, F.softplus(-logits), wanted), (negative, F.softplus(logits), ~wanted)
    total = logits.new_zeros(())
    for weight, losses, chosen in parts:
        total = total + weight * (losses * chosen).sum() / chosen.sum().clamp(min=1)
    return total


class Training(nn.Module):
    """A model with its two losses: `rank` of its embeddings, from which no gradient reaches the gate, and `gate`."""

    def __init__(self, model: SparTermModel, options: argparse.Namespace) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(
        self, queries: dict[str, Any], passages: dict[str, Any], asked_rows: Tensor, asked: Tensor
    ) -> dict[str, Tensor]:
        """The loss of Q queries and their Q*P passages, given as LensModel's arguments. `asked` (M,) are the tokens of
        all queries of the first passages, which `asked_rows` (M,) number from 0 to Q-1."""
        config, options = self.model.config, self.options
        query, passage = self.model(queries, config.query_mode), self.model(passages, config.mode)
        rank = ranking_loss(query.embeddings, passage.embeddings, options.in_batch_negatives, options.temperature)
        if passage.gate is None:
            return {"loss": rank, "rank": rank}
        wanted = self.model.bag(asked_rows, asked, len(query.embeddings))
        first = passage.gate[:: len(passage.gate) // len(wanted)]
        gate = gate_loss(first, wanted, options.positive_weight, options.negative_weight)
        return {"loss": rank + options.gate_weight * gate, "rank": rank, "gate": gate}


def collate(model: SparTerm, groups: Sequence[Any], asked: dict[str, list[str]]) -> dict[str, Any]:
    """The arguments of `Training` for groups (train.data.Group); `asked` maps a passage to all its queries."""
    text = model.text
    queries = text([group.example.query for group in groups], "query")
    passages = text([passage for group in groups for passage in group.passages])
    wanted = [(row, query) for row, group in enumerate(groups) for query in asked[group.passages[0]]]
    tokens = text([query for _, query in wanted], "query")
    pairs = [
        (row, token) for (row, _), item in zip(wanted, tokens, strict=True) for token in item.ids[item.start : item.end]
    ]
    return {
        "queries": text.collate(queries).inputs(),
        "passages": text.collate(passages).inputs(),
        "asked_rows": torch.tensor([row for row, _ in pairs], dtype=torch.long),
        "asked": torch.tensor([token for _, token in pairs], dtype=torch.long),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train/sparterm.py"
    )
    add = parser.add_argument
    add("--base", required=True, metavar="PATH", help="encoder to begin with, best one with its MLM head")
    add("--data", required=True, nargs="+", metavar="FILE", help="examples in the bge format, with negatives")
    add("--clusters", metavar="DIR", help="clusters of the base's tokens as terms; unset: its vocabulary")
    add("--transform", choices=("none", "mlm", "residual", "context"), help="before the head, where the base has none")
    add("--mode", choices=MODES, default="enhanced", help="terms of documents: own, those of the gate, both (enhanced)")
    add("--query-mode", choices=MODES, default="literal", help="the same for queries (literal)")
    add("--threshold", type=float, default=0.5, help="gate probability above which a term is added (0.5)")
    add("--negatives", type=int, default=1, help="hard negatives per query in a step (1)")
    add("--in-batch-negatives", action="store_true", help="the other queries' passages are negatives too")
    add("--temperature", type=float, default=1.0, help="inner products are divided by it in the ranking loss (1)")
    add("--gate-weight", type=float, default=1.0, help="of the gate's loss beside the ranking loss (1)")
    add("--gate-bias", type=float, default=0.0, help="added to the gate's bias at first: below 0 it begins shut (0)")
    add("--positive-weight", type=float, default=1.0, help="in the gate's loss, of terms that queries hold (1)")
    add("--negative-weight", type=float, default=1.0, help="in the gate's loss, of all other terms (1)")
    add("--query-max-length", type=int, default=64, metavar="TOKENS")
    add("--document-max-length", type=int, default=128, metavar="TOKENS")
    add_options(parser, batch_size=16, learning_rate=2e-5, epochs=3)
    return parser


@interruptible("train/sparterm.py", "the same command goes on from the last checkpoint")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one training; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"train/sparterm.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def check(options: argparse.Namespace) -> None:
    """Raises ValueError naming the option that training could not use."""
    check_options(options)
    for name, least in {"negatives": 0, "gate_weight": 0, "positive_weight": 0, "negative_weight": 0}.items():
        if not getattr(options, name) >= least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, found {getattr(options, name)}")
    if not options.temperature > 0:
        raise ValueError(f"--temperature must be above 0, found {options.temperature}")
    if options.mode == "literal" and options.query_mode != "literal":
        raise ValueError(f"--query-mode {options.query_mode} needs the gate, which --mode literal leaves untrained")
    if not math.isfinite(options.gate_bias):
        raise ValueError(f"--gate-bias must be a finite number, found {options.gate_bias}")
    if options.negatives == 0 and not options.in_batch_negatives:
        raise ValueError("--negatives 0 leaves nothing to rank below: raise it, or add --in-batch-negatives")


def run(options: argparse.Namespace) -> int:
    """Trains by the options; raises ValueError, OSError, ImportError or FloatingPointError with one clear line."""
    check(options)
    gated = options.mode != "literal"
    config = SparTermConfig(options.mode, options.query_mode, options.threshold, gate_trained=gated)
    examples: list[Example] = [
        example for file in options.data for example in read_examples(file, options.negatives + 1)
    ]
    asked: dict[str, list[str]] = {}
    for example in examples:
        for passage in example.pos:
            if example.query not in asked.setdefault(passage, []):
                asked[passage].append(example.query)
    files = [Path(file) for file in options.data]
    if options.clusters is not None:
        read_clusters(Path(options.clusters))
        files.append(Path(options.clusters) / CLUSTERS_FILE)
    with begun(options, files, CONFIG_FILE) as finished:
        if finished:
            print(f"{options.output} holds the finished model of these options; nothing to do")
            return 0
        set_seed(options.seed)
        settings = {"clusters": options.clusters, "transform": options.transform}
        lengths = {name: getattr(options, name) for name in ("query_max_length", "document_max_length")}
        given = {name: value for name, value in settings.items() if value is not None}
        model = SparTerm.build(options.base, dataclasses.replace(config), options.device, **given, **lengths)
        with torch.no_grad():
            model.model.gate.bias += options.gate_bias
        schedule = schedule_of(options, len(examples), "the data")

        def batch(step: int, rows: list[int]) -> dict[str, Any]:
            groups = [
                choose(examples[row], options.negatives + 1, schedule.rng(step, position))
                for position, row in enumerate(rows)
            ]
            return collate(model, groups, asked)

        print(f"{len(examples):,} examples, {len(asked):,} passages, {schedule.steps:,} steps", flush=True)
        set_seed(options.seed)
        training = Training(model.model, options)
        if train(training, Steps(schedule, batch), options, model.write, CONFIG_FILE):
            print(f"model in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

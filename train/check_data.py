"""Checks training data line by line and says what training would do with it.

    python train/check_data.py SOURCE [SOURCE ...] [--tokenizer PATH] [--recipe RECIPE.yaml] [--json FILE]

A source is a .jsonl, .jsonl.gz, .json or .parquet file, a folder of them, or a data set of the hub (org/name,
org/name:subset). Exit status 0: the data is fine; 1: it has errors, which are listed; 2: nothing could be checked.

Example: python train/check_data.py mined.jsonl --tokenizer models/minilm --recipe train/recipes/lens-mini.yaml
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from lens.backbone import architecture_of, check_base, load_config, load_tokenizer
from lens.config import LensConfig
from lens.files import check_output, write_json
from lens.program import interruptible
from lens.text import TextProcessor, add_special_tokens
from train.config import OWN_NEGATIVES_TYPES, Recipe
from train.data import Example, parse_example, text_key, tokenize
from train.overrides import load_recipe
from train.rows import brief
from train.sampler import Schedule
from train.sources import DataSet, local_files, open_sources

PLACES = 5
"""Rows that are named for each kind of finding."""


class Tally:
    """What is counted over the rows of a data set. Some 100 bytes a row and 16 a passage are held."""

    def __init__(self, data_set: DataSet, recipe: Recipe) -> None:
        self.data_set, self.recipe = data_set, recipe
        self.types: Counter[str] = Counter()
        self.prompts: Counter[str | None] = Counter()
        self.positives, self.negatives = array("q"), array("q")
        self.scored = np.zeros(len(data_set), dtype=bool)
        self.resampled = 0
        self.places: dict[str, list[str]] = {}
        self.counts: Counter[str] = Counter()
        self._rows: set[int] = set()
        self._queries: dict[int, frozenset[int]] = {}
        self._pairs = {"pos": array("q"), "neg": array("q")}  # keys of (query, text)
        self._pair_rows = array("q")  # row of each positive pair

    def find(self, kind: str, index: int, count: int = 1) -> None:
        """Counts a finding in a row, and names the row if it is among the first."""
        self.counts[kind] += count
        places = self.places.setdefault(kind, [])
        if len(places) < PLACES:
            places.append(self.data_set.where(index))

    def add(self, index: int, example: Example) -> None:
        """Counts a row that training can use."""
        self.types[example.type] += 1
        self.prompts[example.prompt] += 1
        self.positives.append(len(example.pos))
        self.negatives.append(len(example.neg))
        self.resampled += len(example.neg) < self.recipe.group_size_of(example.type) - 1
        positive = [score for score in example.pos_scores or [] if score is not None]
        negative = [score for score in example.neg_scores or [] if score is not None]
        self.scored[index] = len(positive) == len(example.pos) and len(negative) == len(example.neg)
        above = sum(score > max(positive) for score in negative) if positive else 0
        if above:
            self.find("negatives_scored_above_every_positive", index, above)
        query = text_key(f"{example.prompt or ''}\0{example.query}")
        pos = [text_key(text) for text in example.pos]
        neg = [text_key(text) for text in example.neg]
        whole = hash((query, tuple(sorted(pos)), tuple(sorted(neg))))
        if whole in self._rows:
            self.find("duplicate_rows", index)
        elif query in self._queries:
            self.find("duplicate_queries", index)
            retrieval = example.type in ("retrieval", "only_1neg")  # elsewhere a label has many positives
            if retrieval and self._queries[query].isdisjoint(pos):
                self.find("queries_with_other_positives_elsewhere", index)
        self._rows.add(whole)
        self._queries[query] = self._queries.get(query, frozenset()).union(pos)
        self._pairs["pos"].extend(query ^ (key >> 1) for key in pos)
        self._pair_rows.extend([index] * len(pos))
        self._pairs["neg"].extend(query ^ (key >> 1) for key in neg)

    def finish(self) -> None:
        """Finds texts that are both positive and negative of the same query, in one row or in two."""
        positive, negative = (np.array(self._pairs[name], dtype=np.int64) for name in ("pos", "neg"))
        for index in np.array(self._pair_rows, dtype=np.int64)[np.isin(positive, negative)].tolist():
            self.find("texts_both_positive_and_negative", index)


class Lengths:
    """Tokens of queries and passages, prompt and special tokens included, of an evenly spread sample of rows."""

    def __init__(self, text: TextProcessor, recipe: Recipe, rows: int, size: int) -> None:
        self.text = text
        self.limits = {"query": recipe.query_max_length or 512, "document": recipe.document_max_length or 512}
        self.every = max(1, -(-size // rows)) if rows else 1
        self.found: dict[str, list[int]] = {"query": [], "document": []}

    def add(self, index: int, example: Example) -> None:
        if index % self.every:
            return
        passages = [*example.pos, *example.neg]
        instruction = example.prompt if example.symmetric else None
        texts: list[tuple[str, Any, str | None]] = [(example.query, "query", example.prompt)]
        texts += [(passage, "document", instruction) for passage in passages]
        for (_, kind, _), tokens in zip(texts, tokenize(self.text, texts), strict=True):
            self.found[kind].append(len(tokens.ids))

    def report(self) -> dict[str, Any]:
        return {
            kind: {
                **spread(lengths, (50, 90, 99)),
                "limit": self.limits[kind],
                "cut": round(float(np.mean(np.array(lengths) > self.limits[kind])), 6),
                "measured": len(lengths),
            }
            for kind, lengths in self.found.items()
            if lengths
        }


def spread(values: Any, percentiles: tuple[int, ...] = (50,)) -> dict[str, Any]:
    """Least, mean, percentiles and greatest of a list of numbers."""
    if not len(values):
        return {}
    numbers = np.array(values)
    middle = {f"p{p}": int(np.percentile(numbers, p, method="lower")) for p in percentiles}
    return {"min": int(numbers.min()), "mean": round(float(numbers.mean()), 2), **middle, "max": int(numbers.max())}


def check(data_set: DataSet, recipe: Recipe, text: TextProcessor | None, length_rows: int) -> dict[str, Any]:
    """The report on one data set; `errors` holds all messages."""
    tally = Tally(data_set, recipe)
    lengths = None if text is None else Lengths(text, recipe, length_rows, len(data_set))
    errors = [] if len(data_set) else [f"{data_set.name} holds no examples"]
    for index in tqdm(range(len(data_set)), desc=data_set.name[-40:], unit="row", leave=False):
        try:
            example = parse_example(data_set.row(index), recipe.group_size_of)
            kind = next(iter(tally.types), example.type)
            if example.type != kind:
                raise ValueError(f"type {example.type} in a data set of type {kind}: one file per data set")
            if lengths is not None:
                lengths.add(index, example)
        except ValueError as error:
            errors.append(f"{data_set.where(index)}: {error}")
            continue
        tally.add(index, example)
    tally.finish()
    data_set.type = next(iter(tally.types), "retrieval")
    report = {
        "name": data_set.name,
        "rows": len(data_set),
        "errors": errors,
        "types": dict(tally.types),
        "positives": spread(tally.positives),
        "negatives": spread(tally.negatives),
        "rows_with_teacher_scores": int(tally.scored.sum()),
        "prompts": {str(prompt): count for prompt, count in tally.prompts.most_common(PLACES)},
        "distinct_prompts": len(tally.prompts),
        "findings": dict(tally.counts),
        "places": tally.places,
        "training": plan(data_set, recipe, tally),
    }
    return report if lengths is None else {**report, "tokens": lengths.report()}


def plan(data_set: DataSet, recipe: Recipe, tally: Tally) -> dict[str, Any]:
    """What training by the recipe would do with a data set in its first epoch."""
    kind, size = data_set.type, recipe.batch_size_of(data_set.type)
    own = kind in OWN_NEGATIVES_TYPES or not recipe.in_batch_negatives
    result: dict[str, Any] = {
        "type": kind,
        "group_size": recipe.group_size_of(kind),
        "batch_size": size,
        "negatives": "own" if own else "own and in-batch",
        "instruction": "query and passages" if "sts" in kind or "clustering" in kind else "query",
        "weight": data_set.weight,
        "rows_whose_negatives_repeat": tally.resampled,
    }
    try:
        schedule = Schedule([len(data_set)], size, recipe.seed, 1, [data_set.weight], [data_set.blocks],
                            [data_set.name])  # fmt: skip
    except ValueError as error:
        return {**result, "refused": str(error)}
    schedule.steps = count = schedule.steps_per_epoch
    if recipe.kd_weight == 0:
        distilled = 0
    elif recipe.teacher_embeddings:
        distilled = count
    else:
        distilled = sum(bool(tally.scored[schedule.batch(step)[1]].all()) for step in range(count))
    left = int(data_set.weight * len(data_set) + 1e-6) - count * size
    return {**result, "batches": count, "batches_with_distillation": distilled, "rows_left_over": left}


def text_processor(tokenizer: str, recipe: Recipe) -> TextProcessor:
    """The recipe's prompts and tokens, without a limit of length."""
    tokens = load_tokenizer(check_base(tokenizer))
    try:
        architecture = architecture_of(load_config(tokenizer))
    except (ValueError, OSError):  # a folder of tokenizer files alone
        architecture = "encoder" if tokens.cls_token is not None and tokens.sep_token is not None else "decoder"
    decoder = architecture == "decoder"
    prompt = recipe.prompt or ("lens" if decoder else "plain")
    if prompt == "lens":
        add_special_tokens(tokens)
    config = LensConfig(
        base=tokenizer, architecture=architecture, prompt=prompt, positions="shifted" if decoder else "content",
        dimensions=2, hidden_size=1, query_max_length=1 << 30, document_max_length=1 << 30,
    )  # fmt: skip
    return TextProcessor(tokens, config)


def lines_of(report: dict[str, Any], limit: int) -> list[str]:
    """The report on one data set as lines of text."""
    errors, todo = report["errors"], report["training"]
    types = ", ".join(f"{kind} {count:,}" for kind, count in report["types"].items())
    lines = [f"{report['name']}: {report['rows']:,} rows ({types or 'none usable'}), {len(errors):,} errors"]
    lines += [f"  error: {message}" for message in errors[:limit]]
    if len(errors) > limit:
        lines.append(f"  ... and {len(errors) - limit:,} more errors (--limit shows more)")
    for name in ("positives", "negatives"):
        if report[name]:
            lines.append(f"  {name} per row: {_numbers(report[name])}")
    lines.append(f"  rows with teacher scores: {report['rows_with_teacher_scores']:,}")
    for kind, found in report.get("tokens", {}).items():
        shown = {name: found[name] for name in ("min", "mean", "p50", "p90", "p99", "max")}
        name = {"query": "query", "document": "passage"}[kind]
        lines.append(f"  tokens per {name}: {_numbers(shown)}; {found['cut']:.1%} are cut at {found['limit']}")
    for kind, count in report["findings"].items():
        places = [*report["places"].get(kind, []), *(["..."] if count > PLACES else [])]
        lines.append(f"  {kind.replace('_', ' ')}: {count:,}" + (f" ({', '.join(places)})" if places else ""))
    for prompt, count in report["prompts"].items():
        lines.append(f"  prompt {prompt[:80]!r}: {count:,} rows")
    if report["distinct_prompts"] > PLACES:
        lines.append(f"  ... {report['distinct_prompts']:,} different prompts")
    plan = f"{todo['batch_size']} queries x {todo['group_size']} passages, {todo['negatives']} negatives, instruction"
    lines.append(f"  training: {plan} on {todo['instruction']}, seen {todo['weight']:g} times an epoch")
    if todo["rows_whose_negatives_repeat"]:
        lines.append(f"  too few negatives, which are repeated: {todo['rows_whose_negatives_repeat']:,} rows")
    if "refused" in todo:
        lines.append(f"  training refuses it: {todo['refused']}")
    else:
        mended = ", once the errors are mended" if errors else ""
        lines.append(
            f"  an epoch{mended}: {todo['batches']:,} batches, {todo['batches_with_distillation']:,} of them with "
            f"distillation; {todo['rows_left_over']:,} rows left over"
        )
    return lines


def _numbers(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())


@interruptible("train/check_data.py")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train/check_data.py"
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="training data; default: the recipe's data")
    parser.add_argument("--tokenizer", help="folder or hub id whose tokens are counted; without it none are")
    parser.add_argument("--recipe", help="recipe whose sizes, weights and lengths count; default: Recipe's defaults")
    parser.add_argument("--streaming", action="store_true", help="read rows as they come, storing nothing")
    parser.add_argument("--limit", type=int, default=20, help="errors shown of each data set (20); all are counted")
    parser.add_argument("--length-rows", type=int, default=10_000, help="rows of each data set whose tokens are "
                        "counted, evenly spread (10000); 0: all")  # fmt: skip
    parser.add_argument("--json", help="file to write: the whole report")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    options = parser.parse_args(arguments)
    try:
        if options.limit < 0 or options.length_rows < 0:
            raise ValueError(f"--limit and --length-rows must be at least 0, found {options.limit}, "
                             f"{options.length_rows}")  # fmt: skip
        if not options.sources and not options.recipe:
            raise ValueError("name a SOURCE, or a --recipe with data")
        if options.json:
            check_output(options.json, options.overwrite)
        recipe = _recipe(options)
        read = {Path(file).resolve() for source in recipe.data for file in _files(source)}
        if options.json and Path(options.json).resolve() in read:
            raise ValueError(f"--json {options.json} is a file of the data: name another file")
        text = text_processor(options.tokenizer, recipe) if options.tokenizer else None
        reports = _reports(recipe, text, options)
        if options.json:
            write_json(options.json, {"data": list(recipe.data), "data_sets": reports}, options.overwrite)
    except (ValueError, OSError, ImportError) as error:
        print(f"train/check_data.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    errors = sum(len(report["errors"]) for report in reports)
    batches = sum(report["training"].get("batches", 0) for report in reports if "training" in report)
    rows = sum(report["rows"] for report in reports)
    print(f"{len(reports)} data sets, {rows:,} rows, {batches:,} batches an epoch, {errors:,} errors")
    return 1 if errors else 0


def _recipe(options: Any) -> Recipe:
    changes: dict[str, Any] = {"data": options.sources} if options.sources else {}
    changes |= {"streaming": True, "cache_hidden": False} if options.streaming else {}
    if options.recipe:
        return load_recipe(options.recipe, {**changes, "base": options.tokenizer or "none", "output": "none"})
    return Recipe(base="none", output="none", **{**changes, "data": tuple(options.sources)})


def _files(source: str) -> list[str]:
    """The local files of a source, none where it cannot be read, which its report says."""
    try:
        return local_files(source)
    except (ValueError, OSError):
        return []


def _reports(recipe: Recipe, text: TextProcessor | None, options: Any) -> list[dict[str, Any]]:
    """Reports on all data sets, each printed when it is there; a source that cannot be read is an error of its own."""
    reports = []
    for source, weight in zip(recipe.data, recipe.data_weights or [1.0] * len(recipe.data), strict=True):
        try:
            data_sets = open_sources(dataclasses.replace(recipe, data=(source,), data_weights=(weight,)))
        except (ValueError, OSError) as error:
            print(f"{source}: {brief(error)}")
            reports.append({"name": source, "rows": 0, "errors": [brief(error)]})
            continue
        for data_set in data_sets:
            report = check(data_set, recipe, text, options.length_rows)
            if options.recipe and "refused" in report["training"]:
                report["errors"].append(report["training"]["refused"])
            print("\n".join(lines_of(report, options.limit)))
            reports.append(report)
    return reports


if __name__ == "__main__":
    sys.exit(main())

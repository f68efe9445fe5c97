"""Names of training data -> data sets of examples: files, folders, data sets of the hub."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from lens.files import require
from train.config import Recipe
from train.data import Example, parse_example, text_key
from train.rows import Rows, Stream, Table, brief, local_rows
from train.sampler import Schedule

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
MANIFEST = ".manifest.json"
"""Ending of the files beside training data that tell how it was made."""
HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<subset>[\w.-]+))?")
SHARD = re.compile(r"-\d{5}-of-\d{5}$")


class DataSet(Sequence[Example]):
    """Examples that are trained in the same way: the rows of one or several files, in order.

    Reading an example raises ValueError "FILE:LINE: ..." for a row that training could not use.
    """

    def __init__(
        self, name: str, parts: Sequence[Rows], group_size_of: Callable[[str], int] | None = None, weight: float = 1.0
    ) -> None:
        self.name, self.parts, self.weight, self.group_size_of = name, parts, weight, group_size_of
        self.ends = list(accumulate(map(len, parts)))
        self.type = "retrieval"
        self.prompts: dict[tuple[str, bool], None] = {}
        """Instructions, each with whether passages carry it too; when streaming, those of the first row."""
        self._open = -1

    @property
    def blocks(self) -> list[list[int]] | None:
        """Rows of the blocks of every file when streaming, else None."""
        blocks = [part.blocks for part in self.parts if isinstance(part, Stream)]
        return blocks if blocks else None

    @property
    def streaming(self) -> bool:
        """Whether rows are read from the front."""
        return self.blocks is not None

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        try:
            example = parse_example(self.row(index), self.group_size_of)
            if index and example.type != self.type:
                raise ValueError(
                    f"the data set mixes types that train differently ({self.type}, {example.type}): "
                    "one file per data set"
                )
        except ValueError as error:
            raise ValueError(f"{self.where(index)}: {error}") from error
        return example

    def row(self, index: int) -> dict[str, Any]:
        """A row as it stands; raises ValueError, without the place, when it cannot be read."""
        part, offset = self._place(index)
        if part != self._open and self._open >= 0:
            before = self.parts[self._open]
            if isinstance(before, Stream):
                before.close()  # one block of a data set is held at a time
        self._open = part
        return self.parts[part].row(offset)

    def where(self, index: int) -> str:
        """The place of a row, for messages."""
        part, offset = self._place(index)
        return self.parts[part].where(offset)

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)} in {self.name}")
        part = bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)

    def validate(self) -> None:
        """Reads all examples, or the first one when streaming; raises ValueError as reading an example does."""
        if not len(self):
            raise ValueError(f"{self.name} holds no examples")
        for index in range(1 if self.streaming else len(self)):
            example = self[index]
            if index == 0:
                self.type = example.type
            if example.prompt:
                self.prompts[example.prompt, example.symmetric] = None


def read_examples(path: str | Path, group_size: int | None = None) -> DataSet:
    """One training file; raises ValueError "FILE:LINE: ..." for a row that training could not use."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"training file {path} does not exist")
    check_form(str(path))
    group_size_of = None if group_size is None else partial(_constant, group_size)
    examples = DataSet(str(path), [local_rows(str(path))], group_size_of)
    examples.validate()
    return examples


def _constant(group_size: int, kind: str) -> int:
    return group_size


def read_sources(recipe: Recipe) -> list[DataSet]:
    """The data sets of a recipe, checked; raises FileNotFoundError, and ValueError "FILE:LINE: ..." as DataSet."""
    data_sets = open_sources(recipe)
    for data_set in data_sets:
        data_set.validate()
    return data_sets


def open_sources(recipe: Recipe) -> list[DataSet]:
    """The data sets of a recipe, unchecked; raises FileNotFoundError or ValueError for a source that is none."""
    weights = recipe.data_weights or [1.0] * len(recipe.data)
    found = []
    for source, weight in zip(recipe.data, weights, strict=True):
        for name, parts in _parts(source, recipe.shuffle_buffer if recipe.streaming else None):
            found.append(DataSet(name, parts, recipe.group_size_of, weight))
    return found


def check_form(path: str) -> None:
    """Raises ValueError for a file that by its name is no form of training data."""
    if not path.endswith(SUFFIXES):
        raise ValueError(f"training file {path} is none of {', '.join(SUFFIXES)}: convert it, or rename it")


def local_files(source: str) -> list[str]:
    """The files of a source on this machine, none for a data set of the hub."""
    return [file for _, files in _local_sets(source) for file in files] if Path(source).exists() else []


def _parts(source: str, block_size: int | None) -> list[tuple[str, list[Rows]]]:
    """(name, files) of every data set of a source; `block_size` rows at a time when streaming, else None."""
    if Path(source).exists():
        read: Callable[[str], Rows] = local_rows if block_size is None else partial(Stream, block_size=block_size)
        return [(name, [read(file) for file in files]) for name, files in _local_sets(source)]
    hub = HUB_NAME.fullmatch(source)
    if hub is None or source.endswith(SUFFIXES):
        raise FileNotFoundError(f"training file {source} does not exist")
    return _hub_sets(source, hub["repo"], hub["revision"], hub["subset"], block_size)


def _local_sets(source: str) -> list[tuple[str, list[str]]]:
    """(name, files) of a file or folder: in a folder each file, all shards NAME-00000-of-00003 together, and each
    sub-folder is a data set; `data`, where the hub keeps its files, counts as the folder itself."""
    if Path(source).is_file():
        check_form(source)
        return [(source, [source])]
    if not Path(source).is_dir():
        raise ValueError(f"training data {source} is neither a file nor a folder")
    sets: dict[str, list[str]] = {}
    for entry in sorted(Path(source).iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file() and _holds_rows(entry):
            stem = next(entry.name.removesuffix(suffix) for suffix in SUFFIXES if entry.name.endswith(suffix))
            sets.setdefault(f"{source}/{SHARD.sub('', stem)}", []).append(str(entry))
        elif entry.is_dir() and entry.name == "data":
            for name, files in _local_sets(str(entry)):
                sets.setdefault(name, []).extend(files)
        elif entry.is_dir():
            files = [
                str(file)
                for file in sorted(entry.rglob("*"))
                if file.is_file()
                and _holds_rows(file)
                and not any(part.startswith(".") for part in file.relative_to(entry).parts)
            ]
            if files:
                sets.setdefault(f"{source}/{entry.name}", []).extend(files)
    if not sets:
        raise FileNotFoundError(f"{source} holds no training files ({', '.join(SUFFIXES)})")
    return list(sets.items())


def _holds_rows(file: Path) -> bool:
    return file.name.endswith(SUFFIXES) and not file.name.endswith(MANIFEST)


def _hub_sets(
    source: str, repo: str, revision: str | None, subset: str | None, block_size: int | None
) -> list[tuple[str, list[Rows]]]:
    """Every split of a data set of the hub, or of its configuration `subset`, or the split `subset` alone."""
    require("train", "datasets")
    import datasets

    try:
        configurations = datasets.get_dataset_config_names(repo, revision=revision)
        name, split = (subset, None) if subset in configurations else (None, subset)
        if block_size is None:
            splits: Any = datasets.load_dataset(repo, name, revision=revision)
        else:
            splits = datasets.load_dataset_builder(repo, name, revision=revision).config.data_files or {}
        if split is not None and split not in splits:
            known = ", ".join([*configurations, *map(str, splits)])
            raise ValueError(f"{repo} has no subset {split!r}: it has {known}")
        found: list[tuple[str, list[Rows]]] = []
        for part in map(str, splits):
            title = f"{repo}:{part}"
            if split in (None, part) and block_size is None:
                found.append((title, [Table(title, splits[part])]))
            elif split in (None, part):
                found.append((title, [Stream(str(url), block_size or 1) for url in splits[part]]))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"{source} is no file or folder here, and reading it from the hub failed: {brief(error)}"
        ) from error
    return found


def distinct_passages(sources: Sequence[Sequence[Example]]) -> Iterator[str]:
    """Every positive and negative of the sources, each text once; their hashes are held in memory."""
    seen: set[int] = set()
    for source in sources:
        for example in source:
            for passage in (*example.pos, *example.neg):
                key = text_key(passage)
                if key not in seen:
                    seen.add(key)
                    yield passage


def make_schedule(recipe: Recipe, sources: list[DataSet]) -> Schedule:
    """The batches of the whole run, from max_steps or epochs."""
    make = partial(
        Schedule,
        [len(source) for source in sources],
        [recipe.batch_size_of(source.type) for source in sources],
        recipe.seed,
        weights=[source.weight for source in sources],
        blocks=[source.blocks for source in sources],
        names=[source.name for source in sources],
    )
    schedule = make(1)
    batches = round(recipe.epochs * schedule.steps_per_epoch)
    if recipe.max_steps is not None:
        batches = recipe.max_steps * recipe.gradient_accumulation
    batches -= batches % recipe.gradient_accumulation
    if recipe.warmup_steps >= batches // recipe.gradient_accumulation > 0:
        raise ValueError(
            f"warmup_steps={recipe.warmup_steps} takes up all {batches // recipe.gradient_accumulation} steps: lower it"
        )
    if batches == 0:
        raise ValueError(
            f"the data gives {schedule.steps_per_epoch} batches an epoch, fewer than one "
            f"optimizer step over {recipe.epochs} epochs x {recipe.gradient_accumulation} accumulated batches"
        )
    return make(batches)

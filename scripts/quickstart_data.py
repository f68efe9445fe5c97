"""The quick start's data: text that every machine has, or the user's own folder, as two BEIR folders.

    python scripts/quickstart_data.py --output runs/quickstart/data                # Python's own documentation
    python scripts/quickstart_data.py --output runs/quickstart/data --data MY_BEIR # your folder

`train/` holds what training may see (corpus, queries, qrels/train.tsv), `heldout/` what the evaluation asks (the
whole corpus, queries, qrels/test.tsv and more), `data.json` the counts.

The standard library. Every docstring of the running Python's standard library is parsed from source, nothing is
imported. Left out: tests, `turtledemo`, `lib2to3` (which newer versions lack), site-packages. A docstring counts when
it has a summary (its first paragraph, 3 to 40 words) and a body (the rest, at least 8 words). The passage is the body
alone, so no held-out query is contained in its passage. Training queries are the summary, the qualified name split into
words, and up to three sentences of the body; held-out queries are summaries (qrels/dev.tsv, qrels/test.tsv) and, as a
set of its own, the names of the test modules (qrels/names.tsv). Bodies that are the same, or nearly so (word 3-grams
with a Jaccard index of at least 0.8: inherited docstrings), are one passage with several queries. Modules are divided
by a hash of the top-level name, `_pyio` going with `io`: about 70% train, 10% dev, 20% test; the default seed is the
one of 0 to 19 whose parts come nearest to that in docstrings. A passage that also occurs in a held-out module, and a
query worded like a held-out one, are no training data. The held-out corpus is the passages of all modules.

Your own folder. The evaluation takes qrels/test.tsv, else dev.tsv, else another. With qrels/train.tsv the training
pairs are its judgements; without it they are made from the corpus (title -> text, or first sentence -> rest). Either
way no query of the evaluation and no document that it judges relevant is seen in training. Where there is no split
to evaluate on, a fifth of the training queries, chosen by hash, is held out with its documents.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import sys
import sysconfig
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from lens.corpus import find_file, read_beir, read_texts
from lens.files import atomic_folder, check_output, read_jsonl, write_json

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "turtledemo", "lib2to3", "site-packages", "dist-packages"}
DOCUMENTED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SPLITS = ("train", "dev", "test")  # in the order in which a later one takes a shared passage
SEED = 12
SUMMARY_WORDS = (3, 40)
BODY_WORDS = 8
NEAR_DUPLICATE = 0.8  # Jaccard index of word 3-grams
TRAIN_PAIRS = 20_000  # the most training pairs taken from a user's folder

Qrels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Docstring:
    """One documented thing: `id` is module:qualname, `family` the top-level module that decides its split."""

    id: str
    family: str
    name: str
    summary: str
    body: str


@dataclass
class Folder:
    """The content of one BEIR folder; `qrels` maps split -> query id -> document id -> score."""

    corpus: dict[str, str] = field(default_factory=dict)
    queries: dict[str, str] = field(default_factory=dict)
    qrels: dict[str, Qrels] = field(default_factory=dict)
    _worded: dict[tuple[str, str], str] = field(default_factory=dict)

    def add_query(self, split: str, id_: str, text: str, passage: str) -> None:
        """Adds a judged query; one worded like an earlier query of the split only adds its passage to that one."""
        id_ = self._worded.setdefault((split, wording(text)), id_)
        self.queries.setdefault(id_, text)
        self.qrels.setdefault(split, {}).setdefault(id_, {})[passage] = 1

    def write(self, path: Path) -> None:
        """Writes corpus.jsonl, queries.jsonl and qrels/*.tsv; splits without a judgement are left out."""
        (path / "qrels").mkdir(parents=True)
        for stem, texts in (("corpus", self.corpus), ("queries", self.queries)):
            with (path / f"{stem}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"_id": name, "text": text}, ensure_ascii=False) + "\n" for name, text in texts.items()
                )
        for split, qrels in self.qrels.items():
            if qrels:
                with (path / "qrels" / f"{split}.tsv").open("w", encoding="utf-8") as file:
                    file.write("query-id\tcorpus-id\tscore\n")
                    file.writelines(
                        f"{q}\t{d}\t{score}\n" for q, judged in qrels.items() for d, score in judged.items()
                    )

    def counts(self) -> dict[str, Any]:
        """The number of documents, of queries and, by split, of judged queries and judgements."""
        return {
            "documents": len(self.corpus),
            "queries": len(self.queries),
            "splits": {
                split: {"queries": len(qrels), "judgements": sum(map(len, qrels.values()))}
                for split, qrels in self.qrels.items()
                if qrels
            },
        }


def words(text: str) -> list[str]:
    """The lower-case words of a text."""
    return re.findall(r"[^\W_]+", text.lower())


def wording(text: str) -> str:
    """What two texts are compared by: the words alone."""
    return " ".join(words(text))


def split_name(name: str) -> str:
    """A qualified name as a query: `queue.LifoQueue.full` -> "queue lifo queue full"."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(words(re.sub(r"[\W_]+", " ", spaced)))


def fraction(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on the seed and the key alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def split_of(family: str, seed: int) -> str:
    """The split of a top-level module: about 70% train, 10% dev, 20% test."""
    value = fraction(seed, family)
    return "train" if value < 0.7 else "dev" if value < 0.8 else "test"


def family_of(module: str) -> str:
    """The top-level module that a module belongs to; `_pyio` and `_collections_abc` go with io and collections."""
    top = module.partition(".")[0]
    private = re.fullmatch(r"_(?:py_?)?([a-z0-9]+)(?:_.*)?", top)
    return private[1] if private else top


def sentences(body: str, seed: int, count: int = 3) -> list[str]:
    """Up to `count` sentences of 5 to 40 words of a body, chosen by hash: further training queries for it."""
    found = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", body)]
    found = [text for text in found if 5 <= len(text.split()) <= 40]
    return sorted(found, key=lambda text: fraction(seed, text))[:count]


def split_docstring(text: str) -> tuple[str, str] | None:
    """Summary (one line) and body of a cleaned docstring, or None when either is missing or too short or long."""
    summary, _, body = text.strip().partition("\n\n")
    summary, body = " ".join(summary.split()), textwrap.dedent(body.strip("\n")).rstrip()
    low, high = SUMMARY_WORDS
    if not low <= len(words(summary)) <= high or len(words(body)) < BODY_WORDS:
        return None
    if summary.lower() in " ".join(body.split()).lower():
        return None
    return summary, body


def read_module(path: Path, module: str) -> Iterator[Docstring]:
    """Yields the usable docstrings of one source file in source order; a file that does not parse yields none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return
    seen: Counter[str] = Counter()
    pending: list[tuple[ast.AST, str]] = [(tree, "")]
    while pending:
        node, name = pending.pop()
        inner = [
            (child, f"{name}.{child.name}".lstrip(".") if isinstance(child, DOCUMENTED) else name)
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.ExceptHandler)
        ]
        pending.extend(reversed(inner))
        if not isinstance(node, ast.Module | DOCUMENTED):
            continue
        parts = split_docstring((ast.get_docstring(node) or "").encode("utf-8", "replace").decode())
        if parts is None:
            continue
        seen[name] += 1
        id_ = f"{module}:{name}" if name else module
        if seen[name] > 1:
            id_ += f"~{seen[name]}"
        readable = ".".join(part for part in (module, name.removesuffix(".__init__")) if part)
        yield Docstring(id_, family_of(module), split_name(readable), *parts)


def read_standard_library(root: Path) -> list[Docstring]:
    """The usable docstrings of every module under `root`, ordered by module.

    Raises FileNotFoundError when there are none, as in a Python that ships without its source files.
    """
    found: list[Docstring] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            found.extend(read_module(path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    if not found:
        raise FileNotFoundError(f"{root} holds no Python source with docstrings: use a Python that ships .py files")
    return found


def merge_near_duplicates(texts: list[str]) -> list[int]:
    """For every text the index of the first one of its group; texts that are nearly the same share a group."""
    leader = list(range(len(texts)))
    grams: list[set[tuple[str, ...]]] = []
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        tokens = words(text)
        grams.append(set(zip(tokens, tokens[1:], tokens[2:], strict=False)))
        shared = Counter(other for gram in grams[index] for other in holders[gram])
        same = {
            leader[other]
            for other, common in shared.items()
            if common >= NEAR_DUPLICATE * (len(grams[index]) + len(grams[other]) - common)
        }
        if same:
            leader[index] = first = min(same)
            leader = [first if other in same else other for other in leader]
        for gram in grams[index]:
            holders[gram].append(index)
    return leader


def standard_library(root: Path, seed: int) -> tuple[Folder, Folder, dict[str, Any]]:
    """The train and held-out folders made of a standard library's docstrings, and what data.json says of them."""
    found = read_standard_library(root)
    splits = [split_of(item.family, seed) for item in found]
    leader = merge_near_duplicates([item.body for item in found])
    side: dict[int, str] = {}  # passage -> the most held-out split that it occurs in
    for index, split in zip(leader, splits, strict=True):
        side[index] = max(split, side.get(index, split), key=SPLITS.index)

    train, heldout = Folder(), Folder()
    for index in sorted(side):
        heldout.corpus[found[index].id] = found[index].body
        if side[index] == "train":
            train.corpus[found[index].id] = found[index].body
    placed = zip(found, splits, leader, strict=True)
    usable = [(item, split, found[index].id) for item, split, index in placed if side[index] == split]
    for item, split, passage in usable:
        if split != "train":
            heldout.add_query(split, item.id, item.summary, passage)
        if split == "test":
            heldout.add_query("names", f"{item.id}#name", item.name, passage)
    asked = {wording(text) for text in heldout.queries.values()}
    for item, split, passage in usable:
        if split == "train":
            asking = [(item.id, item.summary), (f"{item.id}#name", item.name)]
            asking += [(f"{item.id}#{number}", text) for number, text in enumerate(sentences(item.body, seed), 1)]
            for id_, text in asking:
                if wording(text) not in asked:
                    train.add_query("train", id_, text, passage)
    families = {item.family: split for item, split in zip(found, splits, strict=True)}
    return (
        train,
        heldout,
        {
            "source": f"docstrings of the standard library of Python {platform.python_version()}",
            "docstrings": len(found),
            "modules": {split: sorted(name for name in families if families[name] == split) for split in SPLITS},
            "held_out": "modules whose docstrings training never saw; all modules' passages are searched",
        },
    )


def corpus_pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (id, query, passage) made from a corpus: title -> text, or first sentence -> rest.

    Documents that give no query of 2 words and passage of 8 words are left out.
    """
    for _, row in read_jsonl(find_file(path, "corpus")):
        query, passage = (row.get("title") or "").strip(), row["text"].strip()
        if not query:
            match = re.match(r"(.{10,300}?[.!?])\s+(?=\S)", " ".join(passage.split()))
            if match is None:
                continue
            query, passage = match[1], " ".join(passage.split())[match.end() :]
        if len(words(query)) >= 2 and len(words(passage)) >= BODY_WORDS:
            yield str(row.get("_id", row.get("id"))), query, passage


def relevant(qrels: Qrels) -> Qrels:
    """The judgements with a positive score; queries without one are left out."""
    kept = {query: {d: score for d, score in judged.items() if score > 0} for query, judged in qrels.items()}
    return {query: judged for query, judged in kept.items() if judged}


def own_folder(path: Path, seed: int, limit: int = TRAIN_PAIRS) -> tuple[Folder, Folder, dict[str, Any]]:
    """The train and held-out folders made of a user's BEIR folder, and what data.json says of them.

    Raises FileNotFoundError or ValueError naming the file, and the line of a malformed row.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder: expected one in BEIR layout, with corpus.jsonl")
    corpus = dict(zip(*read_texts(path), strict=True))
    available = sorted(file.stem for file in (path / "qrels").glob("*.tsv"))
    split = next((name for name in ("test", "dev", *available) if name in available and name != "train"), None)
    heldout = Folder(corpus=corpus)
    if split is not None:
        beir = read_beir(path, split)
        heldout.queries, heldout.qrels["test"] = dict(beir.queries), beir.qrels
        if not relevant(beir.qrels):
            raise ValueError(f"{path}/qrels/{split}.tsv: no judgement has a positive score")

    train, made = Folder(), "train" not in available
    if made:
        for id_, query, passage in corpus_pairs(path):
            train.corpus[id_], train.queries[id_] = passage, query
        pairs = {id_: {id_: 1} for id_ in train.queries}
    else:
        beir = read_beir(path, "train")
        train.corpus, train.queries, pairs = dict(corpus), dict(beir.queries), relevant(beir.qrels)
    if split is None:
        chosen = sorted(pairs, key=lambda query: fraction(seed, query))[: max(1, len(pairs) // 5)]
        heldout.qrels["test"] = {query: pairs[query] for query in chosen}
        heldout.queries = {query: train.queries[query] for query in heldout.qrels["test"]}
        if made:
            heldout.corpus = dict(train.corpus)

    asked = {wording(text) for text in heldout.queries.values()}
    hidden = {document for judged in relevant(heldout.qrels["test"]).values() for document in judged}
    hidden_words = {wording(corpus[document]) for document in hidden if document in corpus}
    train.corpus = {
        document: text
        for document, text in train.corpus.items()
        if document not in hidden and wording(text) not in hidden_words
    }
    pairs = {
        query: kept
        for query, judged in pairs.items()
        if query not in heldout.queries and wording(train.queries[query]) not in asked
        if (kept := {document: score for document, score in judged.items() if document in train.corpus})
    }
    order = sorted(pairs, key=lambda query: fraction(seed, f"pair:{query}"))
    before = accumulate((len(pairs[query]) for query in order), initial=0)
    taken = {query for query, count in zip(order, before, strict=False) if count < limit}
    train.qrels["train"] = {query: judged for query, judged in pairs.items() if query in taken}
    train.queries = {query: train.queries[query] for query in train.qrels["train"]}
    if not train.queries or not heldout.queries:
        raise ValueError(
            f"{path}: too little to {'train on' if heldout.queries else 'hold out'}: a pair needs a title and a text, "
            "or a text of two sentences, and a document that the evaluation does not ask for"
        )
    return (
        train,
        heldout,
        {
            "source": str(path),
            "evaluated": split or "a fifth of the training queries",
            "pairs": "made from the corpus" if made else "qrels/train.tsv",
            "held_out": "queries of the evaluation, and the documents relevant to them, which training never saw",
        },
    )


def build(
    output: Path, data: Path | None, seed: int, root: Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Writes train/, heldout/ and data.json into `output`, all or nothing, and returns the content of data.json.

    `data` is the user's folder, None the standard library under `root` (default: the running Python's). An old
    `output` of this program is replaced with `overwrite`. Raises FileExistsError otherwise.
    """
    check_output(output, overwrite, "data.json")
    if data is not None and output.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"--output {output} lies in the folder --data that is read: choose another place")
    if data is not None:
        train, heldout, summary = own_folder(data, seed)
    else:
        train, heldout, summary = standard_library(root or Path(sysconfig.get_path("stdlib")), seed)
    summary |= {"python": platform.python_version(), "seed": seed}
    summary |= {"train": train.counts(), "heldout": heldout.counts()}
    with atomic_folder(output, overwrite, "data.json") as temporary:
        train.write(temporary / "train")
        heldout.write(temporary / "heldout")
        write_json(temporary / "data.json", summary)
    return summary


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns 0, or 1 after one line on standard error."""
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--data", type=Path, help="your own BEIR folder instead of the standard library")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the division into splits (default: {SEED})")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    options = parser.parse_args(arguments)
    try:
        summary = build(options.output, options.data, options.seed, overwrite=options.overwrite)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{summary['source']} -> {options.output}{os.sep}")
    for name in ("train", "heldout"):
        counts = summary[name]
        splits = ", ".join(f"{split} {entry['queries']:,}" for split, entry in counts["splits"].items())
        print(f"  {name + '/':<9} {counts['documents']:,} passages; queries: {splits}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

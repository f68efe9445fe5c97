"""Mines hard negatives: queries and a corpus in, training examples in the bge format out.

    python train/mine.py --beir DIR [--split train] --output FILE.jsonl [--retriever bm25 lens=MODEL ...]
    python train/mine.py --pairs FILE.jsonl [--corpus FILE] --output FILE.jsonl

Example: python train/mine.py --beir data/scifact --retriever st=sentence-transformers/all-MiniLM-L6-v2 \\
    --max-share 0.95 --output mined.jsonl

A retriever is bm25, lens=MODEL (a LENS model), st=MODEL (a SentenceTransformer) or sparse=MODEL (a SparseEncoder),
MODEL being a folder or hub id; several are fused. The corpus is read in shards and never held in memory. A run that
was killed goes on where it was when the same command is started again. Beside OUTPUT a manifest tells what went in.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lens import __version__
from lens.files import atomic_file, check_output, write_json
from lens.program import interruptible
from lens.text import check_texts
from train.negatives import Rules, choose
from train.passages import Corpus, Questions, file_facts, read_folder, read_pairs
from train.ranking import Best, fuse
from train.retrievers import ENCODE_ROWS, Query, Spec, check_installed, choose_faiss, identity, load, parse
from train.sources import MANIFEST
from train.work import check_plan, working

FUSIONS = ("rrf", "sum")
Candidates = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]


class Search:
    """What every retriever finds for every query, in files of the folder `work` from which a killed run goes on."""

    def __init__(self, options: argparse.Namespace, questions: Questions, corpus: Corpus, scored: bool) -> None:
        self.options, self.corpus, self.scored = options, corpus, scored
        self.queries: list[Query] = list(dict.fromkeys((row.text, row.prompt) for row in questions.rows))
        number_of = {query: number for number, query in enumerate(self.queries)}
        self.query_of = [number_of[row.text, row.prompt] for row in questions.rows]
        rows = list(zip(self.query_of, questions.rows, strict=True))
        self.pairs = [(query, text) for query, row in rows for text in row.pos]
        self.ends = np.cumsum([0, *(len(row.pos) for _, row in rows)])
        self.lists: list[Best] = []
        self.own = np.zeros((len(options.retriever), len(self.pairs)))
        """(R, P) scores of all questions' positives one after another, 0 where none are needed."""

    def run(self) -> None:
        """Searches with one retriever after the other; only one model is in memory at a time."""
        for number, spec in enumerate(self.options.retriever):
            self.lists.append(self._run(number, spec))

    def _run(self, number: int, spec: Spec) -> Best:
        options, work = self.options, self.options.work
        best, shards = Best(len(self.queries), options.depth), -(-len(self.corpus) // options.shard)
        state, scores = work / f"best-{number}.npz", work / f"positives-{number}.npy"
        done = best.load(state) if state.is_file() else 0
        if done < shards or (self.scored and not scores.is_file()):
            bm25 = {"stopwords": options.bm25_stopwords, "stemmer": options.bm25_stemmer}
            faiss = None if spec.kind == "bm25" else choose_faiss(options.search)
            retriever = load(spec, self.queries, work, faiss, options.device, **bm25)
            best.lexical = retriever.lexical
            if done:
                print(f"{spec}: {done} of {shards} shards are done; going on", file=sys.stderr)
            steps = retriever.search(self.corpus, options.shard, done, best)
            bar = tqdm(steps, desc=str(spec)[-40:], unit="shard", total=shards, initial=done, leave=False, disable=None)
            for finished, _ in enumerate(bar, done + 1):
                best.save(state, finished)
            if self.scored:
                parts = []
                for first in range(0, len(self.pairs), ENCODE_ROWS):
                    queries, texts = zip(*self.pairs[first : first + ENCODE_ROWS], strict=True)
                    parts.append(retriever.pairs(np.array(queries), texts))
                with atomic_file(scores, overwrite=True) as temporary:
                    np.save(temporary, np.concatenate(parts))
        if self.scored:
            self.own[number] = np.load(scores, allow_pickle=False)
            if not np.isfinite(self.own[number]).all():
                raise ValueError(f"--retriever {spec}: scores of positives are not finite numbers")
        return best

    def candidates(self, number: int) -> Candidates:
        """The positions and scores of a question's candidates, best first, and its positives' scores."""
        query, own = self.query_of[number], self.own[:, self.ends[number] : self.ends[number + 1]]
        if len(self.lists) == 1:
            return *self.lists[0].of(query), own[0]
        return fuse(self.lists, self.options.fuse, self.options.weights, query, own)


def mine(options: argparse.Namespace, rules: Rules) -> dict[str, Any]:
    """Searches, chooses and writes the examples and the manifest, which is returned."""
    if options.beir:
        questions, corpus = read_folder(Path(options.beir), options.split, options.prompt)
    else:
        given = Path(options.corpus) if options.corpus else None
        questions, corpus = read_pairs(Path(options.pairs), given, options.work, options.prompt)
    files = [*questions.files, *([corpus.path] if corpus.path.parent != options.work else [])]
    if any(file.resolve() == Path(options.output).resolve() for file in files):
        raise ValueError(f"--output {options.output} is a file that is read: choose another place")
    inputs = {str(file): file_facts(file) for file in files}
    retrievers = [identity(spec) for spec in options.retriever]
    left_out = questions.left_out
    if not questions.rows:
        raise no_negative(left_out)
    names = ("depth", "shard", "prompt", "bm25_stopwords", "bm25_stemmer")
    plan = {"inputs": inputs, "retriever": retrievers, **{name: getattr(options, name) for name in names}}
    check_plan(options.work, plan)
    search = Search(options, questions, corpus, rules.filters or options.scores)
    search.run()
    counts = Counter[str]()
    chosen: dict[int, list[tuple[int, float | None]]] = {}
    for number in tqdm(range(len(questions.rows)), desc="choose", unit="query", leave=False, disable=None):
        found = choose(rules, number, *search.candidates(number), corpus.keys, questions.banned(number), counts)
        if found:
            chosen[number] = found
        else:
            left_out["no negative"] += 1
    if not chosen:
        raise no_negative(left_out)
    positions = np.unique([position for found in chosen.values() for position, _ in found])
    texts = corpus.fetch(positions, options.work / "texts.bin")
    sizes = [len(found) for found in chosen.values()]
    manifest = {
        "program": "train/mine.py",
        "versions": {"lens": __version__, **versions()},
        "inputs": inputs,
        "retrievers": retrievers,
        "options": {name: value for name, value in vars(options).items() if name not in ("retriever", "work")},
        "passages": len(corpus),
        "queries": len(questions.rows) + sum(left_out.values()) - left_out["no negative"],
        "examples": len(chosen),
        "left_out": dict(left_out),
        "negatives": sum(sizes),
        "mean_negatives": round(sum(sizes) / len(sizes), 4),
        "examples_with_fewer_negatives": sum(size < rules.negatives for size in sizes),
        "random_negatives": counts.pop("random"),
        "candidates_filtered": dict(sorted(counts.items())),
    }
    with atomic_file(options.output, options.overwrite) as temporary:
        with open_text(temporary, str(options.output).endswith(".gz")) as file:
            for number, found in chosen.items():
                row = questions.rows[number]
                scores = search.candidates(number)[2] if options.scores else None
                content = {
                    "query": row.text,
                    "pos": row.pos,
                    "neg": [texts[position] for position, _ in found],
                    "pos_scores": None if scores is None else [rounded(score) for score in scores.tolist()],
                    "neg_scores": None if scores is None else [rounded(score) for _, score in found],
                    "prompt": row.prompt,
                    "type": row.type,
                }
                file.write(json.dumps(content, ensure_ascii=False) + "\n")
        manifest["output"] = file_facts(temporary)
        write_json(manifest_of(options.output), manifest)
    return manifest


def no_negative(left_out: Counter[str]) -> ValueError:
    """What is raised where nothing can be written."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in left_out.items())
    return ValueError(f"no query has a negative ({reasons}): a larger corpus, or weaker filters, may give some")


def manifest_of(output: str) -> Path:
    """Where the manifest of an output lies."""
    return Path(output + MANIFEST)


def rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 6)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that search."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("numpy", "scipy", "torch", "bm25s", "PyStemmer", "faiss-cpu", "transformers", "sentence-transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def open_text(path: Path, packed: bool) -> Iterator[TextIO]:
    """A UTF-8 file for writing, gzipped without name and time when `packed`, so that equal rows are equal bytes."""
    if not packed:
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as stream,
        io.TextIOWrapper(stream, encoding="utf-8") as file,
    ):
        yield file


def check(options: argparse.Namespace) -> Rules:
    """Checks the options before any work, completes them, and returns the rules; raises ValueError or OSError."""
    rules = Rules(**{name: getattr(options, name) for name in Rules.__dataclass_fields__})
    options.retriever = [parse(text) for text in options.retriever or ["bm25"]]
    if len(set(options.retriever)) < len(options.retriever):
        raise ValueError("--retriever names one twice: name each once, with --weights")
    options.weights = options.weights or [1.0] * len(options.retriever)
    usable = all(0 < weight < float("inf") for weight in options.weights)
    if len(options.weights) != len(options.retriever) or not usable:
        raise ValueError(f"--weights takes a number above 0 for each of the {len(options.retriever)} retrievers")
    if options.shard < 1:
        raise ValueError(f"--shard must be at least 1, found {options.shard}")
    if options.corpus and not options.pairs:
        raise ValueError("--corpus goes with --pairs: a BEIR folder has its own corpus")
    for spec in options.retriever:
        check_installed(spec, options.bm25_stopwords, options.bm25_stemmer)
    if options.search != "auto":
        choose_faiss(options.search)
    if options.prompt is not None:
        check_texts([options.prompt])
    if Path(options.output).is_dir():
        raise IsADirectoryError(f"--output {options.output} is a folder: name a file in it")
    if not options.output.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"--output {options.output} is written as .jsonl or .jsonl.gz: name it so")
    check_output(options.output, options.overwrite)
    if manifest_of(options.output).is_dir():
        raise IsADirectoryError(f"{manifest_of(options.output)}, where the manifest goes, is a folder: move it")
    for option, folder in (("--beir", options.beir), ("--corpus", options.corpus)):
        if folder and Path(folder).is_dir() and Path(options.output).resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"--output {options.output} lies in the folder {option} that is read: choose another place"
            )
    options.work = Path(options.output).with_name(f"{Path(options.output).name}.work")
    return rules


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="train/mine.py"
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--beir", help="folder in BEIR layout")
    source.add_argument("--pairs", help=".jsonl(.gz) with `query`, `pos` and perhaps `neg`, in the bge format")
    add("--split", default="train", help="with --beir: split of qrels/ whose queries become examples (train)")
    add("--corpus", help="with --pairs: passages, .jsonl(.gz), .txt or a BEIR folder; default: those of the pairs")
    add("--output", required=True, help="file to write, .jsonl or .jsonl.gz, in the bge format")
    add("--retriever", nargs="+", action="extend", metavar="KIND[=MODEL]", help="one or several (bm25)")
    add(
        "--fuse",
        choices=FUSIONS,
        default="rrf",
        help="several: reciprocal ranks, or normalised scores (rrf)",
    )
    add("--weights", nargs="+", type=float, help="a weight for each retriever (1)")
    add("--negatives", type=int, default=15, help="negatives per query (15)")
    add("--depth", type=int, default=100, help="ranks that negatives are drawn from (100)")
    add("--skip", type=int, default=0, help="best ranks left out, where unjudged positives hide (0)")
    add("--sample", choices=("random", "top"), default="random", help="which ranks: drawn, or the best ones (random)")
    add("--random-share", type=float, default=0.0, help="share of the negatives drawn from the whole corpus (0)")
    add("--margin", type=float, help="negatives score below the positive's score minus this")
    add("--max-share", type=float, help="negatives score below the positive's score times this, such as 0.95")
    add("--anchor", choices=("highest", "lowest"), default="highest", help="of several positives' scores (highest)")
    add("--scores", action="store_true", help="write the retrievers' scores instead of null")
    add("--prompt", help="instruction written into every example, and given to LENS retrievers")
    add("--seed", type=int, default=42)
    add("--shard", type=int, default=50_000, help="passages in memory at a time (50,000)")
    add("--search", choices=("auto", "numpy", "faiss"), default="auto", help="of dense vectors (faiss if it has a GPU)")
    add("--device", help="for models: cpu, cuda or mps; default: the first GPU there is, else the CPU")
    add("--bm25-stopwords", default="english", metavar="LANGUAGE", help="stopword list of bm25s, or none (english)")
    add("--bm25-stemmer", default="english", metavar="LANGUAGE", help="Snowball stemmer, or none (english)")
    add("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(arguments)


@interruptible("train/mine.py", "start the same command again to go on")
def main(arguments: list[str] | None = None) -> int:
    options = arguments_of(arguments)
    try:
        rules = check(options)
        with working(options.work):
            manifest = mine(options, rules)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"train/mine.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    left_out = "".join(f"; {count:,} queries left out: {why}" for why, count in manifest["left_out"].items())
    print(
        f"{manifest['examples']:,} examples with {manifest['mean_negatives']:.1f} negatives on average in "
        f"{options.output}{left_out}; {manifest_of(options.output).name} tells how"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

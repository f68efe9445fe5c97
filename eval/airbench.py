"""Evaluates a LENS model on AIR-Bench through the air-benchmark package, and makes the file that its leaderboard takes.

    python eval/run.py --model runs/mini --benchmark air-bench --version 24.04 --output runs/air

OUTPUT/search_results holds the hits of every data set as the package writes them; data sets that are there are not
searched again, and an unfinished one goes on at its next chunk of the corpus. OUTPUT/MODEL_NoReranker.zip is made when
all data sets that were asked for are there, OUTPUT/dev.json where there are public judgements (24.05).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.encoder import ChunkedEncoder, LensEncoder
from eval.meta import open_model
from lens.files import atomic_file, read_json, require, write_json
from lens.locks import alone
from lens.program import interruptible

VERSIONS = ("24.04", "24.05")
INSTRUCTION = "Given a question, retrieve passages that answer the question."
HITS = 1000
"""Hits of a query that the leaderboard takes at most."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="eval/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--benchmark", choices=("air-bench",), required=True, help="air-bench")
    add("--model", required=True, metavar="[NAME=]DIR", help="LENS or SPLADE folder, or a released checkpoint")
    add("--version", choices=VERSIONS, default="24.04", help="of AIR-Bench (24.04, as in the paper)")
    add("--task-types", nargs="+", default=["qa"], metavar="TYPE", help="qa, long-doc (qa)")
    add("--domains", nargs="+", metavar="NAME", help="such as wiki news (all)")
    add("--languages", nargs="+", default=["en"], metavar="CODE", help="(en)")
    add("--instruction", default=INSTRUCTION, metavar="TEXT", help=f"before queries ({INSTRUCTION})")
    add("--air-data", type=Path, metavar="DIR", help="folder with the data sets, each as in its repository on the hub")
    add("--compat", choices=("official",), help="embed as the released code does, for released checkpoints")
    add("--output", type=Path, default=Path("runs/air"), metavar="DIR", help="(runs/air)")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--device", help="cuda, mps or cpu; unset: the accelerator where there is one")
    device.add_argument("--devices", nargs="+", metavar="DEVICE", help="several, each a share of the texts")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model's weights (as they are)")
    return parser


class _Task:
    """What an encoder has to know of a task that is none of mteb's."""

    type = "Retrieval"
    modalities = ("text",)

    def __init__(self, name: str, instruction: str) -> None:
        self.name, self.prompt = name, {"query": instruction}

    def get_modalities(self, _: Any = None) -> list[str]:
        return ["text"]


def retriever(encoder: ChunkedEncoder, name: str, instruction: str) -> Any:
    """The package's Retriever over an encoder; `domain` is set before each call."""
    from air_benchmark import Retriever
    from datasets import Dataset

    class LensRetriever(Retriever):
        domain = ""

        def __str__(self) -> str:
            return name

        def __call__(self, corpus: Any, queries: Any, **_: Any) -> dict[str, dict[str, float]]:
            documents = {"id": list(corpus), "text": [row["text"] for row in corpus.values()]}
            encoder.index(Dataset.from_dict(documents))
            return encoder.search(
                Dataset.from_dict({"id": list(queries), "text": list(queries.values())}),
                task_metadata=_Task(f"AIR-Bench {self.domain}", instruction),
                hf_split="", hf_subset="", top_k=self.search_top_k,
            )  # fmt: skip

    return LensRetriever(search_top_k=HITS)


def loader(version: str, folder: Path | None) -> Any:
    """The package's DataLoader; with a folder, one that reads DIR/NAME where the hub has AIR-Bench/NAME."""
    from air_benchmark.evaluation_utils import DataLoader

    if folder is None:
        return DataLoader(version)

    class FolderLoader(DataLoader):
        def _read(self, name: str, split: str) -> Any:
            import datasets

            place = folder / name
            if not place.is_dir():
                raise FileNotFoundError(f"--air-data {folder} has no {name}")
            return datasets.load_dataset(str(place), version, split=split)

        def _split(self, kind: str, dataset: str, split: str) -> str:
            dataset = dataset.replace("-", "_")
            return f"{kind}_{dataset}" + ("" if version.endswith("24.04") else f"_{split}")

        def load_corpus(self, task_type: str, domain: str, language: str, dataset_name: str) -> Any:
            rows = self._read(f"{task_type}_{domain}_{language}", f"corpus_{dataset_name.replace('-', '_')}")
            return {row["id"]: {"text": row["text"]} for row in rows}

        def load_queries(
            self, task_type: str, domain: str, language: str, dataset_name: str, split: str = "test"
        ) -> Any:
            rows = self._read(f"{task_type}_{domain}_{language}", self._split("queries", dataset_name, split))
            return {row["id"]: row["text"] for row in rows}

        def load_qrels(self, task_type: str, domain: str, language: str, dataset_name: str, split: str = "dev") -> Any:
            end = "-dev" if split == "dev" else ""
            name = f"qrels-{task_type}_{domain}_{language}{end}"
            found: dict[str, dict[str, int]] = {}
            for row in self._read(name, self._split("qrels", dataset_name, split)):
                found.setdefault(row["qid"], {})[row["docid"]] = row["relevance"]
            return found

    return FolderLoader(version)


def expected(version: str, types: Sequence[str], domains: Sequence[str], languages: Sequence[str]) -> list[Path]:
    """The files of hits that a complete run has, below OUTPUT/search_results/MODEL/NoReranker."""
    from air_benchmark.tasks import BenchmarkTable

    return [
        Path(kind, domain, f"{language}_{name}_{split}.json")
        for kind in types
        for domain in domains
        for language, names in BenchmarkTable[version][kind].get(domain, {}).items()
        if language in languages
        for name, facts in names.items()
        for split in facts["splits"]
    ]


def check_hits(path: Path, version: str, name: str, asked: Iterable[str] | None = None) -> None:
    """Checks a file of hits, which should be those of the queries `asked` where they are given.

    Raises FileNotFoundError or ValueError naming a file that the leaderboard would not take.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    facts = {
        "model_name": name, "reranker_name": "NoReranker", "benchmark_version": version,
        "task_type": path.parts[-3], "domain": path.parts[-2],
    }  # fmt: skip
    for field, value in facts.items():
        if content.get(field) != value:
            raise ValueError(f"{path}: {field} should be {value!r}, found {content.get(field)!r}")
    hits = content.get("search_results")
    if not isinstance(hits, dict) or not hits:
        raise ValueError(f"{path} holds no search_results")
    missing = next((query for query in asked or () if query not in hits), None)
    if missing is not None:
        raise ValueError(f"{path}: query {missing!r} has no hits")
    for query, found in hits.items():
        if not isinstance(found, dict) or not 0 < len(found) <= HITS:
            raise ValueError(f"{path}: query {query!r} should have 1 to {HITS} hits")
        if not all(isinstance(score, float | int) and math.isfinite(score) for score in found.values()):
            raise ValueError(f"{path}: query {query!r} has a score that is no finite number")


def remove_torn(path: Path) -> None:
    """Removes a file of hits that a kill left half-written, which the package would stumble over."""
    if path.is_file():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            print(f"{path} is torn: searched again", file=sys.stderr)
            path.unlink()


def pack(folder: Path, files: Sequence[Path], target: Path, version: str, name: str, data: Any) -> None:
    """Checks the files of hits against the queries of `data`, and packs those of the test splits, as the leaderboard
    takes them."""
    for file in files:
        kind, domain = file.parts[:2]
        language, _, rest = file.stem.partition("_")
        dataset, _, split = rest.rpartition("_")
        asked = data.load_queries(kind, domain, language, dataset, split=split)
        check_hits(folder / file, version, name, asked)
    with (
        atomic_file(target, overwrite=True) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for file in files:
            if not file.name.endswith("_dev.json"):
                archive.write(folder / file, file.as_posix())


def run(options: argparse.Namespace) -> int:
    """Searches all data sets, evaluates the public ones, packs; returns the exit code."""
    from air_benchmark.tasks import check_domains, check_languages, check_task_types

    version = f"AIR-Bench_{options.version}"
    types = check_task_types(options.task_types, version)
    domains = check_domains(options.domains, version)
    languages = check_languages(options.languages, version)
    files = expected(version, types, domains, languages)
    if not files:
        raise ValueError(f"{version} has no {', '.join(types)} in {', '.join(languages)} of {', '.join(domains)}")
    varied = {"compat": options.compat, "dtype": options.dtype}
    name, model, meta = open_model(options.model, options.devices or options.device, **varied)
    with contextlib.closing(model):
        return _run(options, name, LensEncoder(model, meta, options.output / "work"), version, files)


def _run(options: argparse.Namespace, name: str, encoder: LensEncoder, version: str, files: Sequence[Path]) -> int:
    from air_benchmark import AIRBench
    from air_benchmark.evaluation_utils import Evaluator

    meta, weights = encoder.mteb_model_meta, encoder.model.model.head.weight
    facts = {
        "model": meta.name, "revision": meta.revision, "experiment": meta.experiment_kwargs, "version": version,
        "instruction": options.instruction, "dtype": str(weights.dtype), "name": name,
    }  # fmt: skip
    stamp = options.output / "run.json"
    held = read_json(stamp) if stamp.is_file() else facts
    changed = sorted(key for key in facts if held.get(key) != facts[key])
    if changed:
        raise ValueError(
            f"{options.output} holds hits of a run with another {', '.join(changed)}: choose another --output"
        )
    write_json(stamp, facts)
    data = loader(version, options.air_data)
    found = retriever(encoder, name, options.instruction)
    results = options.output / "search_results"
    folder = results / name / "NoReranker"
    for file in files:
        remove_torn(folder / file)
    for kind, domain in dict.fromkeys(file.parts[:2] for file in files):
        languages = sorted({file.name.split("_")[0] for file in files if file.parts[:2] == (kind, domain)})
        bench = AIRBench(version, task_types=[kind], domains=[domain], languages=languages)
        bench.data_loader, found.domain = data, f"{kind} {domain}"
        with contextlib.redirect_stdout(io.StringIO()):
            bench.run(found, output_dir=str(results))
        encoder.forget()
        print(f"searched: {kind} {domain}", flush=True)
    if any(file.name.endswith("_dev.json") for file in files):
        scores = Evaluator(data).evaluate_results(str(folder), split="dev")
        write_json(options.output / "dev.json", scores)
        for kind, by_domain in scores.items():
            for domain, by_language in by_domain.items():
                for language, by_name in by_language.items():
                    for dataset, values in by_name.items():
                        print(f"{kind} {domain} {language} {dataset}  nDCG@10 {values['ndcg_at_10']:.4f}")
    target = options.output / f"{name}_NoReranker.zip"
    pack(folder, files, target, version, name, data)
    print(f"checked and packed {len(files)} data sets: {target}")
    return 0


@interruptible("eval/run.py", "the same command goes on where it stopped")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code: 0, or 2 with one line for bad input."""
    options = parser().parse_args(arguments)
    try:
        require("mteb", "mteb")
        try:
            import air_benchmark  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "air-benchmark is not installed; run: pip install --no-deps air-benchmark==0.1.0 (its own dependency "
                "pytrec_eval is provided by pytrec-eval-terrier)"
            ) from error
        with alone(options.output / "search_results"):
            return run(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

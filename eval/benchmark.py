"""Evaluates models on mteb's benchmarks and tasks, and on local folders as tasks.

    python eval/run.py --model runs/mini --benchmark "MTEB(eng, v2)" --output runs/mteb
    python eval/run.py --model runs/mini --local data/nfcorpus data/sts-b --baselines bm25 dense --output runs/mteb

Results lie in mteb's own layout, OUTPUT/results/OWNER__MODEL/REVISION/TASK.json with model_meta.json, and what is there
is not computed again: the same command goes on after a kill, at the chunk of the corpus that it had not finished.
OUTPUT/summary.json and OUTPUT/report.md hold the main scores of all systems and their means by type, OUTPUT/units what
the scores are made of, OUTPUT/explained where a model loses most, costs.json what it costs.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import mteb
from mteb.models import HybridSearch

from eval.baselines import BM25Search, dense_encoder
from eval.board import Board
from eval.by_task import by_task, on_one
from eval.encoder import LensEncoder
from eval.explained import explained
from eval.fusion import FUSIONS, chosen_weights, dev_tasks, hybrid, members, unfusable
from eval.meta import named_place, open_model
from eval.peers import open_peer, takes
from eval.report import write as write_report
from eval.snapshot import Snapshot, unload
from eval.submission import problems
from eval.tasks import KINDS, LOCAL, known_tasks, local_task
from eval.units import RETRIEVES, Kept
from lens.files import read_json, write_json
from lens.locks import alone
from lens.program import interruptible

BASELINES = ("bm25", "dense")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="eval/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", default=[], metavar="[NAME=]DIR", help="LENS or SPLADE folders, or a released checkpoint")
    add_task_options(parser)
    add("--snapshot", metavar="DIR", help="read mteb's data from this folder of scripts/fetch_benchmarks.py")
    add("--verify", action="store_true", help="compare the snapshot's files with their hashes first")
    add("--local", nargs="+", default=[], metavar="DIR[:KIND]", help=f"folders as tasks; kinds: {', '.join(KINDS)}")
    add("--baselines", nargs="+", choices=BASELINES, default=[], help="systems to run beside the models")
    add("--peers", nargs="+", default=[], metavar="[NAME=]MODEL", help="sentence-transformers folders, models of mteb")
    add("--hybrids", nargs="+", default=[], metavar="A+B", help="fuse two of these systems on retrieval and reranking")
    add("--fusion", nargs="+", choices=FUSIONS, default=list(FUSIONS), help="weighted sum, reciprocal ranks (both)")
    add("--dev", nargs="+", default=[], metavar="DIR[:KIND]", help="folders whose dev split the weights are chosen on")
    add("--explain", type=int, default=3, metavar="N", help="queries a task that models lose most, explained (3)")
    add("--dense-model", metavar="PATH", help="backbone of the dense baseline (the first model's own)")
    add("--dense-length", type=int, default=128, metavar="TOKENS", help="texts are cut to this length for dense (128)")
    add("--name", metavar="OWNER/MODEL", help="name of the only model in the results (local/FOLDER)")
    add("--meta", metavar="FILE", help="JSON with what only the model's owner knows of it, for the leaderboard")
    add("--compat", choices=("official",), help="embed as the released code does, for released checkpoints")
    add("--submit-dry-run", action="store_true", help="then check the first model's results as the leaderboard will")
    add("--output", type=Path, default=Path("runs/mteb"), metavar="DIR", help="folder of all results (runs/mteb)")
    add_embeddings_option(parser)
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--device", help="cuda, mps or cpu; unset: the accelerator where there is one")
    device.add_argument("--devices", nargs="+", metavar="DEVICE", help="several for the models, see --by")
    add("--by", choices=("shard", "task"), default="shard", help="--devices share each task's texts (shard), or tasks")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the models' weights (as they are)")
    add("--quantization", choices=("4bit", "8bit", "int8"), help="of the models, as lens.load takes it")
    return parser


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose among mteb's tasks."""
    add = parser.add_argument
    add("--benchmark", nargs="+", default=[], metavar="NAME", help='mteb benchmarks, such as "MTEB(eng, v1)"')
    add("--tasks", nargs="+", default=[], metavar="NAME", help="mteb tasks; with --benchmark only these of it")
    add("--types", nargs="+", default=[], metavar="TYPE", help="only tasks of these types, such as STS Retrieval")


def add_embeddings_option(parser: argparse.ArgumentParser) -> None:
    """The option that names a folder of embeddings."""
    about = "keep the embeddings of LENS and dense models here, and take those from here that are there"
    parser.add_argument("--embeddings", type=Path, metavar="DIR", help=about)


def chosen_tasks(options: argparse.Namespace) -> list[Any]:
    """The mteb tasks and local ones of the command line, each once.

    Raises ValueError for an unknown benchmark, task or type, with the nearest names, and what `local_task` raises.
    """
    found: dict[str, Any] = {}
    known = known_tasks()
    pool: dict[str, Any] = {}
    for name in options.benchmark:
        benchmarks = {entry.name: entry for entry in mteb.get_benchmarks()}
        entry = benchmarks.get(name) or next((b for b in benchmarks.values() if name in (b.aliases or ())), None)
        if entry is None:
            raise ValueError(f"--benchmark {name!r} is unknown{_nearest(name, benchmarks)}")
        for task in entry.tasks:
            other = pool.setdefault(task.metadata.name, task)
            if set(other.eval_splits) != set(task.eval_splits) or set(other.hf_subsets) != set(task.hf_subsets):
                raise ValueError(
                    f"{task.metadata.name} is of other data in --benchmark {name!r} than in the one before: "
                    "evaluate one benchmark at a time"
                )
    for name in options.tasks:
        if name not in known and name not in pool:
            raise ValueError(f"--tasks {name!r} is unknown{_nearest(name, known)}")
        if options.benchmark and name not in pool:
            raise ValueError(f"--tasks {name!r} is no task of {', '.join(options.benchmark)}")
        found[name] = pool[name] if options.benchmark else mteb.get_task(name)
    if not options.tasks:
        found |= pool
    if options.types:
        types = set(known.values())
        unknown = next((name for name in options.types if name not in types), None)
        if unknown is not None:
            raise ValueError(f"--types {unknown!r} is unknown{_nearest(unknown, types)}")
        if not found:
            raise ValueError("--types narrows --benchmark or --tasks down: give one of them")
        found = {name: task for name, task in found.items() if task.metadata.type in options.types}
        if not found and not getattr(options, "local", ()):
            raise ValueError(f"no task of --benchmark and --tasks is of type {', '.join(options.types)}")
    for given in getattr(options, "local", ()):
        task = local_task(given)
        if task.metadata.name in found:
            raise ValueError(f"two --local tasks are named {task.metadata.name!r}: rename a folder")
        found[task.metadata.name] = task
    if not found:
        raise ValueError("no task: give --benchmark, --tasks or --local")
    other = next((task for task in found.values() if set(task.metadata.modalities) != {"text"}), None)
    if other is not None:
        raise ValueError(f"{other.metadata.name} is not of text alone, which is all that these models read")
    return list(found.values())


def _nearest(name: str, names: Iterable[str]) -> str:
    plain = {known.lower(): known for known in names}
    close = [plain[found] for found in difflib.get_close_matches(name.lower(), plain, 3, 0.5)]
    return f": did you mean {' or '.join(close)}?" if close else ""


def systems(options: argparse.Namespace) -> dict[str, Any]:
    """The models and baselines by name, ready for `mteb.evaluate`.

    Raises OSError, ValueError or ImportError with one clear line.
    """
    work = options.output / "work"
    devices = options.devices or options.device
    varied = {name: getattr(options, name) for name in ("compat", "dtype", "quantization")}
    found: dict[str, Any] = {}
    for given in options.model:
        name, model, meta = open_model(given, devices, options.name, options.meta, **varied)
        found[name] = LensEncoder(model, meta, work).keep(options.embeddings)
    for given in options.peers:
        name, peer = open_peer(given, options.devices[0] if options.devices else options.device)
        found[name] = peer
    if "bm25" in options.baselines:
        found["bm25"] = BM25Search()
    if "dense" in options.baselines:
        first = next(iter(found.values()), None)
        if options.dense_model is None and not isinstance(first, LensEncoder):
            raise ValueError("the dense baseline needs --dense-model, or --model to take its backbone")
        path = options.dense_model or first.model.config.base
        device = options.devices[0] if options.devices else options.device
        found["dense"] = dense_encoder(path, device, options.dense_length, work).keep(options.embeddings)
    return found


def explain(output: Path, task: Any, found: Mapping[str, Any], count: int) -> None:
    """Explains what models lose most on a task, or says why not: the scores stand without it."""
    try:
        explained(output, task, found, count)
    except Exception as error:
        print(f"{task.metadata.name}: losses are not explained: {error}", file=sys.stderr, flush=True)


def names_of(options: argparse.Namespace) -> list[str]:
    """What the systems of the command line are called. Raises ValueError where there are none, or two of one name."""
    if not options.model and not options.baselines and not options.peers:
        raise ValueError("nothing to evaluate: give --model, --peers or --baselines")
    if options.submit_dry_run and not options.model:
        raise ValueError("--submit-dry-run checks the results of a model: give --model")
    for option in ("name", "meta"):
        if getattr(options, option) and len(options.model) != 1:
            raise ValueError(f"--{option} is of one model, and there are {len(options.model)}")
    names: list[str] = []
    for option, given in [*(("model", given) for given in options.model), *(("peers", one) for one in options.peers)]:
        name = named_place(given)[0]
        if name in names or name in BASELINES:
            raise ValueError(f"two systems are named {name!r}: tell them apart with --{option} NAME=DIR")
        names.append(name)
    return [*names, *options.baselines]


def tasks_of(options: argparse.Namespace) -> list[Any]:
    """The tasks of the command line, which read their data from its snapshot where there is one.

    Raises what `chosen_tasks` and `Snapshot.use` raise, and ValueError for options that contradict each other.
    """
    tasks = chosen_tasks(options)
    if options.verify and options.snapshot is None:
        raise ValueError("--verify compares the files of a snapshot: give --snapshot")
    if options.snapshot is not None:
        use_snapshot(options.snapshot, tasks, options.verify)
    return tasks


def use_snapshot(folder: str, tasks: Sequence[Any], verify: bool = False) -> None:
    """Has mteb's own tasks read their data from a snapshot. Raises what `Snapshot.use` raises."""
    snapshot = Snapshot(folder)
    for task in tasks:
        if not task.metadata.dataset["path"].startswith(LOCAL):
            snapshot.use(task, verify)


def run(options: argparse.Namespace) -> int:
    """Evaluates and writes the results; returns the number of tasks that failed, and of what is wrong with them as a
    submission."""
    if options.by == "task" and not options.devices:
        raise ValueError("--by task shares tasks among devices: name them with --devices")
    if (options.output / "results.json").is_file():
        raise ValueError(f"{options.output} holds the report of another program: choose another --output")
    if options.explain < 0:
        raise ValueError(f"--explain is {options.explain}: it is a number of queries")
    tasks = tasks_of(options)
    dev = dev_tasks(options.dev, tasks)
    pairs = members(options, names_of(options), tasks)
    done: dict[Any, Any] = {}
    if options.by == "task":
        done = by_task(options, tasks, [name for pair in pairs.values() for name in pair])
        options = on_one(options, options.devices[0])  # free again
    found = systems(options)
    board = Board(options.output, {name for pair in pairs.values() for name in pair})
    board.systems.update(found)
    try:
        check_arithmetic(options.output / "systems.json", found)
        for name, system in found.items():
            left = [task.metadata.name for task in tasks if not takes(system, task)]
            if len(left) == len(tasks):
                raise ValueError(f"{name} takes none of these tasks: it only retrieves or reranks")
            if left:
                print(f"{name} is not for {', '.join(left)}", file=sys.stderr, flush=True)
        weights = chosen_weights(options, found, pairs, dev)
        for task in tasks:
            for name, system in found.items():
                if takes(system, task):
                    board.evaluate(name, system, task, done.get((name, task.metadata.name)))
            for name, (pair, fusion, chosen) in weights.items():
                if task.metadata.type in RETRIEVES and all(takes(found[member], task) for member in pair):
                    metas = [found[member].mteb_model_meta for member in pair]
                    if unfusable(options.output, metas, task):
                        print(f"{task.metadata.name}: too many queries, not fused", file=sys.stderr, flush=True)
                        continue
                    board.evaluate(name, hybrid(options.output, metas, task, fusion, chosen.weight), task)
            if not options.explain:
                (options.output / "explained" / f"{task.metadata.name}.json").unlink(missing_ok=True)
            else:
                explain(options.output, task, found, options.explain)
            unload(task)
    finally:
        for system in found.values():
            if isinstance(system, LensEncoder):
                system.model.close()
    write_json(options.output / "summary.json", summary(tasks, board))
    write_json(options.output / "costs.json", board.costs)
    write_report(options.output, [str(options.output)])
    wrong: list[str] = []
    if options.submit_dry_run:
        first = next(iter(found.values())).mteb_model_meta
        wrong = problems(options.output / "results", first, [task.metadata.name for task in tasks])
        for line in wrong:
            print(f"submission: {line}", file=sys.stderr)
        print(f"submission of {first.name}: " + (f"{len(wrong)} things to mend" if wrong else "nothing to mend"))
    return len(board.failures) + len(wrong)


def check_arithmetic(path: Path, found: Mapping[str, Any]) -> None:
    """Raises ValueError where results of a model are there that were computed with weights of another dtype, as where
    a GPU's default differs from a CPU's; notes those of new models."""
    held = read_json(path) if path.is_file() else {}
    for system in found.values():
        if isinstance(system, LensEncoder):
            meta, dtype = system.mteb_model_meta, str(system.model.model.head.weight.dtype).removeprefix("torch.")
            key = f"{meta.name} {meta.revision} {meta.experiment_name or ''}".strip()
            if held.setdefault(key, dtype) != dtype:
                raise ValueError(
                    f"{path.parent} holds results of {meta.name} in {held[key]}, and this would be {dtype}: choose "
                    f"another --output, or --dtype {held[key]}"
                )
    write_json(path, held)


def summary(tasks: Sequence[Any], board: Board) -> dict[str, Any]:
    """The content of summary.json: main scores by system and task, and their means."""
    facts = {
        task.metadata.name: {
            "type": task.metadata.type,
            "measure": task.metadata.main_score,
            "revision": task.metadata.revision,
        }
        for task in tasks
    }
    entries = {}
    for name, system in board.systems.items():
        meta, scores = system.mteb_model_meta, board.scores.get(name, {})
        entries[name] = {
            "model": meta.name,
            "revision": meta.revision,
            "role": role(name, system),
            "units": Kept(board.output, meta, tasks[0]).relative.as_posix(),
            "scores": dict(scores),
            "means": means(facts, scores),
        }
    return {"mteb": mteb.__version__, "tasks": facts, "systems": entries, "failures": list(board.failures)}


def role(name: str, system: Any) -> str:
    """What a system is in a run."""
    if isinstance(system, LensEncoder):
        return "model"
    if isinstance(system, HybridSearch):
        return "hybrid"
    return "baseline" if name in BASELINES else "peer"


def means(tasks: Mapping[str, Mapping[str, str]], scores: Mapping[str, float]) -> dict[str, float | None]:
    """The mean score of each type and over all tasks; None where a task's score is missing, for a mean over fewer
    tasks is another figure."""
    groups: dict[str, list[str]] = {}
    for name, facts in tasks.items():
        groups.setdefault(facts["type"], []).append(name)
    groups["all"] = list(tasks)
    return {
        kind: fmean(scores[name] for name in names) if all(name in scores for name in names) else None
        for kind, names in groups.items()
    }


def quiet() -> None:
    """Silences mteb and datasets, whose failures are told otherwise, and scikit-learn on labels never given."""
    warnings.filterwarnings("ignore", module="mteb|sklearn")
    logging.getLogger("mteb").setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()


@interruptible("eval/run.py", "the same command goes on where it stopped")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code: 0, 1 where tasks failed or a submission would, 2 with one line for bad
    input."""
    options = parser().parse_args(arguments)
    quiet()
    try:
        with alone(options.output / "results"):
            failed = run(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"report: {options.output / 'report.html'}")
    return 1 if failed else 0

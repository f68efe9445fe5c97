"""Trains a LENS model by a recipe.

    deepspeed train/run.py RECIPE.yaml [--field value ...]      several GPUs or CPU ranks
    python train/run.py RECIPE.yaml [--field value ...]         one process
    python train/run.py --help                                  all fields

Example: python train/run.py train/recipes/lens-mini.yaml --data pairs.jsonl --clusters clusters --output runs/mini
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lens  # noqa: F401  before transformers, so that bitsandbytes, which that imports, is kept quiet

# isort: split
import torch.distributed as dist
from filelock import FileLock, Timeout
from transformers import TrainingArguments, set_seed

from lens.bag import idf
from lens.card import Facts, recipe_facts
from lens.corpus import texts_file
from lens.devices import resolve_device
from lens.files import check_output, read_json, write_json
from lens.identity import digest
from lens.model import CLUSTERS_FILE, CONFIG_FILE, LensModel
from lens.packed import choose_packed
from lens.program import interruptible
from lens.text import TextProcessor
from train.build import build
from train.checkpoints import COMPLETE_FILE, damage, whole_checkpoints
from train.config import Recipe
from train.data import Batches, TeacherEmbeddings
from train.evaluate import MEASURE, best_folder, best_so_far, read_evaluation
from train.overrides import load_recipe, parse_overrides
from train.parallel import check_stage, collected, deepspeed_config, stage_of, whole_weights
from train.progress import Stopping, ending_workers
from train.refresh import CORPUS_FILE, FOLDER, Refresh, open_corpus
from train.sampler import Schedule
from train.sources import DataSet, distinct_passages, local_files, make_schedule, read_sources
from train.states import compute_states, keys_of
from train.top import TopLayers
from train.trainer import LensTrainer

RECIPE_FILE = "recipe.json"
STATES_FILE = "hidden.f16"
FREE_FIELDS = {
    "output", "save_steps", "save_total_limit", "resume", "logging_steps", "report_to", "workers", "device",
    "eval_data", "eval_steps", "eval_instruction",
}  # fmt: skip
"""Fields that may change between a run and its continuation: they do not decide what is learnt."""


@interruptible("train/run.py", "the same command goes on from the last checkpoint")
def main(arguments: list[str]) -> int:
    """Runs one training; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help") or "--help" in arguments:
        print(__doc__)
        print(_field_help())
        return 0
    try:
        path = [a for a in arguments if not a.startswith("--local_rank") and not a.startswith("--local-rank")]
        if not path or path[0].startswith("--"):
            raise ValueError("the first argument must be a recipe, a YAML file")
        train(load_recipe(path[0], parse_overrides(path[1:])))
    except (ConnectionError, EOFError) as error:  # what a batch came from is no longer there
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"train/run.py: a DataLoader worker died while it handed over a batch ({reason})", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        text = str(error)
        if "Original Traceback" in text:  # of a worker; its last line is the error
            text = text.strip().splitlines()[-1]
        print(f"train/run.py: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except dist.DistNetworkError as error:
        reason = " ".join(str(error).split())
        print(f"train/run.py: the ranks cannot meet ({reason}): try the launcher's --master_port", file=sys.stderr)
        return 2
    return 0


def train(recipe: Recipe) -> None:
    """Trains by `recipe` and leaves the finished artifact in `recipe.output`; goes on where an earlier run stopped.

    Raises ValueError, FileNotFoundError and FileExistsError before long work starts.
    """
    rank = int(os.environ.get("RANK", 0))
    output = Path(recipe.output)
    if rank != 0:
        with ending_workers(), Stopping().listening() as stopping:
            _train(recipe, output, stopping)
        return
    check_run(recipe, output)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.absolute().parent, os.W_OK):
        raise PermissionError(f"{output} cannot be made: {output.absolute().parent} is not writable")
    lock = FileLock(output.absolute().with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FileExistsError(f"another run is writing to {output}: wait for it, or choose another output") from error
    try:
        with ending_workers(), Stopping().listening() as stopping:
            _train(recipe, output, stopping)
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _train(recipe: Recipe, output: Path, stopping: Stopping) -> None:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if check_run(recipe, output) == "finished":
        _say(rank, f"{output} holds the finished model of this recipe; nothing to do")
        drop_states(output, rank)
        return
    known = ("tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "trackio", "swanlab", "neptune")
    for tracker in recipe.report_to:
        if tracker not in known:
            raise ValueError(f"report_to must name trackers of {', '.join(known)}, or be []; found {tracker!r}")
        if importlib.util.find_spec(tracker) is None:
            raise ImportError(f"report_to: {tracker} is not installed; run: pip install {tracker}")
    sources = read_sources(recipe)
    at_hand = [source for source in sources if not source.streaming]
    teacher = TeacherEmbeddings(recipe.teacher_embeddings, at_hand) if recipe.teacher_embeddings else None
    evaluation = read_evaluation(recipe.eval_data)
    corpus = open_corpus(recipe, sources)
    arguments = training_arguments(recipe, world_size)
    schedule = make_schedule(recipe, sources)
    set_seed(recipe.seed)
    with whole_weights(arguments):
        model, tokenizer = build(recipe)
    if recipe.query_idf:
        labels, dimensions = model.head.labels, model.config.dimensions
        model.head.weigh_queries(idf(distinct_passages(sources), tokenizer, labels, dimensions))
    packed = choose_packed(model.backbone, model.config.longest, recipe.packed, half=recipe.precision != "fp32")
    top = TopLayers(model.backbone, recipe.top_layers, packed) if recipe.backbone == "top" else None
    text = TextProcessor(tokenizer, model.config)
    check_prompts(text, sources)
    if dist.is_initialized():
        dist.barrier()  # until all ranks have looked into the folder
    if rank == 0:  # from here on the folder is this run's, and a killed start goes on
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RECIPE_FILE, {**recipe.resolved(), "inputs": inputs_of(recipe)})
    _say(rank, _summary(recipe, model, sources, schedule))
    store = None
    if recipe.backbone in ("frozen", "top") and recipe.cache_hidden:
        model.backbone.to(arguments.device)
        with arguments.main_process_first(local=False):
            keys = keys_of(sources, queries=recipe.query_encoder == "model")
            store = compute_states(model, text, keys, output / STATES_FILE, top, packed=packed)
    batches = Batches(
        sources,
        schedule,
        text,
        recipe.group_size,
        recipe.in_batch_negatives,
        rank,
        world_size,
        store,
        teacher,
        recipe.group_size_of,
        recipe.mini_batch_tokens,
        packed,
    )
    refresh = None if recipe.refresh_steps is None else Refresh(recipe, batches, output, corpus)
    trainer = LensTrainer(model, tokenizer, batches, recipe, arguments, top, evaluation, stopping, refresh)
    checkpoint = next(reversed(whole_checkpoints(output)), None)
    if refresh is not None:
        refresh.go_on(0 if checkpoint is None else int(checkpoint.name.partition("-")[2]))
    for marker in sorted(output.glob(f"checkpoint-*/{COMPLETE_FILE}")):
        if lost := damage(marker.parent):
            _say(rank, f"{marker.parent} is damaged ({', '.join(lost[:3])}) and left out")
    if checkpoint is not None:
        _say(rank, f"going on from {checkpoint}")
    elif any(output.glob("checkpoint-*")):
        _say(rank, f"{output} has no whole checkpoint: starting from the first step")
    set_seed(recipe.seed)  # building and caching took random numbers, how many depends on what was there already
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stopping.stopped:
        _say(rank, f"stopped by SIGTERM after step {trainer.state.global_step}; the same command goes on from there")
    else:
        with collected(model, every=recipe.include_backbone or model.backbone_is_own):
            if rank == 0:
                finish(model, tokenizer, recipe, output)
        _say(rank, f"model in {output}")
        best = best_so_far(output)
        if evaluation and best is not None:
            _say(rank, f"best {MEASURE} {best['eval_ndcg@10']:.4f} after step {best['step']}: {best_folder(output)}")
    trainer.accelerator.end_training()


def check_prompts(text: TextProcessor, sources: list[DataSet]) -> None:
    """Raises ValueError naming the data set when an instruction leaves no room for text."""
    for source in sources:
        for prompt, symmetric in source.prompts:
            for kind in ("query", "document") if symmetric else ("query",):
                try:
                    text([""], kind, prompt)  # type: ignore[arg-type]
                except ValueError as error:
                    raise ValueError(f"{source.name}: prompt {prompt[:40]!r}: {error}") from error


def check_run(recipe: Recipe, output: Path) -> str:
    """`new`, `begun` or `finished`; raises when `output` holds something else or a run of another recipe."""
    if not (output / RECIPE_FILE).is_file():
        for torn in output.glob(f".{RECIPE_FILE}.*"):  # a run killed while it wrote its first file
            torn.unlink()
        try:
            check_output(output)
        except FileExistsError as error:
            what = "is a file" if output.is_file() else "is not empty and holds no run"
            raise FileExistsError(f"{output} {what}: choose another output, or remove it") from error
        return "new"
    before, now = read_json(output / RECIPE_FILE), {**recipe.resolved(), "inputs": inputs_of(recipe)}
    defaults = {item.name: item.default for item in dataclasses.fields(Recipe)}  # of fields newer than the run
    before = {**defaults, **before}
    changed = [name for name in now if name not in FREE_FIELDS and before.get(name) != now[name]]
    if changed:
        said = [f"{name}: {before.get(name)!r} -> {now[name]!r}" for name in changed if name != "inputs"]
        said += [_changed_files(before.get("inputs") or {}, now["inputs"])] if "inputs" in changed else []
        pairs = ", ".join(said)
        raise ValueError(f"{output} holds a run of another recipe ({pairs}): choose another output or remove it")
    if not recipe.resume:
        raise FileExistsError(f"{output} holds a run already and resume is false: choose another output or remove it")
    return "finished" if (output / CONFIG_FILE).is_file() else "begun"


def inputs_of(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the files that decide what is learnt: training data, clusters, teacher embeddings, base weights.

    Of files above 1 GiB only size, first and last MiB count, since ranks wait for this. Data sets of the hub do not
    count: a name with @revision pins them.
    """
    files = [file for source in recipe.data for file in local_files(source)]
    files += [recipe.teacher_embeddings] if recipe.teacher_embeddings else []
    files += [str(texts_file(recipe.refresh_corpus))] if recipe.refresh_corpus else []
    if recipe.clusters is not None:
        files.append(str(Path(recipe.clusters) / CLUSTERS_FILE))
    files += [str(path) for path in sorted(Path(recipe.base).expanduser().glob("*.safetensors"))]
    return {name: digest(Path(name)) for name in files}


def _changed_files(before: dict[str, str], now: dict[str, str], shown: int = 5) -> str:
    """The files that changed, appeared or vanished between two results of `inputs_of`."""
    lists = {
        "appeared": [name for name in now if name not in before],
        "vanished": [name for name in before if name not in now],
        "changed": [name for name in now if name in before and before[name] != now[name]],
    }
    said = []
    for verb, names in lists.items():
        if names:
            more = f" and {len(names) - shown} more" if len(names) > shown else ""
            said.append(f"files that {verb} since: {' '.join(names[:shown])}{more}")
    return ", ".join(said)


def training_arguments(recipe: Recipe, world_size: int) -> TrainingArguments:
    """The Trainer's settings; raises ValueError when batch_size cannot be shared out among the ranks."""
    recipe.check_ranks(world_size)
    if recipe.revision is not None and Path(recipe.base).expanduser().is_dir():
        raise ValueError(
            f"revision={recipe.revision} contradicts base={recipe.base}, a local folder, which has no revisions: set "
            "revision: null, or name the base by its hub id"
        )
    config = None
    if recipe.deepspeed is not None:
        config = deepspeed_config(recipe.deepspeed)
        check_stage(recipe, stage_of(config))
        if "RANK" not in os.environ:  # plain python: DeepSpeed wants the variables of a launcher
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    on_cpu = resolve_device(recipe.device).type == "cpu"
    if on_cpu and recipe.precision == "fp16":
        raise ValueError("precision=fp16 needs a GPU: use bf16 or fp32 on the CPU")
    arguments = TrainingArguments(
        output_dir=recipe.output,
        per_device_train_batch_size=recipe.batch_size // world_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        max_steps=-1 if recipe.max_steps is None else recipe.max_steps,
        num_train_epochs=1,  # the data loader serves the whole run as one sequence
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type=recipe.scheduler,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        seed=recipe.seed,
        save_steps=recipe.save_steps,
        logging_steps=recipe.logging_steps,
        report_to=list(recipe.report_to) or "none",
        deepspeed=config,
        ddp_find_unused_parameters=False,
        use_cpu=on_cpu,
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
    )
    # One process takes one GPU: torch's DataParallel would cut packed batches apart.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def finish(model: LensModel, tokenizer: Any, recipe: Recipe, output: Path) -> None:
    """Moves the finished artifact into `output`, lens.json last, and drops the file of hidden states."""
    staged = output / ".finished"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    model.facts = Facts(recipe_facts(recipe.resolved()))
    (model if recipe.quantization else model.to("cpu")).write(staged, tokenizer, recipe.include_backbone)
    for file in sorted(staged.iterdir(), key=lambda file: file.name == CONFIG_FILE):
        file.replace(output / file.name)
    staged.rmdir()
    drop_states(output)


def drop_states(output: Path, rank: int = 0) -> None:
    """Removes hidden states and the copy of the passages, which only an unfinished run needs."""
    if rank == 0:
        for name in (STATES_FILE, "hidden.json", f"{FOLDER}/{CORPUS_FILE}"):
            (output / name).unlink(missing_ok=True)


def _summary(recipe: Recipe, model: LensModel, sources: list[DataSet], schedule: Schedule) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return (
        f"{recipe.base} with {model.config.dimensions} {model.config.head}: {trained:,} of {total:,} weights trained\n"
        f"{sum(map(len, sources)):,} examples in {len(sources)} data sets, {schedule.steps:,} batches of "
        f"{' or '.join(map(str, sorted(set(schedule.batch_sizes))))} queries ({schedule.steps_per_epoch:,} an epoch)"
    )


def _field_help() -> str:
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(Recipe)).body[0]
    assert isinstance(tree, ast.ClassDef)
    notes: dict[str, str] = {}
    for item, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(after, ast.Expr):
            notes[item.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    lines = []
    for item in dataclasses.fields(Recipe):
        default = "required" if item.default is dataclasses.MISSING else repr(item.default)
        lines.append(f"  --{item.name}  [{default}]\n      {notes[item.name]}")
    return "Fields:\n" + "\n".join(lines)


def _say(rank: int, message: str) -> None:
    if rank == 0:
        print(message, flush=True)


def leave(status: int) -> NoReturn:
    """Ends the process; one of several ranks without the interpreter's own finalization.

    Gloo's threads live on after destroy_process_group wherever a library still refers to a group, and one that then
    asks for the lock of an interpreter that is going down aborts a process whose work is done.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(status)
    atexit._run_exitfuncs()  # trackers and logging flush here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

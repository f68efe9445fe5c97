"""Trains a LENS model by a recipe.

    deepspeed train/run.py RECIPE.yaml [--field value ...]      several GPUs or CPU ranks
    python train/run.py RECIPE.yaml [--field value ...]         one process
    python train/run.py --help                                  all fields

Example: python train/run.py train/recipes/lens-mini.yaml --data pairs.jsonl --clusters clusters --output runs/mini
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from filelock import FileLock, Timeout
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments, set_seed

from lens.backbone import resolve_device
from lens.files import check_output, read_json, require, write_json
from lens.model import CLUSTERS_FILE, CONFIG_FILE, LensModel, build_model
from lens.text import SPECIAL_TOKENS, TextProcessor
from train.config import Recipe, load_recipe, parse_overrides
from train.data import Batches, TeacherEmbeddings, read_examples
from train.sampler import Schedule
from train.states import compute_states, keys_of
from train.top import TopLayers
from train.trainer import COMPLETE_FILE, LensTrainer, damage, whole_checkpoints

RECIPE_FILE = "recipe.json"
STATES_FILE = "hidden.f16"
FREE_FIELDS = {
    "output", "save_steps", "save_total_limit", "resume", "logging_steps", "report_to", "workers", "device",
}  # fmt: skip
"""Fields that may change between a run and its continuation: they do not decide what is learnt."""

ZERO1 = {
    "zero_optimization": {"stage": 1},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}


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
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"train/run.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def train(recipe: Recipe) -> None:
    """Trains by `recipe` and leaves the finished artifact in `recipe.output`; goes on where an earlier run stopped.

    Raises ValueError, FileNotFoundError and FileExistsError before long work starts.
    """
    rank = int(os.environ.get("RANK", 0))
    output = Path(recipe.output)
    if rank != 0:
        _train(recipe, output)
        return
    check_run(recipe, output)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output.absolute().with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FileExistsError(f"another run is writing to {output}: wait for it, or choose another output") from error
    try:
        _train(recipe, output)
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _train(recipe: Recipe, output: Path) -> None:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if check_run(recipe, output) == "finished":
        _say(rank, f"{output} holds the finished model of this recipe; nothing to do")
        drop_states(output, rank)
        return
    known = ("tensorboard", "wandb", "mlflow", "comet_ml", "clearml", "trackio", "swanlab", "neptune")
    for tracker in recipe.report_to:
        if tracker not in known:
            raise ValueError(f"report_to must name trackers of {', '.join(known)}; found {tracker!r}")
        if importlib.util.find_spec(tracker) is None:
            raise ImportError(f"report_to: {tracker} is not installed; run: pip install {tracker}")
    sources = [read_examples(path, recipe.group_size) for path in recipe.data]
    teacher = TeacherEmbeddings(recipe.teacher_embeddings, sources) if recipe.teacher_embeddings else None
    arguments = training_arguments(recipe, world_size)
    schedule = make_schedule(recipe, [len(source) for source in sources])
    set_seed(recipe.seed)
    model, tokenizer = build(recipe)
    top = TopLayers(model.backbone, recipe.top_layers) if recipe.backbone == "top" else None
    text = TextProcessor(tokenizer, model.config)
    check_prompts(text, recipe, sources)
    if rank == 0:  # from here on the folder is this run's, and a killed start goes on
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RECIPE_FILE, {**recipe.resolved(), "inputs": inputs_of(recipe)})
    _say(rank, _summary(recipe, model, sources, schedule))
    store = None
    if recipe.backbone in ("frozen", "top") and recipe.cache_hidden:
        model.backbone.to(arguments.device)
        with arguments.main_process_first(local=False):
            store = compute_states(model, text, keys_of(sources), output / STATES_FILE, top)
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
        recipe.mini_batch_tokens,
    )
    trainer = LensTrainer(model, tokenizer, batches, recipe, arguments, top)
    checkpoint = next(reversed(whole_checkpoints(output)), None)
    for marker in sorted(output.glob(f"checkpoint-*/{COMPLETE_FILE}")):
        if lost := damage(marker.parent):
            _say(rank, f"{marker.parent} is damaged ({', '.join(lost[:3])}) and left out")
    if checkpoint is not None:
        _say(rank, f"going on from {checkpoint}")
    elif any(output.glob("checkpoint-*")):
        _say(rank, f"{output} has no whole checkpoint: starting from the first step")
    set_seed(recipe.seed)  # building and caching took random numbers, how many depends on what was there already
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if rank == 0:
        finish(model, tokenizer, recipe, output)
        _say(rank, f"model in {output}")
    trainer.accelerator.end_training()


def check_prompts(text: TextProcessor, recipe: Recipe, sources: list[Any]) -> None:
    """Raises ValueError naming the file when an instruction leaves no room for text."""
    for path, source in zip(recipe.data, sources, strict=True):
        asked = {(example.prompt, example.symmetric) for example in source if example.prompt}
        for prompt, symmetric in asked:
            for kind in ("query", "document") if symmetric else ("query",):
                try:
                    text([""], kind, prompt)  # type: ignore[arg-type]
                except ValueError as error:
                    raise ValueError(f"{path}: prompt {prompt[:40]!r}: {error}") from error


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
        pairs = ", ".join(f"{name}: {before.get(name)!r} -> {now[name]!r}" for name in changed)
        raise ValueError(f"{output} holds a run of another recipe ({pairs}): choose another output or remove it")
    if not recipe.resume:
        raise FileExistsError(f"{output} holds a run already and resume is false: choose another output or remove it")
    return "finished" if (output / CONFIG_FILE).is_file() else "begun"


def inputs_of(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the files that decide what is learnt: training data, clusters, teacher embeddings, base weights.

    Of weight files above 1 GiB only size, first and last MiB count, since ranks wait for this.
    """
    files = [*recipe.data, *([recipe.teacher_embeddings] if recipe.teacher_embeddings else [])]
    if recipe.clusters is not None:
        files.append(str(Path(recipe.clusters) / CLUSTERS_FILE))
    digests = {}
    for name in files:
        with open(name, "rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    for weights in sorted(Path(recipe.base).expanduser().glob("*.safetensors")):
        size = weights.stat().st_size
        with weights.open("rb") as file:
            if size <= 1 << 30:
                digests[str(weights)] = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                first = file.read(1 << 20)
                file.seek(-(1 << 20), os.SEEK_END)
                digests[str(weights)] = hashlib.sha256(repr(size).encode() + first + file.read()).hexdigest()
    return digests


def make_schedule(recipe: Recipe, sizes: list[int]) -> Schedule:
    """The batches of the whole run, from max_steps or epochs."""
    schedule = Schedule(sizes, recipe.batch_size, recipe.seed, 1)
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
            f"the data gives {schedule.steps_per_epoch} batches of {recipe.batch_size} an epoch, fewer than one "
            f"optimizer step over {recipe.epochs} epochs x {recipe.gradient_accumulation} accumulated batches"
        )
    return Schedule(sizes, recipe.batch_size, recipe.seed, batches)


def training_arguments(recipe: Recipe, world_size: int) -> TrainingArguments:
    """The Trainer's settings; raises ValueError when batch_size cannot be shared out among the ranks."""
    if recipe.batch_size % world_size:
        raise ValueError(f"batch_size={recipe.batch_size} must be a multiple of the {world_size} ranks")
    if recipe.deepspeed is not None:
        require("train", "deepspeed")
        if recipe.deepspeed != "zero1":
            stage = read_json(recipe.deepspeed).get("zero_optimization", {}).get("stage", 0)
            if stage > 2:
                raise ValueError(
                    f"{recipe.deepspeed}: ZeRO stage {stage} scatters the weights that a checkpoint needs; "
                    "stages up to 2 are supported"
                )
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
        deepspeed=ZERO1 if recipe.deepspeed == "zero1" else recipe.deepspeed,
        ddp_find_unused_parameters=False,
        use_cpu=on_cpu,
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
    )
    # One process takes one GPU: torch's DataParallel would cut packed batches apart.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def build(recipe: Recipe) -> tuple[LensModel, Any]:
    """The model of a recipe with the parameters that it trains, and its tokenizer."""
    settings: dict[str, Any] = {
        name: getattr(recipe, name)
        for name in (
            "revision", "transform", "pooling", "positions", "prompt", "bidirectional", "normalize",
            "query_max_length", "document_max_length",
        )
        if getattr(recipe, name) is not None
    }  # fmt: skip
    model, tokenizer = build_model(
        recipe.base,
        recipe.clusters,
        attn_implementation=recipe.attn_implementation,
        whiten=recipe.whiten,
        **settings,
    )
    make_trainable(model, tokenizer, recipe)
    return model, tokenizer


def make_trainable(model: LensModel, tokenizer: Any, recipe: Recipe) -> None:
    """Frees the parameters that a recipe trains, adding LoRA matrices where it says so, and freezes all others."""
    model.backbone.requires_grad_(recipe.backbone == "full")
    model.backbone_is_own = recipe.backbone in ("full", "top")
    if recipe.backbone == "lora":
        model.backbone = _add_lora(model, tokenizer, recipe)
    for name, parameter in model.head.named_parameters():
        parameter.requires_grad_(recipe.train_head or name.startswith("transform."))
    if recipe.gradient_checkpointing:
        backbone: Any = model.backbone
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _add_lora(model: LensModel, tokenizer: Any, recipe: Recipe) -> Any:
    present = {name.rpartition(".")[2] for name, _ in model.backbone.named_modules()}
    unknown = [name for name in recipe.lora_targets if name not in present]
    if unknown:
        linear = {n.rpartition(".")[2] for n, m in model.backbone.named_modules() if isinstance(m, torch.nn.Linear)}
        raise ValueError(
            f"lora_targets {', '.join(unknown)} do not occur in the backbone; its linear layers are "
            f"{', '.join(sorted(linear))}"
        )
    tokens = None
    if recipe.train_special_tokens and model.config.prompt == "lens":
        embedding: Any = model.backbone.get_input_embeddings()  # type: ignore[operator]
        name = next(n for n, module in model.backbone.named_modules() if module is embedding).rpartition(".")[2]
        tokens = {name: tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))}
    lora = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=list(recipe.lora_targets),
        trainable_token_indices=tokens,
    )
    return get_peft_model(model.backbone, lora)


def finish(model: LensModel, tokenizer: Any, recipe: Recipe, output: Path) -> None:
    """Moves the finished artifact into `output`, lens.json last, and drops the file of hidden states."""
    staged = output / ".finished"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    model.to("cpu").write(staged, tokenizer, recipe.include_backbone, card(recipe, model))
    for file in sorted(staged.iterdir(), key=lambda file: file.name == CONFIG_FILE):
        file.replace(output / file.name)
    staged.rmdir()
    drop_states(output)


def drop_states(output: Path, rank: int = 0) -> None:
    """Removes the file of hidden states, which only an unfinished run needs."""
    if rank == 0:
        for name in (STATES_FILE, "hidden.json"):
            (output / name).unlink(missing_ok=True)


def card(recipe: Recipe, model: LensModel) -> str:
    """The model card: base, data and recipe."""
    rows = "\n".join(f"| {name} | `{value}` |" for name, value in recipe.resolved().items())
    return (
        f"# LENS model\n\nLexicon-based text embeddings of {model.config.dimensions} dimensions, each one a cluster of "
        f"tokens, over the backbone `{recipe.base}`.\n\n```python\nimport lens\n\nmodel = lens.load('this folder')\n"
        "model.encode_documents(['some text'])\n```\n\n## Training\n\n| field | value |\n| --- | --- |\n" + rows + "\n"
    )


def _summary(recipe: Recipe, model: LensModel, sources: list[Any], schedule: Schedule) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return (
        f"{recipe.base} with {model.config.dimensions} {model.config.head}: {trained:,} of {total:,} weights trained\n"
        f"{sum(map(len, sources)):,} examples in {len(sources)} data sets, {schedule.steps:,} batches of "
        f"{recipe.batch_size} queries x {recipe.group_size} passages ({schedule.steps_per_epoch:,} an epoch)"
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

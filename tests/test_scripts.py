"""The shell scripts on machines that lack something, and the quick start's steps, both with fake programs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("common.sh", "test.sh", "quickstart.sh")

FAKE_PYTHON = """#!/usr/bin/env bash
# A Python whose venv and pip only leave traces; all else goes to the real one.
case "$1 $2" in
  "-m venv")
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/pyvenv.cfg" ;;
  "-m pip")
    echo "${*:3}" >>"$FAKE_LOG"
    if [[ $3 == install && -n ${FAKE_PIP:-} ]]; then eval "$FAKE_PIP"; fi ;;
  *quickstart.py*)
    echo "quickstart ${*:2}" ;;
  *)
    exec "$REAL_PYTHON" "$@" ;;
esac
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the scripts need, in a path with spaces."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(ROOT / "scripts" / name, root / "scripts" / name)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    executable(root / "python", FAKE_PYTHON)
    return root


def shell(checkout: Path, script: str = "quickstart.sh", *arguments: str, **variables: str) -> Any:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "LENS_"))}
    environment |= {
        "PYTHON": str(checkout / "python"),
        "REAL_PYTHON": sys.executable,
        "FAKE_LOG": str(checkout / "pip.log"),
    }
    command = ["bash", str(checkout / "scripts" / script), *arguments]
    return subprocess.run(command, env=environment | variables, cwd="/", capture_output=True, text=True, check=False)


def pip_calls(checkout: Path) -> list[str]:
    log = checkout / "pip.log"
    return [line for line in log.read_text().splitlines() if line.startswith("install")] if log.exists() else []


def only_error(result: Any) -> str:
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


@pytest.mark.parametrize("name", [*(f"scripts/{name}" for name in SCRIPTS), ".ci/run"])
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
    text = (ROOT / name).read_text()
    assert "\r" not in text
    assert not any(line != line.rstrip() for line in text.split("\n"))


def test_ci_calls_the_test_command_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["bash scripts/test.sh"]


@pytest.mark.parametrize("name", ["test.sh", "quickstart.sh"])
def test_help_installs_nothing(checkout: Path, name: str) -> None:
    result = shell(checkout, name, "--help")
    assert result.returncode == 0
    assert "LENS_VENV" in result.stdout
    assert not (checkout / ".venv").exists()


def test_every_constraint_is_an_exact_pin_and_every_extra_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 and not set(line) & set(" +/@;") for line in lines)
    assert sum(line.startswith("torch==") for line in lines) == 1
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", name)[0]).lower() for name in wanted}
    assert names <= pinned, sorted(names - pinned)


def test_python_too_old(checkout: Path) -> None:
    executable(checkout / "python", "#!/usr/bin/env bash\necho 3.10\n")
    assert "needs Python 3.11 or newer" in only_error(shell(checkout))
    assert not (checkout / ".venv").exists()


def test_no_python(checkout: Path) -> None:
    folder = checkout / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "df", "awk", "uname", "grep", "mkdir", "rm"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    assert "(python3 was not found or does not run)" in only_error(shell(checkout, PATH=str(folder), PYTHON=""))


def test_venv_module_missing(checkout: Path) -> None:
    executable(
        checkout / "python", '#!/usr/bin/env bash\n[[ $2 == *ensurepip* ]] && exit 1\nexec "$REAL_PYTHON" "$@"\n'
    )
    assert "has no venv module" in only_error(shell(checkout))
    assert not (checkout / ".venv.installing").exists()


def test_disk_too_small(checkout: Path) -> None:
    (checkout / "bin").mkdir()
    executable(
        checkout / "bin" / "df",
        "#!/usr/bin/env bash\necho 'Filesystem 1024-blocks Used Available'\necho '/ 9 9 500000'\n",
    )
    error = only_error(shell(checkout, PATH=f"{checkout / 'bin'}:{os.environ['PATH']}"))
    assert "too little disk" in error
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("echo 'ERROR: THESE PACKAGES DO NOT MATCH THE HASHES'; exit 1", "hash mismatch"),
        ("echo '[Errno 28] No space left on device'; exit 1", "no space left"),
        ("echo 'Failed to establish a new connection'; exit 1", "no network"),
        (
            "echo 'ERROR: ResolutionImpossible'; exit 1",
            "could not install torch .*: ResolutionImpossible .*lens-install",
        ),
    ],
)
def test_pip_trouble_is_told_apart(checkout: Path, trouble: str, message: str) -> None:
    error = only_error(shell(checkout, FAKE_PIP=trouble))
    assert re.search(message, error)
    assert not (checkout / ".venv.installing").exists()


def test_no_network_with_the_real_pip(checkout: Path) -> None:
    error = only_error(
        shell(
            checkout,
            PYTHON=sys.executable,
            PIP_CONFIG_FILE="/dev/null",
            PIP_INDEX_URL="http://127.0.0.1:9/simple",
            PIP_RETRIES="0",
        )
    )
    assert "no network" in error


def test_torch_first_then_the_rest_then_never_again(checkout: Path) -> None:
    first = shell(checkout, "quickstart.sh", "--k", "7")
    assert first.returncode == 0, first.stderr
    assert "--k 7" in first.stdout
    torch, rest = pip_calls(checkout)
    assert " torch==" in torch
    assert "-c constraints.txt" in rest
    assert rest.endswith("-e .[mini,cluster,train,eval]")
    second = shell(checkout)
    assert second.returncode == 0
    assert "is complete" in second.stdout
    assert len(pip_calls(checkout)) == 2
    (checkout / "pyproject.toml").write_text((checkout / "pyproject.toml").read_text() + "\n")
    assert shell(checkout).returncode == 0
    assert len(pip_calls(checkout)) == 4


def test_more_extras_are_added_to_those_there(checkout: Path) -> None:
    assert shell(checkout).returncode == 0
    shell(checkout, "test.sh")
    calls = [call for call in pip_calls(checkout) if "--no-deps air-benchmark" not in call]  # unless it is there
    assert calls[-1].endswith("-e .[mini,cluster,train,eval,mteb,quantized,dev]")
    assert len(calls) == 4
    everything = len(pip_calls(checkout))
    assert shell(checkout).returncode == 0
    assert len(pip_calls(checkout)) == everything


def test_a_gpu_takes_the_cuda_torch(checkout: Path) -> None:
    (checkout / "bin").mkdir()
    executable(checkout / "bin" / "nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: Some GPU'\n")
    assert shell(checkout, PATH=f"{checkout / 'bin'}:{os.environ['PATH']}").returncode == 0
    assert "+cpu" not in pip_calls(checkout)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="the CPU build has its own name on Linux alone")
def test_the_cpu_torch_comes_from_its_own_index_where_the_usual_one_lacks_it(checkout: Path) -> None:
    (checkout / "bin").mkdir()
    executable(checkout / "bin" / "nvidia-smi", "#!/usr/bin/env bash\nexit 9\n")
    lacking = "[[ $* == *+cpu* && $* != *download.pytorch.org* ]]"
    trouble = f"{lacking} && {{ echo 'ERROR: No matching distribution found for torch'; exit 1; }}; true"
    result = shell(checkout, PATH=f"{checkout / 'bin'}:{os.environ['PATH']}", FAKE_PIP=trouble)
    assert result.returncode == 0, result.stderr
    assert ["download.pytorch.org" in call for call in pip_calls(checkout)] == [False, True, False]


def test_a_killed_install_is_not_taken_for_complete(checkout: Path) -> None:
    killed = shell(checkout, FAKE_PIP=f"kill -9 $(cat '{checkout}/.venv.installing/pid')")
    assert killed.returncode != 0
    (checkout / ".venv" / "half").touch()
    again = shell(checkout)
    assert again.returncode == 0, again.stderr
    assert "starting afresh" in again.stdout
    assert not (checkout / ".venv" / "half").exists()
    assert not (checkout / ".venv.installing").exists()


def test_two_installs_do_not_meet(checkout: Path) -> None:
    (checkout / ".venv.installing").mkdir()
    (checkout / ".venv.installing" / "pid").write_text(str(os.getpid()))
    assert "another install" in only_error(shell(checkout))


def test_a_folder_that_is_no_environment_is_left_alone(checkout: Path) -> None:
    (checkout / "precious").mkdir()
    (checkout / "precious" / "file").write_text("mine")
    assert "no virtual environment" in only_error(shell(checkout, LENS_VENV=str(checkout / "precious")))
    assert (checkout / "precious" / "file").read_text() == "mine"


# The steps of quickstart.py

FAKE_PROGRAM = """import json, os, sys
from pathlib import Path
name = Path(sys.argv[0]).stem if Path(sys.argv[0]).stem != "run" else Path(sys.argv[0]).parent.name
with open("calls.txt", "a") as file:
    file.write(name + "\\n")
print("working on", name)
if os.environ.get("FAIL") == name:
    sys.exit("something went wrong in " + name)
output = Path(sys.argv[sys.argv.index("--output") + 1])
output.parent.mkdir(parents=True, exist_ok=True)
if output.suffix:
    match = {"cluster": 3, "tokens": ["<i>", "copy"], "share": 0.75}
    hit = {"id": "a:b", "text": "<b>t</b>", "score": 0.5, "relevant": True, "matches": [match], "other_clusters": 2}
    output.write_text(json.dumps({"answers": [{"question": "<q>", "hits": [hit]}]}))
else:
    output.mkdir(exist_ok=True)
systems = {"LENS": 0.5, "dense": 0.4, "bm25": 0.3, "LENS + dense": 0.6}
if name == "quickstart_data":
    (output / "data.json").write_text(json.dumps({"source": "fake <text>", "held_out": "all", "seed": 0,
        "train": {"queries": 4, "documents": 2}}))
if name == "train":
    (output / "training_log.jsonl").write_text("".join(
        json.dumps({"step": i, "loss": 3.0 / i, "contrastive": 2.0 / i}) + "\\n" for i in range(1, 9)) + "half a row")
if name == "eval":
    (output / "results.json").write_text(json.dumps({"datasets": {"heldout": {"queries": 3, "documents": 9,
        "systems": {key: {"nDCG@10": value, "RR@10": value, "R@100": value} for key, value in systems.items()},
        "comparisons": [{"system": "LENS", "other": "bm25", "measure": "nDCG@10", "difference": 0.2, "low": 0.1,
            "high": 0.3, "p": 0.01}]}}}))
"""
ORDER = ["quickstart_data", "clustering", "mine", "score", "train", "eval", "quickstart_answers"]


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/quickstart.py in a checkout of fake programs, with a fake backbone in backbone/."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules["steps"], "ROOT", tmp_path)
    names = [*(f"{name}/run.py" for name in ("clustering", "train", "eval")), "train/mine.py", "train/score.py"]
    for name in [*names, "scripts/quickstart_data.py", "scripts/quickstart_answers.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(FAKE_PROGRAM)
    (tmp_path / module.RECIPE).parent.mkdir()
    (tmp_path / module.RECIPE).write_text("lr: 1\n")
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "config.json").write_text('{"vocab_size": 100}')
    return module


def calls(root: Path) -> list[str]:
    path = root / "calls.txt"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def start(quickstart: ModuleType, root: Path, *arguments: str) -> int:
    status: int = quickstart.main(["--model", str(root / "backbone"), "--output", str(root / "out"), *arguments])
    return status


def test_steps_run_in_order_and_are_skipped_when_done(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(quickstart, tmp_path, "--", "--max_minutes", "2") == 0
    assert calls(tmp_path) == ORDER
    shown = capsys.readouterr().out
    assert "$ python clustering/run.py --model backbone --k 25 --output out/clusters" in shown
    assert "--output out/model --max_minutes 2" in shown
    assert "LENS + dense  0.600" in shown
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["metrics"]["LENS"]["nDCG@10"] == 0.5
    assert set(content["seconds"]) >= {"data", "cluster", "mine", "score", "train", "evaluate", "answer"}
    assert content["peak_rss_mb"] > 1

    assert start(quickstart, tmp_path, "--", "--max_minutes", "2") == 0
    assert calls(tmp_path) == []
    assert start(quickstart, tmp_path, "--", "--max_minutes", "3") == 0
    assert calls(tmp_path) == ORDER[4:]
    (tmp_path / "out" / "clusters").rmdir()
    assert start(quickstart, tmp_path, "--k", "9", "--", "--max_minutes", "3") == 0
    assert calls(tmp_path) == ["clustering", *ORDER[4:]]
    assert start(quickstart, tmp_path, "--restart") == 0
    assert calls(tmp_path) == ORDER
    (tmp_path / quickstart.RECIPE).write_text("lr: 2\n")
    assert start(quickstart, tmp_path) == 0
    assert calls(tmp_path) == ORDER[4:]


def test_a_failing_step_gives_one_line_and_runs_again(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "score")
    assert start(quickstart, tmp_path) == 1
    assert calls(tmp_path) == ORDER[:4]
    error = capsys.readouterr().err
    assert error == "error: step 4, score: something went wrong in score (exit code 1; log: out/logs/score.log)\n"
    assert "working on score" in (tmp_path / "out" / "logs" / "score.log").read_text()
    monkeypatch.delenv("FAIL")
    assert start(quickstart, tmp_path) == 0
    assert calls(tmp_path) == ORDER[3:]


def test_a_killed_training_goes_on_unless_its_inputs_changed(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "out" / "model" / "checkpoint-7"
    monkeypatch.setenv("FAIL", "train")
    assert start(quickstart, tmp_path) == 1
    kept.mkdir(parents=True)
    assert start(quickstart, tmp_path) == 1
    assert kept.exists()
    assert start(quickstart, tmp_path, "--", "--max_steps", "3") == 1
    assert not kept.exists()


def test_seconds_of_a_step_are_those_of_all_its_attempts(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = tmp_path / "out" / ".steps" / "train.begun.json"
    monkeypatch.setenv("FAIL", "train")
    assert start(quickstart, tmp_path) == 1
    entry = json.loads(begun.read_text())
    assert entry["seconds"] > 0
    begun.write_text(json.dumps({**entry, "seconds": 1000.0}))
    monkeypatch.delenv("FAIL")
    assert start(quickstart, tmp_path) == 0
    assert 1000 < json.loads((tmp_path / "out" / ".steps" / "train.json").read_text())["seconds"] < 1100
    assert not begun.exists()
    assert start(quickstart, tmp_path, "--restart") == 0
    assert json.loads((tmp_path / "out" / ".steps" / "train.json").read_text())["seconds"] < 100


@pytest.mark.parametrize("stamp", ["", "{", "[]", '{"key": "K", "seconds": null}', '{"key": "K", "seconds": "abc"}'])
def test_a_torn_stamp_is_none(stamp: str, quickstart: ModuleType, tmp_path: Path) -> None:
    assert start(quickstart, tmp_path) == 0
    calls(tmp_path)
    path = tmp_path / "out" / ".steps" / "train.json"
    path.write_text(stamp.replace("K", json.loads(path.read_text())["key"]))
    assert start(quickstart, tmp_path) == 0
    assert "train" in calls(tmp_path)


def test_two_calls_do_not_write_to_one_output(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    assert start(quickstart, tmp_path) == 0
    with FileLock(tmp_path / "out" / ".steps" / "lock"):
        assert start(quickstart, tmp_path) == 1
    assert "another call is writing to" in capsys.readouterr().err


def test_the_output_of_another_program_is_left_alone(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = sys.modules["steps"]
    assert start(quickstart, tmp_path) == 0
    with pytest.raises(steps.StepError, match="is not empty and was made by the quick start: choose another --output"):
        steps.check_output(tmp_path / "out", "the comparison")
    steps.check_output(tmp_path / "out", "the quick start")


def test_sigterm_ends_the_running_step(tmp_path: Path) -> None:
    """The step's program gets SIGTERM and time to end by itself."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "slow.py").write_text(
        "import signal, sys, time\nfrom pathlib import Path\n"
        "def leave(*_):\n    Path('left').touch()\n    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, leave)\nPath('started').touch()\ntime.sleep(60)\n"
    )
    driver = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport steps; from pathlib import Path\n"
        "steps.ROOT = root = Path(sys.argv[2])\n"
        "steps.run_steps([steps.Step('slow', 'Slow', 'scripts/slow.py', root / 'x')], root / 'out', True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", driver, str(ROOT / "scripts"), str(tmp_path)])
    for _ in range(300):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.1)
    process.terminate()
    assert process.wait(40) == 143
    assert (tmp_path / "left").exists()
    assert not (tmp_path / "out" / ".steps" / "slow.json").exists()


def test_report_is_one_escaped_page(quickstart: ModuleType, tmp_path: Path) -> None:
    assert start(quickstart, tmp_path) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;q&gt;" in page
    assert "&lt;i&gt; · copy" in page
    assert "fake &lt;text&gt;" in page
    assert not any(text in page for text in ("<q>", "<b>t</b>", "<text>", "<script", "http://", "https://"))
    assert "p = 0.010" in page
    assert page.count("<svg") == 2  # no column for the distillation part
    (tmp_path / "out" / "model" / "training_log.jsonl").unlink()
    assert start(quickstart, tmp_path) == 0
    assert "<svg" not in (tmp_path / "out" / "report.html").read_text()


def test_own_data_is_passed_on_and_watched(quickstart: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "corpus.jsonl").write_text("{}\n")
    assert start(quickstart, tmp_path, "--data", str(tmp_path / "my data")) == 0
    calls(tmp_path)
    (tmp_path / "my data" / "corpus.jsonl").write_text("{} \n")
    assert start(quickstart, tmp_path, "--data", str(tmp_path / "my data")) == 0
    assert calls(tmp_path) == [name for name in ORDER if name != "clustering"]


def test_bad_arguments_and_outputs(quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert start(quickstart, tmp_path) == 1
    assert "was not made by the quick start" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert start(quickstart, tmp_path, "--data", str(tmp_path / "nowhere")) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert calls(tmp_path) == []


def test_hash_mismatch(quickstart: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(quickstart.StepError, match="are missing: pip install"):
        quickstart.check_hash(path, "00")
    path.write_bytes(b"altered")
    with pytest.raises(quickstart.StepError, match=r"hash mismatch: .* expected 00: pip install --force-reinstall"):
        quickstart.check_hash(path, "00")

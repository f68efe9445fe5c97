"""`--by task`: tasks shared among processes give what one gives, after a kill too, and no process loses a result."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mteb
import pytest
import torch
from conftest import SENTENCES, write_rows
from mteb.models.model_meta import ModelMeta
from mteb.results import TaskResult
from test_eval_program import write_beir
from threadpoolctl import threadpool_limits

import lens
from eval import benchmark, board, by_task
from eval.benchmark import parser
from eval.by_task import Worker, cost, on_one
from eval.cache import WholeCache
from eval.run import main

TWO = ("--devices", "cpu", "cpu", "--by", "task")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads here as each process gets, since sums round otherwise with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(bert: Path, bert_clusters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    lens.LENS.build(bert, bert_clusters, device="cpu", positions="content", document_max_length=64).save(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four kinds of tasks, and one that fails."""
    place = tmp_path_factory.mktemp("data")
    pairs = [{"sentence1": a, "sentence2": b} for a in SENTENCES for b in SENTENCES]
    rows = [{"text": f"{text} {i}", "label": text[:3]} for i in range(100) for text in SENTENCES[:3]]
    files = {
        "sts/test": [{**pair, "score": i % 5} for i, pair in enumerate(pairs)],
        "pair/test": [{**pair, "label": i % 3 // 2} for i, pair in enumerate(pairs)],
        "intents/train": rows,
        "intents/test": rows[::2],
        "same/test": [{**pair, "score": 1} for pair in pairs],
    }
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        write_rows(place / f"{name}.jsonl", *content)
    return [str(place / name) for name in ("sts", "same", "pair")] + [
        str(write_beir(place / "beir")),
        str(place / "intents"),
    ]


def evaluate(model: Path, output: Path, folders: list[str], *given: str) -> int:
    common = ["--model", str(model), "--baselines", "bm25", "--output", str(output), "--local", *folders]
    return main([*common, *given])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def stored(output: Path) -> dict[str, Any]:
    """The scores of every file of results, by its path."""
    found = {path.relative_to(output).as_posix(): read(path) for path in output.glob("results/*/*/*.json")}
    return {path: content["scores"] for path, content in found.items() if "scores" in content}


def settled(output: Path) -> dict[str, list[str]]:
    """The tasks that each run_settings.jsonl has."""
    files = output.glob("results/*/*/run_settings.jsonl")
    return {p.parent.name: sorted(json.loads(line)["task"] for line in p.read_text().splitlines()) for p in files}


@pytest.fixture(scope="module")
def whole(model: Path, folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    output = tmp_path_factory.mktemp("whole")
    assert evaluate(model, output, folders, "--device", "cpu") == 1
    return output


@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    model: Path,
    folders: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output, send, sent = tmp_path / "out", Worker.send, []
    monkeypatch.setattr(Worker, "send", lambda self, job, doing: (sent.append(job), send(self, job, doing)))
    assert evaluate(model, output, folders, *TWO) == 1
    printed = capfd.readouterr()
    expected = read(whole / "summary.json")
    assert set(expected["systems"]["tiny"]["scores"]) == {"sts", "pair", "beir", "intents"}
    assert set(expected["systems"]["bm25"]["scores"]) == {"beir"}
    assert len(expected["failures"]) == 1
    assert "all scores are 1" in expected["failures"][0]
    assert read(output / "summary.json") == expected
    for part in ("overview", "scores", "comparisons"):  # not the seconds
        assert read(output / "report.json")[part] == read(whole / "report.json")[part]
    assert stored(output) == stored(whole)
    assert len(stored(output)) == 5
    assert settled(output) == settled(whole)
    assert not list((output / "work").iterdir())
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}
    done = [line for line in printed.err.splitlines() if " by cpu (process " in line]
    assert len(done) == 6
    assert [line.partition(" by ")[0] for line in done if ": done" not in line] == ["tiny on same: failed"]
    retrieval = [("tiny", "beir"), ("bm25", "beir")]
    assert sent == [*retrieval, ("tiny", "sts"), ("tiny", "same"), ("tiny", "pair"), ("tiny", "intents")]
    assert done[-1].endswith("6 of 6")
    assert "failed: tiny on same" in printed.err
    assert "text/s" not in printed.err  # no bars, which the processes would write over each other

    before = {path: path.stat().st_mtime_ns for path in output.glob("results/*/*/*.json")}
    again = [folder for folder in folders if not folder.endswith("same")]
    assert evaluate(model, output, again, "--devices", "cpu", "--by", "task") == 0
    assert {path: path.stat().st_mtime_ns for path in output.glob("results/*/*/*.json")} == before
    for name, facts in read(output / "summary.json")["systems"].items():  # files hold six digits
        assert facts["scores"] == pytest.approx(expected["systems"][name]["scores"], abs=1e-6)


@pytest.mark.slow
def test_a_process_that_dies_is_named_and_the_rest_stays(
    model: Path,
    folders: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    send, processes = Worker.send, []

    def killing(self: Worker, job: Any, doing: str) -> None:
        send(self, job, doing)
        processes.append(self.process)
        if job == ("tiny", "intents"):
            os.kill(self.process.pid, signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "send", killing)
        assert evaluate(model, tmp_path, folders, *TWO) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: the process for cpu (process ")
    assert "died by signal 9: it was killed, as Linux does when memory runs out; tiny on intents is not" in errors[-1]
    assert not any("Traceback" in line for line in errors)
    assert not any(process.is_alive() for process in processes)
    done = {line.partition(":")[0] for line in errors if ": done by " in line}
    assert len(done) >= 3  # of the five before it, one fails and one may be under way
    kept = stored(tmp_path)
    assert {Path(path).stem for path in kept} >= {name.split(" on ")[1] for name in done}
    assert not any("intents" in path for path in kept)
    assert evaluate(model, tmp_path, folders, "--device", "cpu") == 1  # in one process goes on what two began
    assert stored(tmp_path) == stored(whole)
    assert settled(tmp_path) == settled(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_all_processes(
    number: int, code: int, model: Path, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes: list[Any] = []
    wait = by_task.wait

    def signalled(connections: Any) -> Any:
        processes.extend(multiprocessing.active_children())
        os.kill(os.getpid(), number)
        return wait(connections)

    monkeypatch.setattr(by_task, "wait", signalled)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        found = evaluate(model, tmp_path, folders, *TWO)
    except SystemExit as end:
        found = end.code
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == code
    assert len(processes) >= 2
    assert not any(process.is_alive() for process in processes)


def test_bad_input(
    model: Path, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*given: str) -> str:
        assert evaluate(model, tmp_path / "out", folders, *given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    wanted = "error: --by task shares tasks among devices: name them with --devices"
    assert error("--by", "task") == wanted
    assert error("--by", "task", "--device", "cpu") == wanted
    assert error("--by", "task", "--devices", "cpu", "gpu").startswith("error: device must be cuda, mps or cpu")


def test_what_a_process_raises_names_its_device(
    model: Path, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("begin", "threadpool_limits", "_without_bars"):  # which are for a process of its own
        monkeypatch.setattr(by_task, name, lambda *_: None)
    given = ["--local", *folders, "--output", str(tmp_path), "--devices", "cpu", "--by", "task", "--model"]

    def raised(path: Path, *job: str) -> str:
        ours, theirs = multiprocessing.Pipe()
        worker = Worker("cpu", None, ours)
        for message in [job, None] if job else [None]:
            ours.send(message)
        by_task._work(
            theirs, on_one(parser().parse_args([*given, str(path)]), "cpu"), 1, tmp_path / "lock", frozenset()
        )
        if job:
            assert worker.receive("")  # it has loaded
        with pytest.raises((OSError, ValueError)) as error:
            worker.receive(" on ".join(job))
        return str(error.value)

    assert raised(tmp_path / "gone").startswith(f"on cpu: model {tmp_path / 'gone'} is neither a folder nor a name")
    monkeypatch.setattr(board, "evaluated", lambda *_: Path("absent").read_text())
    assert raised(model, "tiny", "sts").startswith("on cpu: tiny on sts: [Errno 2] No such file")


def test_the_longest_tasks_come_first() -> None:
    names = ["STSBenchmark", "NFCorpus", "MSMARCO", "CQADupstackRetrieval", "Banking77Classification"]
    tasks = [mteb.get_task(name) for name in names]
    ordered = [task.metadata.name for task in sorted(tasks, key=cost, reverse=True)]
    assert ordered == ["MSMARCO", "CQADupstackRetrieval", "NFCorpus", "Banking77Classification", "STSBenchmark"]


META = ModelMeta.create_empty({"name": "local/tiny", "revision": "a" * 40})


def result(name: str) -> TaskResult:
    block = {"hf_subset": "default", "main_score": 0.5, "languages": ["eng-Latn"]}
    return TaskResult(
        task_name=name, dataset_revision="x", mteb_version="2.26.0", evaluation_time=1.0, scores={"test": [block]}
    )


def save(output: Path, lock: Path | None, first: int, count: int) -> None:
    cache = WholeCache(output, lock)
    for number in range(first, first + count):
        cache.save_to_cache(result(f"task{number}"), META, encode_kwargs={"batch_size": 32})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that begin at once")
def test_what_several_processes_save_is_all_there(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    output, each = tmp_path / "out", 25
    processes = [
        context.Process(target=save, args=(output, tmp_path / "lock", each * number, each)) for number in range(4)
    ]
    for process in processes:
        process.start()
    folder, read_whole = output / "results" / "local__tiny" / ("a" * 40), 0
    while any(process.is_alive() for process in processes):  # whoever reads meanwhile finds whole files
        for path in folder.glob("*.json*"):
            for line in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
                json.loads(line)
                read_whole += 1
    assert read_whole
    assert [process.exitcode for process in processes] == [0] * 4
    names = sorted(f"task{number}" for number in range(4 * each))
    assert settled(output) == {"a" * 40: names}
    assert sorted(path.stem for path in folder.glob("task*.json")) == names
    assert sorted(path.name for path in output.iterdir()) == ["results"]


def test_a_save_that_is_cut_short_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, None, 0, 1)
    (settings,) = tmp_path.rglob("run_settings.jsonl")
    before = settings.read_text()

    def half(path: Path, entries: Any) -> None:
        path.write_text('{"task": ')
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mteb.cache.result_cache._write_and_merge_keyed_json", half)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, None, 1, 1)
    assert settings.read_text() == before
    assert not list(tmp_path.rglob("task1.json"))
    save(tmp_path, None, 1, 1)
    assert settled(tmp_path) == {"a" * 40: ["task0", "task1"]}


def test_a_task_beside_its_aggregate_is_refused(tmp_path: Path) -> None:
    given = ["--tasks", "CQADupstackRetrieval", "CQADupstackGamingRetrieval", "--baselines", "bm25"]
    options = parser().parse_args([*given, *TWO, "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="CQADupstackGamingRetrieval is asked for twice"):
        by_task.by_task(options, benchmark.chosen_tasks(options))

"""Run folders that eval/report.py reads: several together, folders of BEIR results, other data, damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import EVIL, TASKS, edit, three_systems, write_run

from eval.report import main, write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return three_systems(tmp_path / "run")


def test_several_runs(tmp_path: Path, run: Path) -> None:
    same = tmp_path / "same"
    shutil.copytree(run, same)
    other = write_run(tmp_path / "other", {"LENS": (0.2, ["nf", "sts-b"]), "dense": (0.1, ["nf"])}, revision="r2")
    given = [str(run), str(same), f"mine={other}"]
    found = write(tmp_path / "report", given, resamples=200)
    assert list(found["scores"]) == ["run/LENS", EVIL, "bm25", "mine/LENS", "dense"]
    row = next(row for row in found["comparisons"] if row["other"] == "mine/LENS")
    assert list(row["tasks"]) == ["nf", "sts-b"]
    assert row["tasks"]["sts-b"]["p"] is not None
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "### Where run/LENS loses most to \\<script" in markdown
    assert "### Where mine/LENS loses most to dense" in markdown
    assert found["failures"][-1].startswith("mine: bm25 on lost")

    # a baseline that differs from run to run is named as such where a model's losses to it are explained
    def losing(folder: str, score: float) -> Path:
        path = write_run(tmp_path / folder, {"LENS": (0.5, ["nf"]), "bm25": (score, ["nf"])})
        edit(path / "explained" / "nf.json", lambda c: c["rows"]["LENS"]["bm25"][0].update(query=folder))
        return path

    write(tmp_path / "report", [str(losing("one", 0.3)), str(losing("two", 0.4))], resamples=200)
    markdown = (tmp_path / "report" / "report.md").read_text()
    for folder in ("one", "two"):
        after = markdown[markdown.index(f"### Where LENS loses most to {folder}/bm25") :]
        assert f"({folder})" in after.splitlines()[2]

    # variants of a model are two systems, though its name and revision are one
    variant = write_run(tmp_path / "variant", {"LENS": (0.5, ["cran"])})
    edit(variant / "summary.json", lambda c: c["systems"]["LENS"].update(units="units/s0/r1/experiments/int8"))
    found = write(tmp_path / "report", [str(tmp_path / "one"), str(variant)], resamples=200)
    assert list(found["scores"]) == ["one/LENS", "bm25", "variant/LENS"]

    # the same model and revision in two runs of different tasks is one system
    for folder, dropped in ((run, "nf"), (same, "sts-b")):
        edit(folder / "summary.json", lambda c, task=dropped: c["systems"]["LENS"]["scores"].pop(task) and None)
    found = write(tmp_path / "report", [str(run), str(same)], resamples=200)
    assert list(found["scores"]) == ["LENS", EVIL, "bm25"]
    assert set(found["scores"]["LENS"]) == set(TASKS)
    assert found["comparisons"][0]["mean"]["tasks"] == 4


def test_other_data_are_refused(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key, value, message in (
        ("revision", "newer", "task nf has data revision data-nf in run and newer in other"),
        ("measure", "map", "task nf has measure ndcg@10 in run and map in other"),
        ("type", "Reranking", "task nf has type Retrieval in run and Reranking in other"),
    ):
        other = write_run(tmp_path / "other", {"dense": (0.2, ["nf"])})
        edit(other / "summary.json", lambda c, pair=(key, value): c["tasks"]["nf"].update([pair]))
        assert main([str(run), str(other), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        shutil.rmtree(other)
    assert not (tmp_path / "out").exists()


def test_units_that_do_not_fit_are_left_out(run: Path) -> None:
    def renamed(content: Any) -> None:
        content["parts"][0]["names"][0] = "another"

    edit(run / "units" / "s2" / "r1" / "nf.json", renamed)
    edit(run / "summary.json", lambda c: c["systems"]["LENS"]["scores"].update(mrpc=0.1))
    found = write(run, [str(run)], resamples=200)
    one, other = found["comparisons"]
    assert one["mean"]["tasks"] == 3
    assert one["tasks"]["mrpc"] == {"difference": pytest.approx(0.1 - found["scores"][EVIL]["mrpc"])}
    assert other["mean"]["tasks"] == 1
    assert "LENS and bm25 were measured on different units of nf: not tested there" in found["notes"]
    assert any(note.startswith("the units of LENS on mrpc give") for note in found["notes"])
    assert "different units of nf" in (run / "report.md").read_text()


def test_tasks_that_do_not_split_have_no_test(run: Path) -> None:
    for system in ("s0", "s1"):
        edit(run / "units" / system / "r1" / "nf.json", lambda c: c.update(parts=[]))
    (run / "units" / "s0" / "r1" / "mrpc.json").unlink()
    found = write(run, [str(run)], resamples=200)
    assert list(found["comparisons"][0]["tasks"]["nf"]) == ["difference"]
    assert found["comparisons"][0]["mean"]["tasks"] == 2
    assert found["notes"] == [
        f"LENS, {EVIL} on nf: its score does not split into units: not tested",
        "LENS on mrpc: no units in the run: not tested",
    ]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("summary.json", lambda c: c["systems"]["LENS"]["scores"].update(nf=0.123)),
        ("summary.json", lambda c: c["systems"][EVIL]["scores"].pop("nf") and None),
        ("summary.json", lambda c: c["systems"][EVIL].update(units="units/s1/r2")),
        ("summary.json", lambda c: c["tasks"]["nf"].update(revision="newer")),
        ("explained/nf.json", lambda c: c["of"]["systems"].pop("LENS") and None),
        ("explained/nf.json", lambda c: c.update(of=[3, "data-nf", {}])),
        ("explained/nf.json", lambda c: c.pop("of") and None),
    ],
)
def test_losses_of_other_results_are_left_out(name: str, change: Callable[[Any], None], run: Path) -> None:
    write(run, [str(run)], resamples=200)
    assert "loses most to" in (run / "report.md").read_text()
    edit(run / name, change)
    notes = write(run, [str(run)], resamples=200)["notes"]
    assert "loses most to" not in (run / "report.md").read_text()
    assert f"losses on nf explained of other results than these: LENS to {EVIL}: not shown" in notes


def test_losses_to_other_systems_still_stand(run: Path) -> None:
    def another(content: Any) -> None:
        losses = content["rows"]["LENS"][EVIL]
        content["rows"]["LENS"] |= {"bm25": losses, "a system of before": losses}

    edit(run / "explained" / "nf.json", another)
    edit(run / "summary.json", lambda c: c["systems"][EVIL]["scores"].update(nf=0.123))
    notes = write(run, [str(run)], resamples=200)["notes"]
    assert f"LENS to {EVIL}, LENS to a system of before: not shown" in " ".join(notes)
    headings = [line for line in (run / "report.md").read_text().splitlines() if "loses most" in line]
    assert headings == ["### Where LENS loses most to bm25"]


def test_runs_on_beir_folders(tmp_path: Path, run: Path) -> None:
    folder = tmp_path / "beir"
    (folder / "per_query").mkdir(parents=True)
    rng = np.random.default_rng(0)
    values = {"LENS": rng.random(12), "dense": rng.random(12) / 3}
    lines = [f"q{i}\t{name}\t{row[i]}\t0\t0" for i in range(12) for name, row in values.items()]
    head = "query-id\tsystem\tnDCG@10\tRR@10\tR@100"
    (folder / "per_query" / "adi.tsv").write_text("\n".join([head, *lines]) + "\n")
    systems = {
        name: {"nDCG@10": row.mean(), "seconds": 1.5, "dimensions": 384, "index_mb": 2, "parts": []}
        for name, row in values.items()
    }
    (folder / "results.json").write_text(json.dumps({"datasets": {"adi": {"systems": systems, "documents": 1024}}}))
    found = write(tmp_path / "out", [str(folder)], resamples=500)
    assert found["tasks"]["adi"]["measure"] == "nDCG@10"
    test = found["comparisons"][0]["tasks"]["adi"]
    assert test["difference"] == pytest.approx(float((values["LENS"] - values["dense"]).mean()))
    assert test["units"] == 12
    assert found["costs"]["systems"]["dense"]["bytes_per_document"] == 2048
    assert list(write(tmp_path / "out", [str(folder), str(run)])["scores"]) == [
        "beir/LENS", "dense", "run/LENS", EVIL, "bm25",
    ]  # fmt: skip
    assert main([str(folder)]) == 2  # its own report.md would be lost
    (folder / "per_query" / "adi.tsv").unlink()
    assert "no per_query/adi.tsv in the run" in write(tmp_path / "out", [str(folder)])["notes"][0]


def damage(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("summary.json", damage("systems", value=[])),
        ("summary.json", damage("systems", value={})),
        ("summary.json", damage("tasks", "nf", value={"type": "STS"})),
        ("summary.json", damage("systems", "LENS", "scores", "nf", value="high")),
        ("summary.json", damage("systems", "LENS", "scores", "nf", value=float("nan"))),
        ("summary.json", damage("systems", "LENS", "scores", "nf", value=10**400)),
        ("summary.json", damage("systems", "LENS", "scores", "unknown", value=0.5)),
        ("summary.json", damage("failures", value=None)),
        ("costs.json", damage("LENS", "nf", "seconds", value="long")),
        ("costs.json", damage("LENS", value=[])),
        ("explained/nf.json", damage("rows", value=[])),
        ("explained/nf.json", damage("rows", "LENS", EVIL, value={})),
        ("explained/nf.json", damage("rows", "LENS", EVIL, 0, "value", value=None)),
        ("explained/nf.json", damage("rows", "LENS", EVIL, 0, "relevant", "matches", value=[[1, "cat"]])),
        ("units/s0/r1/nf.json", damage("kind", value="median")),
        ("units/s0/r1/nf.json", damage("parts", value={})),
        ("units/s0/r1/nf.json", damage("parts", 0, "values", value=[0.5])),
        ("units/s0/r1/sts-b.json", damage("parts", 0, "gold", value=None)),
        ("units/s0/r1/mrpc.json", damage("parts", 0, "gold", 3, value=2.0)),
    ],
)
def test_damaged_files_are_named(
    name: str, change: Callable[[Any], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run / name, change)
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run / name} is damaged: expected ")
    assert error.count("\n") == 1
    (run / name).write_text("{")
    assert main([str(run)]) == 2
    assert f"{run / name} is not valid JSON" in capsys.readouterr().err


def test_bad_command_lines(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for given, message in (
        ([str(tmp_path / "gone")], "gone is no folder"),
        ([str(tmp_path / "empty")], "holds neither summary.json nor results.json"),
        ([str(run), str(run), "--output", "out"], "two runs are named 'run': tell them apart with NAME="),
        ([str(run), f"b={run}"], "2 runs have no folder for their report: give --output"),
        ([str(run), "--against", "splade"], "--against 'splade' is no system of the runs; there are LENS, "),
        ([str(run), "--resamples", "5"], "--resamples is 5"),
        ([str(run), "--seed", "-1"], "--seed is -1"),
    ):
        assert main(given) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error

"""eval/report.py on made run folders: figures by hand, several runs together, what is left out, and bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from eval.comparable import PUBLISHED
from eval.metrics import holm, randomisation_test
from eval.report import main, write

TASKS = {
    "nf": ("Retrieval", "ndcg_at_10", "mean", 30),
    "cran": ("Retrieval", "ndcg_at_10", "mean", 8),
    "sts-b": ("STS", "cosine_spearman", "spearman", 40),
    "mrpc": ("PairClassification", "max_ap", "ap", 40),
}
EVIL = "<script>alert(1)</script>|x_$y$"
KEYS = ("seconds", "texts", "embedding_seconds", "dimensions", "active", "bytes_per_document")


def parts(task: str, gain: float, seed: int) -> dict[str, Any]:
    """The content of a units file: values that grow with `gain`."""
    _, measure, statistic, n = TASKS[task]
    rng = np.random.default_rng([seed, n])
    gold = None if statistic == "mean" else rng.integers(0, 2 if statistic == "ap" else 5, n).astype(float)
    values = rng.random(n) * 0.5 + gain * (0.5 if gold is None else gold)
    score = {
        "mean": lambda: values.mean(),
        "spearman": lambda: spearmanr(values, gold)[0],
        "ap": lambda: average_precision_score(gold, values),
    }[statistic]()
    part = {"split": "test", "subset": "default", "names": [f"q{i}" for i in range(n)], "values": values.tolist()}
    part["gold"] = None if gold is None else gold.tolist()
    return {"task": task, "measure": measure, "kind": statistic, "score": float(score), "parts": [part]}


def write_run(
    folder: Path, systems: Mapping[str, tuple[float, Sequence[str]]], seed: int = 0, revision: str = "r1"
) -> Path:
    """A run folder: system -> its gain and tasks; all have the same units, with costs and one explained loss."""
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {}
    costs: dict[str, Any] = {}
    for place, (name, (gain, tasks)) in enumerate(systems.items()):
        scores = {}
        where = f"units/s{place}/{revision}"
        (folder / where).mkdir(parents=True)
        for task in tasks:
            content = parts(task, gain, seed)
            scores[task] = round(content["score"], 5)
            (folder / where / f"{task}.json").write_text(json.dumps(content))
        facts[name] = {"model": f"local/{place}", "revision": revision, "scores": scores, "means": {}, "units": where}
        facts[name]["role"] = "model" if place == 0 else "baseline"
        figures = (10.0, 1000, 2.0 * (place + 1), 4000, 99.5, 800.0 * (place + 1))
        costs[name] = {task: dict(zip(KEYS, figures, strict=True)) for task in tasks}
    used = dict.fromkeys(task for _, tasks in systems.values() for task in tasks)
    summary = {
        "mteb": "2.26.0",
        "tasks": {t: {"type": TASKS[t][0], "measure": TASKS[t][1], "revision": f"data-{t}"} for t in used},
        "systems": facts,
        "failures": [f"bm25 on lost: <b> {EVIL}"],
    }
    first, *others = systems
    document = {"document": "d1", "text": f"a text {EVIL}\n" * 99, "score": 0.25}
    loss = {
        "task": "nf", "query": "q3", "text": f"which | {EVIL}?", "value": 0.1, "other_value": 0.9,
        "relevant": {**document, "matches": [[7, ["cat", EVIL], 0.2], *([i, ["dog"], 0.01] for i in range(9))]},
        "found": {**document, "document": "d2", "matches": []},
    }  # fmt: skip
    rows = {first: {others[0]: [loss]}} if others else {}
    made_of = {s: f"{row['units']}@{row['scores']['nf']:.6f}" for s, row in facts.items() if "nf" in row["scores"]}
    explained = {"of": {"count": 3, "task": "data-nf", "systems": made_of}, "rows": rows}
    (folder / "explained").mkdir()
    for name, content in (("summary", summary), ("costs", costs), ("explained/nf", explained)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def three_systems(folder: Path) -> Path:
    names = list(TASKS)
    return write_run(folder, {"LENS": (0.5, names), EVIL: (0.3, names), "bm25": (0.49, names[:2])})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return three_systems(tmp_path / "run")


class Page(HTMLParser):
    """What of a page would load something or run, and its text in cells."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.data: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset") or name.startswith("on"):
                self.outside += [] if (value or "").startswith("#") else [f"{tag} {name}={value}"]
            if name == "style" and "url(" in (value or "") and "url(#" not in (value or ""):
                self.outside.append(f"{tag} {value}")

    def handle_data(self, data: str) -> None:
        self.data.append(data)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def test_figures_are_those_by_hand(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--resamples", "500"]) == 0
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    found = json.loads((run / "report.json").read_text())
    scores = json.loads((run / "summary.json").read_text())["systems"]
    mine, bm25 = scores["LENS"]["scores"], scores["bm25"]["scores"]
    overview = found["overview"]
    assert overview["tasks"] == {"Retrieval": 2, "PairClassification": 1, "STS": 1, "all": 4}
    assert overview["systems"]["LENS"]["Retrieval"] == pytest.approx((mine["nf"] + mine["cran"]) / 2)
    assert overview["systems"]["LENS"]["all"] == pytest.approx(sum(mine.values()) / 4)
    assert overview["systems"]["bm25"] == {
        "Retrieval": pytest.approx((bm25["nf"] + bm25["cran"]) / 2),
        **dict.fromkeys(("PairClassification", "STS", "all")),
    }
    first, second = found["comparisons"]
    assert (first["system"], first["other"], second["other"]) == ("LENS", EVIL, "bm25")
    assert list(second["tasks"]) == ["cran", "nf"]
    for task, test in first["tasks"].items():
        assert test["difference"] == pytest.approx(mine[task] - scores[EVIL]["scores"][task], abs=2e-5)
        assert test["low"] - 1e-9 <= test["difference"] <= test["high"] + 1e-9
    cran = second["tasks"]["cran"]
    values = [np.array(parts("cran", gain, 0)["parts"][0]["values"]) for gain in (0.5, 0.49)]
    assert cran["p"] == randomisation_test(values[0] - values[1], 500)  # 2^8 flips
    assert (cran["wins"], cran["ties"], cran["losses"]) == (8, 0, 0)
    p = {task: test["p"] for task, test in second["tasks"].items()}
    assert p == {"cran": 2 / 256, "nf": pytest.approx(1 / 501)}
    assert cran["p_holm"] == p["cran"]  # the larger of two
    assert second["tasks"]["nf"]["p_holm"] == pytest.approx(2 * p["nf"])
    assert second["mean"]["difference"] == pytest.approx(0.005)
    assert (second["wins"], second["losses"], second["mean"]["tasks"]) == (2, 0, 2)
    both = [row["mean"] for row in (first, second)]
    assert [mean["p_holm"] for mean in both] == pytest.approx(holm([mean["p"] for mean in both]))
    assert both[0]["p_holm"] > both[0]["p"]
    costs = found["costs"]
    assert costs["tasks"] == ["cran", "nf"]
    assert costs["systems"]["bm25"] == {
        "score": pytest.approx((bm25["nf"] + bm25["cran"]) / 2), "texts_per_second": pytest.approx(1000 / 6),
        "seconds": 20.0, "dimensions": 4000, "active": 99.5, "bytes_per_document": 2400,
    }  # fmt: skip

    lines = (run / "report.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| nf | Retrieval |"))
    assert f"**{100 * mine['nf']:.2f}**" in row
    assert f"{100 * bm25['nf']:.2f} ▼" in row
    mean = next(line for line in lines if line.startswith("| LENS | "))
    cells = [100 * overview["systems"]["LENS"][kind] for kind in overview["tasks"]]
    assert [cell.strip(" *") for cell in mean.strip("|").split("|")[1:]] == [f"{cell:.2f}" for cell in cells]
    page = Page(run / "report.html")
    for figure in (f"{100 * mine['nf']:.2f}", f"{100 * overview['systems']['LENS']['all']:.2f}", "+0.50"):
        assert any(figure in text for text in page.data)


def test_the_page_loads_nothing_and_escapes_all(run: Path) -> None:
    write(run, [str(run)], resamples=200)
    page = Page(run / "report.html")
    assert page.outside == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 2 + 2 + 2 * 2  # costs, differences by pair, and queries by pair and task
    assert any(EVIL in text for text in page.data)
    text = (run / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "#0" not in text.replace("&#0", "")  # no placeholder colour is left
    markdown = (run / "report.md").read_text()
    assert "<script" not in markdown.replace("\\<", "")
    assert "\\<script\\>alert(1)\\</script\\>\\|x\\_\\$y\\$" in markdown
    assert "wrongly first: d2" in markdown
    assert "cat \\<script" in markdown
    assert "; 2 more" in markdown  # of ten clusters eight are shown
    for limit in ("held fixed in the resamples", "random draws from the same texts", "only the time since counts"):
        assert limit in markdown
    tables = [part.splitlines() for part in markdown.split("\n\n") if part.startswith("|")]
    assert len(tables) == 9
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_the_direction_of_tests_and_marks(run: Path) -> None:
    found = write(run, [str(run)], against="bm25", resamples=500)
    assert [(row["system"], row["other"]) for row in found["comparisons"]] == [("LENS", "bm25"), (EVIL, "bm25")]
    row = next(line for line in (run / "report.md").read_text().splitlines() if line.startswith("| nf | Retrieval |"))
    ours, evil, bm25 = (cell.strip(" *") for cell in row.replace("\\|", "").strip("|").split("|")[3:])
    assert ours.endswith("▲")
    assert evil.endswith("▼")
    assert bm25[-1].isdigit()


def test_runs_without_units_costs_and_explanations(run: Path) -> None:
    for name in ("costs.json", "explained/nf.json"):
        (run / name).unlink()
    edit(run / "summary.json", lambda c: [c["systems"][name].pop("units") for name in c["systems"]] and None)
    found = write(run, [str(run)])
    assert [note.split(":")[0] for note in found["notes"]] == [
        "no units in the run", "no costs.json in the run", "no explained losses in the run",
    ]  # fmt: skip
    assert found["comparisons"][0]["mean"] is None
    assert found["comparisons"][0]["wins"] + found["comparisons"][0]["losses"] == 4
    markdown = (run / "report.md").read_text()
    assert "There are no costs in the runs" in markdown
    assert "There are no two systems with values by query" in markdown
    assert "## Left out" in markdown


def test_costs_that_a_task_lacks(run: Path) -> None:
    edit(run / "costs.json", lambda c: c["LENS"]["nf"].update(seconds=None, texts=None, bytes_per_document=None))
    found = write(run, [str(run)], resamples=200)["costs"]["systems"]["LENS"]
    assert found["seconds"] is None  # a sum over fewer tasks is another figure
    assert (found["texts_per_second"], found["bytes_per_document"]) == (500, 800)
    edit(run / "costs.json", lambda c: c["LENS"]["nf"].update(texts=float("nan"), embedding_seconds=float("inf")))
    edit(run / "costs.json", lambda c: c["LENS"]["nf"].pop("dimensions") and c[EVIL].update(nf=None))
    edit(run / "costs.json", lambda c: c.update(bm25=None))
    found = write(run, [str(run)], resamples=200)["costs"]["systems"]
    assert list(found) == ["LENS", EVIL]
    assert (found["LENS"]["texts_per_second"], found["LENS"]["dimensions"]) == (500, 4000)
    assert (found[EVIL]["seconds"], found[EVIL]["bytes_per_document"]) == (None, 1600)


def test_seconds_of_a_hybrid_are_its_members_and_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {name: (0.3, ["nf", "cran"]) for name in ("LENS", "bm25", "both rrf")})
    edit(run / "summary.json", lambda c: c["systems"]["both rrf"].update(role="hybrid"))
    edit(run / "costs.json", lambda c: c["LENS"]["nf"].update(seconds=50.0))

    def hybrid() -> tuple[Any, Any]:
        found = write(run, [str(run)], resamples=200)["costs"]["systems"]["both rrf"]
        return found["seconds"], found["texts_per_second"]

    assert hybrid() == (None, None)  # its members are not known
    members = {"both rrf": {"members": ["LENS", "bm25"], "fusion": "rrf"}}
    (run / "hybrids.json").write_text(json.dumps(members))
    assert hybrid() == (50 + 10 + 10 + 3 * 10, None)
    edit(run / "costs.json", lambda c: c["bm25"]["nf"].update(seconds=None))
    assert hybrid() == (None, None)
    (run / "hybrids.json").write_text(json.dumps({"both rrf": {"members": "LENS"}}))
    with pytest.raises(ValueError, match=r"hybrids.json is damaged: expected members of both rrf"):
        hybrid()


def test_losses_are_sorted_over_all_tasks(run: Path) -> None:
    path = run / "explained" / "nf.json"
    found = json.loads(path.read_text())
    (loss,) = found["rows"]["LENS"][EVIL]
    systems = json.loads((run / "summary.json").read_text())["systems"]
    for task, values in (("nf", (0.5, 0.3, 0.2)), ("cran", (0.9, 0.1, 0.4))):
        rows = [{**loss, "task": task, "query": f"{task} {v}", "value": 0.05, "other_value": v + 0.05} for v in values]
        made_of = {name: f"{row['units']}@{row['scores'][task]:.6f}" for name, row in systems.items()}
        content = {"of": {"count": 3, "task": f"data-{task}", "systems": made_of}, "rows": {"LENS": {EVIL: rows}}}
        (run / "explained" / f"{task}.json").write_text(json.dumps(content))
    write(run, [str(run)], resamples=200)
    for name, shown in (("report.md", 3), ("report.html", 6)):
        order = re.findall(r"\(((?:nf|cran) 0\.\d)\): ", (run / name).read_text())
        assert order == ["cran 0.9", "nf 0.5", "cran 0.4", "nf 0.3", "nf 0.2", "cran 0.1"][:shown]


def test_one_system_and_no_scores(tmp_path: Path) -> None:
    alone = write_run(tmp_path / "alone", {"LENS": (0.5, ["nf"])})
    assert write(alone, [str(alone)])["comparisons"] == []
    assert "nothing is compared" in (alone / "report.md").read_text()
    edit(alone / "summary.json", lambda c: c["systems"]["LENS"].update(scores={}))
    found = write(alone, [str(alone)])
    assert found["overview"]["systems"]["LENS"] == {"Retrieval": None, "all": None}


def published_run(folder: Path, names: Mapping[str, Sequence[str]]) -> Path:
    folder.mkdir()
    tasks = {name: {"type": kind, "measure": "x"} for kind, held in names.items() for name in held}
    system = {"model": "local/x", "revision": "r", "scores": dict.fromkeys(tasks, 0.5), "means": {}}
    (folder / "summary.json").write_text(json.dumps({"tasks": tasks, "systems": {"LENS": system}, "failures": []}))
    return folder


def test_published_rows_stand_only_beside_the_same_tasks(tmp_path: Path) -> None:
    wanted = PUBLISHED.content["tasks"]
    assert {kind: len(names) for kind, names in wanted.items()} == {
        "Retrieval": 15, "Reranking": 4, "Clustering": 11, "PairClassification": 3, "Classification": 12, "STS": 10,
        "Summarization": 1,
    }  # fmt: skip

    def table(name: str, tasks: Mapping[str, Sequence[str]], **options: Any) -> tuple[list[str], str]:
        run = published_run(tmp_path / name, tasks)
        found = write(run, [str(run)], **options)
        return found.get("published", {}).get("comparable", []), (run / "report.md").read_text()

    comparable, text = table("whole", wanted)
    assert comparable == [*wanted, "all"]
    row = "| LENS-d8000 (published) | 61.86 | 60.91 | 58.02 | 87.98 | 88.43 | 84.67 | 29.54 | 71.62 |"
    assert row in text
    assert "not comparable" not in text
    comparable, text = table("one type", {"STS": wanted["STS"], "Retrieval": ["NFCorpus"]})
    assert comparable == ["STS"]
    assert "| LENS-d8000 (published) | – | 84.67 | – |" in text
    assert "not comparable" in text
    comparable, text = table("more", {**wanted, "STS": [*wanted["STS"], "mine"]})
    assert "STS" not in comparable
    assert "all" not in comparable
    comparable, _ = table("another type", {**wanted, "BitextMining": ["mine"]})
    assert comparable == list(wanted)
    comparable, text = table("local", {"Retrieval": ["nf"]})
    assert comparable == []
    assert "(published)" not in text
    assert "| LENS-d8000 | 61.86 |" in text
    assert "not comparable" in text
    assert "61.86" not in table("without", {"Retrieval": ["nf"]}, published=False)[1]


def test_other_splits_are_not_comparable(tmp_path: Path) -> None:
    names = PUBLISHED.content["tasks"]["STS"]
    for subset, comparable in (("en", ["STS"]), ("de", [])):
        run = published_run(tmp_path / subset, {"STS": names})
        (run / "units").mkdir()
        part = {"split": "test", "subset": subset, "names": ["0", "1"], "values": [0.4, 0.6], "gold": None}
        (run / "units" / "STS22.json").write_text(json.dumps({"kind": "mean", "parts": [part]}))
        edit(run / "summary.json", lambda c: c["systems"]["LENS"].update(units="units"))
        found = write(run, [str(run)])
        assert found["published"]["comparable"] == comparable
        assert any("STS22" in note and "other splits" in note for note in found["notes"]) == (subset == "de")


def test_the_published_tasks_are_those_of_the_benchmark() -> None:
    import mteb

    tasks = {task.metadata.name: task for task in mteb.get_benchmark("MTEB(eng, v1)").tasks}
    kinds = {name: kind for kind, names in PUBLISHED.content["tasks"].items() for name in names}
    assert {name: task.metadata.type for name, task in tasks.items()} == kinds
    for name, task in tasks.items():
        assert list(task.eval_splits) == [PUBLISHED.content["other_splits"].get(name, "test")]
        if len(task.metadata.hf_subsets) > 1 and name in PUBLISHED.content["one_subset"]:
            assert list(task.hf_subsets) == [PUBLISHED.content["one_subset"][name]]

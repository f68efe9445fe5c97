"""benchmarks/analyses.py: which folders are tasks, its programs in one process on a tiny model, the page."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SENTENCES, write_rows
from test_eval_program import write_beir

import lens
from benchmarks import analyses
from eval.analyse import main as analyse
from eval.run import main as evaluate
from lens.files import write_json

PAIRS = [
    {"sentence1": one, "sentence2": two, "score": float(abs(i - j))}
    for i, one in enumerate(SENTENCES[:5])
    for j, two in enumerate(SENTENCES[:5])
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    beir = write_beir(folder / "questions")
    judged = (beir / "qrels" / "test.tsv").read_text().splitlines()
    (beir / "qrels" / "dev.tsv").write_text("\n".join(judged[:-1]) + "\n")
    (folder / "similar").mkdir()
    write_rows(folder / "similar" / "dev.jsonl", *PAIRS[:-1])
    write_rows(folder / "similar" / "test.jsonl", *PAIRS)
    (folder / "to-train-on").mkdir()
    write_rows(folder / "to-train-on" / "train.jsonl", {"query": "a", "positive": "b"})
    return folder


def test_which_folders_are_tasks(data: Path) -> None:
    found, dev = analyses.tasks_in(data)
    # five pairs with the same first sentence would be five texts of summaries: too few
    assert [Path(place).name for place in found] == ["questions", "similar"]
    assert [Path(place).name for place in dev] == ["questions", "similar"]


def test_all_analyses_and_the_page(
    data: Path, bert: Path, bert_clusters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, work = tmp_path / "quick", tmp_path / "work"
    tiny = lens.LENS.build(bert, bert_clusters, device="cpu", positions="content", document_max_length=64)
    k = tiny.config.dimensions
    tiny.save(quick / "model")
    write_json(quick / "model" / "recipe.json", {"base": str(bert)})
    for place in (quick / "clusters" / "clusters.json", quick / "train" / "examples.jsonl"):
        place.parent.mkdir(exist_ok=True)
        place.write_text("{}")
    (quick / "train" / "teacher.safetensors").write_bytes(b"")
    trained = []

    def program(name: str, *given: object) -> None:
        words = [str(word) for word in given]
        if name in ("clustering/run.py", "train/run.py"):
            trained.append(words)
            output = Path(words[words.index("--output") + 1])
            if name == "train/run.py":
                pooling = words[words.index("--pooling") + 1]
                options = {"device": "cpu", "positions": "content", "document_max_length": 64, "pooling": pooling}
                lens.LENS.build(bert, bert_clusters, **options).save(output)
            return
        assert (evaluate if name == "eval/run.py" else analyse)(words) == 0

    monkeypatch.setattr(analyses, "program", program)
    monkeypatch.setattr(analyses, "CLUSTERS", (k,))  # the quick start's own, not trained again
    monkeypatch.setattr(analyses, "PRUNED", ("--top-n", "4", "--drop", "0.5"))
    monkeypatch.setattr(analyses, "OUTPUT", tmp_path / "analyses.json")
    monkeypatch.setattr(analyses, "PLOTS", tmp_path / "plots")
    (tmp_path / "plots").mkdir()
    page = tmp_path / "results.md"
    monkeypatch.setattr(analyses, "write_section", lambda name, lines: page.write_text("\n".join(lines)))
    given = ["--data", str(data), "--quickstart", str(quick), "--work", str(work)]
    analyses.main([*given, "--only", "run", "pruning", "pooling"])
    assert [words[words.index("--pooling") + 1] for words in trained] == ["sum", "last"]
    content = json.loads((tmp_path / "analyses.json").read_text())
    assert list(content["analyses"]) == ["run", "pruning", "pooling"]
    results = json.loads((work / "pruning" / "results.json").read_text())
    summary = json.loads((work / "run" / "summary.json").read_text())
    text = page.read_text()
    for point in results["points"]:
        assert f"| {point['name']} | " in text
        assert f" {100 * point['means']['all']:.2f} |" in text
    assert f"| LENS | {100 * summary['systems']['LENS']['means']['Retrieval']:.2f} |" in text
    assert results["sentences"][0] in text
    assert "| Dimensions can be pruned after training: here half, by variance | yes | " in text
    assert "Bidirectional" not in text  # no decoder was given
    assert "![Mean score](plots/analysis-pruning.svg)" in text
    assert "LENS+bm25 rsf" in text
    page.unlink()
    count = len(trained)
    analyses.main(["--page"])
    assert page.read_text() == text
    assert len(trained) == count


def test_what_held() -> None:
    """Every task alike, every second one the other way, a loss of half a point, on eight tasks."""

    def analysis(*points: tuple[str, list[float]], **more: object) -> dict[str, object]:
        tasks = {f"t{i}": {"type": "Retrieval" if i < 6 else "STS"} for i in range(8)}
        named = [{"name": name, "scores": dict(zip(tasks, values, strict=True))} for name, values in points]
        return {"tasks": tasks, "points": named, **more}

    steady = [0.5 + i / 100 for i in range(8)]
    better, torn = [value + 0.02 for value in steady], [value + 0.02 * (-1) ** i for i, value in enumerate(steady)]
    less, worse = [value - 0.005 for value in steady], [value - 0.05 for value in steady]
    hybrid = analysis(("dense", steady), ("LENS 0.5 + dense", better), ("LENS", torn), weight=0.5)
    for point, weight in zip(hybrid["points"], (0, 0.5, 1), strict=True):
        point["weight"] = weight
    analyses_made = {
        "hybrid": hybrid,
        "pooling": analysis(("LENS", steady), ("sum pooling", worse), ("last pooling", better)),
        "pruning": analysis(
            ("unpruned", steady),
            ("drop 50%, mean square", less),
            ("drop 50%, variance", worse),
            ("drop 50%, random", torn),
        ),
    }
    rows = {row.split(" | ")[0].strip("| "): row for row in analyses.verdicts(analyses_made)[2:]}
    wanted = {
        "LENS is better than the dense embedding of its backbone": ("undecided", "8", "+0.00"),
        "Dimensions can be pruned after training: here half, by mean square": ("held", "8", "-0.50"),
        "Dimensions can be pruned after training: here half, by variance": ("not shown", "8", "-5.00"),
        "Dimensions can be pruned after training: here half, at random, for comparison": ("not shown", "8", "+0.00"),
        "Maximum pooling is better than sum pooling": ("held", "8", "+5.00"),
        "Maximum pooling is better than the last position": ("reversed", "8", "-2.00"),
        "LENS + dense is better than LENS in retrieval": ("undecided", "6", "+2.00"),
        "LENS + dense is better than dense in retrieval": ("held", "6", "+2.00"),
    }
    assert rows.keys() == wanted.keys()
    for text, (verdict, tasks, shown) in wanted.items():
        cells = [cell.strip() for cell in rows[text].strip("|").split("|")]
        assert (cells[-1], cells[3], cells[4]) == (verdict, tasks, shown), text


def test_a_run_with_failures_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "pruning").mkdir()
    write_json(tmp_path / "pruning" / "results.json", {"failures": ["top 4 on beir: lost"]})
    with pytest.raises(ValueError, match="top 4 on beir: lost"):
        analyses.collect(SimpleNamespace(work=tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "."], "give --data and --quickstart, or --page"),
        (["--quickstart", "."], "is no finished quick start: it has no model/lens.json"),
        (["--decoder", "."], "is no LENS model"),
        (["--only", "nothing"], "invalid choice"),
    ],
)
def test_bad_input(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        analyses.main(given)
    assert error.value.code == 2
    assert message in capsys.readouterr().err

"""`eval/analyse.py`: its points against independent paths, restarts, what its sentences say, bad input."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SENTENCES, SHARED, need, write_rows
from scipy.stats import spearmanr
from test_eval_program import write_beir

import lens
from eval.analyse import main
from eval.run import main as evaluate
from eval.scoring import evaluate as score_beir
from eval.scoring import judged_queries, vector_system
from lens.corpus import read_beir
from lens.vectors import rank_dims


@pytest.fixture(scope="module")
def model(bert: Path, bert_clusters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    lens.LENS.build(bert, bert_clusters, device="cpu", positions="content", document_max_length=64).save(path)
    return path


@pytest.fixture(scope="module")
def unlike(bert: Path, bert_clusters: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that differ from `model` in one thing each."""
    folder = tmp_path_factory.mktemp("others")
    made = {"sum": (bert_clusters, {"pooling": "sum"}), "long": (bert_clusters, {"normalize": False})}
    made |= {"whole": (None, {}), "dense": (None, {"head": "dense", "pooling": "last"})}
    for name, (clusters, config) in made.items():
        lens.LENS.build(bert, clusters, device="cpu", positions="content", **config).save(folder / name)
    return {name: folder / name for name in made}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("data")
    write_beir(place / "beir")
    pairs = [(a, b) for i, a in enumerate(SENTENCES) for b in SENTENCES[i + 1 :]]
    rows = [{"sentence1": a, "sentence2": b, "score": len(set(a) & set(b))} for a, b in pairs]
    for name, splits in (("sts", {"dev": rows[::2], "test": rows[1::2]}), ("only", {"test": rows})):
        (place / name).mkdir()
        for split, part in splits.items():
            write_rows(place / name / f"{split}.jsonl", *part)
    texts = [{"text": f"{SENTENCES[i % 7]} {i}", "label": "ab"[i % 2]} for i in range(24)]
    (place / "labels").mkdir()
    for split, part in (("train", texts[:18]), ("test", texts[18:])):
        write_rows(place / "labels" / f"{split}.jsonl", *part)
    write_rows(place / "texts.jsonl", *({"_id": str(i), "text": f"{i} {text}"} for i, text in enumerate(SENTENCES)))
    return {path.stem: str(path) for path in place.iterdir()}


def analyse(kind: str, output: Path, *given: Any) -> int:
    return main([kind, "--device", "cpu", "--output", str(output), *map(str, given)])


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def points(output: Path) -> dict[str, dict[str, Any]]:
    return {point["name"]: point for point in results(output)["points"]}


def plain(model: Path, output: Path, *given: str) -> dict[str, dict[str, float]]:
    """Scores of `eval/run.py`."""
    assert evaluate(["--model", str(model), "--device", "cpu", "--output", str(output), *given]) == 0
    systems = json.loads((output / "summary.json").read_text())["systems"]
    return {name: facts["scores"] for name, facts in systems.items()}


def stored(scores: dict[str, float]) -> dict[str, float]:
    """Scores with the digits of mteb's files."""
    return {task: round(score, 6) for task, score in scores.items()}


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often LENS embeds each text as a document and as a query, from here on."""
    encode, found = lens.LENS.encode, Counter()

    def counting(self: Any, texts: Any, kind: str = "document", *rest: Any, **options: Any) -> Any:
        found.update((kind, text) for text in texts)
        return encode(self, texts, kind, *rest, **options)

    monkeypatch.setattr(lens.LENS, "encode", counting)
    return found


def test_pruning(model: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = ["--local", data["beir"], data["sts"], data["labels"]]
    wanted = plain(model, tmp_path / "plain", *local)["tiny"]
    embedded = counted(monkeypatch)
    given = [*local, "--model", model, "--top-n", 3, 8, "--drop", 0.25, 0.5, "--calibrate", data["texts"]]
    assert analyse("pruning", tmp_path / "out", *given) == 0
    tasks = ["beir", "sts", "labels"]
    assert len(embedded) > 30
    assert max(embedded.values()) <= len(tasks)  # once for each task
    assert max(embedded[kind, text] for kind, text in embedded if text[0].isdigit()) == 1
    found = points(tmp_path / "out")
    assert list(found) == [
        "unpruned", "top 3", "top 8",
        *(f"drop {share}%, {order}" for order in ("mean square", "variance", "random") for share in (25, 50)),
    ]  # fmt: skip
    assert found["unpruned"]["scores"] == stored(wanted)

    encoder = lens.load(model, device="cpu")
    beir = read_beir(data["beir"])
    queries = [beir.queries[query] for query in judged_queries(beir)]
    texts = [f"{i} {text}" for i, text in enumerate(SENTENCES)]
    sample = encoder.encode_documents(texts)
    kept = rank_dims(sample)[:12]
    by_variance = np.argsort(-sample.var(axis=0), kind="stable")[:18]
    ways = {"top 3": {"top_k": 3}, "drop 50%, mean square": {"dims": kept}, "drop 25%, variance": {"dims": by_variance}}
    rows = [json.loads(line) for line in (Path(data["sts"]) / "test.jsonl").read_text().splitlines()]
    for name, options in ways.items():
        documents = encoder.encode_documents(list(beir.corpus.values()), **options)
        system = vector_system("x", encoder.encode_queries(queries, **options), documents)
        values = score_beir(beir, [system], measures=("nDCG@10",)).values["x"]["nDCG@10"]
        assert found[name]["scores"]["beir"] == pytest.approx(values.mean(), abs=1e-4), name
        one, two = (
            encoder.encode_documents([row[side] for row in rows], **options) for side in ("sentence1", "sentence2")
        )
        wanted = spearmanr((one * two).sum(1), [row["score"] for row in rows])[0]
        assert found[name]["scores"]["sts"] == pytest.approx(wanted, abs=1e-4), name
        active = (encoder.encode_documents(texts, **options) != 0).sum(1).mean()
        assert found[name]["values"] == pytest.approx(active), name

    row = found["top 3"]
    differences = [row["scores"][task] - found["unpruned"]["scores"][task] for task in tasks]
    assert row["difference"]["mean"] == pytest.approx(np.mean(differences))
    assert row["difference"]["low"] <= row["difference"]["mean"] <= row["difference"]["high"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(sentence in text for sentence in results(tmp_path / "out")["sentences"])
    assert "bootstrap intervals over tasks" in text
    plot = ET.parse(tmp_path / "out" / "plot.svg").getroot()
    assert plot.tag.endswith("svg")
    assert "dropped: variance" in "".join(plot.itertext())


def test_what_is_there_is_not_embedded_again(
    model: Path,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--model", model, "--local", data["beir"], data["sts"], "--top-n", 4, "--drop", 0.5]
    whole, output = tmp_path / "whole", tmp_path / "out"
    assert analyse("pruning", whole, *given) == 0
    task = "eval.analyse.evaluated"
    from eval.board import evaluated

    def killed(system: Any, part: Any, cache: Any, **options: Any) -> Any:
        if part.metadata.name == "sts":
            raise KeyboardInterrupt
        return evaluated(system, part, cache, **options)

    monkeypatch.setattr(task, killed)
    assert analyse("pruning", output, *given) == 130
    monkeypatch.setattr(task, evaluated)
    embedded = counted(monkeypatch)
    assert analyse("pruning", output, *given) == 0
    assert {text for _, text in embedded} <= set(SENTENCES)  # of sts alone, which nothing was known of
    assert max(embedded.values()) == 1
    assert points(output) == points(whole)

    embedded.clear()
    report = (output / "report.md").read_text()
    assert analyse("pruning", output, *given) == 0
    assert not embedded
    assert (output / "report.md").read_text() == report
    assert analyse("pruning", output, *given, "--top-n", 4, 6) == 0  # one point more
    assert points(output)["top 4"]["scores"] == points(whole)["top 4"]["scores"]
    assert max(embedded.values()) <= 2
    assert analyse("hybrid", output, "--model", model, "--local", data["beir"]) == 2
    assert "holds the report of another program or analysis" in capsys.readouterr().err


def test_embeddings_beyond_the_memory_are_computed_again(
    model: Path,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--model", model, "--local", data["beir"], "--top-n", 4, "--drop"]
    assert analyse("pruning", tmp_path / "held", *given) == 0
    assert "computed again" not in capsys.readouterr().err
    monkeypatch.setattr("eval.variants.size_of", lambda vectors: 600_000 if vectors.shape[0] else 0)
    assert analyse("pruning", tmp_path / "again", *given, "--memory-mb", 1) == 0
    assert "beir: its embeddings take more than --memory-mb 1" in capsys.readouterr().err
    assert "were computed again" in (tmp_path / "again" / "report.md").read_text()
    assert points(tmp_path / "again") == points(tmp_path / "held")


def test_hybrid(model: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = ["--local", data["beir"], data["sts"]]
    wanted = plain(model, tmp_path / "plain", *local, "--baselines", "dense")
    embedded = counted(monkeypatch)
    assert analyse("hybrid", tmp_path / "out", "--model", model, *local, "--dev", data["sts"]) == 0
    assert max(embedded.values()) <= 3  # beir, sts and sts.dev
    found, told = points(tmp_path / "out"), results(tmp_path / "out")
    assert found["LENS"]["scores"] == stored(wanted["tiny"])
    assert found["dense"]["scores"] == pytest.approx(wanted["dense"], abs=1e-4)
    assert len(found) == 11
    on_dev = {point["weight"]: point["scores"]["sts.dev"] for point in told["dev"]["points"]}
    assert on_dev[told["weight"]] == max(on_dev.values())
    assert f"weight {told['weight']:g} of LENS, chosen on the dev splits of 1 task" in told["sentences"][0]
    assert set(found["LENS"]["scores"]) == {"beir", "sts"}  # what chose the weight is no result

    from lens.dense import Dense

    encoder, dense = lens.load(model, device="cpu"), Dense(lens.load(model, device="cpu").config.base, "cpu")
    beir = read_beir(data["beir"])
    queries, documents = [beir.queries[query] for query in judged_queries(beir)], list(beir.corpus.values())
    scores = 0.3 * encoder.encode_queries(queries) @ encoder.encode_documents(documents).T
    scores += 0.7 * dense.encode(queries, show_progress=False) @ dense.encode(documents, show_progress=False).T
    system = vector_system("x", scores, np.eye(len(documents), dtype=np.float32))
    values = score_beir(beir, [system], measures=("nDCG@10",)).values["x"]["nDCG@10"]
    assert found["LENS 0.3 + dense"]["scores"]["beir"] == pytest.approx(values.mean(), abs=1e-4)

    assert analyse("hybrid", tmp_path / "half", "--model", model, "--local", data["beir"]) == 0
    assert results(tmp_path / "half")["weight"] == 0.5
    assert "given beforehand, not tuned" in results(tmp_path / "half")["sentences"][0]


def test_variants(model: Path, unlike: dict[str, Path], data: dict[str, str], tmp_path: Path) -> None:
    local = ["--local", data["beir"], data["sts"]]
    assert analyse("variants", tmp_path / "out", "--model", f"max={model}", f"sum={unlike['sum']}", *local) == 0
    found, told = points(tmp_path / "out"), results(tmp_path / "out")["sentences"]
    assert found["max"]["scores"] == stored(plain(model, tmp_path / "plain", *local)["tiny"])
    assert (found["sum"]["pooling"], found["sum"]["dimensions"], found["sum"]["difference"] is None) == (
        "sum",
        24,
        False,
    )
    assert "sum (pooling sum instead of max) is " in told[1]
    assert analyse("variants", tmp_path / "k", "--model", model, f"all={unlike['whole']}", *local[:2]) == 0
    assert "From K = 24 to K = " in results(tmp_path / "k")["sentences"][1]
    assert "clusters K" in "".join(ET.parse(tmp_path / "k" / "plot.svg").getroot().itertext())


def test_real_data(model: Path, tmp_path: Path) -> None:
    adi = str(need(SHARED / "data" / "adi"))
    wanted = stored(plain(model, tmp_path / "plain", "--local", adi)["tiny"])
    assert analyse("pruning", tmp_path / "out", "--model", model, "--local", adi, "--top-n", 2, 16, "--drop", 0.9) == 0
    found = points(tmp_path / "out")
    assert found["unpruned"]["scores"] == wanted
    assert found["top 16"]["scores"]["adi"] != found["top 2"]["scores"]["adi"]
    told = results(tmp_path / "out")["sentences"]
    assert len(told) == 5  # of orders against each other nothing can be said
    assert all("one task tells nothing of others" in sentence for sentence in told[1:])


def test_a_failing_point_leaves_its_task_out(
    model: Path,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (broken := tmp_path / "broken").mkdir()
    write_rows(broken / "test.jsonl", *({"sentence1": "a", "sentence2": "b", "score": i} for i in "xy"))
    given = [
        "--model",
        model,
        "--local",
        data["beir"],
        data["sts"],
        str(broken),
        "--top-n",
        4,
        "--calibrate",
        data["texts"],
    ]
    assert analyse("pruning", tmp_path / "out", *given) == 1
    assert "failed: top 4 on broken: " in capsys.readouterr().err
    told = results(tmp_path / "out")
    assert told["compared"] == ["beir", "sts"]
    assert "over 2 tasks (1 without all scores left out)" in told["sentences"][0]
    assert told["points"][0]["means"]["all"] is None


def test_bad_input(
    model: Path, unlike: dict[str, Path], data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, tiny = ["--local", data["beir"]], ["--model", str(model)]
    cases = [
        ("pruning", [*tiny, "--tasks", "NFcorpus"], "'NFcorpus' is unknown: did you mean NFCorpus"),
        ("pruning", tiny, "no task: give --benchmark, --tasks or --local"),
        ("pruning", [*tiny, *task, "--top-n", "0"], "--top-n must be a whole number of at least 1, found 0"),
        ("pruning", [*tiny, *task, "--top-n", "24"], "--top-n 24 keeps everything: the model has 24 dimensions"),
        ("pruning", [*tiny, *task, "--drop", "0.5", "1"], "--drop takes shares between 0 and 1, found 1"),
        ("pruning", [*tiny, *task, "--drop", "nan"], "--drop takes shares between 0 and 1, found nan"),
        ("pruning", [*tiny, *task, "--top-n", "--drop"], "nothing to prune"),
        ("pruning", [*tiny, *task, "--sample", "0"], "--sample must be"),
        ("pruning", [*tiny, *task, "--memory-mb", "0"], "--memory-mb must be at least 1, found 0"),
        ("pruning", [*tiny, *task, "--calibrate", str(tmp_path / "gone")], "gone does not exist"),
        ("pruning", ["--model", str(unlike["dense"]), *task], "head='dense': only sparse embeddings are pruned"),
        ("pruning", ["--model", str(tmp_path / "no"), *task], "is neither a folder nor a name"),
        ("variants", [*tiny, *task], "at least two models"),
        ("variants", ["--model", str(model), str(model), *task], "two models are named 'tiny'"),
        ("variants", ["--model", f"a={model}", f"b={unlike['sum']}", *task, "--axis", "dimensions"], "the same number"),
        ("variants", ["--model", f"a={model}", f"b={unlike['sum']}", *task, "--axis", "k"], "found 'k'"),
        ("hybrid", ["--model", str(unlike["dense"]), *task], "has head='dense'"),
        ("hybrid", ["--model", str(unlike["long"]), *task], "embeddings without unit length"),
        ("hybrid", [*tiny, *task, "--dev", data["only"]], "of which none is called dev, validation"),
        ("hybrid", [*tiny, *task, "--dev", data["beir"]], "of which none is called dev, validation"),
        ("hybrid", [*tiny, *task, "--dense-model", str(tmp_path / "gone")], "gone"),
    ]
    for kind, given, message in cases:
        assert analyse(kind, tmp_path / "out", *given) == 2, given
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith("error: "), given
        assert message in error[-1], error
    assert not (tmp_path / "out" / "results.json").exists()
    (tmp_path / "dev").mkdir()
    write_rows(tmp_path / "dev" / "dev.jsonl", *({"sentence1": "a", "sentence2": "b", "score": i} for i in (1, 2)))
    seen = ["--local", str(tmp_path / "dev"), "--dev", str(tmp_path / "dev")]
    assert analyse("hybrid", tmp_path / "out", *tiny, *seen) == 2
    assert "its split dev is evaluated: that would be no test" in capsys.readouterr().err


def test_scores_of_another_output_are_shared(
    model: Path, data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, given = tmp_path / "run", ["--local", data["beir"], data["sts"]]
    assert evaluate(["--model", str(model), "--device", "cpu", "--output", str(run), *map(str, given)]) == 0
    stored = {path: path.stat().st_mtime_ns for path in (run / "results").rglob("*.json")}
    other = tmp_path / "other"
    shutil.copytree(model, other)
    lens_json = json.loads((other / "lens.json").read_text())
    (other / "lens.json").write_text(json.dumps({**lens_json, "document_max_length": 8}))
    models = ["--model", f"tiny={model}", f"short={other}"]
    assert analyse("variants", tmp_path / "out", *models, *given, "--results", run) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["points"]
    summary = json.loads((run / "summary.json").read_text())
    assert found[0]["scores"] == summary["systems"][model.name]["scores"]
    assert {path: path.stat().st_mtime_ns for path in stored} == stored
    assert len(list((run / "results").rglob("sts*.json"))) == 2
    assert not (tmp_path / "out" / "results").exists()
    assert analyse("variants", tmp_path / "out", *models, *given, "--results", tmp_path / "nowhere") == 2
    assert "nowhere holds no folder results" in capsys.readouterr().err

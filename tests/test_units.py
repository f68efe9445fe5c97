"""What scores are made of, peers and hybrids in one run: values by an independent path, restarts, bad input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ir_measures
import numpy as np
import pytest
from conftest import SHARED, need, write_rows
from ir_measures import nDCG
from mteb.models import ModelMeta
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from test_benchmark import judged, part

import lens
from eval.explained import losses
from eval.fusion import GRID, choose, hybrid
from eval.peers import open_peer
from eval.run import main
from eval.snapshot import unload
from eval.tasks import local_task
from eval.units import Kept, counted, statistic, too_many
from lens.corpus import read_beir

DATA = SHARED / "data"


@pytest.fixture(scope="module")
def peer(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model of the tiny backbone."""
    from sentence_transformers import SentenceTransformer

    path = tmp_path_factory.mktemp("peers") / "tiny-st"
    SentenceTransformer(str(bert), device="cpu").save(str(path))
    return path


@pytest.fixture(scope="module")
def ran(bert: Path, bert_clusters: Path, peer: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One run over real data of every kind, with peers, baselines and hybrids."""
    place = tmp_path_factory.mktemp("run")
    lens.LENS.build(bert, bert_clusters, device="cpu", positions="content", document_max_length=64).save(place / "tiny")
    for split in ("dev", "test"):
        beir = read_beir(need(DATA / "wikiqa"), split)
        kept = list(beir.qrels)[:12]
        documents = dict.fromkeys(document for query in kept for document in beir.qrels[query])
        (place / "wiki" / "qrels").mkdir(parents=True, exist_ok=True)
        lines = [f"{query}\t{name}\t{score}\n" for query in kept for name, score in beir.qrels[query].items()]
        (place / "wiki" / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
        for file, rows in (
            ("corpus", [{"_id": name, "title": "", "text": beir.corpus[name]} for name in documents]),
            ("queries", [{"_id": query, "text": beir.queries[query]} for query in kept]),
        ):
            path = place / "wiki" / f"{file}.jsonl"
            held = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
            write_rows(path, *{row["_id"]: row for row in [*held, *rows]}.values())
    local = [
        str(place / "wiki"),
        f"{judged('wikiqa', place / 'again', 15)}:reranking",
        str(part("sts-b", place / "sts-b", 60)),
        str(part("mrpc", place / "mrpc", 60)),
        str(part("snips", place / "snips", 70)),
        f"{part('snips', place / 'intents', 70)}:clustering",
        f"{part('sick-r', place / 'sick-r', 5000)}:summarization",
    ]
    command = ["--model", str(place / "tiny"), "--device", "cpu", "--local", *local, "--baselines", "bm25", "dense"]
    command += ["--peers", f"st={peer}", "mteb/baseline-random-encoder", "mteb/baseline-bm25s"]
    command += ["--hybrids", "tiny+dense", "tiny+bm25", "--dev", str(place / "wiki"), "--output", str(place / "out")]
    assert main(command) == 0
    summary = json.loads((place / "out" / "summary.json").read_text())
    return SimpleNamespace(output=place / "out", command=command, local=local, summary=summary, wiki=place / "wiki")


def units(ran: SimpleNamespace, system: str, task: str) -> dict[str, Any]:
    return json.loads((ran.output / ran.summary["systems"][system]["units"] / f"{task}.json").read_text())


def test_every_task_is_split_and_its_parts_give_its_score(ran: SimpleNamespace) -> None:
    for name in ("tiny", "st", "dense", "baseline-random-encoder"):
        for task, score in ran.summary["systems"][name]["scores"].items():
            content = units(ran, name, task)
            assert content["parts"], (name, task)
            assert np.mean([statistic(content["kind"], one) for one in content["parts"]]) == pytest.approx(
                score, abs=1e-4
            )
    kinds = {task: units(ran, "tiny", task)["kind"] for task in ran.summary["tasks"]}
    assert [kinds[name] for name in ("sts-b", "mrpc")] == ["spearman", "ap"]
    assert {kinds[name] for name in kinds if name not in ("sts-b", "mrpc")} == {"mean"}


def test_units_by_an_independent_path(ran: SimpleNamespace) -> None:
    model = lens.load(ran.command[1], device="cpu")
    beir = read_beir(ran.wiki, "test")
    (one,) = units(ran, "tiny", "wiki")["parts"]
    queries, names = model.encode_queries([beir.queries[query] for query in one["names"]]), list(beir.corpus)
    scores = queries @ model.encode_documents(list(beir.corpus.values())).T
    run = {
        query: {names[i]: float(row[i]) for i in range(len(names))}
        for query, row in zip(one["names"], scores, strict=True)
    }
    found = {value.query_id: value.value for value in ir_measures.iter_calc([nDCG @ 10], beir.qrels, run)}
    assert one["names"] == [query for query in beir.qrels if any(beir.qrels[query].values())]
    np.testing.assert_allclose(one["values"], [found[query] for query in one["names"]], atol=1e-5)
    assert one["first"] == [max(run[query], key=lambda name: run[query][name]) for query in one["names"]]

    rows = [json.loads(line) for line in Path(ran.local[2], "test.jsonl").read_text().splitlines()]
    (one,) = units(ran, "tiny", "sts-b")["parts"]
    left, right = (model.encode_documents([row[field] for row in rows]) for field in ("sentence1", "sentence2"))
    np.testing.assert_allclose(one["values"], (left * right).sum(1), atol=1e-5)
    assert one["gold"] == [row["score"] for row in rows]
    assert statistic("spearman", one) == spearmanr(one["values"], one["gold"]).statistic

    (one,) = units(ran, "tiny", "mrpc")["parts"]
    assert statistic("ap", one) == average_precision_score(one["gold"], one["values"])
    assert len(units(ran, "tiny", "intents.clustering")["parts"][0]["values"]) == 10


def test_costs_and_roles(ran: SimpleNamespace) -> None:
    costs = json.loads((ran.output / "costs.json").read_text())
    beir = read_beir(ran.wiki, "test")
    asked = sum(any(judged.values()) for judged in beir.qrels.values())
    documents = len(set(beir.corpus.values()))
    own = costs["tiny"]["wiki"]
    # the first of a corpus are embedded once more to see how sparse they are, and so are the queries
    assert own["texts"] == documents + asked + min(64, documents) + asked
    model = lens.load(ran.command[1], device="cpu")
    assert own["dimensions"] == model.config.dimensions
    assert 0 < own["active"] <= own["dimensions"]
    assert own["bytes_per_document"] == pytest.approx(min(4 * own["dimensions"], 8 * own["active"]), abs=0.1)
    assert costs["dense"]["wiki"]["bytes_per_document"] == 4 * costs["dense"]["wiki"]["dimensions"]
    words = [set(re.findall(r"\w+", text.lower())) for text in beir.corpus.values()]
    assert 0.4 * np.mean([*map(len, words)]) < costs["bm25"]["wiki"]["active"] <= np.mean([*map(len, words)])
    assert costs["bm25"]["wiki"]["bytes_per_document"] == pytest.approx(8 * costs["bm25"]["wiki"]["active"], rel=0.01)
    roles = {name: system["role"] for name, system in ran.summary["systems"].items()}
    assert roles["tiny"] == "model"
    assert roles["st"] == "peer"
    assert roles["dense"] == "baseline"
    assert sum(value == "hybrid" for value in roles.values()) == 4


def test_a_peer_scores_as_its_own_library_does(ran: SimpleNamespace, peer: Path) -> None:
    from sentence_transformers import SentenceTransformer

    scores = {name: system["scores"] for name, system in ran.summary["systems"].items()}
    assert scores["st"].keys() == scores["dense"].keys() == ran.summary["tasks"].keys()
    model = SentenceTransformer(str(peer), device="cpu")
    for name, folder in (("sts-b", ran.local[2]), ("mrpc", ran.local[3])):
        rows = [json.loads(line) for line in Path(folder, "test.jsonl").read_text().splitlines()]
        left, right = (model.encode([row[field] for row in rows]) for field in ("sentence1", "sentence2"))
        cosine = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
        if name == "mrpc":  # the best of four similarities
            labels = [row["label"] for row in rows]
            others = [(left * right).sum(1), *(-np.linalg.norm(left - right, ord, axis=1) for ord in (1, 2))]
            expected = max(average_precision_score(labels, found) for found in (cosine, *others))
        else:
            expected = spearmanr(cosine, [row["score"] for row in rows]).statistic
        assert scores["st"][name] == pytest.approx(expected, abs=1e-4)
    assert scores["baseline-bm25s"].keys() == {"wiki", "again.reranking"}  # it has no embeddings


def test_hybrids_are_what_they_say(ran: SimpleNamespace) -> None:
    chosen = json.loads((ran.output / "hybrids.json").read_text())
    assert set(chosen) == {f"tiny+{other} {fusion}" for other in ("dense", "bm25") for fusion in ("rsf", "rrf")}
    scores = {name: system["scores"] for name, system in ran.summary["systems"].items()}
    predictions = {}
    for name in ("tiny", "bm25"):
        relative = ran.summary["systems"][name]["units"].replace("units/", "predictions/", 1)
        held = json.loads((ran.output / relative / "wiki_predictions.json").read_text())
        predictions[name] = held["default"]["test"]
    beir = read_beir(ran.wiki, "test")
    for fusion in ("rsf", "rrf"):
        weight = chosen[f"tiny+bm25 {fusion}"]["weight"]
        run = {}
        for query in predictions["tiny"]:
            total: dict[str, float] = {}
            for name, share in (("tiny", weight), ("bm25", 1 - weight)):
                found = predictions[name].get(query, {})
                low, high = min(found.values(), default=0), max(found.values(), default=0)
                order = sorted(found, key=lambda document, found=found: (found[document], document), reverse=True)
                for rank, document in enumerate(order, 1):
                    scaled = (found[document] - low) / (high - low) if high > low else 0.5
                    total[document] = total.get(document, 0) + share * (scaled if fusion == "rsf" else 1 / (60 + rank))
            run[query] = total
        expected = ir_measures.calc_aggregate([nDCG @ 10], {q: beir.qrels[q] for q in run}, run)[nDCG @ 10]
        assert scores[f"tiny+bm25 {fusion}"]["wiki"] == pytest.approx(expected, abs=1e-4)
        tried = chosen[f"tiny+bm25 {fusion}"]["tried"]
        assert [float(value) for value in tried] == list(GRID)
        assert tried[str(weight)] == max(tried.values())


def test_weight_one_is_the_first_member(ran: SimpleNamespace) -> None:
    systems = ran.summary["systems"]
    metas = [
        ModelMeta.create_empty({"name": systems[name]["model"], "revision": systems[name]["revision"]})
        for name in ("dense", "tiny")
    ]
    task = local_task(str(ran.wiki))
    chosen = choose(ran.output, metas, [task], "rsf")
    assert chosen.tried["1.0"] == pytest.approx(systems["dense"]["scores"]["wiki"], abs=1e-4)
    assert chosen.tried["0.0"] == pytest.approx(systems["tiny"]["scores"]["wiki"], abs=1e-4)
    assert choose(ran.output, metas, [], "rsf").weight == 0.5
    names = {hybrid(ran.output, metas, task, fusion, 0.3).mteb_model_meta.revision for fusion in ("rsf", "rrf")}
    assert len(names) == 2


def test_a_second_run_embeds_nothing(ran: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path: path.read_bytes() for path in ran.output.rglob("*.json") if "run_settings" not in path.name}
    monkeypatch.setattr(lens.LENS, "encode", lambda *_, **__: pytest.fail("texts are embedded again"))
    assert main(ran.command) == 0
    assert {path: path.read_bytes() for path in files} == files


def test_what_was_torn_or_removed_is_made_again(ran: SimpleNamespace) -> None:
    place = ran.summary["systems"]["tiny"]["units"].removeprefix("units/")
    content = units(ran, "tiny", "wiki")
    (ran.output / "units" / place / "wiki.json").write_text('{"task": ')
    torn = ran.output / "predictions" / place / "wiki_predictions.json"
    whole = json.loads(torn.read_text())
    torn.write_text('{"default": {"te')
    assert main(ran.command) == 0
    assert json.loads(torn.read_text())["default"] == whole["default"]
    assert units(ran, "tiny", "wiki")["parts"] == content["parts"]


def test_equal_systems_score_equally_whatever_ran_before(ran: SimpleNamespace, peer: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(peer, twin)
    command = ["--local", ran.local[5], ran.local[4], "--device", "cpu", "--output"]
    assert main(["--peers", str(peer), str(twin), *command, str(tmp_path / "both")]) == 0
    systems = json.loads((tmp_path / "both" / "summary.json").read_text())["systems"]
    assert systems["tiny-st"]["scores"] == systems["twin"]["scores"]
    one, two = (
        json.loads((tmp_path / "both" / system["units"] / "intents.clustering.json").read_text())["parts"]
        for system in systems.values()
    )
    assert one == two  # the same draws, so that they can be paired
    assert systems["twin"]["scores"] == {
        task: ran.summary["systems"]["st"]["scores"][task] for task in systems["twin"]["scores"]
    }


def test_data_that_changed_are_evaluated_again(ran: SimpleNamespace, tmp_path: Path) -> None:
    data, output = tmp_path / "adi", tmp_path / "out"
    shutil.copytree(need(DATA / "adi"), data)
    command = ["--baselines", "bm25", "--local", str(data), "--output", str(output)]
    assert main(command) == 0
    before = json.loads((output / "summary.json").read_text())
    qrels = data / "qrels" / "test.tsv"
    lines = qrels.read_text().splitlines()
    qrels.write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    assert main(command) == 0
    after = json.loads((output / "summary.json").read_text())
    fresh = tmp_path / "fresh"
    assert main([*command[:-1], str(fresh)]) == 0
    scores = json.loads((fresh / "summary.json").read_text())["systems"]["bm25"]["scores"]
    assert after["systems"]["bm25"]["scores"] == scores != before["systems"]["bm25"]["scores"]
    assert after["tasks"] != before["tasks"]


def test_an_aggregate_is_fused_from_its_parts(ran: SimpleNamespace, tmp_path: Path) -> None:
    parts = [local_task(str(ran.wiki)), local_task(ran.local[1])]
    whole = SimpleNamespace(is_aggregate=True, metadata=SimpleNamespace(tasks=parts))
    systems = ran.summary["systems"]
    metas = [
        ModelMeta.create_empty({"name": systems[name]["model"], "revision": systems[name]["revision"]})
        for name in ("tiny", "bm25")
    ]
    for one in parts:
        one.load_data()
        (data,) = one.dataset["default"].values()
        answers = [
            hybrid(ran.output, metas, task, "rrf", 0.5).search(
                data["queries"], top_k=10, task_metadata=one.metadata, hf_split="test", hf_subset="default"
            )
            for task in (whole, one)
        ]
        assert answers[0] == answers[1]
        assert any(answers[0].values())


def test_a_query_does_not_find_itself(ran: SimpleNamespace) -> None:
    hits = {"q": {"q": 3.0, "a": 2.0, "b": 1.0}}
    task = SimpleNamespace(ignore_identical_ids=True, skip_first_result=False)
    assert counted(task, hits) == {"q": {"a": 2.0, "b": 1.0}}
    task = SimpleNamespace(ignore_identical_ids=False, skip_first_result=True)
    assert counted(task, hits) == {"q": {"a": 2.0, "b": 1.0}}
    task = SimpleNamespace(ignore_identical_ids=False, skip_first_result=False)
    assert counted(task, hits) == hits


def test_a_task_whose_parts_cannot_be_told_keeps_its_score(
    ran: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise TypeError("odd data")

    monkeypatch.setattr("eval.units.split", fails)
    monkeypatch.setattr("eval.benchmark.explained", fails)
    command = [*ran.command[:4], "--local", str(ran.wiki), "--baselines", "bm25", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["systems"]["tiny"]["scores"] == {"wiki": ran.summary["systems"]["tiny"]["scores"]["wiki"]}
    content = json.loads((tmp_path / "out" / summary["systems"]["tiny"]["units"] / "wiki.json").read_text())
    assert content["parts"] == []
    assert content["reason"] == "TypeError: odd data"
    assert "wiki: losses are not explained: odd data" in capsys.readouterr().err


def test_hits_of_huge_tasks_are_neither_kept_nor_sought_again(
    ran: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eval.units.MOST", 3)
    output = tmp_path / "out"
    command = [*ran.command[:4], "--local", str(ran.wiki), "--baselines", "bm25", "--output", str(output)]
    command += ["--hybrids", "tiny+bm25"]
    assert main(command) == 0
    assert "wiki: too many queries, not fused" in capsys.readouterr().err
    assert not list((output / "predictions").rglob("*.json"))
    monkeypatch.setattr(lens.LENS, "encode", lambda *_, **__: pytest.fail("texts are embedded again"))
    assert main(command) == 0


def test_a_snapshot_stays_when_data_are_let_go_of(ran: SimpleNamespace) -> None:
    task = local_task(ran.local[2])
    own = task.metadata.model_copy(update={"dataset": {"path": "local/elsewhere", "revision": "1"}})
    task.metadata = own
    task.load_data()
    unload(task)
    assert not task.data_loaded
    assert task.metadata is own


def test_losses_are_explained(ran: SimpleNamespace) -> None:
    rows = json.loads((ran.output / "explained" / "wiki.json").read_text())["rows"]["tiny"]
    beir = read_beir(ran.wiki, "test")
    found = [row for other in rows.values() for row in other]
    assert found
    for other, lost in rows.items():
        mine, theirs = (
            dict(zip(one["names"], one["values"], strict=True))
            for one in (units(ran, name, "wiki")["parts"][0] for name in ("tiny", other))
        )
        worst = sorted((mine[query] - theirs[query], query) for query in mine if mine[query] < theirs[query])[:3]
        assert [row["query"] for row in lost] == [query for _, query in worst]
    model = lens.load(ran.command[1], device="cpu")
    for row in found[:4]:
        assert beir.qrels[row["query"]][row["relevant"]["document"]] > 0
        why = model.explain(row["text"], beir.corpus[row["relevant"]["document"]], 8)
        assert row["relevant"]["score"] == pytest.approx(why.score, abs=1e-4)
        assert [match[0] for match in row["relevant"]["matches"]] == [match.cluster for match in why.matches]
        if row["found"]:
            assert beir.qrels[row["query"]].get(row["found"]["document"], 0) == 0


def test_no_losses_against_itself(ran: SimpleNamespace) -> None:
    own = units(ran, "tiny", "wiki")
    assert losses(local_task(str(ran.wiki)), None, own, own, 3) == []


def test_what_is_too_large_is_not_split() -> None:
    def task(queries: int) -> Any:
        return SimpleNamespace(dataset={"default": {"test": {"queries": range(queries), "corpus": ()}}})

    assert too_many(task(200_001))
    assert not too_many(task(200_000))
    assert not too_many(SimpleNamespace(dataset={"test": [1, 2]}))
    assert not too_many(SimpleNamespace())


def test_units_of_other_data_are_not_read(ran: SimpleNamespace, tmp_path: Path) -> None:
    task = local_task(str(ran.wiki))
    system = ran.summary["systems"]["tiny"]
    meta = ModelMeta.create_empty({"name": system["model"], "revision": system["revision"]})
    assert Kept(ran.output, meta, task).content() is not None
    other = SimpleNamespace(metadata=SimpleNamespace(name="wiki", revision="another"), prediction_file_name="x")
    assert Kept(ran.output, meta, other).content() is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--hybrids", "tiny+nothing"], "no pair of these systems: tiny, bm25"),
        (["--hybrids", "tiny+tiny"], "no pair of these systems"),
        (["--dev", "WIKI"], "give --hybrids"),
        (["--hybrids", "tiny+bm25", "--dev", "STS"], "has test, of which none is called dev|weights are chosen on"),
        (["--hybrids", "tiny+bm25", "--dev", "WIKI", "WIKI"], "two --dev tasks are named 'wiki.dev'"),
        (["--peers", "./nowhere"], "no such folder"),
        (["--peers", "nobody/nothing-at-all"], "neither a folder nor to be had as a model"),
        (["--peers", "mteb/baseline-random-encodr"], "did you mean mteb/baseline-random-encoder"),
        (["--peers", "again=MODEL"], "is a LENS model: give it with --model"),
        (["--peers", "WIKI"], "no model of sentence-transformers"),
        (["--peers", "bm25=PEER"], "two systems are named 'bm25'"),
        (["--explain", "-1"], "it is a number of queries"),
        (["--peers", "BROKEN"], "broken: "),
        (["--name", "../x"], "OWNER/MODEL, of letters"),
    ],
)
def test_bad_input(
    ran: SimpleNamespace, peer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(peer, broken)
    for file in broken.rglob("*.safetensors"):
        file.write_bytes(b"garbage")
    places = {
        "BROKEN": str(broken),
        "WIKI": str(ran.wiki),
        "STS": ran.local[2],
        "MODEL": ran.command[1],
        "PEER": str(peer),
    }
    words = [re.sub("|".join(places), lambda found: places[found[0]], word) for word in given]
    command = [*ran.command[:4], "--local", str(ran.wiki), "--baselines", "bm25", "--output", str(tmp_path / "out")]
    assert main([*command, *words]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:]
    assert any(one in errors[-1] for one in message.split("|")), errors


def test_what_a_system_cannot_do_is_said(
    ran: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--baselines", "bm25", "--output", str(tmp_path / "out"), "--local", ran.local[2]]
    assert main(command) == 2
    assert "bm25 takes none of these tasks" in capsys.readouterr().err
    assert main([*command, str(ran.wiki)]) == 0
    assert "bm25 is not for sts-b" in capsys.readouterr().err


def test_a_copy_of_what_is_evaluated_is_no_dev(
    ran: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ran.wiki, copy)
    (copy / "qrels" / "test.tsv").replace(copy / "qrels" / "dev.tsv")
    command = [*ran.command[:4], "--local", str(ran.wiki), "--baselines", "bm25", "--output", str(tmp_path / "out")]
    assert main([*command, "--hybrids", "tiny+bm25", "--dev", str(copy)]) == 2
    assert "its split dev is evaluated" in capsys.readouterr().err


def test_dev_data_that_are_evaluated_are_refused(
    ran: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (ran.wiki / "qrels" / "test.tsv").rename(tmp_path / "test.tsv")  # dev is all there is, so dev is evaluated
    try:
        command = [*ran.command[:4], "--local", str(ran.wiki), "--baselines", "bm25", "--output", str(tmp_path / "out")]
        assert main([*command, "--hybrids", "tiny+bm25", "--dev", str(ran.wiki)]) == 2
    finally:
        (tmp_path / "test.tsv").rename(ran.wiki / "qrels" / "test.tsv")
    assert "its split dev is evaluated" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["SparseEncoder", "CrossEncoder"])
def test_other_kinds_of_peers(kind: str, bert: Path, bert_mlm: Path, ran: SimpleNamespace, tmp_path: Path) -> None:
    import sentence_transformers

    path = tmp_path / "peer"
    base = bert_mlm if kind == "SparseEncoder" else bert
    getattr(sentence_transformers, kind)(str(base), device="cpu").save_pretrained(str(path))
    name, system = open_peer(str(path), "cpu")
    assert name == "peer"
    assert system.mteb_model_meta.name == "local/peer"
    output = ["--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["--peers", str(path), "--local", *ran.local[:3], *output]) == 0
    scores = json.loads((tmp_path / "out" / "summary.json").read_text())["systems"]["peer"]["scores"]
    expected = {"wiki", "again.reranking", "sts-b"} if kind == "SparseEncoder" else {"again.reranking"}
    assert set(scores) == expected

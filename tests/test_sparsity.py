"""Regularisers, their warm-up and top-k masking: against naive loops and by hand, cached and on ranks."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from train_helpers import FULL, deepspeed, log_of, settings

import lens
from lens.vectors import prune
from train.config import Recipe
from train.loss import contrastive_loss
from train.run import main as train
from train.sparsity import keep_top, regulariser, warmed_up

SPLADE = {**FULL, "normalize": "false", "temperature": 1.0, "learning_rate": 1e-3, "pooling": "max"}
SPARSE = {"sparsity": "flops", "query_sparsity": 0.3, "passage_sparsity": 0.1, "sparsity_warmup_steps": 4}


@pytest.fixture
def steady(bert_mlm, tmp_path):
    """BERT with its MLM head, without dropout."""
    folder = tmp_path / "steady"
    shutil.copytree(bert_mlm, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_regularisers_equal_naive_loops():
    torch.manual_seed(0)
    embeddings = torch.randn(7, 5)
    rows = embeddings.tolist()
    flops = sum((sum(abs(row[j]) for row in rows) / 7) ** 2 for j in range(5))
    l1 = sum(sum(map(abs, row)) for row in rows) / 7
    assert float(regulariser("flops", embeddings)) == pytest.approx(flops, rel=1e-5)
    assert float(regulariser("l1", embeddings)) == pytest.approx(l1, rel=1e-5)
    leaf = embeddings.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(regulariser("flops", leaf), leaf)
    for n, j in itertools.product(range(7), range(5)):
        mean = sum(abs(row[j]) for row in rows) / 7
        assert float(gradient[n, j]) == pytest.approx(2 * mean / 7 * (1 if rows[n][j] > 0 else -1), rel=1e-4)


def test_flops_by_hand_prefers_evenly_used_dimensions():
    alike = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    spread = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert [float(regulariser("flops", x)) for x in (alike, spread)] == [4.0, 2.0]
    assert [float(regulariser("l1", x)) for x in (alike, spread)] == [2.0, 2.0]


def test_the_weight_rises_with_the_square_of_the_step():
    assert [warmed_up(0.8, step, 4) for step in (1, 2, 3, 4, 5, 100)] == pytest.approx([0.05, 0.2, 0.45, 0.8, 0.8, 0.8])
    assert warmed_up(0.8, 1, 0) == 0.8


def test_the_largest_values_stay_and_alone_get_gradients():
    embeddings = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 4.0, 6.0, 0.0]]).requires_grad_()
    kept = keep_top(embeddings, 2)
    assert kept.tolist() == [[0.0, 3.0, 2.0, 0.0], [5.0, 0.0, 6.0, 0.0]]
    kept.sum().backward()
    assert embeddings.grad.tolist() == [[0, 1, 1, 0], [1, 0, 1, 0]]
    served = prune(embeddings.detach(), None, 2, normalize=True)
    torch.testing.assert_close(keep_top(embeddings, 2, normalize=True).detach(), served)
    assert keep_top(embeddings, None) is embeddings
    assert keep_top(embeddings, 4) is embeddings


def test_margin_mse_by_hand():
    queries = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    passages = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    teacher = torch.tensor([[5.0, 2.0], [1.0, 0.0]])
    # margins: 3 - 1 = 2 against 3, and 2 - 4 = -2 against 1
    loss = contrastive_loss(queries, passages, teacher, 0.1, 0.5, 9.0, True, None, None, None, 0.0, "margin_mse")
    assert float(loss.kd) == pytest.approx((1 + 9) / 2)
    assert float(loss.total) == pytest.approx(2.5)
    # a bi-encoder's margins of all four passages; scores are 3 1 0 0 and 0 0 2 4, the positives' 3 and 2
    vectors = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [1.0], [4.0], [0.0]])
    loss = contrastive_loss(queries, passages, None, 0.1, 0.5, 9.0, True, vectors, None, None, 0.0, "margin_mse")
    wanted = [(2, 1), (3, -2), (3, 2), (2, 2), (2, 3), (-2, 4)]
    assert float(loss.kd) == pytest.approx(sum((a - b) ** 2 for a, b in wanted) / 6)


@pytest.mark.parametrize("budget", [{}, {"mini_batch_tokens": 64}])
def test_a_run_logs_the_weighted_regulariser_and_ends_sparser(budget, empty, bert_mlm, pairs, tmp_path):
    common = {**SPLADE, "head": "lexical", "save_steps": 12, "max_steps": 12, **budget}
    for name, changes in {"plain": {}, "sparse": {**SPARSE, "query_sparsity": 3.0, "passage_sparsity": 3.0}}.items():
        assert train([empty, *settings(bert_mlm, "null", pairs, tmp_path / name, **common, **changes)]) == 0
    plain, sparse = log_of(tmp_path / "plain"), log_of(tmp_path / "sparse")
    assert "sparsity" not in plain[0]
    for row in sparse:
        assert row["loss"] == pytest.approx(row["contrastive"] + row["kd"] + row["sparsity"], rel=1e-3)
    # the same batch and weights at the first step
    assert sparse[0]["contrastive"] == pytest.approx(plain[0]["contrastive"], rel=1e-4)
    assert sparse[-1]["active_per_passage"] < plain[-1]["active_per_passage"] - 1


def test_cached_and_whole_batches_learn_the_same(empty, steady, pairs, tmp_path):
    for name, changes in {"whole": {}, "cached": {"mini_batch_tokens": 64}}.items():
        arguments = {**SPLADE, **SPARSE, "query_top_k": 6, "max_steps": 3, **changes}
        assert train([empty, *settings(steady, "null", pairs, tmp_path / name, **arguments)]) == 0
    for whole, cached in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "cached"), strict=True):
        for name in ("loss", "sparsity", "grad_norm"):
            assert cached[name] == pytest.approx(whole[name], rel=1e-3)


@pytest.mark.slow
def test_two_ranks_give_the_regularisers_of_one(empty, steady, pairs, tmp_path):
    arguments = {**SPLADE, **SPARSE, "max_steps": 3}
    alone = settings(steady, "null", pairs, tmp_path / "one", **arguments)
    assert train([empty, *alone]) == 0
    both = settings(steady, "null", pairs, tmp_path / "two", **arguments, deepspeed="zero1")
    done = deepspeed(empty, both, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in ("loss", "sparsity", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": "flops"}, "sparsity=flops has no weight"),
        ({"query_sparsity": 0.1}, "need a regulariser: set sparsity to flops or l1"),
        ({"sparsity": "l2", "query_sparsity": 0.1}, "sparsity must be one of none, flops, l1"),
        ({"contrastive_weight": 0.0, "kd_weight": 0.0}, "nothing is learnt"),
        ({"passage_top_k": 0}, "passage_top_k must be at least 1, found 0"),
        ({"passage_sparsity": -0.1}, "passage_sparsity must be at least 0"),
        ({"distillation": "mse"}, "distillation must be one of kl, margin_mse"),
        ({"sparsity_warmup_steps": 5}, "sparsity_warmup_steps needs a regulariser"),
        ({"distillation": "margin_mse", "kd_weight": 0.0}, "distillation=margin_mse contradicts kd_weight=0"),
        ({"contrastive_weight": 0.0, "group_size": 1}, "contrastive_weight=0 contradicts group_size=1"),
        ({"query_encoder": "bag", "head": "dense", "pooling": "last"}, "query_encoder=bag contradicts head=dense"),
        ({"query_idf": True}, "query_idf=true contradicts query_encoder=model"),
        ({"query_idf": True, "query_encoder": "bag", "streaming": True}, "query_idf=true contradicts streaming=true"),
        ({"query_encoder": "bag", "query_top_k": 3}, "contradict query_encoder=bag: nothing of queries is learnt"),
        ({"head": "dense", "pooling": "last", "query_top_k": 5}, "query_top_k=5 contradicts head=dense"),
    ],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(base="b", data=("d",), output="o", **changes)


def test_each_option_reaches_the_loss(empty, steady, pairs, tmp_path, monkeypatch):
    seen = []
    inner = contrastive_loss

    def loss(queries, passages, *arguments):
        seen.append((queries, passages, arguments))
        return inner(queries, passages, *arguments)

    monkeypatch.setattr("train.trainer.contrastive_loss", loss)
    monkeypatch.setattr(  # 8 queries and 24 passages in a batch
        "train.trainer.regulariser", lambda kind, rows: torch.tensor({8: 1.0, 24: 100.0}[len(rows)]) + len(kind)
    )
    weights = {"sparsity": "l1", "query_sparsity": 0.5, "passage_sparsity": 0.25, "sparsity_warmup_steps": 3}
    options = {"passage_top_k": 7, "query_top_k": 5, "distillation": "margin_mse", "contrastive_weight": 0.125}
    arguments = {**SPLADE, **weights, **options, "max_steps": 4, "gradient_accumulation": 2}
    assert train([empty, *settings(steady, "null", pairs, tmp_path / "run", **arguments)]) == 0
    for queries, passages, given in seen:
        assert (int((queries > 0).sum(1).max()), int((passages > 0).sum(1).max())) == (5, 7)
        assert given[-2:] == (0.125, "margin_mse")
    assert len(seen) == 8
    for step, row in enumerate(log_of(tmp_path / "run"), 1):
        assert row["sparsity"] == pytest.approx((0.5 * 3 + 0.25 * 102) * min(step / 3, 1) ** 2, rel=1e-5)


def test_distilling_alone_needs_teacher_scores(empty, steady, pairs, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    data = tmp_path / "unscored.jsonl"
    data.write_text("".join(json.dumps({**row, "pos_scores": None, "neg_scores": None}) + "\n" for row in rows))
    arguments = {**SPLADE, "distillation": "margin_mse", "contrastive_weight": 0.0}
    assert train([empty, *settings(steady, "null", data, tmp_path / "run", **arguments)]) == 2
    assert "leaves a batch without teacher scores nothing to learn: score the data" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, {"mini_batch_tokens": 64}, {"query_idf": "true"}])
def test_queries_as_bags_are_learnt_against(changes, empty, steady, pairs, tmp_path):
    output = tmp_path / "run"
    arguments = {**SPLADE, "query_encoder": "bag", "sparsity": "flops", "passage_sparsity": 0.1, "max_steps": 4}
    assert train([empty, *settings(steady, "null", pairs, output, **{**arguments, **changes})]) == 0
    model = lens.load(output, device="cpu")
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    bags = [set(model.tokenizer(row["query"], add_special_tokens=False)["input_ids"]) for row in rows]
    found = model.encode_queries([row["query"] for row in rows])
    if "query_idf" in changes:
        texts = {text for row in rows for text in (*row["pos"], *row["neg"])}
        seen = Counter(
            token for text in texts for token in set(model.tokenizer(text, add_special_tokens=False)["input_ids"])
        )
        worth = {
            token: math.log1p((len(texts) - seen[token] + 0.5) / (seen[token] + 0.5)) for bag in bags for token in bag
        }
    else:
        worth = dict.fromkeys((token for bag in bags for token in bag), 1.0)
    for bag, row in zip(bags, found, strict=True):
        assert set(row.nonzero()[0]) == bag
        assert all(row[token] == pytest.approx(worth[token], rel=1e-5) for token in bag)
    log = log_of(output)
    assert log[-1]["contrastive"] != log[0]["contrastive"]


def test_bags_of_cached_and_whole_batches_learn_the_same(empty, steady, pairs, tmp_path):
    arguments = {**SPLADE, "query_encoder": "bag", "max_steps": 3}
    for name, changes in {"whole": {}, "cached": {"mini_batch_tokens": 64}}.items():
        assert train([empty, *settings(steady, "null", pairs, tmp_path / name, **arguments, **changes)]) == 0
    for whole, cached in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "cached"), strict=True):
        for name in ("loss", "grad_norm", "active_per_query"):
            assert cached[name] == pytest.approx(whole[name], rel=1e-3)


def test_states_of_bags_are_not_computed(empty, bert, bert_clusters, pairs, tmp_path):
    arguments = {"backbone": "frozen", "transform": "residual", "train_head": "true", "query_encoder": "bag"}
    assert train([empty, *settings(bert, bert_clusters, pairs, tmp_path / "run", max_steps=2, **arguments)]) == 0
    model = lens.load(tmp_path / "run", device="cpu")
    (row,) = model.encode_queries(["fox dog"])
    labels = model.model.head.labels
    ids = model.tokenizer("fox dog", add_special_tokens=False)["input_ids"]
    assert set(row.nonzero()[0]) == {int(labels[token]) for token in ids}
    assert len(set(row[row > 0])) == 1  # of unit length

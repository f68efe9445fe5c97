"""The loss against naive loops, and its gradients on several ranks against one."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from train.loss import contrastive_loss


def naive(queries, passages, teacher, temperature, kd_weight, kd_temperature, in_batch):
    """Both parts by plain Python."""
    group = len(passages) // len(queries)
    contrastive, kd, right = 0.0, 0.0, 0
    for i, query in enumerate(queries):
        pool = range(len(passages)) if in_batch else range(i * group, (i + 1) * group)
        scores = {j: float(query @ passages[j]) / temperature for j in pool}
        total = sum(math.exp(score) for score in scores.values())
        contrastive -= math.log(math.exp(scores[i * group]) / total)
        right += max(scores, key=scores.get) == i * group
        own = [float(query @ passages[i * group + p]) / temperature for p in range(group)]
        student = [math.exp(s) / sum(map(math.exp, own)) for s in own]
        if teacher is not None:
            wanted = [math.exp(float(t) / kd_temperature) for t in teacher[i]]
            for t, s in zip(wanted, student, strict=True):
                kd += t / sum(wanted) * math.log(t / sum(wanted) / s)
    n = len(queries)
    return contrastive / n + kd_weight * kd / n, contrastive / n, kd / n, right / n


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_equals_naive_loop(in_batch, with_teacher):
    torch.manual_seed(0)
    queries, passages = torch.randn(5, 8), torch.randn(20, 8)
    teacher = torch.randn(5, 4) if with_teacher else None
    loss = contrastive_loss(queries, passages, teacher, 0.7, 0.3, 0.9, in_batch)
    expected = naive(queries, passages, teacher, 0.7, 0.3, 0.9, in_batch)
    for found, wanted in zip((loss.total, loss.contrastive, loss.kd, loss.accuracy), expected, strict=True):
        assert float(found) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("in_batch", [True, False])
def test_teacher_embeddings_score_every_passage(in_batch):
    torch.manual_seed(2)
    queries, passages = torch.randn(3, 8), torch.randn(6, 8)
    wanted, known = torch.randn(3, 4), torch.randn(6, 4)
    loss = contrastive_loss(queries, passages, None, 0.7, 0.3, 0.9, in_batch, (wanted, known))
    kd = 0.0
    for i in range(3):
        pool = range(6) if in_batch else range(2 * i, 2 * i + 2)
        teacher = [math.exp(float(wanted[i] @ known[j]) / 0.9) for j in pool]
        student = [math.exp(float(queries[i] @ passages[j]) / 0.7) for j in pool]
        for t, s in zip(teacher, student, strict=True):
            kd += t / sum(teacher) * math.log(t / sum(teacher) / (s / sum(student)))
    assert float(loss.kd) == pytest.approx(kd / 3, rel=1e-4)
    assert float(loss.total) == pytest.approx(float(loss.contrastive) + 0.3 * kd / 3, rel=1e-4)


def masked(queries, passages, allowed, known, group, in_batch, teacher):
    """Both parts by plain Python: `allowed(i, j)` says whether passage j is no false negative of query i, and
    `teacher(i, j)` is its score, over the passages of `known(i)`."""
    n = len(queries)
    contrastive = kd = torch.zeros(())
    for i in range(n):
        own = range(i * group, (i + 1) * group)
        student = {j: torch.exp(queries[i] @ passages[j] / 0.7) for j in range(len(passages))}
        pool = [j for j in (range(len(passages)) if in_batch else own) if j == i * group or allowed(i, j)]
        contrastive = contrastive - torch.log(student[i * group] / sum(student[j] for j in pool)) / n
        marks = {j: math.exp(teacher(i, j) / 0.9) for j in known(i)}
        for j, mark in marks.items():  # every passage, false negative or not
            t = mark / sum(marks.values())
            kd = kd + t * torch.log(t / (student[j] / sum(student[k] for k in marks))) / n
    return contrastive, kd


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("with_vectors", [True, False])
@pytest.mark.parametrize("margin", [None, 0.0, -0.4, 0.6])
def test_false_negatives_leave_the_denominator_and_distillation_sees_them(in_batch, with_vectors, margin):
    torch.manual_seed(4)
    queries, passages, group = torch.randn(4, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True), 3
    names = [10, 11, 12, 20, 11, 10, 30, 31, 30, 40, 41, 20]  # 30 repeats its own positive, 10 and 20 others'
    excepted = [[10, -1, 1], [20, -1, 41], [30, 12, 3], [40, -1, 41]]  # positives, padding, the query itself
    scores = torch.randn(4, 3)
    vectors = (torch.randn(4, 5), torch.randn(12, 5)) if with_vectors else None

    def teacher(i, j):
        return float(vectors[0][i] @ vectors[1][j]) if with_vectors else float(scores[i, j - i * group])

    def known(i):
        return range(12) if with_vectors and in_batch else range(i * group, (i + 1) * group)

    def allowed(i, j):
        above = margin is not None and j in known(i) and teacher(i, j) > teacher(i, i * group) + margin
        return names[j] not in excepted[i] and not above

    keys = (torch.tensor(excepted), torch.tensor(names))
    loss = contrastive_loss(
        queries, passages, None if with_vectors else scores, 0.7, 0.3, 0.9, in_batch, vectors, keys, margin
    )
    contrastive, kd = masked(queries, passages, allowed, known, group, in_batch, teacher)
    torch.testing.assert_close(loss.contrastive, contrastive.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.kd, kd.detach(), rtol=1e-4, atol=1e-6)
    found = torch.autograd.grad(loss.total, (queries, passages))
    for one, other in zip(found, torch.autograd.grad(contrastive + 0.3 * kd, (queries, passages)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    plain = contrastive_loss(queries, passages, None if with_vectors else scores, 0.7, 0.3, 0.9, in_batch, vectors)
    assert float(plain.contrastive) > float(loss.contrastive) + 1e-3  # the case masks something
    assert float(plain.kd) == pytest.approx(float(loss.kd))


def test_a_query_whose_negatives_are_all_false_has_no_contrastive_loss():
    queries, passages = torch.randn(1, 4, requires_grad=True), torch.randn(3, 4)
    loss = contrastive_loss(queries, passages, torch.tensor([[0.0, 1.0, 2.0]]), 1, 0, 1, True, teacher_margin=0.0)
    loss.total.backward()
    assert float(loss.contrastive) == 0
    assert torch.equal(queries.grad, torch.zeros(1, 4))


def test_weight_zero_and_single_passages_switch_distillation_off():
    queries, passages = torch.randn(4, 8), torch.randn(4, 8)
    assert float(contrastive_loss(queries, passages, torch.ones(4, 1), 1, 1, 1, True).kd) == 0
    passages = torch.randn(8, 8)
    assert float(contrastive_loss(queries, passages, torch.randn(4, 2), 1, 0, 1, True).kd) == 0


def test_misfits_are_named():
    with pytest.raises(ValueError, match="7 passages cannot be shared out among 2 queries"):
        contrastive_loss(torch.zeros(2, 3), torch.zeros(7, 3), None, 1, 1, 1, True)
    with pytest.raises(ValueError, match="do not fit"):
        contrastive_loss(torch.zeros(2, 3), torch.zeros(6, 3), torch.zeros(2, 2), 1, 1, 1, True)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def gradients(world_size, tmp_path):
    output = tmp_path / f"gradients-{world_size}.pt"
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": str(world_size), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "tests" / "ranks.py", output], env={**environment, "RANK": str(rank)}, cwd=ROOT
        )
        for rank in range(world_size)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0] * world_size
    return torch.load(output, weights_only=True)


@pytest.mark.slow
def test_gradients_are_equal_for_one_two_and_four_ranks(tmp_path):
    alone = gradients(1, tmp_path)
    assert max(float(gradient.abs().max()) for gradient in alone.values()) > 1e-3
    for world_size in (2, 4):
        for name, gradient in gradients(world_size, tmp_path).items():
            torch.testing.assert_close(gradient, alone[name], rtol=1e-4, atol=1e-6)

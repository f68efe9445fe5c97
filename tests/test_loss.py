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


@pytest.mark.parametrize("taught", [True, False])
def test_a_passage_that_is_also_ones_own_positive_is_no_negative(taught):
    torch.manual_seed(3)
    queries, passages = torch.randn(3, 8), torch.randn(6, 8)
    vectors = (torch.randn(3, 4), torch.randn(6, 4)) if taught else None
    positives = torch.tensor([[10, -1], [12, 14], [14, -1]])
    names = torch.tensor([10, 11, 12, 13, 14, 10])  # the last one repeats query 0's positive; 14 is query 1's other
    loss = contrastive_loss(queries, passages, None, 0.7, 0.3, 0.9, True, vectors, (positives, names))
    allowed = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]
    contrastive = kd = 0.0
    for i, pool in enumerate(allowed):
        student = {j: math.exp(float(queries[i] @ passages[j]) / 0.7) for j in pool}
        contrastive -= math.log(student[2 * i] / sum(student.values())) / 3
        if taught:
            teacher = {j: math.exp(float(vectors[0][i] @ vectors[1][j]) / 0.9) for j in pool}
            for j in pool:
                t = teacher[j] / sum(teacher.values())
                kd += t * math.log(t / (student[j] / sum(student.values()))) / 3
    assert float(loss.contrastive) == pytest.approx(contrastive, rel=1e-4)
    assert float(loss.kd) == pytest.approx(kd, rel=1e-4)


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

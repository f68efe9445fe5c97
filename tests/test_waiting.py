"""No step on packed texts waits for a GPU: on torch's meta device, whose tensors have no values, asking for one raises.

Padded batches wait once a pass, because transformers looks whether a mask holds any padding.
"""

from __future__ import annotations

import pytest
import torch
from accelerate.utils import send_to_device
from test_step import examples
from torch.utils._pytree import tree_map

from lens.config import LensConfig
from lens.head import LexicalHead
from lens.packed import packing_limit
from lens.text import TextProcessor
from train.build import build
from train.config import Recipe
from train.data import Batches
from train.loss import contrastive_loss
from train.progress import Stopping
from train.sampler import Schedule
from train.step import QueryPassageModel
from train.watch import Watch

META = torch.device("meta")


def test_the_meta_device_tells_when_a_value_is_asked_for():
    values = torch.ones(3, device=META)
    for ask in (bool, torch.nonzero, lambda tensor: tensor[tensor > 0], torch.Tensor.tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask(values.sum() if ask is bool else values)


@pytest.fixture
def triton(monkeypatch):
    """The head's kernels, whose results have a shape on the meta device too; it knows no autocast."""
    pytest.importorskip("triton", reason="the head on a GPU needs triton")
    monkeypatch.setattr("lens.head.choose", lambda backend, hidden: "triton")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.mark.parametrize("budget", [None, 60])
@pytest.mark.parametrize("folder", ["mistral", "bert"])
def test_a_training_step_never_waits(folder, budget, request, triton):
    path, clusters = request.getfixturevalue(folder), request.getfixturevalue(f"{folder}_clusters")
    how = {"backbone": "lora", "lora_r": 4} if folder == "mistral" else {"backbone": "full", "transform": "context"}
    recipe = Recipe(
        base=str(path), data=("none",), output="none", clusters=str(clusters), batch_size=6, group_size=3,
        train_head=True, gradient_checkpointing=folder == "mistral", **how,
    )  # fmt: skip
    model, tokenizer = build(recipe)
    assert packing_limit(model.backbone) > 0  # probed on the CPU, where values are
    text = TextProcessor(tokenizer, model.config)
    source = Batches([examples()], Schedule([6], 6, 1, 1), text, 3, mini_batch_tokens=budget, packed=True)
    batch = tree_map(lambda value: value.to(META) if isinstance(value, torch.Tensor) else value, source[0])
    wrapped = QueryPassageModel(model).to(META).train()
    watch = Watch(wrapped)
    for _ in range(2):
        queries, passages = wrapped(batch["queries"], batch["passages"], batch["mini_batches"])
        loss = contrastive_loss(
            queries, passages, batch["teacher"], 0.1, 0.5, 1.0, True, keys=batch["keys"], teacher_margin=0.1
        )
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        watch.count(loss, queries.detach(), passages.detach(), batch)
    assert loss.total.device == META
    assert all(p.grad is not None and p.grad.device == META for p in wrapped.parameters() if p.requires_grad)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [None, 60])
def test_a_step_on_a_gpu_never_waits(budget, mistral, mistral_clusters, monkeypatch):
    device = torch.device("cuda")
    recipe = Recipe(
        base=str(mistral), data=("none",), output="none", clusters=str(mistral_clusters), batch_size=6, group_size=3,
        backbone="lora", lora_r=4, train_head=True, device="cuda", precision="bf16",
    )  # fmt: skip
    model, tokenizer = build(recipe)
    packing_limit(model.backbone)
    text = TextProcessor(tokenizer, model.config)
    batch = Batches([examples()], Schedule([6], 6, 1, 1), text, 3, mini_batch_tokens=budget, packed=True)[0]
    pinned = tree_map(lambda value: value.pin_memory() if isinstance(value, torch.Tensor) else value, batch)
    wrapped = QueryPassageModel(model).to(device).train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    watch, stopping = Watch(wrapped), Stopping()
    monkeypatch.setattr("train.progress.dist.all_reduce", lambda *_: None)

    def step():
        inputs = send_to_device(pinned, device, non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16):
            queries, passages = wrapped(inputs["queries"], inputs["passages"], inputs["mini_batches"])
            loss = contrastive_loss(queries, passages, inputs["teacher"], 0.1, 0.5, 1.0, True, keys=inputs["keys"])
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.count(loss, queries.detach(), passages.detach(), inputs)
        stopping._asked_anywhere(device)

    step()  # compiles and tunes
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "settings", [{"head": "dense", "pooling": "last"}, {"transform": "context"}, {"pooling": "sum"}]
)
def test_heads_never_wait(settings, triton):
    config = LensConfig(dimensions=4 if "head" in settings else 6, hidden_size=4, base="none", **settings)
    head = LexicalHead(config, torch.zeros(9)).to(META)
    hidden = torch.empty(7, 4, device=META, requires_grad=True)
    embeddings = head(hidden, cu_seqlens=torch.empty(4, dtype=torch.long, device=META))
    embeddings.sum().backward()
    assert embeddings.shape == (3, 4 if "head" in settings else 6)
    assert hidden.grad.shape == hidden.shape

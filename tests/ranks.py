"""Run by test_loss.py in several processes: gradients of the loss on this rank's share of a fixed batch."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from train.loss import contrastive_loss
from train.sparsity import regulariser


def main(output: str) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(8, 6, generator=generator)
    passages = torch.randn(24, 6, generator=generator)
    teacher = torch.randn(8, 3, generator=generator)
    torch.manual_seed(1)
    layer: torch.nn.Module = torch.nn.Linear(6, 5)
    wrapped = DistributedDataParallel(layer) if world_size > 1 else layer
    share = 8 // world_size
    mine = slice(rank * share, (rank + 1) * share)
    both = wrapped(torch.cat([queries[mine], passages[rank * share * 3 : (rank + 1) * share * 3]]))
    loss = contrastive_loss(both[:share], both[share:], teacher[mine], 0.5, 0.7, 1.3, in_batch=True)
    names = torch.arange(24) % 20  # four passages repeat the text of others
    keys = (names.view(8, 3)[mine, :1], names[rank * share * 3 :][: share * 3])
    vectors = (queries[mine], passages[rank * share * 3 :][: share * 3])
    masks = {"keys": keys, "teacher_margin": 0.1}
    scored = contrastive_loss(both[:share], both[share:], teacher[mine], 0.5, 0.7, 1.3, True, **masks)
    taught = contrastive_loss(both[:share], both[share:], None, 0.5, 0.7, 1.3, True, vectors, **masks)
    margins = {"distillation": "margin_mse", "contrastive_weight": 0.2}
    squared = contrastive_loss(both[:share], both[share:], teacher[mine], 0.5, 0.7, 1.3, True, **margins)
    every = contrastive_loss(both[:share], both[share:], None, 0.5, 0.7, 1.3, True, vectors, **margins)
    sparse = regulariser("flops", both[:share]) + regulariser("l1", both[share:])
    (loss.total + scored.total + taught.total + squared.total + every.total + sparse).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in layer.named_parameters()}, output)
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
        # gloo's threads may still let go of tensors, which now and then aborts an interpreter that is finalising.
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])

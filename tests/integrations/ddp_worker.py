"""Run by torchrun in test_ddp.py: each rank trains on its half of a batch; rank 0 saves the averaged gradients."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 2


def network() -> nn.Module:
    """No BatchNorm: its statistics are those of each rank's own half."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 6, 1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def joined_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 12, 12, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def main(backend: str, path: str) -> None:
    from convgrad_export.integrations import compile_backend

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = DistributedDataParallel(network())
    compiled = torch.compile(model, backend=getattr(compile_backend, backend))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        x, target = joined_batch(step)
        mine = slice(4 * rank, 4 * rank + 4)
        optimizer.zero_grad()
        F.cross_entropy(compiled(x[mine]), target[mine]).backward()
        optimizer.step()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # DistributedDataParallel keeps its process group alive beyond destroy_process_group and beyond its own deletion
    # (torch 2.13: two pt_gloo_runloop threads are left, none without DDP). An interpreter that is torn down under them
    # ends in std::terminate now and then. The work is done and synchronised here, so leave without the teardown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

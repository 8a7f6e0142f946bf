"""One of two gloo processes that train under control."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cheapgrad
from cheapgrad.sketch import RowSample


def main(rank: int, store_file: str) -> None:
    """Train on data of its own; an exception is the failure."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store_file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(0.5)), skip_small=False)
    controller = cheapgrad.Controller(handle, noise=0.1)
    parallel = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(6):
        x, direction = (torch.randn(32, size, generator=generator) for size in (16, 4))
        # Batches as different as can be: on its own each process would choose another budget.
        weight = torch.rand(32, 1, generator=generator) ** (1 + 4 * rank)
        (weight * direction * parallel(x)).mean().backward()
        controller.step()
    chosen: list[object] = [None, None]
    torch.distributed.all_gather_object(chosen, (controller.keeps, controller.history))
    assert chosen[0] == chosen[1]
    assert controller.keep != 0.5
    assert controller.state_dict()["totals"][0] > 6


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

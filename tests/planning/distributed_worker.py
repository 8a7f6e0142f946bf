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
    in_force: list[dict[str, float]] = []
    for _ in range(6):
        # Batches as different as can be: on its own each process would choose another budget, of other numbers of rows.
        examples = 32 - 12 * rank
        x, direction = (torch.randn(examples, size, generator=generator) for size in (16, 4))
        weight = torch.rand(examples, 1, generator=generator) ** (1 + 4 * rank)
        (weight * direction * parallel(x)).mean().backward()
        controller.step()
        in_force.append({name: strategy.keep for name, strategy in handle.strategies().items()})
    rounded: list[object] = [None, None]
    torch.distributed.all_gather_object(rounded, in_force)
    assert rounded[0] == rounded[1]
    # Whole numbers of the mean of 32 and 20 rows.
    assert all(abs(26 * keep - round(26 * keep)) < 1e-9 for keeps in in_force for keep in (keeps["0"], keeps["2"]))
    chosen: list[object] = [None, None]
    torch.distributed.all_gather_object(chosen, (controller.keeps, controller.history))
    assert chosen[0] == chosen[1]
    assert controller.keep != 0.5
    assert controller.state_dict()["totals"][0] > 6
    # Without an orderly end a thread of gloo may outlive the process, which then aborts.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

"""One of two gloo processes that train under control."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cheapgrad
from cheapgrad.sketch import RowSample
from tests.planning.controlled import (
    make_batch,
    mean_loss,
    measure_between_trials,
    measure_noise,
    set_up,
)

TARGET = 0.5


def main(rank: int, store_file: str) -> None:
    """Train on data of its own; an exception is the failure."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store_file}", rank=rank, world_size=2)
    check_budgets_are_equal(rank)
    check_noise_is_kept(rank)
    # Without an orderly end a thread of gloo may outlive the process, which then aborts.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def check_budgets_are_equal(rank: int) -> None:
    """Train on batches of other sizes than the other process."""
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


def check_noise_is_kept(rank: int) -> None:
    """Measure the noise of the gradient that both processes have in the end, the mean of theirs."""
    model, handle, controller = set_up(keep=0.5, noise=TARGET, every=2)
    # Rows are drawn apart.
    torch.manual_seed(rank)
    parallel = DistributedDataParallel(model)
    generator, noises = torch.Generator().manual_seed(rank), []

    def share(gradient: Tensor) -> Tensor:
        torch.distributed.all_reduce(gradient)
        return gradient / 2

    def measure() -> float:
        return measure_noise(model, handle, seed=99 + rank, share=share, batches=30, draws=2)

    for step in range(1, 72):
        mean_loss(parallel, make_batch(generator)).backward()
        controller.step()
        if step % 10 == 1 and step > 40:
            noises.append(measure_between_trials(handle, controller.keeps, measure))
    assert abs(sum(noises) / len(noises) / TARGET - 1) < 0.2, noises
    # The start is far off: a controller that does nothing fails.
    start = measure_between_trials(handle, dict.fromkeys(controller.keeps, 0.5), measure)
    assert abs(start / TARGET - 1) > 0.4, start


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

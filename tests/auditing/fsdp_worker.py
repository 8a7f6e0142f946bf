"""One of two gloo processes that audit a model whose parameters are shared out between them (FSDP2).

Usage: ``python -m tests.auditing.fsdp_worker RANK STORE_FILE``
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import cheapgrad
from cheapgrad import audit
from cheapgrad.sketch import RowSample
from tests.auditing import planted
from tests.auditing.planted import make_batch, make_even_optimizer, make_network, mean_loss, right_loss

WORLD_SIZE = 2


def _shard(model: nn.Sequential) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    fully_shard(model[3], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _make_sketched() -> nn.Sequential:
    model = make_network(planted.exact)
    model[3] = nn.Linear(planted.H, planted.H)
    cheapgrad.approximate(model, cheapgrad.Rule("*", cotangent=RowSample(keep=0.5)), skip_small=False)
    return model


def _averaged_squared_norm(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Return the squared norm of the exact gradient, averaged over processes, of a model that is not shared out."""
    with cheapgrad.get_handle(model).exact():
        gradients = torch.autograd.grad(mean_loss(model, batch), list(model.parameters()))
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)
    return sum(float((gradient / WORLD_SIZE).square().sum()) for gradient in gradients)


def main(rank: int, store_file: str) -> None:
    """Run the audits; an exception is the failure."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store_file}", rank=rank, world_size=WORLD_SIZE)
    world = torch.distributed.group.WORLD
    batch = make_batch(seed=rank)
    sketched = _make_sketched()
    squared_norm = _averaged_squared_norm(sketched, batch)
    model = _shard(sketched)
    report = audit(model, mean_loss, batch, group=world, optimizer=make_even_optimizer(model))
    assert report.unbiased
    # Second moments are shared out too.
    assert abs(report.preconditioned_noise_fraction / report.noise_fraction - 1) < 1e-3
    # Averaged before anybody sees it: the same draws everywhere, which count once; of whole parameters, not of shards.
    assert (report.draws, report.processes) == (64, 1)
    assert abs(report.squared_norm / squared_norm - 1) < 1e-4
    assert report.layer("3.weight").coordinates == planted.H**2
    assert report.relative_variance > 0.1
    _assert_left_as_it_was(sketched)

    for backward, draws in ((planted.one_percent_too_long, 8), (planted.sampled_rows(weighted=False), 64)):
        model = _shard(make_network(backward))
        wrong = audit(model, mean_loss, batch, reference=right_loss, group=world, draws=draws)
        assert [layer.name for layer in wrong.biased_layers] == ["3.weight"]
    right = audit(_shard(make_network(planted.sampled_rows())), mean_loss, batch, reference=right_loss, group=world)
    assert right.unbiased
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _assert_left_as_it_was(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.grad is None


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

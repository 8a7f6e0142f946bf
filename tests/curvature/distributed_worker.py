"""One of two gloo processes, each with batches of its own; the first compares with one process that has them all."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from cheapgrad.curvature import BatchReader, Draws, GaussNewton, Hessian, MonteCarloFisher, top_eigenpairs
from cheapgrad.errors import BatchError, OperandError


def _make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def main(rank: int, store_file: str) -> None:
    """Run the comparisons; an exception is the failure."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store_file}", rank=rank, world_size=2)
    model, loss = _make_model(), nn.CrossEntropyLoss()
    x, y = torch.randn(11, 3, dtype=torch.float64), torch.arange(11) % 2
    # Unequal numbers of examples: 1 + 3 on the first process, 2 + 5 on the second.
    pieces = list(zip(x.split([1, 3, 2, 5]), y.split([1, 3, 2, 5]), strict=True))
    own = pieces[:2] if rank == 0 else pieces[2:]
    columns = torch.randn(26, 2, dtype=torch.float64)
    reader = BatchReader(process_group=torch.distributed.group.WORLD)
    for kind in (Hessian, GaussNewton):
        shared, whole = kind(model, loss, own, reader=reader), kind(model, loss, (x, y))
        torch.testing.assert_close(shared @ columns, whole @ columns, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(shared.gradient(), whole.gradient(), rtol=1e-12, atol=1e-14)
        assert abs(shared.loss() - whole.loss()) < 1e-14
        assert shared.example_count == 11
        parts = shared.micro_batches
        assert [part.example_count for part in parts] == [3, 8]
        mean = sum(part.weight * (part.operator @ columns) for part in parts)
        torch.testing.assert_close(mean, whole @ columns, rtol=1e-12, atol=1e-14)
    with pytest.raises(BatchError, match="from 1 to 2 batches, this one"):
        _ = Hessian(model, loss, own[: 1 + rank], reader=reader).micro_batches
    fisher = MonteCarloFisher(model, loss, own, reader=reader, draws=Draws(3))
    product = fisher @ columns
    torch.testing.assert_close(fisher @ columns, product, rtol=0, atol=0)
    everyone = [torch.empty_like(product) for _ in range(2)]
    torch.distributed.all_gather(everyone, product)
    assert torch.equal(everyone[0], everyone[1])
    # Equal seeds on all processes make equal iterations.
    values = top_eigenpairs(Hessian(model, loss, own, reader=reader), 2).values
    truth = torch.linalg.eigvalsh(Hessian(model, loss, (x, y)).to_dense()).flip(0)[:2]
    torch.testing.assert_close(values, truth, rtol=1e-8, atol=1e-10)
    with pytest.raises(OperandError, match="the 2 processes of the group multiply different operands"):
        Hessian(model, loss, own, reader=reader) @ (columns + rank)
    # A process that ends while another one still talks to it takes that one down.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

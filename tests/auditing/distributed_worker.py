"""One of two gloo processes that audit together."""

from __future__ import annotations

import sys

import torch
from torch.nn.parallel import DistributedDataParallel

import cheapgrad
from cheapgrad import audit, audit_step
from cheapgrad.sketch import RowSample
from tests.auditing import planted
from tests.auditing.planted import make_batch, make_even_optimizer, make_network, mean_loss, right_loss


def main(rank: int, store_file: str) -> None:
    """Run the audits; an exception is the failure."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store_file}", rank=rank, world_size=2)
    world = torch.distributed.group.WORLD
    # Every process has data of its own.
    batch = make_batch(seed=rank)
    model = make_network(planted.noisy(0.3))
    optimizer = make_even_optimizer(model)
    pooled = audit(model, mean_loss, batch, reference=right_loss, group=world, optimizer=optimizer)
    assert pooled.unbiased
    # Its two parts are averaged over the processes, as those of the other figure are.
    assert abs(pooled.preconditioned_noise_fraction / pooled.noise_fraction - 1) < 1e-3
    assert (pooled.draws, pooled.processes) == (128, 2)
    _assert_same_everywhere(pooled)
    alone = audit(model, mean_loss, batch, reference=right_loss)
    assert (alone.draws, alone.processes) == (64, 1)
    # Twice the draws show biases smaller by the square root of two.
    assert (
        0.55
        < pooled.layer("3.weight").detectable_relative_bias / alone.layer("3.weight").detectable_relative_bias
        < 0.85
    )

    # A mistake on one process only is found by both.
    backward = planted.one_percent_too_long if rank == 1 else planted.exact
    one_wrong = audit(make_network(backward), mean_loss, batch, reference=right_loss, group=world, draws=8)
    assert [layer.name for layer in one_wrong.biased_layers] == ["3.weight"]
    assert (one_wrong.draws, one_wrong.confirmed) == (32, True)
    _assert_same_everywhere(one_wrong)

    # DDP averages gradients before anybody can see them: the draws are the same everywhere, and count once.
    converted = make_network(planted.exact)
    converted[3] = torch.nn.Linear(planted.H, planted.H)
    for parameter in converted.parameters():
        torch.distributed.broadcast(parameter.data, 0)
    cheapgrad.approximate(converted, cheapgrad.Rule("*", cotangent=RowSample(keep=0.5)), skip_small=False)
    averaged = audit(DistributedDataParallel(converted), mean_loss, batch, group=world)
    assert averaged.unbiased
    assert (averaged.draws, averaged.processes) == (64, 1)
    _assert_same_everywhere(averaged)
    local = audit(converted, mean_loss, batch, group=world)
    ratio = (averaged.relative_variance * averaged.squared_norm) / (local.relative_variance * local.squared_norm)
    # Independent sketches: averaging over two processes halves the variance.
    assert 0.3 < ratio < 0.75, ratio

    # A loop that sums over processes where it should average.
    def sums() -> None:
        mean_loss(converted, batch).backward()
        for parameter in converted.parameters():
            torch.distributed.all_reduce(parameter.grad)

    def reference(model, batch):
        gradients = torch.autograd.grad(right_loss(model, batch), list(model.parameters()))
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
        return [gradient / 2 for gradient in gradients]

    with cheapgrad.get_handle(converted).exact():
        summed = audit_step(converted, mean_loss, batch, sums, reference=reference, group=world, draws=8, split=False)
    assert not summed.unbiased
    assert "2 times its length: not divided?" in summed.verdict()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _assert_same_everywhere(report: cheapgrad.AuditReport) -> None:
    everyone = [None, None]
    torch.distributed.all_gather_object(
        everyone, (report.unbiased, report.max_abs_z, report.relative_variance, report.preconditioned_noise_fraction)
    )
    assert everyone[0] == everyone[1], everyone


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

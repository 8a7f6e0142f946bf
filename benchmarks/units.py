"""Plans with and without the optimizer: noise as predicted, and as drawn, plain and in units of its steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import cheapgrad
from benchmarks.experiments.methods import EXACT
from benchmarks.experiments.preparing import Batch, Prepared
from benchmarks.experiments.settings import make_tasks
from benchmarks.experiments.tasks import Task
from benchmarks.experiments.training import draw_batches, make_optimizer, take_exact_step
from cheapgrad.auditing.preconditioned_noise import read_second_moments
from cheapgrad.planning.units import optimizer_units

_FLOPS = 0.6
# Of a training: noise is looked at while the weights still move.
_SHARE = 0.3
_RATE = 1e-3
_BATCHES = 8


def measure_units(*, data: Path | None, draws: int) -> Iterator[dict[str, Any]]:
    """Yield one record for each network and plan; networks without a linear layer to plan for are left out.

    Args:
        data: as for ``python -m benchmarks.experiments``; None for the digits.
        draws: of the gradient of each batch.
    """
    for task in make_tasks(() if data is None else (data,)):
        if any(isinstance(module, nn.Conv2d) for module in task.build_seeded(0).modules()):
            continue
        steps = max(1, round(_SHARE * task.steps))
        model, optimizer, batches = train_exactly(task, steps)
        planned = list(itertools.islice(batches, _BATCHES))
        for given in (None, optimizer):
            plan = cheapgrad.plan(
                model,
                lambda network, batch, task=task: task.compute_loss(network, *batch),
                planned,
                flops=_FLOPS,
                skip_small=task.skip_small,
                optimizer=given,
            )
            record = {"benchmark": "units", "network": f"{task.name}, {steps} steps", "optimizer": given is not None}
            record |= {"backward_flops_fraction": plan.backward_flops_fraction}
            drawn = _Drawn.of(task, model, plan, planned, draws).weigh(model, optimizer)
            yield record | {"predicted": plan.predicted.noise_fraction} | drawn


def train_exactly(task: Task, steps: int) -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Batch]]:
    """Return a model after some steps of AdamW at a constant rate, its optimizer, and the batches that come next."""
    model = task.build_seeded(0)
    optimizer = make_optimizer(model, _RATE)
    batches = draw_batches(task, task.batch_size, seed=0)
    for batch in track(itertools.islice(batches, steps), "training exactly", steps, transient=True):
        take_exact_step(task, model, optimizer, batch)
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer, batches


@dataclass(frozen=True)
class _Drawn:
    """Variances of every entry, tensor by tensor: that a plan adds, and that of the mini-batch's gradient."""

    added: Sequence[Tensor]
    mini_batch: Sequence[Tensor]

    @classmethod
    def of(cls, task: Task, model: nn.Module, plan: cheapgrad.Plan, batches: Sequence[Batch], draws: int) -> _Drawn:
        draw = Prepared(task, EXACT, model).draw_gradient
        exact = [draw(batch) for batch in batches]
        added = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in model.parameters()]
        handle = cheapgrad.approximate(model, plan)
        for batch, gradient in track(list(zip(batches, exact, strict=True)), "drawing", transient=True):
            for _ in range(draws):
                for total, one, other in zip(added, draw(batch), gradient, strict=True):
                    total += (one - other).double().square() / (draws * len(batches))
        handle.revert()
        return cls(added, [torch.stack(parts).double().var(0) for parts in zip(*exact, strict=True)])

    def weigh(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        names, parameters = zip(*model.named_parameters(), strict=True)
        moments = read_second_moments(optimizer, names, parameters)
        factors = optimizer_units(optimizer, names, parameters).factors
        above, below = moments.sum_by_steps(self.added, self.added, self.mini_batch)
        return {
            "drawn_plain": self._divide([1.0] * len(factors)),
            "drawn_by_parameter": self._divide(factors),
            "drawn_by_entry": above / below,
        }

    def _divide(self, factors: Sequence[float]) -> float:
        above, below = (
            sum(factor**2 * float(one.sum()) for factor, one in zip(factors, values, strict=True))
            for values in (self.added, self.mini_batch)
        )
        return above / below

"""Bytes and FLOPs of a step, counted in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cheapgrad.convert import Rule, approximate
from cheapgrad.convert.wrappers import unwrap
from cheapgrad.cost import CostReport, scan
from cheapgrad.planning.passes import LossFunction, Step
from cheapgrad.seeding import seed_torch, torch_states_kept


class _Whole(nn.Module):
    """A model and its loss as one module, so that the loss is in the books too."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        """Return the loss."""
        return self._loss_fn(self.model, batch)


def name_in_model(row: str) -> str:
    """Return what a row of `count_costs` is called in the model itself; ``"(loss)"`` is what the loss function does.

    >>> name_in_model("model.blocks.0"), name_in_model("model"), name_in_model("")
    ('blocks.0', '', '(loss)')
    """
    head, _, rest = row.partition(".")
    return rest if head == "model" else row or "(loss)"


def count_costs(step: Step, batch: Any) -> CostReport:
    """Return the ledger of one step of the model as it is.

    Args:
        step: the training step.
        batch: the batch.
    """
    with torch_states_kept():
        seed_torch(step.seed)
        return _leave_out_wrappers(scan(_Whole(step.model, step.loss_fn), batch), step.model)


def _leave_out_wrappers(report: CostReport, model: nn.Module) -> CostReport:
    """Return the ledger with the names that modules have inside wrappers, as rules and plans name them."""
    inner = unwrap(model)
    path = next(name for name, module in model.named_modules() if module is inner)
    wrapped = f"model.{path}"

    def rename(name: str) -> str:
        is_inside = path and (name == wrapped or name.startswith(f"{wrapped}."))
        return f"model{name.removeprefix(wrapped)}" if is_inside else name

    return dataclasses.replace(
        report,
        rows=tuple(dataclasses.replace(row, name=rename(row.name)) for row in report.rows),
        operations=tuple(dataclasses.replace(cost, module=rename(cost.module)) for cost in report.operations),
    )


def count_planned_costs(step: Step, batch: Any, rules: Sequence[Rule], skip_small: bool) -> CostReport:
    """Return the ledger of one step with rules; the model is as before when this returns.

    Args:
        step: the training step.
        batch: the batch.
        rules: what to convert.
        skip_small: as in `cheapgrad.approximate`.
    """
    handle = approximate(step.model, rules, skip_small=skip_small)
    try:
        return count_costs(step, batch)
    finally:
        handle.revert()

"""Who holds what for backward, in the exact step and in the planned one."""

from __future__ import annotations

from dataclasses import dataclass

from cheapgrad.cost import CostReport
from cheapgrad.planning.costs import name_in_model


@dataclass(frozen=True)
class HeldPart:
    """What one operation of one module holds for backward; counted in one step of each kind.

    Attributes:
        module: qualified name; empty for the model itself, ``"(loss)"`` for what the loss function does beside it.
        operation: such as ``"aten::addmm"``, or the class of a custom function.
        exact_bytes: in the exact step, every storage counted once.
        planned_bytes: the same in the planned step.
    """

    module: str
    operation: str
    exact_bytes: int
    planned_bytes: int


def compare_held(exact: CostReport, planned: CostReport) -> tuple[HeldPart, ...]:
    """Return what holds anything in either step, what the exact step holds most of first.

    Args:
        exact: ledger of the exact step.
        planned: ledger of the planned one.
    """
    sums: dict[tuple[str, str], list[int]] = {}
    for position, report in enumerate((exact, planned)):
        for cost in report.operations:
            if cost.saved_bytes:
                part = sums.setdefault((name_in_model(cost.module), cost.operation), [0, 0])
                part[position] += cost.saved_bytes
    return tuple(HeldPart(module, operation, *held) for (module, operation), held in sums.items())

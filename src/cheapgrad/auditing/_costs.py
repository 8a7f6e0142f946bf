"""What the audited step and the exact one hold and compute, module by module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cheapgrad.auditing._step import LossFunction
from cheapgrad.cost import CostReport, scan
from cheapgrad.errors import UnknownNameError
from cheapgrad.exactness import forced_exact


class _WholeStep(nn.Module):
    """A model and its loss as one module, which `scan` can call."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self._loss_fn(self.model, batch)


@dataclass(frozen=True)
class StepCosts:
    """Ledgers of the audited and of the exact step; None where they could not be written.

    Attributes:
        audited: of the step as it is.
        exact: of the same step with `forced_exact`.
        remark: why there are none.
    """

    audited: CostReport | None = None
    exact: CostReport | None = None
    remark: str = ""

    def figure(self, which: str, module: str | None, figure: str) -> int | None:
        """Return one figure of a module, or of the whole step for None; None where it is not known.

        Args:
            which: ``"audited"`` or ``"exact"``.
            module: qualified name in the model.
            figure: ``"saved_bytes"`` or ``"backward_flops"``, recomputation included.
        """
        report: CostReport | None = getattr(self, which)
        if report is None:
            return None
        try:
            row = report.total if module is None else report.row(f"model.{module}" if module else "model")
        except UnknownNameError:
            return None
        return row.saved_bytes if figure == "saved_bytes" else row.backward_flops + row.recompute_flops


def measure_costs(model: nn.Module, loss_fn: LossFunction, batch: Any) -> StepCosts:
    """Scan the step as it is and as it is when exact; eagerly, so compiled parts count as not compiled."""
    whole = _WholeStep(model, loss_fn)
    try:
        audited = scan(whole, batch)
        with forced_exact():
            exact = scan(whole, batch)
    except Exception as error:
        text = " ".join(str(error).split())
        return StepCosts(remark=f"bytes and FLOPs unknown: {type(error).__name__}: {text[:120]}")
    return StepCosts(audited, exact)

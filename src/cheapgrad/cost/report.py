"""The records of a scan: who computes and who holds what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cheapgrad.errors import UnknownNameError, nearest_match
from cheapgrad.plain_data import read_record

# The name of the row for what runs outside of all modules: the loss, and operations on outputs.
OUTSIDE = "(outside)"


@dataclass(frozen=True)
class Figures:
    """What a part of a step costs.

    Attributes:
        parameters: number of parameters, each counted once.
        forward_flops: FLOPs of the forward pass.
        backward_flops: FLOPs of the backward pass, without recomputation.
        recompute_flops: FLOPs of forward passes that checkpoints run again during backward.
        saved_bytes: bytes held for backward when the forward pass is over, every storage counted once.
    """

    parameters: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    recompute_flops: int = 0
    saved_bytes: int = 0

    @property
    def flops(self) -> int:
        """All FLOPs: forward, backward and recomputation."""
        return self.forward_flops + self.backward_flops + self.recompute_flops

    @property
    def backward_per_forward(self) -> float | None:
        """Backward FLOPs, without recomputation, divided by forward FLOPs; None where nothing was counted forward."""
        return self.backward_flops / self.forward_flops if self.forward_flops else None


@dataclass(frozen=True)
class OperationCost:
    """What one operation costs in one module, over all its calls there.

    Attributes:
        module: qualified name of the module.
        operation: such as ``"aten::addmm"``, or the class of a custom function. Backward FLOPs and saved bytes stand
            with the operation of the forward pass that caused them; ``"(checkpoint)"`` is what a checkpoint keeps to
            run again, ``"(elsewhere)"`` what is held by a graph that does not lead to the output.
        calls: of counted operations, how often they ran in the forward pass.
        forward_flops: see `Figures`.
        backward_flops: see `Figures`.
        recompute_flops: see `Figures`.
        saved_bytes: see `Figures`.
    """

    module: str
    operation: str
    calls: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    recompute_flops: int = 0
    saved_bytes: int = 0


@dataclass(frozen=True)
class ModuleCost(Figures):
    """What one module costs; the figures are its own, those of the modules it calls are in `inclusive`.

    Attributes:
        name: qualified name, the first one of a shared module; empty for the model itself; ``"(outside)"`` for what ran
            outside of all modules, such as the loss.
        kind: class name.
        calls: how often it ran in the forward pass.
        output_bytes: bytes of the tensors it returned, over all calls.
        dtypes: those of the tensors it returned.
        inclusive: its own figures and those of everything that ran inside its calls. A shared module that is called in
            two others is part of both.
    """

    name: str = ""
    kind: str = ""
    calls: int = 0
    output_bytes: int = 0
    dtypes: tuple[str, ...] = ()
    inclusive: Figures = Figures()

    @property
    def figures(self) -> Figures:
        """Its own figures alone."""
        return Figures(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Figures)})


@dataclass(frozen=True)
class CostReport:
    """The ledger of one forward and backward pass; see `scan`.

    ``print(report)`` shows what holds most.

    Attributes:
        rows: one for each module, in the model's order, and one for what ran outside, if anything did. The figures of
            all rows add up to `total`.
        total: of the whole step.
        operations: one for each module and operation with FLOPs or bytes.
        uncounted: names of the operations that ran without a formula, first those whose cost is unknown, then those
            that take a few steps for each element, such as ``"aten::relu"``. Their FLOPs are in no figure.
        unknown: how many names at the head of `uncounted` are of unknown cost.
        remarks: what else a reader has to know.
        fake: whether the step ran without data, on fake tensors.
    """

    rows: tuple[ModuleCost, ...]
    total: Figures
    operations: tuple[OperationCost, ...]
    uncounted: tuple[str, ...] = ()
    unknown: int = 0
    remarks: tuple[str, ...] = ()
    fake: bool = False

    def row(self, name: str) -> ModuleCost:
        """Return the row of a module.

        Args:
            name: its qualified name.

        Raises:
            UnknownNameError: there is no such row; the message names the nearest one.
        """
        for row in self.rows:
            if row.name == name:
                return row
        names = [row.name for row in self.rows]
        raise UnknownNameError(f"the report has no row {name!r}{nearest_match(name, names)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as data that JSON can hold, marked as what it is."""
        return {"kind": "cheapgrad.scan", "version": 1, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostReport:
        """Return the report that `to_dict` was called on.

        Args:
            data: what it returned, also after a journey through JSON; what else stands in it is left alone.

        Raises:
            RecordError: the data are no report, or a damaged one; the message names the field.
        """
        return read_record(cls, data, kind="cheapgrad.scan")

    def table(self, top: int | None = 20) -> str:
        """Return the modules as a table, those that hold most first.

        Args:
            top: number of lines; None or 0 for all modules that ran.

        Raises:
            BudgetError: `top` is no whole number, or negative.
        """
        from cheapgrad.cost._table import render_report

        return render_report(self, top)

    def __str__(self) -> str:
        return self.table()

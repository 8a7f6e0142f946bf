"""Two reports side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cheapgrad.cost.report import CostReport, Figures
from cheapgrad.errors import check_instance
from cheapgrad.plain_data import read_record


@dataclass(frozen=True)
class ModuleChange:
    """What one module costs in two reports.

    Attributes:
        name: qualified name.
        before: own figures in the first report; None where the module is not in it.
        after: own figures in the second report; None where the module is not in it.
    """

    name: str
    before: Figures | None
    after: Figures | None


@dataclass(frozen=True)
class CostComparison:
    """What changed between two reports; see `compare`. ``print(comparison)`` shows where most was saved.

    Attributes:
        rows: the modules that cost something in either report, in the order of the first.
        before: total of the first report.
        after: total of the second report.
        remarks: remarks of both reports, and operations that only one of them ran without counting them.
    """

    rows: tuple[ModuleChange, ...]
    before: Figures
    after: Figures
    remarks: tuple[str, ...] = ()

    @property
    def saved_bytes_fraction(self) -> float | None:
        """Bytes held in the second report divided by those in the first; None where nothing was held."""
        return self.after.saved_bytes / self.before.saved_bytes if self.before.saved_bytes else None

    @property
    def flops_fraction(self) -> float | None:
        """All FLOPs of the second report divided by those of the first; None where nothing was counted."""
        return self.after.flops / self.before.flops if self.before.flops else None

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as data that JSON can hold, marked as what it is."""
        return {"kind": "cheapgrad.comparison", "version": 1, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostComparison:
        """Return the comparison that `to_dict` was called on.

        Args:
            data: what it returned, also after a journey through JSON; what else stands in it is left alone.

        Raises:
            RecordError: the data are no comparison, or a damaged one; the message names the field.
        """
        return read_record(cls, data, kind="cheapgrad.comparison")

    def table(self, top: int | None = 20) -> str:
        """Return the modules as a table, those that save most bytes first.

        Args:
            top: number of lines; None or 0 for all.

        Raises:
            BudgetError: `top` is no whole number, or negative.
        """
        from cheapgrad.cost._table import render_comparison

        return render_comparison(self, top)

    def __str__(self) -> str:
        return self.table()


def compare(before: CostReport, after: CostReport) -> CostComparison:
    """Put two reports side by side, module by module: exact and sketched, or before and after a change.

    Args:
        before: the first report.
        after: the second report, of the same model or of one whose modules bear the same names.

    Returns:
        The own figures of every module in both, and the totals.

    Raises:
        ArgumentError: one of them is no report.

    >>> import torch
    >>> from cheapgrad.cost import scan
    >>> layer, rows_NI = torch.nn.Linear(8, 4), torch.ones(32, 8)
    >>> exact = scan(layer, rows_NI)
    >>> frozen = scan(layer.requires_grad_(False), rows_NI)
    >>> compare(exact, frozen).saved_bytes_fraction
    0.0
    """
    for name, report in (("before", before), ("after", after)):
        check_instance(name, report, CostReport, "give what cheapgrad.scan or CostReport.from_dict returned")
    first = {row.name: row.figures for row in before.rows}
    second = {row.name: row.figures for row in after.rows}
    names = [*first, *(name for name in second if name not in first)]
    rows = [ModuleChange(name, first.get(name), second.get(name)) for name in names]
    remarks = [f"before: {remark}" for remark in before.remarks] + [f"after: {remark}" for remark in after.remarks]
    for when, one, other in (("before", before, after), ("after", after, before)):
        alone = sorted(set(one.uncounted) - set(other.uncounted))
        if alone:
            remarks.append(f"not counted, {when} only: {', '.join(alone)}")
    return CostComparison(
        rows=tuple(row for row in rows if _costs(row.before) or _costs(row.after)),
        before=before.total,
        after=after.total,
        remarks=tuple(remarks),
    )


def _costs(figures: Figures | None) -> bool:
    return figures is not None and bool(figures.flops or figures.saved_bytes)

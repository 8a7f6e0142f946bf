"""What a watch over a model saw of kinks and ties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

OUTSIDE = "(outside)"


@dataclass(frozen=True)
class KinkRow:
    """What one operation of one layer met, in one dtype.

    Attributes:
        layer: qualified name of the module, the first of its names if it has several; ``""`` is the model itself, and
            `OUTSIDE` is what ran outside of it, such as the loss.
        operation: name in ATen, such as ``"relu"`` or ``"max_pool2d_with_indices"``.
        dtype: of what came in, such as ``"float32"``.
        calls: how often it ran in forward passes.
        places: where it could have met a kink: entries, or windows and slices of which it takes the largest.
        kinks: places that stood exactly on a kink, or whose largest value was attained more than once.
        zero_kinks: those of them where the value is 0. Behind a ReLU a window of zeros is tied for good and harmless,
            because the ReLU passes nothing on from there.
    """

    layer: str
    operation: str
    dtype: str
    calls: int
    places: int
    kinks: int
    zero_kinks: int

    @property
    def share(self) -> float:
        """Share of the places that were kinks, in [0, 1]."""
        return self.kinks / self.places if self.places else 0.0


@dataclass(frozen=True)
class KinkReport:
    """What a watch saw; see `watch`.

    Attributes:
        rows: one for each layer, operation and dtype, in the order in which they first ran.
        not_counted: nonsmooth operations that ran and that no counter knows, ``"layer: operation"``.
    """

    rows: tuple[KinkRow, ...]
    not_counted: tuple[str, ...]

    @property
    def kinks(self) -> int:
        """All kinks and ties together."""
        return sum(row.kinks for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain lists and numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KinkReport:
        """Return the record that `to_dict` wrote."""
        return cls(tuple(KinkRow(**row) for row in data["rows"]), tuple(data["not_counted"]))

    def __str__(self) -> str:
        heads = ("layer", "operation", "dtype", "calls", "places", "kinks", "of which 0", "share")
        cells = [heads] + [
            (
                row.layer or "(the model itself)",
                row.operation,
                row.dtype,
                *(f"{count:,}" for count in (row.calls, row.places, row.kinks, row.zero_kinks)),
                f"{row.share:.2e}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]
        if self.not_counted:
            lines.append("not counted: " + ", ".join(self.not_counted))
        return "\n".join(lines)

"""Steps that noise of a known size costs, read off exact trainings on smaller batches."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from benchmarks.experiments.equivalent import measure_equivalent
from benchmarks.experiments.methods import SMALLER_BY
from benchmarks.experiments.results import Row, TaskResults


@dataclass(frozen=True)
class BatchCurve:
    """Ratio of steps as a function of added noise, straight between its points when both are logarithms.

    Attributes:
        points: ``1 + ω`` and ratio of steps, ascending, ``(1, 1)`` the first; at least 2.
    """

    points: tuple[tuple[float, float], ...]

    def read(self, omega: float) -> float:
        """Return the ratio of steps at added noise `omega` ≥ 0; beyond the last point its slope goes on.

        >>> curve = BatchCurve(((1.0, 1.0), (2.0, 1.5), (4.0, 1.5)))
        >>> [round(curve.read(omega), 3) for omega in (0.0, 0.5, 1.0, 2.0, 15.0)]
        [1.0, 1.268, 1.5, 1.5, 1.5]
        """
        noise = math.log1p(omega)
        pairs = list(itertools.pairwise([(math.log(each), math.log(ratio)) for each, ratio in self.points]))
        (left, low), (right, high) = next((pair for pair in pairs if noise <= pair[1][0]), pairs[-1])
        return math.exp(low + (high - low) * (noise - left) / (right - left))


def list_smaller(results: TaskResults) -> list[Row]:
    """Return the rows that the curve is made of, as far as they were trained."""
    return [row for row in results.rows if row.match_by.startswith(SMALLER_BY) and row.runs and not row.is_tuned]


def read_batch_curve(results: TaskResults) -> BatchCurve | None:
    """Return the curve of a task; None without smaller batches whose steps are measured.

    A batch of a share q of the examples has the noise of the whole one and ``1/q - 1`` of it on top, whatever the unit.
    A smaller batch that ends beyond the ruler says too little, and one that ends better than exact training costs
    nothing.
    """
    points = [(1.0, 1.0)]
    for row in list_smaller(results):
        measured = measure_equivalent(results, row)
        noise = results.exact.declaration["batch_size"] / row.declaration["batch_size"]
        if measured is not None and measured.ratio <= measured.longest and noise > 1:
            points.append((noise, max(1.0, measured.ratio)))
    return BatchCurve(tuple(sorted(points))) if len(points) > 1 else None

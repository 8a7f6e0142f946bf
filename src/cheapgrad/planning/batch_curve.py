"""Steps that noise of a known size costs, read off exact trainings on smaller batches."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cheapgrad.errors import TheoryError


@dataclass(frozen=True)
class BatchCurve:
    """Ratio of steps as a function of added noise, straight between its points when both are logarithms.

    A batch of a share q of the examples has the noise of the whole one and ``1/q - 1`` of it on top.

    Attributes:
        points: ``1 + ω`` and ratio of steps, ascending, ``(1, 1)`` the first; at least 2.
    """

    points: tuple[tuple[float, float], ...]

    @property
    def most(self) -> float:
        """ω of the last point."""
        return self.points[-1][0] - 1

    @classmethod
    def from_shares(cls, smaller_batches: Mapping[float, float]) -> BatchCurve:
        """Return the curve through exact trainings on smaller batches.

        Args:
            smaller_batches: by the share of the usual batch, in (0, 1): the steps divided by those on the usual batch
                that end as well. Where a smaller batch takes fewer than a larger one, which is scatter, it counts as
                taking as many.

        Raises:
            TheoryError: if there is none, or a share or ratio is out of range.

        >>> BatchCurve.from_shares({0.5: 1.5, 0.25: 2.0}).points
        ((1.0, 1.0), (2.0, 1.5), (4.0, 2.0))
        """
        if not isinstance(smaller_batches, Mapping) or not smaller_batches:
            raise TheoryError(
                "smaller_batches must say for one share of the batch at least how many times the steps it takes, e.g. "
                f"{{0.5: 1.4}}, but is {smaller_batches!r}"
            )
        for share, ratio in smaller_batches.items():
            if not (_is_positive(share) and share < 1 and _is_positive(1 / float(share)) and _is_positive(ratio)):
                raise TheoryError(
                    "smaller_batches must map shares of the batch in (0, 1) to finite ratios of steps above 0, but has "
                    f"{share!r}: {ratio!r}"
                )
        points = [(1.0, 1.0), *sorted((1 / float(share), float(ratio)) for share, ratio in smaller_batches.items())]
        highest = itertools.accumulate((ratio for _, ratio in points), max)
        return cls(tuple((more, ratio) for (more, _), ratio in zip(points, highest, strict=True)))

    def read(self, noise: float) -> float:
        """Return the ratio of steps at added noise ω ≥ 0; beyond the last point its slope goes on, up to ``1 + ω``'s.

        >>> curve = BatchCurve(((1.0, 1.0), (2.0, 1.5), (4.0, 1.5)))
        >>> [round(curve.read(noise), 3) for noise in (0.0, 0.5, 1.0, 2.0, 15.0)]
        [1.0, 1.268, 1.5, 1.5, 1.5]
        """
        at = math.log1p(noise)
        pairs = list(itertools.pairwise([(math.log(more), math.log(ratio)) for more, ratio in self.points]))
        (left, low), (right, high) = next((pair for pair in pairs if at <= pair[1][0]), pairs[-1])
        slope = (high - low) / (right - left)
        # Noise that decides costs in proportion, and no theory says more.
        return math.exp(low + slope * (at - left) if at <= right else high + min(slope, 1.0) * (at - right))


def read_real(value: Any) -> float:
    """Return a real number as a float; NaN if it is none, or too large for one.

    >>> read_real(2), read_real(True), read_real(10**400)
    (2.0, nan, nan)
    """
    try:
        return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def _is_positive(value: Any) -> bool:
    return 0 < read_real(value) < math.inf

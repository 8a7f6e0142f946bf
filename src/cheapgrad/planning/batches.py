"""What several batches show: the variance of the mini-batch gradient, and how noise differs from batch to batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from cheapgrad.errors import BatchError

# With fewer, nothing is known of how well the ratio of two averages over batches is known.
FEWEST_FOR_ERRORS = 4
# A ceiling is kept with this many standard errors to spare, a chance of nine in ten: quantiles of Student's t for a
# standard error known from so many batches, less one degree of freedom; of the normal where none comes from batches.
_SPARE_OF_BATCHES = {4: 1.638, 5: 1.533, 6: 1.476, 7: 1.440, 8: 1.415}
_SPARE_OF_DRAWS = 1.282


def check_shapes(batches: Sequence[Any]) -> None:
    """Refuse batches of different shapes: their gradients have different variances, and their steps different costs.

    Args:
        batches: whose tensors are compared, leaf by leaf.

    Raises:
        BatchError: if they differ; names both shapes.
    """
    shapes = [[tuple(leaf.shape) for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)] for batch in batches]
    for number, found in enumerate(shapes):
        if found != shapes[0]:
            raise BatchError(
                f"batches must be of equal size, but the tensors of batches[0] have the shapes {shapes[0]} and those "
                f"of batches[{number}] {found}; leave a smaller last batch out (drop_last=True), and pad sequences to "
                "one length"
            )


class MiniBatchVariance:
    """Variance of the mini-batch gradient, from the gradients of several batches."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self._squares: list[float] = []
        self._products: list[float] = []

    def add(self, gradient: list[Tensor]) -> None:
        """Take in the gradient of one batch."""
        self.gradients.append(gradient)
        self._squares.append(squared_norm(gradient))
        self._products.clear()

    @property
    def batches(self) -> int:
        """How many there are."""
        return len(self.gradients)

    @property
    def value(self) -> float:
        """``Σ‖g_i − ḡ‖² / (m − 1)``."""
        return _variance(math.fsum(self._squares), math.fsum(self._with_sum()), self.batches)

    def leave_one_out(self) -> list[float]:
        """Return the variance without each of the batches."""
        squares, of_sum = math.fsum(self._squares), math.fsum(self._with_sum())
        pairs = zip(self._squares, self._with_sum(), strict=True)
        return [_variance(squares - own, of_sum - 2 * product + own, self.batches - 1) for own, product in pairs]

    def _with_sum(self) -> list[float]:
        """Return ``⟨g_i, Σ_j g_j⟩`` for every batch."""
        if not self._products:
            total = [value.clone() for value in self.gradients[0]]
            for gradient in self.gradients[1:]:
                torch._foreach_add_(total, gradient)
            for gradient in self.gradients:
                dots = [torch.dot(one.flatten(), other.flatten()) for one, other in zip(gradient, total, strict=True)]
                self._products.append(float(torch.stack([dot.double().cpu() for dot in dots]).sum()))
        return self._products


def _variance(squares: float, of_sum: float, batches: int) -> float:
    return max(0.0, squares - of_sum / batches) / (batches - 1)


def squared_norm(gradient: Sequence[Tensor]) -> float:
    """Return the squared norm of a gradient.

    Args:
        gradient: its tensors.
    """
    norms = [torch.linalg.vector_norm(value, dtype=torch.float64).cpu() for value in gradient]
    return float(torch.stack(norms).square().sum())


def spare_factor(relative_error: float, batches: int) -> float:
    """Return how far above an estimate its bound lies.

    Args:
        relative_error: standard error over estimate.
        batches: how many it was estimated from; of fewer than `FEWEST_FOR_ERRORS` the error is that of draws alone.
    """
    most = max(_SPARE_OF_BATCHES)
    return math.exp(_SPARE_OF_BATCHES.get(min(batches, most), _SPARE_OF_DRAWS) * relative_error)


def relative_error_of_ratio(noises: Sequence[float], variance: MiniBatchVariance) -> float | None:
    """Return the relative standard error of mean noise over mini-batch variance, by leaving out one batch at a time.

    Both are averages over the same batches; a batch with few hard examples moves them together.

    Args:
        noises: of every batch.
        variance: of the gradients of the same batches.

    Returns:
        None where there are too few batches.
    """
    count = len(noises)
    whole = math.fsum(noises) / count / (variance.value or 1.0)
    if count < FEWEST_FOR_ERRORS or not whole:
        return None
    others = [
        (math.fsum(noises) - own) / (count - 1) / (rest or 1e-300)
        for own, rest in zip(noises, variance.leave_one_out(), strict=True)
    ]
    mean = math.fsum(others) / count
    return math.sqrt((count - 1) / count * math.fsum((other - mean) ** 2 for other in others)) / whole

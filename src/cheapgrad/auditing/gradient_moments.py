"""Bias and variance of a random gradient, from a fixed number of draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from cheapgrad.auditing._directions import MOST_BLOCKS
from cheapgrad.auditing._errors_drawn import ErrorCollector
from cheapgrad.auditing._judgement import check_alpha, judge
from cheapgrad.auditing._relative import relative
from cheapgrad.errors import check_count
from cheapgrad.plain_data import plain

# In a block of few rows, an event that few draws see looks like a constant error.
_DRAWS_FOR_A_BLOCK = 32


@dataclass(frozen=True)
class TensorMoments:
    """Bias and variance of one tensor of the gradient; see `measure_gradient_moments`.

    Attributes:
        name: of the tensor.
        coordinates: how many entries it has.
        squared_norm: ``‖g‖²`` of the exact gradient.
        relative_variance: ``E‖ĝ − g‖² / ‖g‖²``; infinite where g is zero and ĝ is not.
        max_abs_z: largest absolute z-score of its projections; infinite if it never changes and is wrong.
        z_along_gradient: z-score of the projection on the exact gradient.
        detectable_relative_bias: error of scale, as a fraction, that would have been found with probability 0.99.
    """

    name: str
    coordinates: int
    squared_norm: float
    relative_variance: float
    max_abs_z: float
    z_along_gradient: float
    detectable_relative_bias: float


@dataclass(frozen=True)
class GradientMoments:
    """Bias and variance of a random gradient; see `measure_gradient_moments`.

    Attributes:
        draws: gradients drawn, fixed beforehand.
        alpha: probability that an unbiased gradient is called biased, over all tests together.
        tests: how many tests share `alpha` (Bonferroni).
        band: largest absolute z-score that chance explains at that level.
        squared_norm: ``‖g‖²`` of the exact gradient.
        relative_variance: ``E‖ĝ − g‖² / ‖g‖²``.
        relative_variance_standard_error: standard error of that figure.
        max_abs_z: largest absolute z-score of all tests; infinite where a tensor never changes and is wrong.
        z_along_gradient: z-score of the projection of the whole gradient on the exact one.
        detectable_relative_bias: error of scale, as a fraction, that would have been found with probability 0.99.
        tensors: the same, tensor by tensor.
    """

    draws: int
    alpha: float
    tests: int
    band: float
    squared_norm: float
    relative_variance: float
    relative_variance_standard_error: float
    max_abs_z: float
    z_along_gradient: float
    detectable_relative_bias: float
    tensors: tuple[TensorMoments, ...]

    @property
    def unbiased(self) -> bool:
        """Whether every z-score lies within the band; what could have hidden there is `detectable_relative_bias`."""
        return self.max_abs_z <= self.band

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain lists and numbers, ready for JSON; infinities become ``"inf"``."""
        return {**plain(asdict(self)), "unbiased": self.unbiased}


def measure_gradient_moments(
    draw_gradient: Callable[[], Sequence[Tensor]],
    exact_gradient: Sequence[Tensor],
    *,
    draws: int = 256,
    alpha: float = 1e-6,
    names: Sequence[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> GradientMoments:
    """Draw a random gradient a fixed number of times and compare its moments with the exact gradient.

    With ``d_i`` the error of draw i and n draws, the mean of ``⟨u, d_i⟩`` over its standard error is compared with the
    two-sided Student band at ``alpha / tests``, for these directions u: the exact gradient as a whole, of each tensor,
    and of blocks of rows and of columns of each tensor (one for every 32 draws, up to 8), and random signs on the same
    blocks.

    Args:
        draw_gradient: no arguments; returns the tensors of one random gradient, drawn independently of the others.
        exact_gradient: the tensors that they should equal on average, in the same order; copied at once.
        draws: how many gradients to draw, at least 8. There is no early stop.
        alpha: probability that an unbiased gradient is called biased, over all tests together, in (0, 1).
        names: of the tensors, for the report; by default their positions.
        progress: called after each draw with the number done and the total.

    Returns:
        Relative variance, z-scores, their band and what bias would have been seen, in total and for each tensor.

    Law:
        The relative variance is unbiased. False alarms stay below `alpha` as far as the means of the projections are
        near normal, skewness being corrected for. Entries are not tested one by one, because that does not hold for
        them: an entry may live on an event that comes once in a thousand draws, and 256 draws that miss it look like a
        tight distribution around a wrong mean (a z-score of 246 was seen for an unbiased codec). A tensor that never
        changes must equal the exact one to within rounding. Memory: three copies of the gradient; only some fifty
        numbers for each tensor grow with `draws`.

    Raises:
        GradientDrawError: a draw does not fit the exact gradient in number, presence or shape, or is not finite.
        BudgetError: too few draws, or `alpha` outside (0, 1).

    Example:
        >>> import torch
        >>> exact = torch.ones(1000)
        >>> generator = torch.Generator().manual_seed(0)
        >>> def keep_half():
        ...     return [exact * 2 * (torch.rand(1000, generator=generator) < 0.5)]
        >>> moments = measure_gradient_moments(keep_half, [exact])
        >>> moments.unbiased, round(moments.relative_variance, 1)
        (True, 1.0)

    References:
        P. Hall, "On the removal of skewness by transformation", J. R. Statist. Soc. B 54 (1992), for the correction.
    """
    check_count("draws", draws, minimum=8)
    check_alpha(alpha)
    collector = ErrorCollector(exact_gradient, names, most_blocks=max(1, min(MOST_BLOCKS, draws // _DRAWS_FOR_A_BLOCK)))
    for draw in range(draws):
        collector.add(draw_gradient(), f"draw {draw + 1}")
        if progress is not None:
            progress(draw + 1, draws)
    return _summarise(collector, alpha)


def _summarise(collector: ErrorCollector, alpha: float) -> GradientMoments:
    errors = collector.collected()
    judgement = judge(errors, collector.resolutions, alpha)
    squared_norms = collector.squared_norms.tolist()
    tensors = tuple(
        TensorMoments(
            name=name,
            coordinates=collector.sizes[position],
            squared_norm=squared_norms[position],
            relative_variance=relative(float(errors.squared_errors[:, position].mean()), squared_norms[position]),
            max_abs_z=float(judgement.largest[position]),
            z_along_gradient=float(judgement.along[1 + position]),
            detectable_relative_bias=relative(float(judgement.reach[1 + position]), squared_norms[position]),
        )
        for position, name in enumerate(collector.names)
    )
    squared_norm = sum(squared_norms)
    squared_errors = errors.squared_errors.sum(1)
    return GradientMoments(
        draws=errors.draws,
        alpha=alpha,
        tests=judgement.tests,
        band=judgement.band,
        squared_norm=squared_norm,
        relative_variance=relative(float(squared_errors.mean()), squared_norm),
        relative_variance_standard_error=relative(float(squared_errors.std()) / math.sqrt(errors.draws), squared_norm),
        max_abs_z=judgement.max_abs_z,
        z_along_gradient=float(judgement.along[0]),
        detectable_relative_bias=relative(float(judgement.reach[0]), squared_norm),
        tensors=tensors,
    )

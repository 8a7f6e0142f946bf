"""What every sampling design promises."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.sketch.selection import Selection
from cheapgrad.sketch.value import Value
from cheapgrad.sketch.water_filling import water_filling

# Given weights over the atoms, returns || sum_i weight_i atom_i ||**2: all a design's variance needs beyond the norms.
SquaredNormOfSum = Callable[[Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class AbstractDesign(Value, abc.ABC):
    """A way to draw atoms given their scores, with its exact or stated variance.

    The estimate of ``sum_i a_i`` is ``sum_k weight_k a_index_k``; it is unbiased whenever an atom of probability zero
    is itself zero.
    """

    @abc.abstractmethod
    def draw(self, scores: Tensor, count: int, generator: torch.Generator | None = None) -> Selection:
        """Draw `count` of the atoms (in expectation for Poisson).

        Args:
            scores: non-negative, shape ``[..., n]``; leading axes are drawn independently.
            count: atoms to keep, at least 1.
            generator: for function-style use only.

        Returns:
            A `Selection` whose ``index_K`` and ``weight_K`` have shape ``[..., K]``.
        """

    @abc.abstractmethod
    def variance(
        self, squared_norms: Tensor, scores: Tensor, count: int, squared_norm_of_sum: SquaredNormOfSum
    ) -> Tensor:
        """Return ``E || estimate - sum_i a_i ||**2``.

        Args:
            squared_norms: ``||a_i||**2``, shape ``[n]``.
            scores: as in `draw`, shape ``[n]``.
            count: as in `draw`.
            squared_norm_of_sum: weights over atoms ``[n]`` to ``|| sum_i weight_i a_i ||**2``.
        """

    def expected_count(self, size: int, count: int) -> float:
        """Return the expected number of atoms that are multiplied."""
        return float(min(size, count))


@dataclass(frozen=True, repr=False)
class AbstractFixedSizeDesign(AbstractDesign):
    """A design without replacement of fixed size whose inclusion probabilities are exactly the water-filling ones."""

    @abc.abstractmethod
    def select(self, probabilities: Tensor, randomness: tuple[Tensor, ...], count: int) -> Tensor:
        """Return the ``[..., K]`` chosen indices, a deterministic function of the randomness (tests enumerate it)."""

    @abc.abstractmethod
    def draw_randomness(self, probabilities: Tensor, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        """Return the uniform numbers that `select` consumes."""

    @abc.abstractmethod
    def joint_inclusion(self, probabilities: Tensor) -> Tensor | None:
        """Return exact pairwise inclusion probabilities ``[n, n]`` where n is small enough, otherwise None."""

    def is_approximated(self, probabilities: Tensor) -> bool:
        """Tell whether the variance is that of `approximate_variance`: no exact joint probabilities are known."""
        # A design with a variance of its own says so itself.
        is_own = type(self).variance is not AbstractFixedSizeDesign.variance
        return not is_own and self.joint_inclusion(probabilities) is None

    def draw(self, scores: Tensor, count: int, generator: torch.Generator | None = None) -> Selection:
        """Draw exactly ``min(count, n)`` distinct atoms with the water-filling inclusion probabilities."""
        size = scores.shape[-1]
        probabilities = water_filling(scores, count)
        randomness = self.draw_randomness(probabilities, generator)
        index = self.select(probabilities, randomness, min(count, size))
        return Selection(index, probabilities.gather(-1, index).reciprocal(), size)

    def variance(
        self, squared_norms: Tensor, scores: Tensor, count: int, squared_norm_of_sum: SquaredNormOfSum
    ) -> Tensor:
        r"""Horvitz-Thompson variance, with joint probabilities exact for small n and approximated beyond.

        ``Var = sum_ij (p_ij - p_i p_j) / (p_i p_j) <a_i, a_j>``. Without exact joint probabilities they are taken as
        ``p_i p_j - c_i c_j / sum c`` with ``c_i - c_i**2 / sum c = p_i (1 - p_i)`` (Deville and Tille's fixed point),
        which is exact for orthogonal atoms and for equal probabilities, and an approximation of relative order ``1 /
        sum p (1 - p)`` on the cross terms otherwise.
        """
        probabilities = water_filling(scores, count)
        inverse = torch.where(probabilities > 0, 1.0 / probabilities, 0.0)
        joint = self.joint_inclusion(probabilities)
        if joint is None:
            return _fixed_point_variance(squared_norms, probabilities, squared_norm_of_sum)
        return _joint_variance(probabilities, inverse, joint, squared_norm_of_sum)


def _joint_variance(
    probabilities: Tensor, inverse: Tensor, joint: Tensor, squared_norm_of_sum: SquaredNormOfSum
) -> Tensor:
    covariance = (joint - torch.outer(probabilities, probabilities)) * torch.outer(inverse, inverse)
    # A quadratic form in the atoms, as a signed sum of squared norms along the covariance's eigenvectors.
    eigenvalues, eigenvectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    squares = torch.stack([squared_norm_of_sum(column).double() for column in eigenvectors.T])
    return eigenvalues @ squares


def approximate_variance(
    squared_norms: Tensor, probabilities: Tensor, squared_norms_of_sums: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the variance under the fixed point's joint probabilities, for several lines of probabilities at once.

    Args:
        squared_norms: ``||a_i||**2``, shape ``[n]``.
        probabilities: of inclusion, shape ``[S, n]``.
        squared_norms_of_sums: weights ``[S, n]`` to ``|| sum_i weight_si a_i ||**2``, shape ``[S]``.

    Returns:
        Float64 variances, shape ``[S]``; zero where every atom is certain.
    """
    inverse = torch.where(probabilities > 0, 1.0 / probabilities, 0.0)
    spread = probabilities * (1 - probabilities)
    is_random = spread.sum(-1) >= 1e-12
    spread = torch.where(is_random.unsqueeze(-1), spread, 0.0)
    dispersion = spread.clone()
    for _ in range(60):
        dispersion = spread + dispersion**2 / dispersion.sum(-1, keepdim=True).clamp_min(1e-300)
    total = dispersion.sum(-1).clamp_min(1e-300)
    own_terms = (dispersion * inverse**2) @ squared_norms.double()
    values = own_terms - squared_norms_of_sums(dispersion * inverse).double() / total
    return torch.where(is_random, values, 0.0)


def _fixed_point_variance(
    squared_norms: Tensor, probabilities: Tensor, squared_norm_of_sum: SquaredNormOfSum
) -> Tensor:
    return approximate_variance(
        squared_norms, probabilities.unsqueeze(0), lambda weights: squared_norm_of_sum(weights[0]).unsqueeze(0)
    )[0]

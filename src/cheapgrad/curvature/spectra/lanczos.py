"""Lanczos with full reorthogonalisation: the eigenvalues at the ends of a spectrum, with residuals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.curvature.operators import AbstractOperator, as_operator
from cheapgrad.curvature.spectra.krylov import KrylovSpace
from cheapgrad.curvature.spectra.probes import check_within
from cheapgrad.errors import BudgetError, NotConvergedWarning, check_count, check_instance


@dataclass(frozen=True)
class LanczosSettings:
    """When to stop, and how to start.

    Attributes:
        tolerance: residuals ``‖A v − λ v‖`` wanted, relative to the largest eigenvalue in magnitude; None for the root
            of the dtype's rounding.
        products: at most as many; None for P or, if that is fewer, the larger of 100 and twenty for each eigenpair.
        block: vectors multiplied at a time. An eigenvalue that occurs m times is found m times where m ≤ block.
        generator: of the start; torch's default otherwise. Processes of a group need equal ones.

    Raises:
        BudgetError: if the tolerance is not positive, or a number is not a positive whole one.
    """

    tolerance: float | None = None
    products: int | None = None
    block: int = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_count("block", self.block)
        if self.products is not None:
            check_count("products", self.products)
        if self.tolerance is not None and not self.tolerance > 0:
            raise BudgetError(f"tolerance must be positive, but got {self.tolerance!r}; use e.g. tolerance=1e-6")


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues with their vectors, and how good they are.

    Eigenvalues of a batch's matrix are *that batch's*; along the same directions the curvature of all data is smaller
    at the top of the spectrum.

    Attributes:
        values: ``[K]``, float64.
        vectors: unit columns ``[P, K]``, orthogonal.
        residuals: ``‖A v − λ v‖`` of each, ``[K]``. An eigenvalue lies within its residual of the value.
        products: matrix-vector products that were made.
        converged: whether all residuals are within the tolerance.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool

    @property
    def standard_error(self) -> Tensor:
        """What the values may be off by; not a random error, but the residuals' bound."""
        return self.residuals

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; tensors become lists of float64."""
        tensors = {name: getattr(self, name).double().tolist() for name in ("values", "vectors", "residuals")}
        return tensors | {"products": self.products, "converged": self.converged}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Eigenpairs:
        """Return what `to_dict` was made from, in float64."""
        tensors = {name: torch.tensor(data[name], dtype=torch.float64) for name in ("values", "vectors", "residuals")}
        return cls(**tensors, products=data["products"], converged=data["converged"])


def top_eigenpairs(operator: Any, count: int = 1, *, settings: LanczosSettings | None = None) -> Eigenpairs:
    """Return the largest eigenvalues, in descending order, by Lanczos with full reorthogonalisation.

    Args:
        operator: anything with ``shape`` and ``@``, symmetric.
        count: eigenpairs, from 1 to the number of parameters.
        settings: tolerance, products, block, generator.

    Returns:
        Values, vectors and residuals; all that was found, with a `NotConvergedWarning`, if the products run out.

    Law:
        Every value lies within its residual of an eigenvalue. Which one is a matter of the start: an eigenvalue whose
        vectors are orthogonal to the start, or further copies of a multiple one, may be passed over; a larger `block`
        finds them. Holds as many vectors as it makes products.

    Raises:
        BudgetError: if the count is not from 1 to the number of parameters.
        OperatorError: if the matrix turns out not to be symmetric.
        NonFiniteCurvatureError: if a product is not finite.

    Example:
        >>> from cheapgrad.curvature import DenseOperator
        >>> pairs = top_eigenpairs(DenseOperator(torch.diag(torch.tensor([3.0, 1.0, 2.0, -7.0]))), 2)
        >>> [round(value, 4) for value in pairs.values.tolist()], pairs.products
        ([3.0, 2.0], 4)

    References:
        Lanczos, An iteration method for the solution of the eigenvalue problem, 1950; Parlett, The symmetric eigenvalue
        problem, chapters 13 (residual bounds) and 13.12 (blocks).
    """
    return _iterate(
        operator,
        count,
        settings,
        lambda values: values.argsort(descending=True),
    )


def bottom_eigenpairs(operator: Any, count: int = 1, *, settings: LanczosSettings | None = None) -> Eigenpairs:
    """Return the smallest eigenvalues, in ascending order; all else as `top_eigenpairs`.

    Args:
        operator: anything with ``shape`` and ``@``, symmetric.
        count: eigenpairs, from 1 to the number of parameters.
        settings: tolerance, products, block, generator.

    Returns:
        Values, vectors and residuals.

    Raises:
        BudgetError: if the count is not from 1 to the number of parameters.
        OperatorError: if the matrix turns out not to be symmetric.
    """
    return _iterate(operator, count, settings, lambda values: values.argsort())


def top_singular_values(operator: Any, count: int = 1, *, settings: LanczosSettings | None = None) -> Eigenpairs:
    """Return the largest singular values of a symmetric matrix: its eigenvalues' magnitudes, in descending order.

    Args:
        operator: anything with ``shape`` and ``@``, symmetric.
        count: singular values, from 1 to the number of parameters.
        settings: tolerance, products, block, generator.

    Returns:
        Values without their signs, with right singular vectors and residuals.

    Raises:
        BudgetError: if the count is not from 1 to the number of parameters.
        OperatorError: if the matrix turns out not to be symmetric.
    """
    pairs = _iterate(
        operator,
        count,
        settings,
        lambda values: values.abs().argsort(descending=True),
    )
    return Eigenpairs(pairs.values.abs(), pairs.vectors, pairs.residuals, pairs.products, pairs.converged)


def _iterate(
    matrix: Any, count: int, settings: LanczosSettings | None, order: Callable[[Tensor], Tensor]
) -> Eigenpairs:
    settings = LanczosSettings() if settings is None else settings
    check_instance("settings", settings, LanczosSettings, "use LanczosSettings(...)")
    operator = as_operator(matrix)
    check_count("count", count)
    check_within(operator, "count", count)
    size = operator.shape[0]
    limit = min(size, settings.products or max(100, 20 * count))
    tolerance = settings.tolerance or torch.finfo(operator.dtype).eps ** 0.5
    space = KrylovSpace(operator, min(settings.block, size), settings.generator)
    check_at, found, settled_at = count, torch.empty(0, dtype=torch.float64), 0
    while True:
        space.extend(limit)
        is_last = space.products >= limit
        if not is_last and space.products < check_at:
            continue
        # The small problem grows; looking at it ever more rarely keeps its cost below that of the products.
        check_at = space.products + (1 if space.restarts else max(1, space.products // 8))
        values, residuals, weights = space.solve()
        chosen = order(values)[:count]
        threshold = tolerance * float(values.abs().max())
        if len(found) != len(chosen) or (values[chosen] - found).abs().max() > threshold:
            found, settled_at = values[chosen], space.products
        within = bool((residuals[chosen] <= threshold).all()) and len(chosen) == count
        # Where the space was exhausted, residuals say nothing of what lies outside: see whether it changes the answer.
        is_settled = not space.restarts or space.products - settled_at >= count
        if (within and is_settled) or is_last:
            return _finish(operator, space, (values[chosen], residuals[chosen], weights[:, chosen]), within, tolerance)


def _finish(
    operator: AbstractOperator,
    space: KrylovSpace,
    found: tuple[Tensor, Tensor, Tensor],
    converged: bool,
    tolerance: float,
) -> Eigenpairs:
    values, residuals, weights = found
    if not converged:
        warnings.warn(
            f"after {space.products} products, eigenpairs of a {operator.shape[0]}×{operator.shape[0]} matrix have "
            f"residuals of up to {float(residuals.max()):.3g}, where {tolerance:.3g} of the largest eigenvalue was "
            "asked for; allow more with LanczosSettings(products=...), or a larger tolerance",
            NotConvergedWarning,
            stacklevel=4,
        )
    return Eigenpairs(values, space.combine(weights), residuals, space.products, converged)

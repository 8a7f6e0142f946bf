"""The directions of largest (or smallest) curvature of one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from cheapgrad.curvature.operators import AbstractDataOperator, AbstractOperator
from cheapgrad.curvature.spectra import LanczosSettings, bottom_eigenpairs, top_eigenpairs
from cheapgrad.errors import BudgetError, check_count

# Up to this size the whole matrix costs less than the care that an iteration needs.
_SMALL = 400
# Residuals are wanted as small as this many roundings of the dtype.
_ROUNDINGS = 100


def find_leading_directions(
    operator: AbstractOperator, count: int, *, largest: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the operator's own leading eigenvalues and eigenvectors.

    These are eigenvalues *of this batch*: too large at the top of its spectrum, too small at the bottom. To know the
    curvature along the same directions on all data, measure it on another batch: `split_sample`.

    Args:
        operator: of the batch that chooses.
        count: K, from 1 to the number of parameters.
        largest: the largest eigenvalues, in descending order; else the smallest, in ascending order.
        seed: of the start vector where the matrix is too large to be written out.

    Returns:
        Eigenvalues ``[K]`` and unit eigenvectors ``[P, K]``, in the operator's dtype.

    Law:
        Converged to a hundred roundings of the dtype, relative to the largest eigenvalue. Small matrices (up to 400
        parameters) are written out; larger ones go through `top_eigenpairs` or `bottom_eigenpairs`, one product a step,
        which may pass over further copies of an eigenvalue that occurs more than once.

    Raises:
        BudgetError: if `count` is no whole number from 1 to the number of parameters.

    Example:
        >>> from cheapgrad.curvature import DenseOperator
        >>> find_leading_directions(DenseOperator(torch.diag(torch.tensor([1.0, 3.0, 2.0]))), 2)[0]
        tensor([3., 2.])
    """
    check_direction_count(count, operator)
    if operator.shape[0] > max(_SMALL, 3 * count):
        return _iterate(operator, count, largest, seed)
    matrix_PP = operator.to_dense()
    values, vectors_PP = torch.linalg.eigh((matrix_PP + matrix_PP.T) / 2)
    if largest:
        values, vectors_PP = values.flip(0), vectors_PP.flip(1)
    return values[:count], vectors_PP[:, :count].contiguous()


def check_direction_count(count: int, operator: AbstractOperator) -> None:
    """Raise `BudgetError` unless `count` directions exist."""
    check_count("count", count)
    if count > operator.shape[0]:
        raise BudgetError(
            f"count={count} directions were asked of a curvature with {operator.shape[0]} parameters; "
            f"use count ≤ {operator.shape[0]}"
        )


def _iterate(operator: AbstractOperator, count: int, largest: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Return converged eigenpairs, those asked for first."""
    if isinstance(operator, AbstractDataOperator):
        operator = operator.linearized()
    settings = LanczosSettings(
        tolerance=_ROUNDINGS * torch.finfo(operator.dtype).eps,
        products=operator.shape[0],
        generator=torch.Generator(operator.device).manual_seed(seed),
    )
    pairs = (top_eigenpairs if largest else bottom_eigenpairs)(operator, count, settings=settings)
    return pairs.values.to(operator.dtype).to(operator.device), pairs.vectors

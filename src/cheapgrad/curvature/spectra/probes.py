"""Random vectors, and products with many of them within bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cheapgrad.curvature.operators import AbstractOperator, as_operator
from cheapgrad.errors import BudgetError, check_count

# Columns that are multiplied at once: enough to share a graph, few enough to hold.
COLUMNS_AT_ONCE = 16


def check_probes(matrix: Any, name: str, count: int, minimum: int = 2) -> AbstractOperator:
    """Return the matrix as an operator, and refuse a number of probes that leaves no standard error.

    Raises:
        BudgetError: if the count is not a whole number of at least `minimum`.
    """
    check_count(name, count, minimum)
    return as_operator(matrix)


def check_within(operator: AbstractOperator, name: str, count: int, share: int = 1) -> None:
    """Raise `BudgetError` if one of so many shares of a count of vectors exceeds the space's dimensions."""
    size = operator.shape[0]
    if count // share > size:
        each = f"{share} for each of the {size} dimensions" if share > 1 else f"the {size} dimensions"
        raise BudgetError(
            f"{name}={count} is more than {each} of the matrix; use at most {share * size}, or operator.to_dense()"
        )


def draw_signs(operator: AbstractOperator, columns: int, generator: torch.Generator | None) -> Tensor:
    """Return columns ``[P, R]`` of independent ±1."""
    device = operator.device if generator is None else generator.device
    coins = torch.randint(2, (operator.shape[0], columns), generator=generator, device=device)
    return (2 * coins - 1).to(operator.device, operator.dtype)


def draw_normals(operator: AbstractOperator, columns: int, generator: torch.Generator | None) -> Tensor:
    """Return columns ``[P, R]`` of independent standard normal numbers."""
    device = operator.device if generator is None else generator.device
    shape = (operator.shape[0], columns)
    return torch.randn(shape, generator=generator, device=device, dtype=operator.dtype).to(operator.device)


def multiply_signs(
    operator: AbstractOperator, count: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield columns of signs and the products with them, some at a time."""
    for start in range(0, count, COLUMNS_AT_ONCE):
        signs_PR = draw_signs(operator, min(COLUMNS_AT_ONCE, count - start), generator)
        yield signs_PR, operator @ signs_PR

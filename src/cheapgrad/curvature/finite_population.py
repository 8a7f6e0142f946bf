"""The exact correction for a second batch that was drawn from what the first one left."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cheapgrad.curvature.operators import AbstractOperator
from cheapgrad.errors import BatchError, OverlapError, check_count


@dataclass(frozen=True)
class FinitePopulation:
    """A data set of N examples: batch a took A of them, and batch b took B of the other N - A, without replacement.

    Given a, the mean of b is centred at the mean of what a left, ``(N·h - A·h_a) / (N - A)``, a little below h along
    the directions that a chose. Undone exactly by

        corrected = (A / N)·same_batch + ((N - A) / N)·held_out

    Args:
        size: N.
        first_count: A, from 1 to N.
        second_count: B, from 1 to N - A; not looked at where A = N.

    Law:
        ``E[corrected | a]`` is the whole population's value, for whatever is linear in the mean over examples and along
        any directions chosen by a. The variance of b's mean carries the factor ``1 - B / (N - A)``. Does not hold where
        b was drawn independently of a, from all N: leave the population out there.

    Raises:
        BudgetError: if a count is no positive whole number.
        OverlapError: if the batches are larger than the population together, so that they must overlap.

    Example:
        >>> FinitePopulation(300, 60, 60).first_share
        0.2
    """

    size: int
    first_count: int
    second_count: int

    def __post_init__(self) -> None:
        """Check the counts."""
        for name in ("size", "first_count", "second_count"):
            check_count(name, getattr(self, name))
        total = self.first_count + self.second_count
        if self.first_count != self.size and total > self.size:
            raise OverlapError(
                f"batches of {self.first_count} and {self.second_count} examples cannot be disjoint in a population of "
                f"{self.size}; {_advise(self.size, self.first_count)}"
            )

    @property
    def first_share(self) -> float:
        """The weight of the first batch's own value, A / N."""
        return self.first_count / self.size

    @property
    def second_share(self) -> float:
        """The weight of the second batch's value, (N - A) / N."""
        return 1 - self.first_share

    @property
    def error_factor(self) -> float:
        """What the standard error of the second batch's value becomes in the corrected one."""
        left = self.size - self.first_count
        return 0.0 if left == 0 else self.second_share * math.sqrt(1 - self.second_count / left)

    def combine(self, same_batch: Tensor, held_out: Tensor) -> Tensor:
        """Return the corrected value of anything linear in the mean over examples.

        Args:
            same_batch: measured on the first batch, any shape.
            held_out: measured on the second batch, of the same shape.

        Returns:
            A tensor of that shape; `same_batch` itself where the first batch is the whole population.
        """
        if self.first_count == self.size:
            return same_batch
        return self.first_share * same_batch + self.second_share * held_out


def _advise(size: int, first_count: int) -> str:
    if first_count > size:
        return "the first alone is larger; is this the number of examples of the data set?"
    return f"leave at most {size - first_count} to the second"


def population_of(
    operator_a: AbstractOperator, operator_b: AbstractOperator, population_size: int | None
) -> FinitePopulation | None:
    """Return the population that two operators' batches come from; None where its size is not given.

    Args:
        operator_a: knows its `example_count`.
        operator_b: knows its `example_count`.
        population_size: N, or None for batches that are independent draws.

    Raises:
        BudgetError: if the size is no positive whole number.
        BatchError: if an operator does not know how many examples it is a mean over.
    """
    if population_size is None:
        return None
    check_count("population_size", population_size)
    counts = []
    for name, operator in (("a", operator_a), ("b", operator_b)):
        if operator.example_count is None:
            raise BatchError(
                f"population_size={population_size!r} needs the number of examples of both batches, but operator "
                f"{name} does not know its own; wrap it: "
                "MeanOperator([MicroBatch(as_operator(matrix), 1.0, examples)])"
            )
        counts.append(round(operator.example_count))
    return FinitePopulation(population_size, counts[0], counts[1])

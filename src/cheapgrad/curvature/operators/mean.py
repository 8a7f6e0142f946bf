"""The weighted mean of operators."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from cheapgrad.curvature.operators.abstract import AbstractOperator, MicroBatch
from cheapgrad.errors import OperatorError


@final
class MeanOperator(AbstractOperator):
    """The mean of operators over micro-batches: ``A = Σ weight_i · A_i / Σ weight_i``.

    Args:
        parts: micro-batches, such as some of those of another operator; their weights are normalised to sum to one.
            Operators without weights count by their examples, or all the same where these are not known.

    Raises:
        OperatorError: if there are no parts, they differ in shape, dtype or device, or a weight is not positive.

    Example:
        >>> from cheapgrad.curvature import DenseOperator
        >>> halves = [DenseOperator(torch.eye(2)), DenseOperator(3 * torch.eye(2))]
        >>> MeanOperator(halves) @ torch.ones(2)
        tensor([2., 2.])
    """

    def __init__(self, parts: Iterable[MicroBatch | AbstractOperator]) -> None:
        parts = list(parts)
        counts = [part.example_count for part in parts]
        known = all(count is not None for count in counts)
        terms = [
            part if isinstance(part, MicroBatch) else MicroBatch(part, float(count) if known and count else 1.0, count)
            for part, count in zip(parts, counts, strict=True)
        ]
        _check_terms(terms)
        total = sum(term.weight for term in terms)
        self._terms = tuple(MicroBatch(term.operator, term.weight / total, term.example_count) for term in terms)

    @property
    def shape(self) -> tuple[int, int]:
        """The parts' shape."""
        return self._terms[0].operator.shape

    @property
    def dtype(self) -> torch.dtype:
        """The parts' dtype."""
        return self._terms[0].operator.dtype

    @property
    def device(self) -> torch.device:
        """The parts' device."""
        return self._terms[0].operator.device

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """The parts, their weights summing to one."""
        return self._terms

    @property
    def example_count(self) -> float | None:
        """The sum over the parts, where all are known."""
        counts = [term.example_count for term in self._terms if term.example_count is not None]
        return sum(counts) if len(counts) == len(self._terms) else None

    def _multiply(self, columns_PR: Tensor) -> Tensor:
        total_PR = torch.zeros_like(columns_PR)
        for term in self._terms:
            total_PR.add_(term.operator @ columns_PR, alpha=term.weight)
        return total_PR


def _check_terms(terms: list[MicroBatch]) -> None:
    if not terms:
        raise OperatorError("a mean of operators needs at least one of them, but got none")
    for term in terms:
        if not (math.isfinite(term.weight) and term.weight > 0):
            raise OperatorError(f"weights in a mean of operators must be positive, but got {term.weight!r}")
    kinds = {(term.operator.shape, term.operator.dtype, term.operator.device) for term in terms}
    if len(kinds) > 1:
        texts = ", ".join(sorted(f"{shape} {dtype} {device}" for shape, dtype, device in kinds))
        raise OperatorError(f"operators in a mean must agree in shape, dtype and device, but got {texts}")

"""Which cotangents are sent backward: the exact Fisher, samples of it, or the empirical one."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from cheapgrad.curvature.kronecker.outputs import AbstractOutputs
from cheapgrad.errors import BatchError, check_count


class AbstractFisher(abc.ABC):
    """Columns s at the outputs whose outer products sum to an example's curvature: ``Σ_s E[s sᵀ] = S Sᵀ``."""

    @abc.abstractmethod
    def cotangents(self, outputs: Tensor, targets: Tensor | None, likelihood: AbstractOutputs) -> Iterator[Tensor]:
        """Yield cotangents like `outputs`, one backward pass each; every example has its own column."""


@final
@dataclass(frozen=True)
class ExactFisher(AbstractFisher):
    """All columns of the square root: the Gauss–Newton matrix, at one backward pass per output of an example."""

    def cotangents(self, outputs: Tensor, targets: Tensor | None, likelihood: AbstractOutputs) -> Iterator[Tensor]:
        """Yield the columns of S, for one position of an example at a time."""
        root = likelihood.square_root(outputs).reshape(outputs.shape[0], -1, outputs.shape[-1], outputs.shape[-1])
        for position in range(root.shape[1]):
            for column in range(root.shape[3]):
                cotangent = outputs.new_zeros(outputs.shape[0], root.shape[1], root.shape[2])
                cotangent[:, position] = root[:, position, :, column]
                yield cotangent.reshape(outputs.shape)


@final
@dataclass(frozen=True)
class SampledFisher(AbstractFisher):
    """Targets drawn from the model: unbiased for the exact Fisher, at one backward pass per sample.

    Attributes:
        samples: drawn per example, at least 1.
        generator: source of the draws; torch's default without it.

    Raises:
        BudgetError: if `samples` is no whole number of at least 1.
    """

    samples: int = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_count("samples", self.samples)

    def cotangents(self, outputs: Tensor, targets: Tensor | None, likelihood: AbstractOutputs) -> Iterator[Tensor]:
        """Yield gradients at sampled targets, divided by the root of their number."""
        for _ in range(self.samples):
            drawn = likelihood.sample_targets(outputs, self.generator)
            yield likelihood.score(outputs, drawn) / math.sqrt(self.samples)


@final
@dataclass(frozen=True)
class EmpiricalFisher(AbstractFisher):
    """The gradients at the data's own targets: one backward pass, and not the Gauss–Newton matrix.

    References:
        Kunstner, Balles and Hennig (2019), Limitations of the empirical Fisher approximation.
    """

    def cotangents(self, outputs: Tensor, targets: Tensor | None, likelihood: AbstractOutputs) -> Iterator[Tensor]:
        """Yield the gradients at the given targets."""
        if targets is None:
            raise BatchError("the empirical Fisher needs targets, but the batch is None beside its inputs")
        yield likelihood.score(outputs, targets)

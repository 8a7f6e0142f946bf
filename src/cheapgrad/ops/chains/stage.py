"""What a row-wise operation promises to the chain it is part of."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops.plan import PoisonedRows, RootUse, poison
from cheapgrad.sketch import AbstractStrategy

#: Rebuilds the input of a stage on the kept rows, from what an earlier stage holds.
Rebuild = Callable[[], Tensor]


@dataclass(frozen=True)
class KeptRows:
    """The rows that a backward pass works on.

    Attributes:
        index_K: their indices, or None for all rows.
        count: N, how many rows there are.
        watch: called with the two factors of each dW on the kept rows, and W; or None.
    """

    index_K: Tensor | None
    count: int
    watch: Callable[[Tensor, Tensor, Tensor | None], None] | None = None

    def contract(self, grad_KO: Tensor, stored_KI: Tensor, weight_OI: Tensor) -> Tensor:
        """Return ``G.T X``, summed over the kept rows: the gradient of W."""
        stored_KI = stored_KI.to(grad_KO.dtype)
        if self.watch is not None:
            self.watch(grad_KO, stored_KI, weight_OI)
        return grad_KO.mT @ stored_KI

    def take(self, tensor_ND: Tensor) -> Tensor:
        """Return the kept rows of a tensor whose leading axes, flattened, are the rows; possibly a view."""
        matrix_ND = tensor_ND.reshape(self.count, -1)
        return matrix_ND if self.index_K is None else matrix_ND.index_select(0, self.index_K)

    def take_visibly(self, tensor_ND: Tensor) -> Tensor:
        """Return the kept rows; the first one is NaN if any row, kept or not, holds a NaN."""
        rows_KD = self.take(tensor_ND)
        if self.index_K is not None:
            rows_KD[:1].add_(poison(tensor_ND))
        return rows_KD

    def decode(self, codec: AbstractStrategy, codes: tuple[Tensor, ...], features: int, dtype: torch.dtype) -> Tensor:
        """Return the kept rows of what was encoded; the first one is NaN if anything encoded was not finite."""
        stored = codec.restore(codes, self.count, features, dtype)
        return stored.dense() if self.index_K is None else PoisonedRows(stored, codes).rows(self.index_K)


class AbstractOpenedStage(abc.ABC):
    """A stage in a backward pass: what it holds, on the kept rows."""

    @abc.abstractmethod
    def output(self) -> Tensor:
        """Return the stage's output on the kept rows ``[K, O]``, or an unbiased stand-in for it."""

    @abc.abstractmethod
    def pull_back(self, grad_KO: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """Return the vector-Jacobian products with the input and with each parameter.

        Args:
            grad_KO: cotangent of the output on the kept rows.
            wanted: whether the input, and each parameter, needs a gradient.
        """


class AbstractStage(abc.ABC):
    """A row-wise operation: row n of the output depends on row n of the input, and on parameters.

    A stage is a value: it holds options, never tensors. What it needs of its input at backward time is its record, a
    tuple of plain tensors that the chain saves.
    """

    #: Codec for what is kept of the input, or None to keep it as it is.
    stored: AbstractStrategy | None

    #: Told when the input is kept for others, or None.
    use: RootUse | None = None

    #: Whether the record is made from the output instead of the input.
    keeps_output: bool = False

    @property
    @abc.abstractmethod
    def rebuilds_output(self) -> bool:
        """Whether an opened stage can return its output more cheaply than by storing it."""

    @property
    def multiplies(self) -> bool:
        """Whether its products cost enough for sampled rows to save time."""
        return False

    def options(self) -> tuple[Any, ...]:
        """Return name and options as plain data, from which compiled graphs make the stage again; see `operator`.

        Numbers and sizes are left out: they may be symbols.
        """
        raise RuntimeError("this stage is no layer of its own")

    def numbers(self) -> tuple[float, ...]:
        """Return the options that are numbers."""
        raise RuntimeError("this stage is no layer of its own")

    def holding_output(self) -> AbstractStage:
        """Return the stage with a record made from its output, where autograd too holds that; else the stage itself.

        What follows outside of the chain holds its input, which is this output: the two are then one tensor.
        """
        return self

    def alone(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        """Return the output with the backward pass that the stage has where nothing joins it, PyTorch's by default."""
        return self.forward(x, parameters)

    @abc.abstractmethod
    def forward(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        """Return the output, bit for bit as PyTorch does."""

    @abc.abstractmethod
    def record(self, x: Tensor, parameters: tuple[Tensor | None, ...], is_rebuilt: bool) -> tuple[Tensor, ...]:
        """Return what backward needs of the input.

        Args:
            x: the input, detached, shape ``[..., I]``.
            parameters: the stage's parameters.
            is_rebuilt: whether the stage before can rebuild `x` at backward time.
        """

    @abc.abstractmethod
    def open(
        self,
        record: tuple[Tensor, ...],
        parameters: tuple[Tensor | None, ...],
        rows: KeptRows,
        rebuild: Rebuild | None,
    ) -> AbstractOpenedStage:
        """Return the stage, ready for the backward pass.

        Args:
            record: what `record` returned.
            parameters: the stage's parameters.
            rows: the rows to work on.
            rebuild: returns the stage's input on the kept rows, or None where nothing rebuilds it.
        """

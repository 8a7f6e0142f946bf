"""The linear map as a stage: ``Y = X W.T + b``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cheapgrad.ops.chains.stage import AbstractOpenedStage, AbstractStage, KeptRows, Rebuild
from cheapgrad.ops.linear import may_need_grad, multiply
from cheapgrad.ops.plan import RootUse
from cheapgrad.sketch import AbstractStrategy, DenseMatrix, Moment, Operands


@dataclass(frozen=True)
class LinearStage(AbstractStage):
    """A linear map, with parameters weight ``[O, I]`` and bias ``[O]`` or None.

    Attributes:
        stored: codec for what is kept of X, or None to keep X.
        is_flat: multiply rows as one matrix, as modules do whose stock forward flattens them.
        use: told when the input is kept for others, or None.
    """

    stored: AbstractStrategy | None = None
    is_flat: bool = False
    use: RootUse | None = field(default=None, compare=False, repr=False)

    @property
    def rebuilds_output(self) -> bool:
        """No: a product is too dear to be formed twice."""
        return False

    @property
    def multiplies(self) -> bool:
        """Yes: this is where sampled rows save time."""
        return True

    def forward(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
        """Return ``x @ weight.T + bias``."""
        weight, bias = parameters
        if not self.is_flat:
            return multiply(x, present(weight), bias)
        rows = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), present(weight), bias)
        return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])

    def record(self, x: Tensor, parameters: tuple[Tensor | None, ...], is_rebuilt: bool) -> tuple[Tensor, ...]:
        """Return X, or its codes; nothing where X is rebuilt or the weight is frozen."""
        if is_rebuilt or not may_need_grad(present(parameters[0])):
            return ()
        if self.stored is None:
            return (x,)
        return self.stored.store(Operands(Moment.STORED, DenseMatrix(x.reshape(-1, x.shape[-1]))))

    def open(
        self,
        record: tuple[Tensor, ...],
        parameters: tuple[Tensor | None, ...],
        rows: KeptRows,
        rebuild: Rebuild | None,
    ) -> AbstractOpenedStage:
        """Return the stage, with a way to its input."""
        return _OpenedLinear(present(parameters[0]), rows, self.input_rows(record, parameters, rows, rebuild))

    def input_rows(
        self,
        record: tuple[Tensor, ...],
        parameters: tuple[Tensor | None, ...],
        rows: KeptRows,
        rebuild: Rebuild | None,
    ) -> Rebuild | None:
        """Return the way to X on the kept rows, or None where nothing is kept of it; arguments as for `open`."""
        if not record:
            return rebuild
        if self.stored is None:
            return lambda: rows.take_visibly(record[0])
        codec, weight_OI = self.stored, present(parameters[0])
        return lambda: rows.decode(codec, record, weight_OI.shape[1], weight_OI.dtype)


class _OpenedLinear(AbstractOpenedStage):
    def __init__(self, weight_OI: Tensor, rows: KeptRows, input_KI: Rebuild | None) -> None:
        self._weight_OI = weight_OI
        self._rows = rows
        self._input_KI = input_KI

    def output(self) -> Tensor:
        """Refuse: products are stored, not rebuilt."""
        raise RuntimeError("the output of a linear map is stored, not rebuilt")

    def pull_back(self, grad_KO: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """Return ``G W``, ``G.T X`` and ``1.T G``."""
        wants_input, wants_weight, wants_bias = wanted
        grad_KO = grad_KO.to(self._weight_OI.dtype)
        grad_weight = None
        if wants_weight and self._input_KI is not None:
            grad_weight = self._rows.contract(grad_KO, self._input_KI(), self._weight_OI)
        grad_bias = grad_KO.sum(0) if wants_bias else None
        grad_input = grad_KO @ self._weight_OI if wants_input else None
        return grad_input, (grad_weight, grad_bias)


def present(tensor: Tensor | None) -> Tensor:
    """Return a weight, which no linear stage is without."""
    if tensor is None:
        raise RuntimeError("a linear stage has a weight")
    return tensor

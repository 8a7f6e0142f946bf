"""A small linear layer whose exact gradients are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.errors import ShapeError, check_count


@dataclass(frozen=True)
class LayerProblem:
    """The tensors of one linear layer ``Y = X W.T``, in float64.

    Attributes:
        stored_NI: X.
        cotangent_NO: G.
        weight_OI: W.
        examples: B; the N rows are B consecutive blocks of equal length.
    """

    stored_NI: Tensor
    cotangent_NO: Tensor
    weight_OI: Tensor
    examples: int = 1

    @property
    def input_gradient(self) -> Tensor:
        """The exact ``dX = G W``."""
        return self.cotangent_NO @ self.weight_OI

    @property
    def weight_gradient(self) -> Tensor:
        """The exact ``dW = G.T X``."""
        return self.cotangent_NO.mT @ self.stored_NI


def make_layer_problem(
    rows: int = 21, inputs: int = 11, outputs: int = 5, examples: int = 7, seed: int = 0
) -> LayerProblem:
    """Return a problem whose rows, features and outputs are of very unequal size.

    Norms are spread over a factor of ten, a few of them large; the rows of X and G share a direction, so that the atoms
    of dW are correlated. The default sizes are multiples of nothing that a kernel or a packing would like.

    Args:
        rows: N, a multiple of `examples`.
        inputs: I.
        outputs: O.
        examples: B.
        seed: of the private generator that draws the tensors.

    Raises:
        BudgetError: if a size is not a whole number of at least 1.
        ShapeError: if `rows` is not a multiple of `examples`.

    >>> make_layer_problem().weight_gradient.shape
    torch.Size([5, 11])
    """
    for name, size in (("rows", rows), ("inputs", inputs), ("outputs", outputs), ("examples", examples)):
        check_count(name, size)
    if rows % examples:
        raise ShapeError(f"rows must be a multiple of examples, but got rows={rows} and examples={examples}")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def spread(count: int) -> Tensor:
        return 0.3 + 3.0 * torch.rand(count, 1, generator=generator, dtype=torch.float64) ** 2

    stored_NI = (draw(rows, inputs) + 0.5 * draw(1, inputs)) * spread(rows) * spread(inputs).T
    cotangent_NO = (draw(rows, outputs) + 0.5 * draw(1, outputs)) * spread(rows) * spread(outputs).T
    return LayerProblem(stored_NI, cotangent_NO, draw(outputs, inputs) * spread(outputs), examples)

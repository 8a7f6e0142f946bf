"""Layers of the table, each with the problem that shows in one draw whether forward and backward agree.

The input is the identity (row n holds a one in feature n) and the cotangent is diagonal, so that dW is diagonal. A draw
that only selects leaves it diagonal exactly if backward uses the very sample that forward drew; otherwise rows of one
sample meet rows of another and dW is zero almost everywhere, or not diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.convert.models import Conv1D

# Rows, input features and output features alike.
SIZE = 32


@dataclass(frozen=True)
class LayerCase:
    """A layer with 32 input and output features, and the shape in which its 32 rows come.

    Attributes:
        name: what the table calls it.
        build: makes the stock layer, without bias where it can.
        rows: shape of the rows: ``(32,)`` for a matrix, ``(B, T)`` for a sequence, ``(B, height, ...)`` for images.
        is_convolution: whether features are the second axis instead of the last.
        is_transposed: whether the weight is ``[I, O, ...]``.
    """

    name: str
    build: Callable[[], nn.Module]
    rows: tuple[int, ...]
    is_convolution: bool = False
    is_transposed: bool = False

    def _arrange(self, matrix: Tensor) -> Tensor:
        tensor = matrix.view(*self.rows, SIZE)
        return tensor.movedim(-1, 1).contiguous() if self.is_convolution else tensor

    def identity_input(self) -> Tensor:
        """Return the identity as this layer's input."""
        return self._arrange(torch.eye(SIZE))

    def diagonal_cotangent(self) -> Tensor:
        """Return ``diag(1, ..., 2)``, exact in bfloat16, as a cotangent of this layer's output."""
        return self._arrange(torch.diag(1 + torch.arange(SIZE) / SIZE))

    def matrix(self, weight_gradient: Tensor) -> Tensor:
        """Return gradients ``[..., weight shape]`` as matrices ``[..., O, I]``; of a kernel, its centre."""
        if self.is_convolution:
            for _ in range(len(self.rows) - 1):
                weight_gradient = weight_gradient[..., weight_gradient.shape[-1] // 2]
        return weight_gradient.mT if self.is_transposed else weight_gradient


def _convolution(stock: type[nn.Module], rows: tuple[int, ...]) -> LayerCase:
    return LayerCase(
        stock.__name__,
        lambda: stock(SIZE, SIZE, 3, padding=1, bias=False),
        rows,
        is_convolution=True,
        is_transposed=stock.__name__.startswith("ConvTranspose"),
    )


LINEAR = LayerCase("Linear", lambda: nn.Linear(SIZE, SIZE, bias=False), (SIZE,))
SEQUENCE = LayerCase("Linear on sequences", lambda: nn.Linear(SIZE, SIZE, bias=False), (8, 4))
TRANSPOSED_LINEAR = LayerCase("Conv1D of transformers", lambda: Conv1D(SIZE, SIZE), (8, 4), is_transposed=True)
CONVOLUTION_2D = _convolution(nn.Conv2d, (8, 2, 2))
# Three axes with a depth of 4: at depth 2 PyTorch 2.13's own dW of a kernel of 3 is wrong in bfloat16 on CPU.
OTHER_CONVOLUTIONS = (
    _convolution(nn.Conv1d, (8, 4)),
    _convolution(nn.Conv3d, (8, 4, 1, 1)),
    _convolution(nn.ConvTranspose1d, (8, 4)),
    _convolution(nn.ConvTranspose2d, (8, 2, 2)),
    _convolution(nn.ConvTranspose3d, (8, 4, 1, 1)),
)

"""The sampled backward pass of a chain of row-wise operations by its definition, with dense matrices and no autograd.

Every row is computed, forward and backward. The cotangent of a row that was not kept is zero; that of a kept row is
multiplied by its weight, once for every time it was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class OracleNorm:
    """Layer normalisation over the last axis."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float = 1e-5

    def _normalised(self, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        centred = x_NI - x_NI.mean(1, keepdim=True)
        deviation = (centred.pow(2).mean(1, keepdim=True) + self.eps).sqrt()
        return centred / deviation, deviation

    def forward(self, x_NI: Tensor) -> Tensor:
        """Return the normalised rows."""
        y = self._normalised(x_NI)[0]
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def backward(self, x_NI: Tensor, grad_NI: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of the input, by the Jacobian of every row, and of the parameters."""
        features = x_NI.shape[1]
        x_hat, deviation = self._normalised(x_NI)
        identity = torch.eye(features, dtype=x_NI.dtype) - 1 / features
        jacobian = (identity - x_hat.unsqueeze(2) * x_hat.unsqueeze(1) / features) / deviation.unsqueeze(2)
        scaled = grad_NI if self.weight is None else grad_NI * self.weight
        gradients = [] if self.weight is None else [(grad_NI * x_hat).sum(0)]
        gradients += [] if self.bias is None else [grad_NI.sum(0)]
        return torch.einsum("ni,nij->nj", scaled, jacobian), gradients


@dataclass(frozen=True)
class OracleLinear:
    """``x W.T + b``."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x_NI: Tensor) -> Tensor:
        """Return the product."""
        product = torch.einsum("ni,oi->no", x_NI, self.weight)
        return product if self.bias is None else product + self.bias

    def backward(self, x_NI: Tensor, grad_NO: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of the input and of the parameters."""
        gradients = [torch.einsum("no,ni->oi", grad_NO, x_NI)]
        gradients += [] if self.bias is None else [grad_NO.sum(0)]
        return torch.einsum("no,oi->ni", grad_NO, self.weight), gradients


@dataclass(frozen=True)
class OracleActivation:
    """An element-wise function.

    Attributes:
        function: the function.
        slope: its derivative, on NumPy arrays.
    """

    function: Callable[[Tensor], Tensor]
    slope: Callable[[np.ndarray], np.ndarray]

    def forward(self, x_NI: Tensor) -> Tensor:
        """Return ``f(x)``."""
        return self.function(x_NI)

    def backward(self, x_NI: Tensor, grad_NI: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return ``f'(x) * grad``."""
        return grad_NI * torch.as_tensor(self.slope(x_NI.numpy())), []


Stage = OracleNorm | OracleLinear | OracleActivation


def chain_forward(stages: Sequence[Stage], x_NI: Tensor) -> Tensor:
    """Return the output of the chain."""
    for stage in stages:
        x_NI = stage.forward(x_NI)
    return x_NI


def chain_gradients(
    stages: Sequence[Stage], x_NI: Tensor, cotangent_NO: Tensor, weight_N: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of the root and of all parameters in order, where row n counts ``weight_N[n]`` times."""
    inputs = [x_NI]
    for stage in stages[:-1]:
        inputs.append(stage.forward(inputs[-1]))
    grad, gradients = cotangent_NO * weight_N.unsqueeze(1), []
    for stage, x in zip(reversed(stages), reversed(inputs), strict=True):
        grad, of_stage = stage.backward(x, grad)
        gradients = of_stage + gradients
    return grad, gradients

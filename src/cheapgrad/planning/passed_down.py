"""Noise, and what the rows of a gradient become in all layers below."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.planning.capture import Call


@dataclass(frozen=True)
class Noise:
    """Expected squared error of the gradient.

    Attributes:
        own: of the parameters of the layers that are sketched.
        passed_down: of the parameters of all layers below them.
    """

    own: float = 0.0
    passed_down: float = 0.0

    @property
    def total(self) -> float:
        """Of all parameters."""
        return self.own + self.passed_down

    def scaled(self, factor: float) -> Noise:
        """Return it multiplied by a factor."""
        return Noise(self.own * factor, self.passed_down * factor)

    def __add__(self, other: Noise) -> Noise:
        return Noise(self.own + other.own, self.passed_down + other.passed_down)


class PassedDown:
    """What the rows of a gradient dX become further down, projected on random directions.

    For a row n of dX, ``v_zn = ⟨u_zn, dX_n⟩`` is the product of z with what that row alone adds to the gradients of all
    parameters below; over z its square has the expectation ``‖Jᵀ dX_n‖²``. For convolutions a row is an example.
    """

    def __init__(self) -> None:
        self._products: dict[int, list[Tensor]] = {}

    def take(self, call: Call, tangent: Tensor) -> None:
        """Take in the tangent of a call's input."""
        if call.input_gradient is None:
            return
        product = tangent * call.input_gradient
        rows = product.sum(-1).flatten() if call.is_matrix else product.flatten(1).sum(1)
        self._products.setdefault(id(call), []).append(rows.double())

    def of(self, call: Call) -> Tensor | None:
        """Return v for all probes and rows, shape ``[probes, N]``; None where nothing is below."""
        products = self._products.get(id(call))
        return None if products is None else torch.stack(products)

    def amplification(self, call: Call) -> float:
        """Return the squared error below for each unit of squared error in the rows of dX."""
        products_ZN = self.of(call)
        if products_ZN is None or call.input_gradient is None:
            return 0.0
        squared_norm = float(call.input_gradient.double().square().sum())
        return float(products_ZN.square().sum(1).mean()) / squared_norm if squared_norm else 0.0


def row_norms(call: Call, cotangent: Tensor) -> Tensor:
    """Return the norms of the rows of a cotangent, of its examples for a convolution, in float64.

    Args:
        call: of the layer.
        cotangent: in the shape of its output.
    """
    rows = cotangent.reshape(-1, cotangent.shape[-1]) if call.is_matrix else cotangent.flatten(1)
    return rows.double().norm(dim=1)


def scale_rows(call: Call, scale: Tensor) -> Tensor:
    """Return the call's cotangent with its rows, or examples, multiplied by factors.

    Args:
        call: of the layer.
        scale: one factor for each.
    """
    cotangent = call.use.cotangent
    shape = (*cotangent.shape[:-1], 1) if call.is_matrix else (-1, *[1] * (cotangent.dim() - 1))
    return cotangent * scale.to(cotangent.dtype).view(shape)

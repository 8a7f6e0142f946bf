"""The rectifier with a chosen derivative at zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cheapgrad.errors import ConventionError


def relu(input: Tensor, at_zero: float = 0.0) -> Tensor:
    """Return ``max(0, x)`` with the derivative `at_zero` where x is exactly zero.

    ``d relu(x) / dx = 0 (x < 0), s (x = 0), 1 (x > 0)``, and the cotangent is multiplied by it: an incoming 3 leaves as
    3s. Values are those of `torch.relu`; torch's own derivative is s = 0.

    Args:
        input: any shape, floating point.
        at_zero: the derivative s at zero; finite. The limiting gradients are 0 and 1, what lies between them is a
            Clarke subgradient of the rectifier, and anything else is neither.

    Returns:
        A tensor of the same shape and dtype; reverse mode, forward mode, `vmap` and higher derivatives work.

    Raises:
        ConventionError: `at_zero` is not a finite number.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> (3 * relu(x, at_zero=0.5)).sum().backward()
        >>> x.grad
        tensor([0.0000, 1.5000, 3.0000])

    References:
        Bertoin, Bolte, Gerchinovitz, Pauwels, "Numerical influence of ReLU'(0) on backpropagation", NeurIPS 2021. Code
        that circulates with it writes s in place of the cotangent instead of multiplying; this does not.
    """
    slope = check_slope(at_zero)
    if slope == 0.0:
        return torch.relu(input)
    return torch.where(input == 0, input * slope, torch.relu(input))


def check_slope(at_zero: object) -> float:
    """Return a derivative at zero as a float if it is a finite number; raise `ConventionError` otherwise."""
    if not isinstance(at_zero, (int, float)) or isinstance(at_zero, bool) or not math.isfinite(at_zero):
        raise ConventionError(
            f"the derivative of a ReLU at zero must be a finite number, but got {at_zero!r}; torch's own is 0.0, "
            "and Clarke subgradients are those in [0, 1]"
        )
    return float(at_zero)

"""Units in which noise is counted: every parameter by what an optimizer divides its gradient by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cheapgrad.auditing.preconditioned_noise import read_second_moments

# A gradient below this many units in the last place of the largest one is zero but for rounding.
_ROUNDING_ULPS = 32


@dataclass(frozen=True)
class Units:
    """What the gradient of each parameter is multiplied by before it is looked at.

    Attributes:
        factors: one for each parameter; 0 leaves it out.
        remarks: what a reader has to know.
    """

    factors: tuple[float, ...]
    remarks: tuple[str, ...] = ()

    def scale(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """Return a gradient in these units."""
        return [value if factor == 1 else value * factor for value, factor in zip(gradient, self.factors, strict=True)]


def plain_units(parameters: Sequence[nn.Parameter]) -> Units:
    """Return units in which every entry of the gradient counts as it is."""
    return Units((1.0,) * len(parameters))


def optimizer_units(
    optimizer: torch.optim.Optimizer, names: Sequence[str], parameters: Sequence[nn.Parameter]
) -> Units:
    r"""Return units of an optimizer's steps, parameter by parameter.

    ``f_t = 1 / (√v̄_t + ε)``, v̄_t being the mean of the optimizer's second moments over all entries of parameter t: one
    factor for each, so that all laws hold as they are. They are multiplied by one number for which the mean square of
    the factors over all entries is 1.

    Args:
        optimizer: as for `read_second_moments`.
        names: of the parameters.
        parameters: those that are trained.

    Raises:
        OptimizerStateError: the optimizer keeps no second moments, or has stepped none of the parameters.
    """
    found = read_second_moments(optimizer, names, parameters)
    roots = [math.sqrt(float(moment.mean())) for moment in found.moments]
    largest = math.sqrt(max(float(moment.max()) for moment in found.moments))
    factors = [0.0] * len(parameters)
    silent = []
    for position, root, epsilon in zip(found.positions, roots, found.epsilons, strict=True):
        if root <= _ROUNDING_ULPS * torch.finfo(parameters[position].dtype).eps * largest:
            # What is added to it would count as infinitely much, and does nothing: its exact gradient does not either.
            silent.append(names[position])
        else:
            factors[position] = 1 / (root + epsilon)
    entries = sum(parameter.numel() for parameter in parameters)
    squares = math.fsum(factor**2 * parameter.numel() for factor, parameter in zip(factors, parameters, strict=True))
    unit = math.sqrt(entries / squares) if squares else 0.0
    remarks = [found.remark] if found.remark else []
    if silent:
        remarks.append(
            f"the gradient of {len(silent)} parameters is zero but for rounding, the first one is {silent[0]}; what is "
            "added to them is not counted"
        )
    return Units(tuple(unit * factor for factor in factors), tuple(remarks))

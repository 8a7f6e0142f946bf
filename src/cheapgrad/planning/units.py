"""Units in which noise is counted: every parameter by what an optimizer divides its gradient by."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cheapgrad.auditing.preconditioned_noise import read_second_moments
from cheapgrad.errors import OptimizerStateError

# A root mean square below this share of the largest one is rounding of single precision, whatever it was computed in.
_ROUNDING = 32 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Units:
    """What the gradient of each parameter is multiplied by before it is looked at.

    Attributes:
        factors: one for each parameter; 0 leaves it out.
        remarks: what a reader has to know.
        of_optimizer: whether they are those of an optimizer's steps.
    """

    factors: tuple[float, ...]
    remarks: tuple[str, ...] = ()
    of_optimizer: bool = False

    def scale(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """Return a gradient in these units, in single precision at least where that changes it."""
        return [
            value if factor == 1 else value.to(torch.promote_types(value.dtype, torch.float32)) * factor
            for value, factor in zip(gradient, self.factors, strict=True)
        ]


def name_units(of_optimizer: bool) -> str:
    """Return what comes behind a figure of noise: nothing, or that it is in units of the optimizer's steps.

    >>> name_units(False), name_units(True)
    ('', " in units of the optimizer's steps")
    """
    return " in units of the optimizer's steps" if of_optimizer else ""


def plain_units(parameters: Sequence[nn.Parameter]) -> Units:
    """Return units in which every entry of the gradient counts as it is."""
    return Units((1.0,) * len(parameters))


def optimizer_units(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    parameters: Sequence[nn.Parameter],
    rounding: Collection[str] = (),
) -> Units:
    r"""Return units of an optimizer's steps, parameter by parameter.

    ``f_t = 1 / (√v̄_t + ε)``, v̄_t being the mean of the optimizer's second moments over all entries of parameter t: one
    factor for each, so that all laws hold as they are. They are multiplied by one number for which the mean square of
    the factors over all entries is 1.

    Args:
        optimizer: as for `read_second_moments`.
        names: of the parameters.
        parameters: those that are trained.
        rounding: names of those whose gradient is known to be nothing but rounding.

    Raises:
        OptimizerStateError: the optimizer keeps no second moments, has stepped none of the parameters, or has seen
            nothing but zeros.
    """
    found = read_second_moments(optimizer, names, parameters)
    roots = [math.sqrt(moment.mean) for moment in found.known]
    factors = [0.0] * len(parameters)
    silent = []
    for moment, root in zip(found.known, roots, strict=True):
        if root <= _ROUNDING * max(roots) or names[moment.position] in rounding:
            # What is added to it would count as infinitely much, and does nothing: its exact gradient does not either.
            silent.append(names[moment.position])
        else:
            factors[moment.position] = 1 / (root + moment.epsilon)
    entries = sum(parameter.numel() for parameter in parameters)
    squares = math.fsum(factor**2 * parameter.numel() for factor, parameter in zip(factors, parameters, strict=True))
    if not squares:
        raise OptimizerStateError(
            f"the {type(optimizer).__name__} has seen no gradient but zeros and rounding, so that its steps have no "
            "unit; pass it after some steps of training"
        )
    unit = math.sqrt(entries / squares)
    remarks = list(found.remarks)
    if silent:
        remarks.append(
            f"the gradient of {len(silent)} parameters is zero but for rounding, the first one is {silent[0]}; what is "
            "added to them is not counted"
        )
    return Units(tuple(unit * factor for factor in factors), tuple(remarks), of_optimizer=True)

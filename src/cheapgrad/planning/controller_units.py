"""In which units a controller counts the noise of each layer: those of an optimizer's steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from cheapgrad.errors import OptimizerStateError, describe_value
from cheapgrad.planning.units import optimizer_units

# So many steps without a single one of the optimizer's own are no loss scaler's first ones any more.
_WAITING_STEPS = 32


class StepUnits:
    """What the weights' gradients of each steered layer are multiplied by before their noise is counted.

    Args:
        optimizer: whose steps are the unit; as for `optimizer_units`.
        layers: that are steered, with their names.

    Raises:
        OptimizerStateError: if it is no optimizer, or does not hold the weight of a layer that is trained.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: Iterable[tuple[str, nn.Module]]) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise OptimizerStateError(
                f"optimizer must be a torch.optim.Optimizer, but is {describe_value(optimizer)}; pass the one that "
                "steps the controlled layers, of a scheduler its .optimizer"
            )
        self._optimizer = optimizer
        # Tensors without a second axis are biases.
        self._weights = {
            layer: [
                (f"{layer}.{name}".removeprefix("."), value)
                for name, value in module.named_parameters()
                if _is_weight(value)
            ]
            for layer, module in layers
        }
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        strange = [name for weights in self._weights.values() for name, value in weights if value not in held]
        if strange:
            raise OptimizerStateError(
                f"the {type(optimizer).__name__} does not hold {len(strange)} weights of controlled layers, the first "
                f"one is {strange[0]}; pass the optimizer that steps them, made for this very model and not for a copy "
                "of it, or control without optimizer=, in units of the gradient itself"
            )

    def read(self, steps: int) -> dict[str, float]:
        """Return a factor for each layer; none before the optimizer's first step.

        Several weights of a layer count together, by the root of the mean square of their factors over all entries.

        Args:
            steps: of the training so far.

        Raises:
            OptimizerStateError: if the optimizer keeps no second moments, or has made no step in many.
        """
        weights = [each for own in self._weights.values() for each in own]
        if not any(self._optimizer.state.get(value) for _, value in weights):
            if steps >= _WAITING_STEPS:
                raise OptimizerStateError(
                    f"the {type(self._optimizer).__name__} has no state for any weight of the controlled layers after "
                    f"{steps} steps of the controller: it keeps none, as SGD without momentum does, or has made no "
                    "step; call controller.step() after optimizer.step(), or control without optimizer="
                )
            return {}
        names, parameters = zip(*weights, strict=True)
        factors = dict(zip(names, optimizer_units(self._optimizer, names, parameters).factors, strict=True))
        return {
            layer: _join([(factors[name], value.numel()) for name, value in own])
            for layer, own in self._weights.items()
        }


def _is_weight(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and parameter.requires_grad


def _join(factors: list[tuple[float, int]]) -> float:
    entries = sum(count for _, count in factors)
    return math.sqrt(sum(factor**2 * count for factor, count in factors) / entries) if entries else 1.0

"""In which units a controller counts the noise of each weight: those of an optimizer's steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from cheapgrad.auditing.preconditioned_noise import has_stepped, keeps_second_moments
from cheapgrad.errors import OptimizerStateError, describe_value
from cheapgrad.planning.units import optimizer_units

# So many steps of the controller without one of the optimizer's are no loss scaler's first ones any more.
_WAITING_STEPS = 32
# Between a parameter and what a product is formed with there are casts and views, no more than so many.
_MOST_VIEWS = 4


class StepUnits:
    """What the gradient of each weight under control is multiplied by before its noise is counted.

    Args:
        optimizer: whose steps are the unit; as for `optimizer_units`.
        layers: that are steered, with their names.

    Attributes:
        names: of all weights of the layers.
        remarks: what a reader has to know about what was read last.

    Raises:
        OptimizerStateError: if it is no optimizer, keeps no second moments, or does not hold a weight that is trained;
            or if none is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: Iterable[tuple[str, nn.Module]]) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise OptimizerStateError(
                f"optimizer must be a torch.optim.Optimizer, but is {describe_value(optimizer)}; pass the one that "
                "steps the controlled layers, of a scheduler its .optimizer"
            )
        self._optimizer = optimizer
        # Products have two factors with an axis each: what has fewer axes is a bias or a scale.
        self._weights = {
            layer: {
                f"{layer}.{name}".removeprefix("."): value
                for name, value in module.named_parameters()
                if value.dim() == 2
            }
            for layer, module in layers
        }
        self.names = frozenset(name for own in self._weights.values() for name in own)
        self.remarks: tuple[str, ...] = ()
        self._waited = 0
        if not self._list_trained():
            raise OptimizerStateError(
                "none of the controlled layers has a weight that is trained, so that its noise has no unit; control "
                "layers whose weights require gradients"
            )

    def _list_trained(self) -> dict[str, nn.Parameter]:
        """Return the weights that are trained at the moment.

        Raises:
            OptimizerStateError: if the optimizer does not hold them all, or keeps no second moments.
        """
        kind = type(self._optimizer).__name__
        weights = {name: value for own in self._weights.values() for name, value in own.items() if value.requires_grad}
        groups = {parameter: group for group in self._optimizer.param_groups for parameter in group["params"]}
        strange = [name for name, value in weights.items() if value not in groups]
        if strange:
            raise OptimizerStateError(
                f"the {kind} does not hold {len(strange)} weights of controlled layers, the first one is {strange[0]}; "
                "pass the optimizer that steps them, made for this very model and not for a copy of it, or control "
                "without optimizer=, in units of the gradient itself"
            )
        if not all(keeps_second_moments(groups[value]) for value in weights.values()):
            raise OptimizerStateError(
                f"the {kind} keeps no running mean of squared gradients, entry by entry, so that its steps have no "
                "unit; pass Adam, AdamW, NAdam, RAdam or RMSprop, or control without optimizer=, in units of the "
                "gradient itself"
            )
        return weights

    def read(self) -> dict[str, float]:
        """Return a factor for each weight, by its name; none before the optimizer's first step.

        Raises:
            OptimizerStateError: if the optimizer keeps no second moments, or has made no step in many.
        """
        weights, kind = self._list_trained(), type(self._optimizer).__name__
        if not any(has_stepped(self._optimizer, value) for value in weights.values()):
            self._waited += 1
            if self._waited > _WAITING_STEPS:
                raise OptimizerStateError(
                    f"the {kind} has stepped no weight of the controlled layers in {_WAITING_STEPS} steps of the "
                    "controller; call controller.step() after optimizer.step(), or control without optimizer="
                )
            return {}
        units = optimizer_units(self._optimizer, list(weights), list(weights.values()))
        self._waited, self.remarks = 0, units.remarks
        return dict(zip(weights, units.factors, strict=True))

    def resolve(self, factors: Mapping[str, float]) -> Callable[[str, Tensor | None], float]:
        """Return what finds the factor of a product's weight.

        Where the weight is not at hand, as in the lowest layer, it is that of the layer that draws: of several weights
        the root of the mean square over all entries.

        Args:
            factors: by the weight's name.
        """
        by_weight = {
            id(value): factors[name] for own in self._weights.values() for name, value in own.items() if name in factors
        }
        by_layer = {
            layer: _join([(factors[name], value.numel()) for name, value in own.items() if name in factors])
            for layer, own in self._weights.items()
        }

        def find(layer: str, weight: Tensor | None) -> float:
            return by_weight.get(id(_find_parameter(weight)), by_layer.get(layer, 1.0))

        return find


def _find_parameter(weight: Tensor | None) -> Tensor | None:
    """Return the parameter that a weight is, or is a cast or a view of."""
    if weight is None or weight.is_leaf:
        return weight
    node = weight.grad_fn
    for _ in range(_MOST_VIEWS):
        variable = getattr(node, "variable", None)
        if node is None or variable is not None:
            return variable
        above = [each for each, _ in node.next_functions if each is not None]
        node = above[0] if len(above) == 1 else None
    return None


def _join(factors: list[tuple[float, int]]) -> float:
    entries = sum(count for _, count in factors)
    return math.sqrt(sum(factor**2 * count for factor, count in factors) / entries) if entries else 1.0

"""What linear maps and convolutions have in common: weights that are multiplied with."""

from __future__ import annotations

from torch import Tensor, nn

from cheapgrad.sketch import AbstractStrategy, Moment


def why_not_product(module: nn.Module, strategy: AbstractStrategy, moment: Moment) -> str:
    """Return why a strategy is left out for a layer with weights, or an empty string."""
    # Not get_parameter: hooks such as pruning put a plain tensor in the place of the parameter.
    weight: Tensor = module.weight  # type: ignore[assignment] - a tensor, pruned or not
    if moment is Moment.STORED and not weight.requires_grad:
        return "frozen: PyTorch keeps no input of a frozen layer"
    return ""

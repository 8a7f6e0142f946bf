"""Why a single module cannot be converted although its class can."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized


def find_obstacle(module: nn.Module) -> str:
    """Return what stands in the way of swapping the module's class, or an empty string.

    >>> find_obstacle(nn.Linear(4, 4))
    ''
    >>> find_obstacle(nn.LazyLinear(4))
    'unsupported: its weight has no shape yet; run one batch, then convert'
    """
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "unsupported: nn.MultiheadAttention reads this layer's weight without calling it; convert the attention"
    if "forward" in module.__dict__:
        return "unsupported: this instance carries a forward of its own, which hides that of its class"
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        return "unsupported: its weight has no shape yet; run one batch, then convert"
    if is_parametrized(module):
        return "unsupported: its weight is parametrized; convert first, then register the parametrization"
    names = ("weight", "in_proj_weight", "q_proj_weight")
    weight = next((found for found in (getattr(module, name, None) for name in names) if found is not None), None)
    if weight is None and not any(True for _ in module.parameters()):
        return ""
    if weight is None or not weight.is_floating_point():
        return f"unsupported: weights of type {getattr(weight, 'dtype', None)}; sketches are made for real numbers"
    if not weight.numel():
        return f"unsupported: a weight of shape {tuple(weight.shape)} has no entries"
    return ""

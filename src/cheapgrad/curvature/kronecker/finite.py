"""Values that are not finite, by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from cheapgrad.errors import NonFiniteCurvatureError


def check_finite(layer_name: str, what: str, values: Tensor) -> None:
    """Raise `NonFiniteCurvatureError` naming the layer, if any value is not finite."""
    if not torch.isfinite(values).all():
        raise NonFiniteCurvatureError(
            f"layer {layer_name!r}: {int((~torch.isfinite(values)).sum())} of {values.numel()} entries of the {what} "
            "are not finite; look at the inputs and parameters, or use float64"
        )

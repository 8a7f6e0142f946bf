"""Running estimates of the cotangent's row norms, by position in the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from cheapgrad.sketch.transforms import is_transformed


class RunningRowNorms:
    """One running mean per position in the sequence, relative to the batch's mean.

    Kept beside the layer, not in its buffers: state_dict keys do not change and nothing is broadcast between ranks.

    Args:
        momentum: share of the old mean kept per update.
    """

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._mean_T: Tensor | None = None

    def predict(self, rows: int, examples: int, device: torch.device) -> Tensor | None:
        """Return predicted norms ``[N]``, or None before the first update of this sequence length."""
        tokens = rows // max(examples, 1)
        if self._mean_T is None or self._mean_T.shape[0] != tokens:
            return None
        return self._mean_T.to(device).repeat(examples)

    def update(self, norm_N: Tensor, examples: int) -> None:
        """Take in the row norms of one cotangent."""
        if torch.compiler.is_compiling() or is_transformed(norm_N):
            return
        mean_T = norm_N.detach().double().view(examples, -1).mean(0)
        scale = mean_T.mean()
        if not torch.isfinite(scale) or scale <= 0:
            return
        # A tenth of the mean as a floor: a prediction of zero would exclude rows whose cotangent may come back.
        fresh_T = mean_T / scale + 0.1
        if self._mean_T is None or self._mean_T.shape != fresh_T.shape or self._mean_T.device != fresh_T.device:
            self._mean_T = fresh_T
        else:
            self._mean_T = torch.lerp(fresh_T, self._mean_T, self._momentum)

"""A layer whose weight is counted in other units."""

from __future__ import annotations

from torch import Tensor, nn


class Rescaled(nn.Module):
    """Computes what a linear layer does, from a weight that is smaller by a factor: its gradient is larger by it."""

    def __init__(self, layer: nn.Linear, scale: float) -> None:
        super().__init__()
        self.scale, self.bias = scale, layer.bias
        self.weight = nn.Parameter(layer.weight.detach() / scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)

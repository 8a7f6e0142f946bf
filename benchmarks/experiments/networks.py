"""Networks that no other benchmark needs."""

from __future__ import annotations

from torch import Tensor, nn


class Perceptron(nn.Module):
    """A multilayer perceptron with ReLU, its hidden layers as blocks that can be checkpointed.

    Args:
        inputs: numbers in an example.
        hidden: width of both hidden layers.
        classes: C.
    """

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU()), nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU())
        )
        self.head = nn.Linear(hidden, classes)

    def forward(self, rows: Tensor) -> Tensor:
        """Return class scores ``[B, C]`` of ``[B, inputs]``."""
        return self.head(self.blocks(rows))

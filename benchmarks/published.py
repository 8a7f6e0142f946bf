"""The hand-counted memory table of randomised automatic differentiation (arXiv:2007.10412, Table 1), measured.

The authors count weights, the share of every layer's input that is kept, and one bit for each ReLU where less than all
is kept (elsewhere a ReLU holds what the next layer holds anyway), at batch 150, and say that it is the memory an
efficient implementation would need. Here the same networks run, and the bytes that their graphs hold are measured,
indices included. The count has nothing for pooling, and an average holds nothing; with maximum pooling, one byte for
each window comes on top. A share of 5 % is 7.5 of 150 examples: there, the mean of 7 and of 8 is reported.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import cheapgrad
from cheapgrad.cost import measure_held_bytes
from cheapgrad.sketch import AbstractStrategy, ExampleSample, FeatureSample, StochasticRounding

BATCH = 150
SHARES = (1.0, 0.8, 0.5, 0.3, 0.1, 0.05)
# Megabytes (1e6 bytes) as published, by share.
PUBLISHED = {
    "ConvNet": (23.08, 19.19, 12.37, 7.82, 3.28, 2.14),
    "MLP": (2.69, 2.51, 2.21, 2.00, 1.80, 1.75),
}


def measure_published() -> Iterator[dict[str, Any]]:
    """Yield one record per network and share."""
    for network, published in PUBLISHED.items():
        for share, megabytes in zip(SHARES, published, strict=True):
            measured = _measure(network, share, nn.AvgPool2d(2))
            record = {"benchmark": "published", "method": network, "share": share, "measured_megabytes": measured}
            record |= {"published_megabytes": megabytes, "ratio": measured / megabytes}
            if network == "ConvNet":
                record["with_maximum_pooling"] = _measure(network, share, nn.MaxPool2d(2))
            yield record


def _measure(network: str, share: float, pool: nn.Module) -> float:
    """Return the megabytes held, of weights included."""
    if network == "MLP":
        return _held(*_dense(), FeatureSample(share)) if share < 1 else _held(*_dense(), None)
    inputs = torch.randn(BATCH, 3, 32, 32)
    if share == 1:
        return _held(_convolutional(pool), inputs, None)
    kept = BATCH * share
    counts = {math.floor(kept + _ROUNDING), math.ceil(kept - _ROUNDING)}
    return statistics.mean(_held(_convolutional(pool), inputs, ExampleSample(count / BATCH)) for count in counts)


def _held(model: nn.Sequential, inputs: Tensor, stored: AbstractStrategy | None) -> float:
    without_weights = (nn.MaxPool2d, nn.AvgPool2d) if stored is None else (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d)
    rules = [
        cheapgrad.Rule(lambda name, module, kinds=kinds: isinstance(module, kinds), stored=strategy)
        for kinds, strategy in ((without_weights, _BITS), ((nn.Linear, nn.Conv2d), stored))
        if strategy is not None and any(isinstance(module, kinds) for module in model)
    ]
    if rules:
        cheapgrad.approximate(model, rules, skip_small=False)
    loss = measure_held_bytes(lambda: model(inputs).sum(), exclude=[model])
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return (loss.total_bytes + weights) / 1e6


# Shares of a batch are not exact in binary.
_ROUNDING = 1e-9
# For a ReLU one bit, for a maximum one byte, for an average nothing, whatever the number.
_BITS = StochasticRounding(8)


def _dense() -> tuple[nn.Sequential, Tensor]:
    sizes = (784, 300, 300, 300, 10)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.randn(BATCH, 784)


def _convolutional(pool: nn.Module) -> nn.Sequential:
    def block(inputs: int, outputs: int, *pools: nn.Module) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 5, padding=2), *pools, nn.ReLU()]

    return nn.Sequential(
        *block(3, 16), *block(16, 32, pool), *block(32, 32), *block(32, 32, pool), nn.Flatten(), nn.Linear(2048, 10)
    )

"""The hand-counted memory table of randomised automatic differentiation (arXiv:2007.10412, Table 1), measured.

The authors count weights, the share of every layer's input that is kept, and one bit for each ReLU, at batch 150, and
say that it is the memory an efficient implementation would need. Here the same networks run, and the bytes that their
graphs hold are measured, indices included. The count has nothing for pooling: with maximum pooling, one byte for each
window comes on top.
"""

from __future__ import annotations

import itertools
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
    model, inputs = (_convolutional(pool), torch.randn(BATCH, 3, 32, 32)) if network == "ConvNet" else _dense()
    layers = nn.Linear if network == "MLP" else (nn.Conv2d, nn.Linear)
    stored: AbstractStrategy = FeatureSample(share) if network == "MLP" else ExampleSample(share)
    rules = [cheapgrad.Rule(lambda name, module: isinstance(module, (nn.ReLU, nn.MaxPool2d)), stored=_BITS)]
    if share < 1:
        rules.append(cheapgrad.Rule(lambda name, module: isinstance(module, layers), stored=stored))
    cheapgrad.approximate(model, rules, skip_small=False)
    loss = measure_held_bytes(lambda: model(inputs).sum(), exclude=[model])
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return (loss.total_bytes + weights) / 1e6


# For a ReLU one bit, for a maximum one byte, whatever the number.
_BITS = StochasticRounding(8)


def _dense() -> tuple[nn.Module, Tensor]:
    sizes = (784, 300, 300, 300, 10)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.randn(BATCH, 784)


def _convolutional(pool: nn.Module) -> nn.Module:
    def block(inputs: int, outputs: int, *pools: nn.Module) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 5, padding=2), *pools, nn.ReLU()]

    return nn.Sequential(
        *block(3, 16), *block(16, 32, pool), *block(32, 32), *block(32, 32, pool), nn.Flatten(), nn.Linear(2048, 10)
    )

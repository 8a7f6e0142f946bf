"""Time of one layer's backward pass, scores and drawing included, as a share of the dense one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import cheapgrad
from benchmarks.interleaved import time_interleaved
from cheapgrad.sketch import ColumnSample, RowSample

ROWS = 2048
WIDTHS = (1024, 2048)
KEEPS = (0.1, 0.25, 0.5)
# What the time may exceed the kept share by.
ALLOWANCE = {"rows": 0.06, "columns": 0.08}


def measure_layers(*, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one record per width, strategy and budget."""
    for width in WIDTHS:
        functions = {"exact": _backward(width, None)}
        for keep in KEEPS:
            functions[f"rows {keep}"] = _backward(width, cheapgrad.Rule(cotangent=RowSample(keep)))
            functions[f"columns {keep}"] = _backward(width, cheapgrad.Rule(cotangent=ColumnSample(keep)))
        timings = time_interleaved(functions, reference="exact", rounds=rounds, label=f"layer {width} x {width}")
        for name, timing in timings.items():
            axis, _, keep = name.partition(" ")
            record = {"benchmark": "layer", "rows": ROWS, "width": width, "method": name}
            record |= {"seconds": timing.seconds, "share_of_dense": timing.ratio, "spread": timing.spread}
            if keep:
                record["target_share"] = float(keep) + ALLOWANCE[axis]
            yield record


def _backward(width: int, rule: cheapgrad.Rule | None) -> Any:
    layer = nn.Linear(width, width)
    if rule is not None:
        cheapgrad.approximate(layer, rule)
    inputs = torch.randn(ROWS, width, requires_grad=True)
    cotangent = torch.randn(ROWS, width)
    output = layer(inputs)
    leaves = (inputs, layer.weight, layer.bias)
    return lambda: torch.autograd.grad(output, leaves, cotangent, retain_graph=True)

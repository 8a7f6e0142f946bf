"""Time of one scan, as a share of what torch's own FLOP counter needs for one step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cheapgrad
from benchmarks.interleaved import time_interleaved

TARGET = 0.5


def measure_scans(*, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one record per network and way of counting."""
    for name, (model, inputs) in _make_networks().items():
        functions = {
            "torch's counter": _without_garbage(lambda model=model, inputs=inputs: _count(model, inputs)),
            "scan": _without_garbage(lambda model=model, inputs=inputs: cheapgrad.scan(model, inputs)),
            "scan, fake": _without_garbage(lambda model=model, inputs=inputs: cheapgrad.scan(model, inputs, fake=True)),
            "step alone": _without_garbage(lambda model=model, inputs=inputs: _step(model, inputs)),
        }
        timings = time_interleaved(functions, reference="torch's counter", rounds=rounds, label=f"scan {name}")
        for method, timing in timings.items():
            record = {"benchmark": "scan", "network": name, "method": method, "seconds": timing.seconds}
            record |= {"share_of_counter": timing.ratio, "spread": timing.spread}
            if method == "scan":
                record["target_share"] = TARGET
            yield record


def _make_networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(20)])
    encoder_layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(encoder_layer, 20, enable_nested_tensor=False)
    return {"20 layers": (layers, torch.randn(32, 64)), "20 encoder layers": (encoder, torch.randn(4, 16, 64))}


def _count(model: nn.Module, inputs: torch.Tensor) -> None:
    with FlopCounterMode(display=False):
        _step(model, inputs)


def _step(model: nn.Module, inputs: torch.Tensor) -> None:
    model(inputs).sum().backward()


def _without_garbage(function: Callable[[], object]) -> Callable[[], None]:
    """Keep the collector out: it would run in whichever comes next, for what the others left behind."""

    def run() -> None:
        gc.disable()
        try:
            function()
        finally:
            gc.enable()

    return run

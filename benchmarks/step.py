"""Time of a whole training step (forward, loss, backward), and of one with the optimiser's update as well."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import cheapgrad
from benchmarks.interleaved import time_interleaved
from benchmarks.vision_transformer import VisionTransformer
from cheapgrad import recipes

# width, depth, examples -> speed-up to reach at each budget (tokens: 64).
SHAPES: dict[tuple[int, int, int], dict[float, float]] = {
    (384, 4, 32): {0.5: 1.37, 0.35: 1.56, 0.25: 1.68},
    (768, 2, 16): {0.5: 1.44, 0.35: 1.68, 0.25: 1.88},
}


def measure_steps(*, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one record per network and budget, the smaller batch of each budget beside it.

    ``speed_up_limit`` is modelled: the measured forward pass and the kept share of the backward pass, nothing else.
    """
    for (width, depth, examples), targets in SHAPES.items():
        model = VisionTransformer(width, depth)
        inputs, labels = torch.randn(examples, 64, 48), torch.randint(0, 10, (examples,))
        functions: dict[str, Callable[[], object]] = {"exact": _step(copy.deepcopy(model), inputs, labels)}
        functions["exact, forward only"] = _forward(copy.deepcopy(model), inputs, labels)
        functions["exact with AdamW"] = _update(copy.deepcopy(model), inputs, labels)
        for keep in targets:
            sketched = copy.deepcopy(model)
            cheapgrad.approximate(sketched, recipes.speed(keep))
            functions[f"recipes.speed {keep}"] = _step(sketched, inputs, labels)
            functions[f"with AdamW, recipes.speed {keep}"] = _update(copy.deepcopy(sketched), inputs, labels)
            fewer = max(1, round(keep * examples))
            functions[f"batch x {keep}"] = _step(copy.deepcopy(model), inputs[:fewer], labels[:fewer])
        timings = time_interleaved(functions, reference="exact", rounds=rounds, label=f"step {width} x {depth}")
        for name, timing in timings.items():
            record = {"benchmark": "step", "width": width, "depth": depth, "examples": examples, "method": name}
            base = timings["exact with AdamW"].ratio if "AdamW" in name else 1.0
            record |= {"seconds": timing.seconds, "relative_cost": timing.ratio / base, "speed_up": base / timing.ratio}
            keep = float(name.rsplit(" ", 1)[1]) if name.startswith("recipes") else None
            forward = timings["exact, forward only"].ratio
            record["speed_up_limit"] = 1 / (forward + keep * (1 - forward)) if keep else None
            yield record | {"spread": timing.spread, "target_speed_up": targets.get(keep) if keep else None}


def _step(model: nn.Module, inputs: Tensor, labels: Tensor) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()

    return run


def _update(model: nn.Module, inputs: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step = _step(model, inputs, labels)

    def run() -> None:
        step()
        optimizer.step()

    return run


def _forward(model: nn.Module, inputs: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.nn.functional.cross_entropy(model(inputs), labels)

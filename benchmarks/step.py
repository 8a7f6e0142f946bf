"""Time of a whole training step (forward, loss, backward), and of one with the optimiser's update as well."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import cheapgrad
from benchmarks.interleaved import time_interleaved
from benchmarks.per_layer import rules_per_layer, without_chains
from benchmarks.vision_transformer import VisionTransformer
from cheapgrad import recipes
from cheapgrad.cost import measure_held_bytes

# width, depth, examples -> speed-up to reach at each budget (tokens: 64).
SHAPES: dict[tuple[int, int, int], dict[float, float]] = {
    (384, 4, 32): {0.5: 1.37, 0.35: 1.56, 0.25: 1.68},
    (768, 2, 16): {0.5: 1.44, 0.35: 1.68, 0.25: 1.88},
}


@dataclass
class _Trials:
    """What is timed on one network, what it holds for backward, and which budget it has.

    Attributes:
        inputs: a batch.
        labels: its classes.
        functions: what is timed, by name.
        held_bytes: by name, of whole steps.
        keeps: budgets by name, of the recipe's steps.
    """

    inputs: Tensor
    labels: Tensor
    functions: dict[str, Callable[[], object]] = field(default_factory=dict)
    held_bytes: dict[str, int] = field(default_factory=dict)
    keeps: dict[str, float] = field(default_factory=dict)

    def add_step(self, name: str, model: nn.Module, *, examples: int | None = None, per_layer: bool = False) -> None:
        """Add a step of the model on all examples, or on the first few; `per_layer` without chains."""
        inputs, labels = self.inputs[:examples], self.labels[:examples]

        def forward() -> Tensor:
            return torch.nn.functional.cross_entropy(model(inputs), labels)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            forward().backward()

        self.functions[name] = without_chains()(step) if per_layer else step
        held = without_chains()(forward) if per_layer else forward
        self.held_bytes[name] = measure_held_bytes(held, exclude=[model, inputs]).total_bytes

    def add_update(self, name: str, model: nn.Module) -> None:
        """Add a step with AdamW's update behind it."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def run() -> None:
            model.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(self.inputs), self.labels).backward()
            optimizer.step()

        self.functions[name] = run


def measure_steps(*, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one record per network and budget; the smaller batch of each budget, and a draw per layer, beside it.

    ``speed_up_limit`` is modelled: the measured forward pass and the kept share of the backward pass, nothing else.
    """
    for (width, depth, examples), targets in SHAPES.items():
        model = VisionTransformer(width, depth)
        trials = _set_up(model, examples, targets)
        timings = time_interleaved(trials.functions, reference="exact", rounds=rounds, label=f"step {width} x {depth}")
        forward = timings["exact, forward only"].ratio
        for name, timing in timings.items():
            base = timings["exact with AdamW"].ratio if "AdamW" in name else 1.0
            keep = trials.keeps.get(name)
            yield {
                "benchmark": "step",
                "width": width,
                "depth": depth,
                "examples": examples,
                "method": name,
                "seconds": timing.seconds,
                "relative_cost": timing.ratio / base,
                "speed_up": base / timing.ratio,
                "speed_up_limit": 1 / (forward + keep * (1 - forward)) if keep else None,
                "spread": timing.spread,
                "held_bytes": trials.held_bytes.get(name),
                "target_speed_up": targets[keep] if keep else None,
            }


def _set_up(model: nn.Module, examples: int, keeps: Iterable[float]) -> _Trials:
    trials = _Trials(torch.randn(examples, 64, 48), torch.randint(0, 10, (examples,)))
    trials.add_step("exact", copy.deepcopy(model))
    plain = copy.deepcopy(model)
    trials.functions["exact, forward only"] = lambda: torch.nn.functional.cross_entropy(
        plain(trials.inputs), trials.labels
    )
    trials.add_update("exact with AdamW", copy.deepcopy(model))
    for keep in keeps:
        sketched, apart = copy.deepcopy(model), copy.deepcopy(model)
        cheapgrad.approximate(sketched, recipes.speed(keep))
        cheapgrad.approximate(apart, rules_per_layer(keep))
        trials.keeps[f"recipes.speed {keep}"] = keep
        trials.add_step(f"recipes.speed {keep}", sketched)
        trials.add_update(f"with AdamW, recipes.speed {keep}", copy.deepcopy(sketched))
        trials.add_step(f"a draw per layer {keep}", apart, per_layer=True)
        trials.add_step(f"batch x {keep}", copy.deepcopy(model), examples=max(1, round(keep * examples)))
    return trials

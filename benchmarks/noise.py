"""Added variance as a multiple of the mini-batch variance (omega), on a trained vision transformer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import cheapgrad
from benchmarks.per_layer import rules_per_layer, without_chains
from benchmarks.pictures import Patches, load_patches
from benchmarks.vision_transformer import VisionTransformer
from cheapgrad import recipes
from cheapgrad.sketch import (
    ColumnNorm,
    ColumnSample,
    ExampleSample,
    FeatureSample,
    JointNorm,
    OrderedPivotal,
    Pivotal,
    PredictedNorm,
    RowSample,
    StochasticRounding,
    Systematic,
    Uniform,
)

BATCH = 128
KEEPS = (0.5, 0.35, 0.25)


@dataclass(frozen=True)
class Sketched:
    """One way to draw the gradient.

    Attributes:
        rules: what `cheapgrad.approximate` is given.
        target_omega: what the noise is to stay below, where something is asked.
        per_layer: whether every layer draws by itself, as it would without chains.
    """

    rules: tuple[cheapgrad.Rule, ...]
    target_omega: float | None = None
    per_layer: bool = False


def methods() -> dict[str, Sketched]:
    """Return what is measured, by name."""
    found = {}
    for design, words in ((None, ""), (Systematic(False), ", in order"), (OrderedPivotal(), ", ordered pivotal")):
        for keep in KEEPS:
            rows = RowSample(keep) if design is None else RowSample(keep, design=design)
            target = {0.5: 0.10, 0.25: 0.6}.get(keep) if design is None else None
            found[f"cotangent rows {_short(keep)}{words}"] = _one(target, cotangent=rows)
    found |= {
        "cotangent rows .5, joint score": _one(cotangent=RowSample(0.5, scores=JointNorm())),
        "cotangent rows .25, joint score": _one(cotangent=RowSample(0.25, scores=JointNorm())),
        "cotangent rows .5, pivotal": _one(cotangent=RowSample(0.5, design=Pivotal())),
        "cotangent rows .5, uniform": _one(cotangent=RowSample(0.5, scores=Uniform())),
        "cotangent examples .5": _one(cotangent=ExampleSample(0.5)),
        "cotangent columns .5": _one(cotangent=ColumnSample(0.5, scores=ColumnNorm())),
        "stored rows .5": _one(stored=RowSample(0.5)),
        "stored rows .5, predicted score": _one(stored=RowSample(0.5, scores=PredictedNorm())),
        "stored features .5": _one(stored=FeatureSample(0.5)),
        "stored 8 bits": _one(stored=StochasticRounding(8)),
        "stored 4 bits": _one(0.006, stored=StochasticRounding(4)),
        "stored 2 bits": _one(stored=StochasticRounding(2)),
        "stored 4 bits + cotangent rows .5": _one(stored=StochasticRounding(4), cotangent=RowSample(0.5)),
        "recipes.memory(4)": Sketched(recipes.memory(4), 0.02),
        "recipes.memory(2)": Sketched(recipes.memory(2)),
    }
    for keep, target in zip(KEEPS, (0.08, 0.21, 0.5), strict=True):
        found[f"recipes.speed({_short(keep)})"] = Sketched(recipes.speed(keep), target)
        found[f"a draw per layer {_short(keep)}"] = Sketched(rules_per_layer(keep), per_layer=True)
    return found | {
        "recipes.both(4, .5)": Sketched(recipes.both(4, 0.5)),
        "recipes.both(4, .35)": Sketched(recipes.both(4, 0.35)),
    }


def _one(target: float | None = None, **strategies: Any) -> Sketched:
    return Sketched((cheapgrad.Rule(**strategies),), target)


def _short(keep: float) -> str:
    return f"{keep:g}".lstrip("0")


def measure_noise(*, data: Path | None, epochs: int, batches: int, draws: int) -> Iterator[dict[str, Any]]:
    """Train exactly, then yield one record per method."""
    patches = load_patches(data)
    model = VisionTransformer(192, 4, patches.inputs.shape[1], patches.inputs.shape[2])
    loss = _train(model, patches, epochs)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    chosen = [torch.randint(0, len(patches.labels), (BATCH,)) for _ in range(batches)]
    exact = torch.stack([_gradient(model, patches, index, weights) for index in track(chosen, "mini-batch variance")])
    minibatch = (exact - exact.mean(0)).square().sum(1).mean().item() * batches / (batches - 1)
    common = {"benchmark": "noise", "data": patches.name, "epochs": epochs, "loss": loss, "batch": BATCH}
    for name, method in methods().items():
        handle = cheapgrad.approximate(model, method.rules)
        apart = without_chains if method.per_layer else contextlib.nullcontext
        # Running estimates need a few steps before they predict anything.
        errors = []
        with apart():
            for index in chosen[:3]:
                _gradient(model, patches, index, weights)
            for position, index in enumerate(track(chosen, name, transient=True)):
                for _ in range(draws):
                    error = _gradient(model, patches, index, weights) - exact[position]
                    errors.append(error.square().sum().item())
        handle.revert()
        spread = torch.tensor(errors).std().item() / len(errors) ** 0.5
        yield common | {
            "method": name,
            "omega": sum(errors) / len(errors) / minibatch,
            "standard_error": spread / minibatch,
            "target_omega": method.target_omega,
        }


def _train(model: nn.Module, patches: Patches, epochs: int) -> float:
    """Train with AdamW and return the mean loss of the last twenty steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    steps = max(1, len(patches.labels) // BATCH)
    for step in track(range(epochs * steps), "training exactly"):
        index = torch.randint(0, len(patches.labels), (BATCH,))
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(patches.inputs[index]), patches.labels[index])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50)
    return sum(losses[-20:]) / len(losses[-20:])


def _gradient(model: nn.Module, patches: Patches, index: Tensor, weights: list[Tensor]) -> Tensor:
    loss = torch.nn.functional.cross_entropy(model(patches.inputs[index]), patches.labels[index])
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)])

"""Added variance as a multiple of the mini-batch variance (omega), on a trained vision transformer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import cheapgrad
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
Methods = dict[str, tuple[tuple[cheapgrad.Rule, ...], float | None]]


def methods() -> Methods:
    """Return rules by name, with the omega to stay below where one is asked."""
    single = {
        "cotangent rows .5": (cheapgrad.Rule(cotangent=RowSample(0.5)), 0.10),
        "cotangent rows .35": (cheapgrad.Rule(cotangent=RowSample(0.35)), None),
        "cotangent rows .25": (cheapgrad.Rule(cotangent=RowSample(0.25)), 0.6),
        "cotangent rows .5, in order": (cheapgrad.Rule(cotangent=RowSample(0.5, design=Systematic(False))), None),
        "cotangent rows .35, in order": (cheapgrad.Rule(cotangent=RowSample(0.35, design=Systematic(False))), None),
        "cotangent rows .25, in order": (cheapgrad.Rule(cotangent=RowSample(0.25, design=Systematic(False))), None),
        "cotangent rows .5, ordered pivotal": (cheapgrad.Rule(cotangent=RowSample(0.5, design=OrderedPivotal())), None),
        "cotangent rows .35, ordered pivotal": (
            cheapgrad.Rule(cotangent=RowSample(0.35, design=OrderedPivotal())),
            None,
        ),
        "cotangent rows .25, ordered pivotal": (
            cheapgrad.Rule(cotangent=RowSample(0.25, design=OrderedPivotal())),
            None,
        ),
        "cotangent rows .5, joint score": (cheapgrad.Rule(cotangent=RowSample(0.5, scores=JointNorm())), None),
        "cotangent rows .25, joint score": (cheapgrad.Rule(cotangent=RowSample(0.25, scores=JointNorm())), None),
        "cotangent rows .5, pivotal": (cheapgrad.Rule(cotangent=RowSample(0.5, design=Pivotal())), None),
        "cotangent rows .5, uniform": (cheapgrad.Rule(cotangent=RowSample(0.5, scores=Uniform())), None),
        "cotangent examples .5": (cheapgrad.Rule(cotangent=ExampleSample(0.5)), None),
        "cotangent columns .5": (cheapgrad.Rule(cotangent=ColumnSample(0.5, scores=ColumnNorm())), None),
        "stored rows .5": (cheapgrad.Rule(stored=RowSample(0.5)), None),
        "stored rows .5, predicted score": (cheapgrad.Rule(stored=RowSample(0.5, scores=PredictedNorm())), None),
        "stored features .5": (cheapgrad.Rule(stored=FeatureSample(0.5)), None),
        "stored 8 bits": (cheapgrad.Rule(stored=StochasticRounding(8)), None),
        "stored 4 bits": (cheapgrad.Rule(stored=StochasticRounding(4)), 0.006),
        "stored 2 bits": (cheapgrad.Rule(stored=StochasticRounding(2)), None),
        "stored 4 bits + cotangent rows .5": (
            cheapgrad.Rule(stored=StochasticRounding(4), cotangent=RowSample(0.5)),
            None,
        ),
    }
    whole: Methods = {
        "recipes.memory(4)": (recipes.memory(4), 0.02),
        "recipes.memory(2)": (recipes.memory(2), None),
        "recipes.speed(.5)": (recipes.speed(0.5), 0.08),
        "recipes.speed(.35)": (recipes.speed(0.35), 0.21),
        "recipes.speed(.25)": (recipes.speed(0.25), 0.5),
        "recipes.both(4, .5)": (recipes.both(4, 0.5), None),
        "recipes.both(4, .35)": (recipes.both(4, 0.35), None),
    }
    return {name: ((rule,), target) for name, (rule, target) in single.items()} | whole


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
    for name, (rules, target) in methods().items():
        handle = cheapgrad.approximate(model, rules)
        # Running estimates need a few steps before they predict anything.
        for index in chosen[:3]:
            _gradient(model, patches, index, weights)
        errors = []
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
            "target_omega": target,
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

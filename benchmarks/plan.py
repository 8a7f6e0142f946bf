"""Does a plan keep its word? Bytes, FLOPs, noise and time of plans, and the theory of cheaper, noisier steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import cheapgrad
from benchmarks.pictures import Patches, load_patches
from benchmarks.vision_transformer import VisionTransformer
from cheapgrad.planning import LocalQuadratic, tradeoff
from tests.planning.convex_problems import count_measured_steps, make_logistic_regression, make_quadratic

BATCH = 64
_BATCHES = 8
_BUDGETS: tuple[dict[str, Any], ...] = (
    {"flops": "60 %"},
    {"flops": "45 %"},
    {"memory": "75 %"},
    {"noise": 0.05},
    {"memory": "70 %", "flops": "60 %"},
)
# Targets as shares of the excess at the start: signal decides, both do, noise decides.
_PROBLEMS = {
    "quadratic": (make_quadratic, (0.2, 0.01, 0.0003)),
    "logistic regression": (make_logistic_regression, (0.2, 0.05, 0.004)),
}

Batch = tuple[Tensor, Tensor]


def measure_theory(*, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield predicted and measured ratios of steps to a target on two convex problems."""
    for name, (make, shares) in _PROBLEMS.items():
        problem = make()
        model = LocalQuadratic(problem.curvature, problem.squared_distance, problem.variance)
        start = float(problem.excess(problem.start))
        for share in shares:
            for noise in (0.5, 2.0):
                target = share * start
                steps = [
                    count_measured_steps(
                        problem, step_size=model.best_step_size(target, one), noise=one, target=target, seeds=seeds
                    )
                    for one in (0.0, noise)
                ]
                ratio = tradeoff(1.0, noise, problem=model, target=target).steps_ratio
                record = {"benchmark": "theory", "problem": name, "target_share": share, "noise": noise, "seeds": seeds}
                record |= {"exact_steps": steps[0], "measured_ratio": steps[1] / steps[0], "predicted_ratio": ratio}
                yield record | {"predicted_over_measured": ratio * steps[0] / steps[1]}


def measure_plans(*, epochs: int, draws: int) -> Iterator[dict[str, Any]]:
    """Yield one record for each network and budget."""
    patches = load_patches(None)
    tokens, width = patches.inputs.shape[1:]
    networks: dict[str, nn.Module] = {
        "8-layer MLP, width 256": _make_mlp(tokens * width, 256, 8),
        "4-layer ViT, width 128": VisionTransformer(128, 4, tokens, width),
    }
    for name, model in networks.items():
        _train(model, patches, epochs)
        order = torch.randperm(len(patches.labels))
        batches = [
            (patches.inputs[index].clone(), patches.labels[index]) for index in order[: _BATCHES * BATCH].split(BATCH)
        ]
        exact = [_gradient(model, batch) for batch in batches]
        variance = float(torch.stack(exact).var(0).sum())
        step_seconds = _time(lambda model=model, batches=batches: _gradient(model, batches[0]), 10)
        for budget in _BUDGETS:
            record = {"benchmark": "plan", "network": name, "budget": str(budget).strip("{}")}
            yield record | _measure_plan(model, batches, exact, variance, step_seconds, budget, draws)


def _measure_plan(
    model: nn.Module,
    batches: Sequence[Batch],
    exact: Sequence[Tensor],
    variance: float,
    step_seconds: float,
    budget: dict[str, Any],
    draws: int,
) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        plan = cheapgrad.plan(model, _loss, batches, **budget)
    except cheapgrad.errors.UnreachableBudgetError as error:
        return {"remark": str(error).rsplit("; ", 1)[-1]}
    seconds = time.perf_counter() - started
    handle = cheapgrad.approximate(model, plan)
    total = cheapgrad.scan(_Whole(model), batches[0]).total
    errors = [
        float((_gradient(model, batch) - gradient).square().sum()) / variance
        for _ in track(range(draws), "drawing", transient=True)
        for batch, gradient in zip(batches, exact, strict=True)
    ]
    handle.revert()
    noise = torch.tensor(errors)
    return {
        "saved_bytes_fraction": plan.saved_bytes_fraction,
        "bytes_predicted_over_measured": plan.predicted.saved_bytes / total.saved_bytes,
        "backward_flops_fraction": plan.backward_flops_fraction,
        "flops_predicted_over_measured": plan.predicted.backward_flops / total.backward_flops,
        "predicted_noise": plan.predicted.noise_fraction,
        "measured_noise": float(noise.mean()),
        "noise_standard_error": float(noise.std()) / len(errors) ** 0.5,
        "sum_of_layers_alone": plan.separate_noise_fraction,
        "noise_predicted_over_measured": plan.predicted.noise_fraction / float(noise.mean()),
        "cost_times_noise": plan.cost_times_noise,
        "planning_in_exact_steps": seconds / step_seconds,
    }


class _Whole(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return _loss(self.model, batch)


def _make_mlp(inputs: int, width: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(inputs, width)]
    for _ in range(depth - 2):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.GELU(), nn.Linear(width, 10))


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _gradient(model: nn.Module, batch: Batch) -> Tensor:
    gradients = torch.autograd.grad(_loss(model, batch), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def _train(model: nn.Module, patches: Patches, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in track(range(epochs * max(1, len(patches.labels) // BATCH)), "training exactly", transient=True):
        index = torch.randint(0, len(patches.labels), (BATCH,))
        optimizer.zero_grad(set_to_none=True)
        _loss(model, (patches.inputs[index], patches.labels[index])).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _time(function: Callable[[], object], rounds: int) -> float:
    """Return the median time of a call."""
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[2:])[rounds // 2]

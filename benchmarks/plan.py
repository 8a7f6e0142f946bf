"""Does a plan keep its word? Bytes, FLOPs, noise and time of plans, and the theory of cheaper, noisier steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import cheapgrad
from benchmarks.networks import NETWORKS
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
    {"memory": "30 %"},
    {"noise": 0.05},
    {"memory": "60 %", "flops": "70 %"},
)
# Of the network whose blocks are worth a code of their norms and attention.
_BLOCK_BUDGETS: tuple[dict[str, Any], ...] = ({"memory": "30 %"}, {"memory": "22 %"}, {"memory": "10 %"})
# A plan is to take no longer than so many exact steps.
_TARGET_STEPS = 30
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
        "4-layer ViT, width 192": VisionTransformer(192, 4, tokens, width),
    }
    for name, model in networks.items():
        _train(model, patches, epochs)
        order = torch.randperm(len(patches.labels))
        batches = [
            (patches.inputs[index].clone(), patches.labels[index])
            for index in order[: 2 * _BATCHES * BATCH].split(BATCH)
        ]
        yield from _measure_budgets(name, model, batches, _BUDGETS, draws)
    large = NETWORKS[0]
    batches = [large.make_batch() for _ in range(2 * _BATCHES)]
    yield from _measure_budgets(f"{large.name}, untrained", large.make(), batches, _BLOCK_BUDGETS, draws)


def _measure_budgets(
    name: str, model: nn.Module, batches: Sequence[Batch], budgets: Sequence[dict[str, Any]], draws: int
) -> Iterator[dict[str, Any]]:
    """Plan with the first batches, measure on them and on as many others."""
    exact = [_gradient(model, batch) for batch in batches]
    halves = [_Half(batches[part], exact[part]) for part in (slice(_BATCHES), slice(_BATCHES, None))]
    for budget in budgets:
        record = {"benchmark": "plan", "network": name, "budget": str(budget).strip("{}")}
        yield record | _measure_plan(model, halves, budget, draws)


class _Half:
    """Batches with their exact gradients."""

    def __init__(self, batches: Sequence[Batch], exact: Sequence[Tensor]) -> None:
        self.batches, self.exact = batches, exact
        self.variance = float(torch.stack(list(exact)).var(0).sum())

    def measure_noise(self, model: nn.Module, draws: int) -> tuple[float, float]:
        """Return the noise of a converted model, and the standard error of it that comes from the draws."""
        errors = [
            torch.tensor([float((_gradient(model, batch) - gradient).square().sum()) for _ in range(draws)])
            for batch, gradient in track(list(zip(self.batches, self.exact, strict=True)), "drawing", transient=True)
        ]
        noise = torch.stack(errors) / self.variance
        return float(noise.mean()), float(noise.var(1).mean() / noise.numel()) ** 0.5


def _measure_plan(model: nn.Module, halves: Sequence[_Half], budget: dict[str, Any], draws: int) -> dict[str, Any]:
    planned, others = halves
    try:
        plan, steps = _time_planning(model, planned.batches, budget)
    except cheapgrad.errors.UnreachableBudgetError as error:
        return {"remark": str(error).rsplit("; ", 1)[-1]}
    handle = cheapgrad.approximate(model, plan)
    total = cheapgrad.scan(_Whole(model), planned.batches[0]).total
    noise, error = planned.measure_noise(model, draws)
    noise_of_others, _ = others.measure_noise(model, draws)
    handle.revert()
    low, high = plan.noise_interval
    return {
        "saved_bytes_fraction": plan.saved_bytes_fraction,
        "bytes_predicted_over_measured": plan.predicted.saved_bytes / total.saved_bytes,
        "backward_flops_fraction": plan.backward_flops_fraction,
        "flops_predicted_over_measured": plan.predicted.backward_flops / total.backward_flops,
        "predicted_noise": plan.predicted.noise_fraction,
        "interval_low": low,
        "interval_high": high,
        "measured_noise": noise,
        "noise_standard_error": error,
        "noise_predicted_over_measured": plan.predicted.noise_fraction / noise if noise else 1.0,
        "noise_of_other_batches": noise_of_others,
        "cost_times_noise": plan.cost_times_noise,
        "planning_in_exact_steps": steps,
        "target_steps": _TARGET_STEPS,
    }


def _time_planning(model: nn.Module, batches: Sequence[Batch], budget: dict[str, Any]) -> tuple[cheapgrad.Plan, float]:
    """Return the plan, and the median over rounds of its time over that of exact steps before and after it."""
    ratios, plans = [], []
    for _ in range(3):
        step_seconds = [_seconds(lambda: _gradient(model, batches[0])) for _ in range(4)]
        plan_seconds = _seconds(lambda: plans.append(cheapgrad.plan(model, _loss, batches, **budget)))
        step_seconds += [_seconds(lambda: _gradient(model, batches[0])) for _ in range(4)]
        ratios.append(plan_seconds / statistics.median(step_seconds))
        if plan_seconds > 10:
            break
    return plans[-1], statistics.median(ratios)


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


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

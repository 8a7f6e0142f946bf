"""Stochastic gradient descent on two convex problems, all seeds at once; nothing here is imported from cheapgrad."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Draws noisy gradients [seeds, D] at points [seeds, D], with `noise` times the mini-batch's variance added.
NoisyGradient = Callable[[Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class Problem:
    """A loss with its constants at the minimum, in the eigenvectors of the Hessian there."""

    start: Tensor
    excess: Callable[[Tensor], Tensor]
    gradient: NoisyGradient
    curvature: tuple[float, ...]
    squared_distance: tuple[float, ...]
    variance: tuple[float, ...]


def make_quadratic(directions: int = 20) -> Problem:
    """Return ``½ Σ λ_i x_i²`` with Gaussian noise of another variance in every direction."""
    curvature = torch.logspace(-1.5, 0.0, directions, dtype=torch.float64)
    variance = 0.002 * torch.linspace(0.5, 1.5, directions, dtype=torch.float64)
    start = curvature.rsqrt()

    def gradient(x: Tensor, noise: float, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return curvature * x + ((1 + noise) * variance).sqrt() * drawn

    return Problem(
        start,
        lambda x: 0.5 * (curvature * x.square()).sum(-1),
        gradient,
        tuple(curvature.tolist()),
        tuple(start.square().tolist()),
        tuple(variance.tolist()),
    )


def make_logistic_regression(examples: int = 400, features: int = 8, batch: int = 200) -> Problem:
    """Return regularised logistic regression on random data, seen through mini-batches drawn with replacement.

    Noise is added by dropping rows of the mini-batch's gradient at random and weighting the others.
    """
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(examples, features, generator=generator, dtype=torch.float64)
    inputs = inputs * torch.linspace(0.3, 1.5, features, dtype=torch.float64)
    scores = inputs @ torch.linspace(-1.0, 1.0, features, dtype=torch.float64)
    labels = (scores + torch.randn(examples, generator=generator, dtype=torch.float64) > 0).double()
    penalty = 0.01

    def loss(x: Tensor) -> Tensor:
        logits = x @ inputs.T
        likelihood = (torch.nn.functional.softplus(logits) - labels * logits).mean(-1)
        return likelihood + 0.5 * penalty * x.square().sum(-1)

    minimum = torch.zeros(features, dtype=torch.float64)
    for _ in range(50):
        chances = torch.sigmoid(inputs @ minimum)
        slope = inputs.T @ (chances - labels) / examples + penalty * minimum
        hessian = (inputs.T * (chances * (1 - chances))) @ inputs / examples + penalty * torch.eye(features)
        minimum = minimum - torch.linalg.solve(hessian, slope)

    def gradient(x: Tensor, noise: float, generator: torch.Generator) -> Tensor:
        picked = torch.randint(0, examples, (x.shape[0], batch), generator=generator)
        rows = inputs[picked]
        residual = torch.sigmoid((rows @ x.unsqueeze(-1)).squeeze(-1)) - labels[picked]
        # Coins that keep a row with chance 1 / (1 + ω): their variance is ω times the second moment of a row, which is
        # its variance as far as the mean gradient vanishes.
        kept = torch.rand(residual.shape, generator=generator, dtype=torch.float64) < 1 / (1 + noise)
        residual = residual * kept * (1 + noise)
        return (residual.unsqueeze(-1) * rows).mean(1) + penalty * x

    curvature, directions = torch.linalg.eigh(hessian)
    rows_at_minimum = (torch.sigmoid(inputs @ minimum) - labels).unsqueeze(1) * inputs
    variance = (rows_at_minimum @ directions).var(0, unbiased=False) / batch
    start = minimum + directions @ (0.4 * curvature.rsqrt())
    return Problem(
        start,
        lambda x: loss(x) - loss(minimum),
        gradient,
        tuple(curvature.tolist()),
        tuple(((start - minimum) @ directions).square().tolist()),
        tuple(variance.tolist()),
    )


def count_measured_steps(
    problem: Problem, *, step_size: float, noise: float, target: float, seeds: int, most: int = 20_000
) -> float:
    """Return after how many steps the mean excess over all seeds is `target`, on a straight line between two steps."""
    generator = torch.Generator().manual_seed(11)
    x = problem.start.expand(seeds, -1).clone()
    before = math.inf
    for step in range(most):
        excess = float(problem.excess(x).mean())
        if excess <= target:
            return step - (target - excess) / (before - excess)
        before = excess
        x = x - step_size * problem.gradient(x, noise, generator)
    raise AssertionError(f"the target {target} is not reached in {most} steps")

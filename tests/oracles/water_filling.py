"""The least variance under a budget, by a general convex solver and by trying every certain set."""

from __future__ import annotations

import itertools

import numpy as np
from scipy import optimize


def variance(probabilities: np.ndarray, scores: np.ndarray) -> float:
    """Return ``sum (1 / p - 1) s**2``; infinite where an atom that counts can never be drawn."""
    if np.any((probabilities <= 0) & (scores > 0)):
        return np.inf
    counted = scores > 0
    return float(((1 / probabilities[counted] - 1) * scores[counted] ** 2).sum())


def solve(scores: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """Minimise ``sum (1 / p - 1) s**2`` subject to ``sum p <= count``, ``p <= 1`` by sequential quadratic programming.

    In the variables ``log p``, where the problem stays convex and the solver sees no pole.
    """
    scores = scores / scores.max()

    def objective(logs: np.ndarray) -> tuple[float, np.ndarray]:
        terms = scores**2 * np.exp(-logs)
        return float(terms.sum()), -terms

    solution = optimize.minimize(
        objective,
        np.full(len(scores), np.log(count / len(scores))),
        jac=True,
        method="SLSQP",
        bounds=[(-30.0, 0.0)] * len(scores),
        constraints={
            "type": "ineq",
            "fun": lambda logs: count - np.exp(logs).sum(),
            "jac": lambda logs: -np.exp(logs),
        },
        options={"ftol": 1e-15, "maxiter": 2000},
    )
    probabilities = np.exp(solution.x)
    return probabilities, variance(probabilities, scores)


def try_every_certain_set(scores: np.ndarray, count: int) -> float:
    """Return the least variance over all sets that could be certain, the others sharing in proportion to score."""
    best = np.inf
    size = len(scores)
    for certain_size in range(count + 1):
        for certain in itertools.combinations(range(size), certain_size):
            tail = np.array([score for index, score in enumerate(scores) if index not in certain])
            total = tail.sum()
            if total == 0:
                best = min(best, 0.0)
                continue
            if certain_size == count:
                continue
            shares = (count - certain_size) * tail / total
            if shares.max() <= 1 + 1e-12:
                best = min(best, variance(shares, tail))
    return best


def clamp_only(scores: np.ndarray, count: float) -> np.ndarray:
    """Return ``min(1, count s / sum s)``: what is lost by the clamp is not given to the others."""
    return np.minimum(1.0, count * scores / scores.sum())

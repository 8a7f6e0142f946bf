from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

import numpy as np
import pytest

from cheapgrad.errors import TheoryError
from cheapgrad.planning import LocalQuadratic, tradeoff
from tests.planning.convex_problems import (
    Problem,
    count_measured_steps,
    make_logistic_regression,
    make_quadratic,
)

SEEDS = 100
# Targets as shares of the excess at the start: signal decides, both do, noise decides.
CASES = {
    "quadratic": (make_quadratic, (0.2, 0.01, 0.0003)),
    "logistic": (make_logistic_regression, (0.2, 0.05, 0.004)),
}


def constants(problem: Problem) -> LocalQuadratic:
    return LocalQuadratic(problem.curvature, problem.squared_distance, problem.variance)


@pytest.mark.parametrize("noise", [0.5, 2.0])
@pytest.mark.parametrize("name", CASES)
def test_predicted_ratio_of_steps_is_the_measured_one(name: str, noise: float) -> None:
    make, shares = CASES[name]
    problem = make()
    model, start = constants(problem), float(problem.excess(problem.start))
    ratios = []
    for share in shares:
        target = share * start
        measured = [
            count_measured_steps(
                problem, step_size=model.best_step_size(target, omega), noise=omega, target=target, seeds=SEEDS
            )
            for omega in (0.0, noise)
        ]
        predicted = tradeoff(0.7, noise, problem=model, target=target)
        assert predicted.steps_ratio == pytest.approx(measured[1] / measured[0], rel=0.15)
        assert predicted.cost_ratio == 0.7 * predicted.steps_ratio
        ratios.append(predicted.steps_ratio)
    # The cases are different regimes: a theory that always says 1, or always 1 + ω, fails above.
    assert ratios[0] < 1 + 0.2 * noise
    assert ratios[-1] > 1 + 0.8 * noise


def test_bound_goes_from_one_to_one_plus_noise() -> None:
    ratios = [tradeoff(1.0, 3.0, noise_to_target=value).steps_ratio for value in (0.0, 0.1, 1.0, 10.0, 1e9)]
    assert ratios == sorted(ratios)
    assert ratios[0] == 1.0
    assert ratios[-1] == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("noise_to_target", [0.3, 5.0])
def test_bound_is_the_solution_of_its_own_inequality(noise_to_target: float) -> None:
    def root(variance: float) -> float:
        # x of x² + 2 x σ = 1, by bisection.
        low, high = 0.0, 1.0
        for _ in range(100):
            middle = (low + high) / 2
            below = middle**2 + 2 * middle * math.sqrt(variance) < 1
            low, high = (middle, high) if below else (low, middle)
        return low

    expected = (root(noise_to_target) / root(noise_to_target * 1.8)) ** 2
    assert tradeoff(1.0, 0.8, noise_to_target=noise_to_target).steps_ratio == pytest.approx(expected, rel=1e-9)


def test_smaller_batch_breaks_even_where_noise_decides() -> None:
    share = 0.4
    result = tradeoff(share, 1 / share - 1)
    assert result.cost_ratio == pytest.approx(1.0)
    assert result.signal_dominated_cost_ratio == share
    assert tradeoff(share, 1 / share - 1.01).beats_smaller_batch
    assert not tradeoff(share, 1 / share - 0.99).beats_smaller_batch


def test_record_is_ready_for_json() -> None:
    data = json.loads(json.dumps(tradeoff(0.5, np.float32(0.2)).to_dict()))
    assert data["noise_dominated_cost_ratio"] == pytest.approx(0.6)
    assert data["beats_smaller_batch"] is True


ONE = LocalQuadratic((1.0,), (1.0,), (0.1,))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: tradeoff(0.0, 0.1), "cost must be finite and above 0, but got 0.0"),
        (lambda: tradeoff(1.0, -0.1), "noise must be finite and at least 0, but got -0.1"),
        (lambda: tradeoff(1.0, None), "noise must be finite and at least 0, but got None"),  # type: ignore[arg-type] - refused
        (lambda: tradeoff(1.0, 0.1, noise_to_target=-2.0), "but got -2.0"),
        (lambda: tradeoff(1.0, 0.1, noise_to_target="x"), "noise_to_target must be at least 0"),  # type: ignore[arg-type] - refused
        (lambda: tradeoff(1.0, math.inf), "noise must be finite and at least 0, but got inf"),
        (lambda: tradeoff(1.0, 10**400), "noise must be finite and at least 0, but got 1000"),
        (lambda: tradeoff(True, 0.1), "cost must be finite and above 0, but got True"),
        (lambda: tradeoff(1.0, 0.1, problem=ONE), "target is missing"),
        (lambda: tradeoff(1.0, 0.1, target=0.5), "problem is missing"),
        (lambda: ONE.best_step_size(0.7), "the start has an excess of 0.5, at most the target 0.7"),
        (lambda: ONE.best_step_size(-1.0), "but got -1.0"),
        (lambda: ONE.best_step_size(0.1, noise=-3.0), "but got -3.0"),
        (lambda: LocalQuadratic((1.0,), (1.0, 2.0), (0.1,)), "'squared_distance': 2"),
        (lambda: LocalQuadratic((0.0,), (1.0,), (0.1,)), "curvature must be finite and above 0, but has 0.0"),
        (lambda: LocalQuadratic((1.0,), (1.0,), (-0.1,)), "variance must be finite and at least 0, but has -0.1"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], text: str) -> None:
    with pytest.raises(TheoryError, match=re.escape(text)):
        call()


def test_step_size_too_large_for_the_target_never_arrives() -> None:
    assert ONE.count_steps(0.01, step_size=0.5) is None
    assert ONE.count_steps(0.01, step_size=0.05) is not None

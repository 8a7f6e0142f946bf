"""Steps read off smaller batches: power laws exactly, gradient descent on a quadratic, and what is refused."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest

from cheapgrad.errors import TheoryError
from cheapgrad.planning import LocalQuadratic, tradeoff
from cheapgrad.planning.batch_curve import BatchCurve


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 1.6, 7.0])
def test_a_power_law_of_batches_is_read_exactly(power: float, noise: float) -> None:
    found = tradeoff(0.5, noise, smaller_batches={0.25: 4.0**power, 0.5: 2.0**power})
    assert found.steps_ratio == pytest.approx((1 + noise) ** power)
    assert found.cost_ratio == pytest.approx(0.5 * (1 + noise) ** power)


@pytest.mark.parametrize("share", [0.2, 0.01, 0.0003])
def test_it_finds_the_ratio_of_gradient_descent_whatever_decides(share: float) -> None:
    # The bound, which knows nothing of the target, says 1 + ω in each of these.
    problem = LocalQuadratic((1.0, 0.1), (1.0, 10.0), (0.01, 0.01))
    target = share * (0.5 * 1.0 + 0.5 * 0.1 * 10.0)
    exact = problem.solve_steps(target, 0.0)
    batches = {part: problem.solve_steps(target, 1 / part - 1) / exact for part in (0.5, 0.25)}
    for noise in (0.4, 1.0, 2.2):
        expected = problem.solve_steps(target, noise) / exact
        assert tradeoff(0.7, noise, smaller_batches=batches).steps_ratio == pytest.approx(expected, rel=0.03)


def test_what_lies_beyond_the_smallest_batch_is_said() -> None:
    batches = {0.5: 1.5, 0.25: 1.5}
    within, beyond = (tradeoff(0.5, noise, smaller_batches=batches) for noise in (2.9, 9.0))
    assert within.assumption.endswith("measured down to 0.25 of the batch")
    assert beyond.assumption.endswith("; a batch of 0.1 is beyond, on the last slope")
    assert beyond.steps_ratio == pytest.approx(1.5)


def test_fewer_steps_than_on_the_usual_batch_are_scatter() -> None:
    assert BatchCurve.from_shares({0.5: 0.9}).points == ((1.0, 1.0), (2.0, 1.0))
    assert BatchCurve.from_shares({0.25: 1.2, 0.5: 2.0}).points == ((1.0, 1.0), (2.0, 2.0), (4.0, 2.0))
    # More noise is never fewer steps, so that a smaller batch of equal cost is judged right.
    ratios = [tradeoff(0.1, noise, smaller_batches={0.5: 2.0, 0.25: 1.2}).steps_ratio for noise in (0.5, 1, 2, 15, 100)]
    assert ratios == sorted(ratios)


@pytest.mark.parametrize("noise", [0.5, 10.0, 1e6])
def test_beyond_what_was_measured_noise_costs_in_proportion_at_most(noise: float) -> None:
    # A batch of nearly all examples says next to nothing about the slope.
    ratio = tradeoff(0.5, noise, smaller_batches={0.99: 1.5}).steps_ratio
    assert ratio == pytest.approx(1.5 * 0.99 * (1 + noise))


def test_shares_may_be_fractions() -> None:
    assert tradeoff(0.5, 1.0, smaller_batches={Fraction(1, 2): 1.4}).steps_ratio == pytest.approx(1.4)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({}, "for one share of the batch at least"),
        ([(0.5, 1.4)], "for one share of the batch at least"),
        ({1.0: 1.4}, "but has 1.0: 1.4"),
        ({0.0: 1.4}, "but has 0.0: 1.4"),
        ({2: 1.4}, "but has 2: 1.4"),
        ({5e-324: 1.4}, "but has 5e-324: 1.4"),
        ({True: 1.4}, "but has True: 1.4"),
        ({0.5: math.nan}, "but has 0.5: nan"),
        ({0.5: math.inf}, "but has 0.5: inf"),
        ({0.5: -1.0}, "but has 0.5: -1.0"),
        ({0.5: 10**400}, "but has 0.5: 1000"),
        ({"half": 1.4}, "but has 'half': 1.4"),
    ],
)
def test_bad_input_is_named(wrong: object, text: str) -> None:
    with pytest.raises(TheoryError, match=re.escape(text)):
        tradeoff(0.5, 0.1, smaller_batches=wrong)  # type: ignore[arg-type] - refused


def test_one_way_to_the_ratio_is_enough() -> None:
    problem = LocalQuadratic((1.0,), (1.0,), (0.1,))
    with pytest.raises(TheoryError, match="noise_to_target and smaller_batches are different ways"):
        tradeoff(0.5, 0.1, noise_to_target=1.0, smaller_batches={0.5: 1.4})
    with pytest.raises(TheoryError, match="problem and smaller_batches are different ways"):
        tradeoff(0.5, 0.1, problem=problem, target=0.1, smaller_batches={0.5: 1.4})

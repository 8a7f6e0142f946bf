"""Water-filling: optimal, exact in size, and calm where scores are flat, zero or not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cheapgrad.errors import BudgetError
from cheapgrad.sketch import minimum_variance, water_filling
from tests.oracles import water_filling as oracle

RANDOM = np.random.default_rng(0)
SCORES = {
    "flat": np.ones(6),
    "one": np.array([3.0]),
    "two": np.array([3.0, 0.1]),
    "duplicates": np.array([2.0, 2.0, 2.0, 1.0, 1.0]),
    "dominant": np.array([1e6, 1.0, 2.0, 1.0]),
    "geometric": 3.0 ** np.arange(8),
    "some zeros": np.array([0.0, 2.0, 0.0, 1.0, 1.0, 0.0]),
    "on the edge": np.array([2.0, 1.0, 1.0, 0.0]),
    **{f"random {seed}": np.random.default_rng(seed).random(8) ** 4 for seed in range(6)},
    **{f"exponential {seed}": np.random.default_rng(seed).exponential(size=7) for seed in range(4)},
}
CASES = [
    pytest.param(scores, count, id=f"{name}, {count}")
    for name, scores in SCORES.items()
    for count in range(1, len(scores) + 1)
]


def _fill(scores, count):
    return water_filling(torch.as_tensor(scores, dtype=torch.float64), count).numpy()


@pytest.mark.parametrize(("scores", "count"), CASES)
def test_equals_the_convex_solver(scores, count):
    ours = _fill(scores, count)
    scale = scores.max() ** 2
    _, best = oracle.solve(scores, count)
    reached = oracle.variance(ours, scores) / scale
    assert reached == pytest.approx(best, rel=1e-6, abs=1e-6)
    assert oracle.try_every_certain_set(scores, count) / scale == pytest.approx(reached, rel=1e-11, abs=1e-14)


@pytest.mark.parametrize(("scores", "count"), CASES)
def test_minimum_variance_is_what_the_probabilities_attain(scores, count):
    ours = oracle.variance(_fill(scores, count), scores)
    stated = float(minimum_variance(torch.as_tensor(scores), count))
    assert stated == pytest.approx(ours, rel=1e-11, abs=1e-13 * scores.max() ** 2)


@pytest.mark.parametrize(("scores", "count"), CASES)
def test_sums_to_the_budget_and_stays_in_range(scores, count):
    ours = _fill(scores, count)
    assert ours.sum() == pytest.approx(count, rel=1e-13)
    assert ours.min() >= 0
    assert ours.max() <= 1


def test_is_proportional_below_one():
    scores = SCORES["random 0"]
    ours = _fill(scores, 3)
    open_atoms = ours < 1
    ratio = ours[open_atoms] / scores[open_atoms]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
    assert (scores[~open_atoms] * ratio[0] >= 1 - 1e-12).all()


@pytest.mark.parametrize("seed", range(120))
def test_never_worse_than_uniform_nor_than_clamping_only(seed):
    random = np.random.default_rng(seed)
    size = int(random.integers(3, 40))
    count = int(random.integers(1, size))
    scores = random.random(size) ** random.choice([0.0, 1.0, 3.0, 8.0]) + 1e-9
    ours = oracle.variance(_fill(scores, count), scores)
    assert ours <= oracle.variance(np.full(size, count / size), scores) * (1 + 1e-12)
    # At equal expected size: the clamp's budget is raised until its probabilities sum to the count as well.
    clamped = oracle.clamp_only(scores, count)
    assert ours <= oracle.variance(clamped, scores) * (1 + 1e-12)
    equal_size = clamped * count / clamped.sum()
    if equal_size.max() <= 1:
        assert ours <= oracle.variance(equal_size, scores) * (1 + 1e-12)


def test_clamping_only_is_strictly_worse_where_something_is_clamped():
    scores = np.array([10.0, 1.0, 1.0, 1.0])
    assert oracle.variance(_fill(scores, 2), scores) < 0.7 * oracle.variance(oracle.clamp_only(scores, 2), scores)


def test_all_zero_scores_share_equally():
    np.testing.assert_allclose(_fill(np.zeros(8), 2), 0.25)


def test_budget_left_over_goes_to_atoms_of_score_zero():
    np.testing.assert_allclose(_fill(np.array([5.0, 0.0, 0.0, 0.0, 0.0]), 3), [1.0, 0.5, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_scores_are_certain(bad):
    ours = _fill(np.array([1.0, bad, 1.0, 1.0]), 2)
    np.testing.assert_allclose(ours, [1 / 3, 1.0, 1 / 3, 1 / 3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_more_non_finite_scores_than_budget_share_it(bad):
    ours = _fill(np.array([1.0, bad, bad, bad]), 2)
    np.testing.assert_allclose(ours, [0.0, 2 / 3, 2 / 3, 2 / 3], atol=1e-12)


def test_all_scores_non_finite():
    np.testing.assert_allclose(_fill(np.full(4, np.nan), 1), 0.25)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_scale_does_not_matter(scale):
    scores = SCORES["exponential 0"]
    np.testing.assert_allclose(_fill(scores * scale, 3), _fill(scores, 3), rtol=1e-12)


@pytest.mark.parametrize("tiny", [1e-12, 1e-100, 1e-300, 1e-310, 5e-324])
def test_a_tiny_tail_keeps_the_budget(tiny):
    np.testing.assert_allclose(_fill(np.array([1.0, tiny, tiny, tiny]), 2), [1.0, 1 / 3, 1 / 3, 1 / 3], rtol=1e-12)


@pytest.mark.parametrize("count", [1, 3, 50, 200])
def test_budget_of_all_or_more_is_one_everywhere(count):
    np.testing.assert_array_equal(_fill(np.array([0.0]), count), 1.0)
    np.testing.assert_array_equal(_fill(np.zeros(count), count + 1), 1.0)


def test_leading_axes_are_independent():
    scores = torch.rand(3, 5, 9, dtype=torch.float64) ** 3
    together = water_filling(scores, 4)
    for index in np.ndindex(3, 5):
        torch.testing.assert_close(together[index], water_filling(scores[index], 4), rtol=1e-13, atol=0)
    torch.testing.assert_close(minimum_variance(scores, 4)[2, 1], minimum_variance(scores[2, 1], 4), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    "scores",
    [
        *SCORES.values(),
        np.zeros(5),
        np.array([np.nan, 1.0, 2.0, np.inf, 3.0]),
        np.array([1.0, 5e-324, 0.0]),
    ],
    ids=[*SCORES, "zeros", "not finite", "denormal"],
)
def test_one_line_on_the_host_equals_a_line_of_a_stack(scores):
    scores = torch.as_tensor(scores)
    before = scores.clone()
    for count in range(1, len(scores) + 2):
        stacked = water_filling(scores.unsqueeze(0), count)[0]
        torch.testing.assert_close(water_filling(scores, count), stacked, rtol=1e-13, atol=0)
    torch.testing.assert_close(scores, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", [0, -3, 1.5, True])
def test_a_budget_that_is_no_count_is_named(count):
    with pytest.raises(BudgetError, match=f"count must be a whole number of at least 1, but got {count!r}"):
        water_filling(torch.ones(4), count)

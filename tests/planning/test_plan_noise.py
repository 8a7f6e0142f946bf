"""The noise of a plan: told for every batch, with an error that covers other batches, and below its ceiling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import cheapgrad
from cheapgrad.planning.batches import MiniBatchVariance, relative_error_of_ratio, spare_factor
from cheapgrad.planning.row_noise import _fold
from cheapgrad.sketch import RowSample
from cheapgrad.sketch.designs import OrderedPivotal, Systematic
from cheapgrad.sketch.designs._abstract import approximate_variance
from cheapgrad.sketch.water_filling import water_filling
from tests.planning.networks import Batch, exact_gradients, loss_fn, make_batches, make_mlp, measure_noise

ROWS = [cheapgrad.Rule(nn.Linear, cotangent=RowSample(keep)) for keep in (0.75, 0.5, 0.25)]


def make_uneven_batches() -> list[Batch]:
    """Return batches of which all but the first two hold three hard examples, one of them much harder ones."""
    hard = torch.arange(24) < 3
    sizes = [0.2, 0.2, 3.0, 3.0, 3.0, 18.0, 3.0, 3.0]
    batches = zip(make_batches((24,), 8), sizes, strict=True)
    return [(x * torch.where(hard, size, 0.2)[:, None], y) for (x, y), size in batches]


def test_noise_of_batches_with_few_hard_examples_is_told() -> None:
    model, batches = make_mlp(4), make_uneven_batches()
    plan = cheapgrad.plan(model, loss_fn, batches, strategies=ROWS, skip_small=False, flops="55 %")
    exact = exact_gradients(model, batches)
    cheapgrad.approximate(model, plan)
    noise, error = measure_noise(model, batches, exact, draws=400)
    assert error < 0.05 * noise
    assert plan.predicted.noise_fraction == pytest.approx(noise, rel=0.15)
    # The first two batches alone say something else altogether.
    of_two, _ = measure_noise(model, batches[:2], exact[:2], draws=40)
    scale = float(torch.stack(exact[:2]).var(0).sum() / torch.stack(exact).var(0).sum())
    assert of_two * scale < 0.2 * noise


def test_interval_covers_the_noise_of_many_batches_and_stays_below_the_ceiling() -> None:
    model, kept, covered, covered_by_half = make_mlp(3), 0, 0, 0
    pool = make_batches((24,), 240)
    exact = exact_gradients(model, pool)
    for start in range(0, 240, 8):
        plan = cheapgrad.plan(model, loss_fn, pool[start : start + 8], strategies=ROWS, skip_small=False, noise=0.6)
        low, high = plan.noise_interval
        assert plan.layers
        assert high <= 0.6
        handle = cheapgrad.approximate(model, plan)
        noise, _ = measure_noise(model, pool, exact, draws=1)
        handle.revert()
        kept += noise <= 0.6
        covered += low <= noise <= high
        middle = plan.predicted.noise_fraction
        covered_by_half += (low * middle) ** 0.5 <= noise <= (high * middle) ** 0.5
    # Nine and eight in ten of thirty are promised; an interval of half the width does not keep that.
    assert kept >= 27
    assert covered >= 24
    assert covered_by_half < 24


@pytest.mark.parametrize("batches", [4, 5, 6, 7, 8])
def test_bounds_are_those_of_students_t(batches: int) -> None:
    freedom, quantile = batches - 1, math.log(spare_factor(1.0, batches))
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    points = torch.linspace(0.0, quantile, 10_001, dtype=torch.float64)
    density = scale * (1 + points**2 / freedom) ** (-(freedom + 1) / 2)
    assert 0.5 + float(torch.trapezoid(density, points)) == pytest.approx(0.9, abs=1e-4)
    # Of fewer than four batches nothing is known but the error of draws, which is taken to be normal.
    assert math.erf(math.log(spare_factor(1.0, 3)) / math.sqrt(2)) == pytest.approx(0.8, abs=1e-3)


def test_few_batches_are_named() -> None:
    def plan_with(count: int) -> cheapgrad.Plan:
        batches = make_batches((24,), count)
        return cheapgrad.plan(make_mlp(3), loss_fn, batches, strategies=ROWS, skip_small=False, flops="60 %")

    assert "from 3 batches nobody can tell" in plan_with(3).remarks[0]
    assert "for eight in ten, by the error of laws and draws alone)" in str(plan_with(3))
    assert not any("nobody can tell" in remark for remark in plan_with(6).remarks)
    text = str(plan_with(6))
    low, high = plan_with(6).noise_interval
    assert low < plan_with(6).predicted.noise_fraction < high
    assert f"{low:.2g} to {high:.2g} for eight in ten)" in text


def test_large_errors_are_said() -> None:
    batches = make_uneven_batches()
    plan = cheapgrad.plan(make_mlp(4), loss_fn, batches, strategies=ROWS, skip_small=False, flops="55 %")
    relative = plan.noise_standard_error / plan.predicted.noise_fraction
    assert relative > 0.25
    assert f"known to ±{relative:.0%} only" in plan.remarks[0]


def test_error_of_a_ratio_is_that_of_a_jackknife() -> None:
    generator = torch.Generator().manual_seed(3)
    gradients = [[torch.randn(5, generator=generator), torch.randn(2, 3, generator=generator)] for _ in range(6)]
    noises = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
    variance = MiniBatchVariance()
    for gradient in gradients:
        variance.add(gradient)

    def ratio(kept: list[int]) -> float:
        rows = torch.stack([torch.cat([part.flatten() for part in gradients[one]]).double() for one in kept])
        return sum(noises[one] for one in kept) / len(kept) / float(rows.var(0).sum())

    others = [ratio([one for one in range(6) if one != left]) for left in range(6)]
    mean = sum(others) / 6
    expected = math.sqrt(5 / 6 * sum((other - mean) ** 2 for other in others)) / ratio(list(range(6)))
    assert relative_error_of_ratio(noises, variance) == pytest.approx(expected, rel=1e-5)
    few = MiniBatchVariance()
    for gradient in gradients[:3]:
        few.add(gradient)
    assert relative_error_of_ratio(noises[:3], few) is None


def test_several_budgets_at_once_have_the_variances_of_each() -> None:
    generator = torch.Generator().manual_seed(4)
    atoms = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    scores = atoms.norm(dim=1) + 0.1

    def squares_of_sums(weights: Tensor) -> Tensor:
        return (weights @ atoms).square().sum(1)

    counts = (5, 12, 39, 40)
    together = approximate_variance(
        atoms.square().sum(1), torch.stack([water_filling(scores, count) for count in counts]), squares_of_sums
    )
    each = [
        Systematic().variance(atoms.square().sum(1), scores, count, lambda w: squares_of_sums(w[None])[0])
        for count in counts
    ]
    torch.testing.assert_close(together, torch.stack(each), rtol=1e-12, atol=1e-12)
    assert together[-1] == 0.0


def test_designs_with_variances_of_their_own_are_not_approximated() -> None:
    many = torch.full((40,), 0.5, dtype=torch.float64)
    assert Systematic().is_approximated(many)
    assert not Systematic(permute=False).is_approximated(many)
    assert not OrderedPivotal().is_approximated(many)


def test_folded_features_keep_squared_norms_on_average() -> None:
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(20_000, 300, generator=generator, dtype=torch.float64)
    folded = _fold(matrix, 0)
    assert folded.shape == (20_000, 48)
    # Each row has 2 * 300² / 48 of variance around 300.
    assert float(folded.square().sum(1).mean()) == pytest.approx(float(matrix.square().sum(1).mean()), rel=0.01)
    assert torch.equal(_fold(matrix[:, :48], 0), matrix[:, :48])

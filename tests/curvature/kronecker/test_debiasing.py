"""The bias of same-batch eigenvalues and its removal, by listing all pairs of batches of a small population."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from cheapgrad.curvature.finite_population import FinitePopulation
from cheapgrad.curvature.kronecker import CategoricalOutputs, KroneckerCurvature, along_basis_of, ekfac, kfac
from tests.curvature.kronecker.cases import double, randn

POPULATION, SIZE = 6, 2


def _problem() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))), 2 * randn(POPULATION, 3, seed=11)


def _batch(x: Tensor, index: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return x[list(index)], torch.zeros(len(index))


def _flatten(curvature: KroneckerCurvature) -> Tensor:
    return torch.cat([values.flatten() for values in curvature.eigenvalues.values()])


def test_held_out_eigenvalues_have_the_mean_of_what_the_first_batch_left_and_corrected_ones_that_of_all() -> None:
    model, x = _problem()
    whole = FinitePopulation(POPULATION, SIZE, SIZE)
    excess, gap = [], []
    for first in combinations(range(POPULATION), SIZE):
        same = ekfac(model, _batch(x, first), CategoricalOutputs())
        full = _flatten(along_basis_of(same, model, (x, torch.zeros(POPULATION)), CategoricalOutputs()))
        rest = tuple(index for index in range(POPULATION) if index not in first)
        others = [
            along_basis_of(same, model, _batch(x, second), CategoricalOutputs()) for second in combinations(rest, SIZE)
        ]
        held_out = torch.stack([_flatten(other) for other in others]).mean(0)
        own = _flatten(same)
        expected = (POPULATION * full - SIZE * own) / (POPULATION - SIZE)
        torch.testing.assert_close(held_out, expected, rtol=1e-10, atol=1e-12)
        corrected = torch.stack([_flatten(other.correct_for_population(same, whole)) for other in others]).mean(0)
        torch.testing.assert_close(corrected, full, rtol=1e-10, atol=1e-12)
        # What the batch says of itself is something else, in both directions.
        leading, last = own.topk(3).indices, (-own).topk(10).indices
        excess.append(float(own[leading].sum() / full[leading].sum()))
        gap.append(float(own[last].sum() / full[last].sum()))
    # Over all batches: too large at the top, too small at the bottom.
    assert sum(excess) / len(excess) > 1.2
    assert sum(gap) / len(gap) < 0.5


def test_factors_of_all_data_have_no_bias_to_remove() -> None:
    model, x = _problem()
    everything = (x, torch.zeros(POPULATION))
    for build in (kfac, ekfac):
        once = build(model, everything, CategoricalOutputs())
        twice = build(model, everything, CategoricalOutputs(), eigenvalue_batches=everything)
        torch.testing.assert_close(once.to_dense(), twice.to_dense(), rtol=1e-10, atol=1e-12)


def test_a_basis_that_does_not_look_at_the_batch_shows_no_bias() -> None:
    model, x = _problem()
    fixed = ekfac(model, (randn(9, 3, seed=20), torch.zeros(9)), CategoricalOutputs())
    batches = list(combinations(range(POPULATION), SIZE))
    mean = sum(_flatten(along_basis_of(fixed, model, _batch(x, one), CategoricalOutputs())) for one in batches)
    full = _flatten(along_basis_of(fixed, model, (x, torch.zeros(POPULATION)), CategoricalOutputs()))
    torch.testing.assert_close(mean / len(batches), full, rtol=1e-10, atol=1e-12)

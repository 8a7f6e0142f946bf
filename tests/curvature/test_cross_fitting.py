"""Cross-fitting one batch, and the coupled curvature along mini-batch gradients."""

from __future__ import annotations

import math

import pytest
import torch

from cheapgrad.curvature import DenseOperator, MeanOperator
from cheapgrad.curvature.batch_sharpness import measure_batch_sharpness
from cheapgrad.curvature.cross_fitting import cross_fit
from cheapgrad.curvature.split_sample import split_sample
from cheapgrad.errors import BatchError, BudgetError, NonFiniteCurvatureError, ShapeError


def distance(draws, truth):
    draws = torch.tensor([float(draw) for draw in draws])
    return float((draws.mean() - truth).abs() / (draws.std() / math.sqrt(len(draws))))


def white_batch(examples=60, parameters=20, parts=6, spike=1.0):
    rows_BP = torch.randn(examples, parameters, dtype=torch.float64)
    rows_BP[:, 0] *= math.sqrt(spike)
    return MeanOperator([DenseOperator(rows.T @ rows / len(rows)) for rows in rows_BP.chunk(parts)])


def test_unbiased_for_white_data_where_the_batch_itself_is_not():
    fits = [cross_fit(white_batch(), 1, folds=3) for _ in range(150)]
    assert distance([fit.held_out for fit in fits], 1.0) < 3
    assert distance([fit.same_batch for fit in fits], 1.0) > 6


def test_less_variance_than_one_split_where_there_is_a_signal():
    crossed, halves, stated = [], [], []
    for _ in range(200):
        batch = white_batch(spike=6.0)
        fit = cross_fit(batch, 1)
        crossed.append(fit.held_out)
        stated.append(fit.fold_standard_error)
        parts = batch.micro_batches
        halves.append(split_sample(MeanOperator(parts[:3]), MeanOperator(parts[3:]), 1).held_out)
    variance = torch.cat(crossed).var()
    assert variance < 0.8 * torch.cat(halves).var()
    # The spread over folds understates: as documented, and not by more.
    assert 0.7 < float(torch.cat(stated).square().mean().sqrt() / variance.sqrt()) < 1.0


def test_two_folds_are_two_splits():
    batch = white_batch()
    even, odd = (MeanOperator(batch.micro_batches[start::2]) for start in (0, 1))
    fit = cross_fit(batch, 2, folds=2)
    swapped = [split_sample(odd, even, 2), split_sample(even, odd, 2)]
    torch.testing.assert_close(fit.held_out, (swapped[0].held_out + swapped[1].held_out) / 2)
    torch.testing.assert_close(fit.same_batch, (swapped[0].same_batch + swapped[1].same_batch) / 2)
    spread = (swapped[0].held_out - swapped[1].held_out).abs() / 2
    torch.testing.assert_close(fit.fold_standard_error, spread)
    assert fit.to_dict()["folds"] == 2


def test_finite_population_is_corrected_in_every_fold():
    rows_BP = torch.randn(100, 10, dtype=torch.float64)
    batch = MeanOperator([DenseOperator(rows.T @ rows / 10, example_count=10) for rows in rows_BP.chunk(10)])
    fit = cross_fit(batch, 1, population_size=100)
    # The folds together are the population: what is held out is exactly what the others leave.
    folds = []
    for index, part in enumerate(batch.micro_batches):
        others = MeanOperator([each for place, each in enumerate(batch.micro_batches) if place != index])
        directions = split_sample(others, part.operator, 1).directions_PK
        folds.append((directions * (batch @ directions)).sum())
    torch.testing.assert_close(fit.corrected.squeeze(), torch.stack(folds).mean())


class TestSharpness:
    def draw(self):
        """Least squares from zero with white inputs: all data have the curvature 1 in every direction."""
        parts, gradients = [], []
        for _ in range(4):
            rows_BP = torch.randn(10, 8, dtype=torch.float64)
            parts.append(DenseOperator(rows_BP.T @ rows_BP / 10))
            gradients.append(-(rows_BP * (rows_BP.sum(1, keepdim=True))).mean(0))
        return measure_batch_sharpness(MeanOperator(parts), torch.stack(gradients))

    def test_decoupled_is_the_curvature_of_all_data_and_coupled_is_not(self):
        drawn = [self.draw() for _ in range(300)]
        assert distance([each.decoupled for each in drawn], 1.0) < 3
        assert distance([each.coupled for each in drawn], 1.0) > 6
        stated = sum(each.coupled_standard_error**2 for each in drawn) / len(drawn)
        measured = float(torch.tensor([each.coupled for each in drawn]).std()) ** 2
        assert stated == pytest.approx(measured, rel=0.3)

    def test_bad_input(self):
        operator = MeanOperator([DenseOperator(torch.eye(2)) for _ in range(2)])
        with pytest.raises(BatchError, match="the operator has 1 micro-batch"):
            measure_batch_sharpness(torch.eye(2), torch.ones(1, 2))
        with pytest.raises(ShapeError, match=r"shape \(2, 2\), .* but got \(3, 2\)"):
            measure_batch_sharpness(operator, torch.ones(3, 2))
        with pytest.raises(NonFiniteCurvatureError, match="gradient of micro-batch 1 is zero"):
            measure_batch_sharpness(operator, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_bad_input():
    with pytest.raises(BatchError, match="at least 2 micro-batches"):
        cross_fit(torch.eye(3), 1)
    with pytest.raises(BatchError, match="7 folds were asked of 6 micro-batches"):
        cross_fit(white_batch(), 1, folds=7)
    with pytest.raises(BudgetError, match="folds must be a whole number of at least 2, but got 1"):
        cross_fit(white_batch(), 1, folds=1)

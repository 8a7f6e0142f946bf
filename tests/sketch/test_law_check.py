"""The law checker has power: every biased twin and every twin of another variance is caught, and for that reason."""

from __future__ import annotations

import pytest
import torch

from cheapgrad.errors import BudgetError, PlacementError, ShapeError
from cheapgrad.sketch import (
    ColumnSample,
    CountSketch,
    ElementMask,
    ExampleSample,
    FeatureSample,
    Hadamard,
    LowRank,
    Pivotal,
    Poisson,
    Rademacher,
    RowProjection,
    RowSample,
    StochasticRounding,
    Systematic,
    Uniform,
)
from cheapgrad.testing import check_law, make_layer_problem
from tests.sketch import mutants
from tests.sketch.cases import COTANGENT, STORED, parametrized

# One member per family and moment, with little noise, so that two per cent of bias can be seen.
FAMILIES = [
    (COTANGENT, RowSample(keep=0.7)),
    (STORED, RowSample(keep=0.7)),
    (COTANGENT, RowSample(keep=0.7, design=Poisson())),
    (COTANGENT, ExampleSample(keep=0.7)),
    (STORED, ExampleSample(keep=0.7)),
    (COTANGENT, ColumnSample(keep=0.8)),
    (STORED, FeatureSample(keep=0.7)),
    (STORED, FeatureSample(keep=0.7, rows_per_mask=4)),
    (COTANGENT, ElementMask(keep=0.7)),
    (STORED, ElementMask(keep=0.7)),
    (COTANGENT, RowProjection(keep=0.95)),
    (STORED, RowProjection(keep=0.95, kind=Hadamard())),
    (STORED, RowProjection(keep=0.95, kind=CountSketch())),
    (COTANGENT, LowRank(rank=4)),
    (STORED, LowRank(rank=6)),
    (STORED, StochasticRounding(bits=2)),
    (STORED, StochasticRounding(bits=4)),
]
SAMPLINGS = [
    (COTANGENT, lambda design: RowSample(keep=0.5, design=design)),
    (STORED, lambda design: RowSample(keep=0.5, design=design)),
    (COTANGENT, lambda design: ExampleSample(keep=0.6, design=design)),
    (COTANGENT, lambda design: ColumnSample(keep=0.6, design=design)),
    (STORED, lambda design: FeatureSample(keep=0.5, design=design)),
    (COTANGENT, lambda design: LowRank(rank=3, design=design)),
    (STORED, lambda design: LowRank(rank=5, design=design)),
]


@pytest.mark.parametrize(("moment", "strategy"), parametrized(FAMILIES))
def test_a_scale_of_two_per_cent_is_seen_as_bias(moment, strategy):
    report = check_law(mutants.TwinScaled(strategy), moment=moment, draws=30_000)
    assert report.biased == tuple(target.name for target in report.targets), str(report)


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize(("moment", "strategy"), parametrized(FAMILIES))
def test_a_variance_wrong_by_a_tenth_is_seen_as_such(moment, strategy, factor):
    report = check_law(mutants.TwinOfOtherVariance(strategy, factor), moment=moment, draws=8000)
    assert report.wrong_variance == tuple(target.name for target in report.targets), str(report)
    assert not report.biased
    assert not report.ok


@pytest.mark.parametrize("twin", [mutants.TwinUnweighted, mutants.TwinOneLess, mutants.TwinMultinomial])
@pytest.mark.parametrize(("moment", "build"), SAMPLINGS)
@pytest.mark.parametrize("inner", [Systematic(), Pivotal()], ids=repr)
def test_biased_designs_are_caught(twin, moment, build, inner):
    report = check_law(build(twin(inner)), moment=moment, draws=8000)
    assert report.biased == tuple(target.name for target in report.targets), str(report)


BIASED = [
    (STORED, RowProjection(keep=0.5, kind=mutants.TwinHadamardForgetsPadding())),
    (COTANGENT, RowProjection(keep=0.5, kind=mutants.TwinHadamardForgetsPadding())),
    (COTANGENT, RowProjection(keep=0.5, kind=mutants.TwinHadamardScaledByProduct())),
    (COTANGENT, RowProjection(keep=0.5, kind=mutants.TwinCountSketchWithoutSigns())),
    (STORED, mutants.TwinProjectionDrawnTwice(RowProjection(keep=0.5, kind=Hadamard()))),
    (STORED, mutants.TwinProjectionDrawnTwice(RowProjection(keep=0.5, kind=Rademacher()))),
    (STORED, mutants.TwinRoundsToNearest(StochasticRounding(bits=2))),
    (STORED, mutants.TwinRoundsToNearest(StochasticRounding(bits=8))),
    (COTANGENT, mutants.TwinMaskUnweighted(ElementMask(keep=0.5))),
    (STORED, mutants.TwinMaskUnweighted(ElementMask(keep=0.5))),
    (COTANGENT, mutants.TwinTruncated(LowRank(rank=3))),
    (STORED, mutants.TwinTruncated(LowRank(rank=3))),
    (COTANGENT, mutants.TwinRowsDrawnTwice(RowSample(keep=0.5))),
]


@pytest.mark.parametrize(("moment", "strategy"), parametrized(BIASED))
def test_other_biased_twins_are_caught(moment, strategy):
    report = check_law(strategy, moment=moment)
    assert report.biased == tuple(target.name for target in report.targets), str(report)


TIED = [
    (STORED, FeatureSample(keep=0.5, scores=Uniform(), rows_per_mask=4, design=mutants.TwinSharedMask(Systematic()))),
    (COTANGENT, RowSample(keep=0.5, design=mutants.TwinOneCoin(Poisson()))),
    (STORED, mutants.TwinOneDither(StochasticRounding(bits=2))),
]


@pytest.mark.parametrize(("moment", "strategy"), parametrized(TIED))
def test_one_draw_used_for_two_is_unbiased_but_has_another_variance(moment, strategy):
    report = check_law(strategy, moment=moment)
    assert "dW" in report.wrong_variance, str(report)
    assert not report.biased


def test_too_few_draws_are_a_failure():
    report = check_law(RowProjection(keep=0.1), draws=200)
    assert report.inconclusive == ("dW",)
    assert not report.ok
    assert "inconclusive: more draws needed" in str(report)


def test_a_nan_is_a_failure():
    problem = make_layer_problem()
    problem.cotangent_NO[0, 0] = float("nan")
    report = check_law(RowSample(keep=0.5), problem=problem, draws=200)
    assert report.biased == report.wrong_variance == report.inconclusive == ("dX", "dW")


def test_an_exact_strategy_passes_and_says_that_nothing_varies():
    report = check_law(ColumnSample(keep=1.0), draws=100)
    assert report.ok
    assert [target.variance_ratio for target in report.targets] == [1.0, 1.0]


def test_a_constant_error_is_a_bias():
    report = check_law(mutants.TwinScaled(ColumnSample(keep=1.0), 1 + 1e-6), draws=100)
    assert report.biased == ("dX", "dW")


def test_the_default_generator_is_left_as_it_was():
    state = torch.random.get_rng_state()
    first = check_law(RowSample(keep=0.5), draws=200, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert check_law(RowSample(keep=0.5), draws=200, seed=3) == first
    assert check_law(RowSample(keep=0.5), draws=200, seed=4) != first


def test_the_report_prints_what_it_found():
    text = str(check_law(mutants.TwinScaled(RowSample(keep=0.5), 1.5), draws=2000))
    assert "in cotangent=, 2000 draws: LAW BROKEN" in text
    assert "dW: largest |z|" in text
    assert "biased, wrong variance" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 99}, "draws must be a whole number of at least 100, but got 99"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\), but got 0.0"),
        ({"tolerance": 1.5}, r"tolerance must be in \(0, 1\), but got 1.5"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(BudgetError, match=message):
        check_law(RowSample(keep=0.5), **options)


def test_a_moment_without_meaning():
    with pytest.raises(PlacementError, match=r"ColumnSample\(keep=0.5\) has no meaning in stored="):
        check_law(ColumnSample(keep=0.5), moment=STORED)


def test_rows_that_are_no_whole_number_of_examples():
    with pytest.raises(ShapeError, match="rows=10 and examples=3"):
        make_layer_problem(rows=10, examples=3)


def test_sizes_out_of_range():
    with pytest.raises(BudgetError, match="inputs must be a whole number of at least 1, but got 0"):
        make_layer_problem(inputs=0)

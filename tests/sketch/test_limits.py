"""The places where others went wrong: flat and zero scores, zero cotangents, full budgets, one row, NaN."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cheapgrad.errors import PlacementError, ShapeError
from cheapgrad.ops.linear import sketched_linear
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import (
    ColumnSample,
    CotangentNorm,
    DenseMatrix,
    ElementMask,
    ExampleSample,
    FeatureSample,
    Hadamard,
    LowRank,
    Moment,
    Operands,
    Pivotal,
    Poisson,
    ProductNorm,
    RowProjection,
    RowSample,
    StochasticRounding,
    StoredNorm,
    Systematic,
    Uniform,
    WinnerTakeAll,
    WithReplacement,
    water_filling,
)
from cheapgrad.testing import LayerProblem, check_law, make_layer_problem
from tests.sketch.cases import COTANGENT, DESIGNS, LAZY, PLACED, STORED, parametrized

EVERY = PLACED + LAZY
PROBLEM = make_layer_problem()


def _gradients(moment, strategy, x, weight, cotangent, examples, seed=0):
    """Return dX and dW of a layer whose backward pass is sketched."""
    torch.manual_seed(seed)
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    plan = Plan(**{moment.value: strategy, f"{moment.value}_memory": strategy.new_memory()})
    sketched_linear(x, weight, None, plan, examples=examples).backward(cotangent)
    return x.grad, weight.grad


def _of_problem(moment, strategy, seed=0, **changed):
    problem = dataclasses.replace(PROBLEM, **changed)
    return _gradients(
        moment, strategy, problem.stored_NI, problem.weight_OI, problem.cotangent_NO, problem.examples, seed
    )


@pytest.mark.parametrize(("moment", "strategy"), parametrized(EVERY))
def test_a_zero_cotangent_gives_zero(moment, strategy):
    for gradient in _of_problem(moment, strategy, cotangent_NO=torch.zeros_like(PROBLEM.cotangent_NO)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("moment", "strategy"), parametrized(EVERY))
def test_a_zero_input_gives_zero(moment, strategy):
    grad_input, grad_weight = _of_problem(moment, strategy, stored_NI=torch.zeros_like(PROBLEM.stored_NI))
    assert torch.equal(grad_weight, torch.zeros_like(grad_weight))
    assert torch.isfinite(grad_input).all()


@pytest.mark.parametrize(("moment", "strategy"), parametrized(EVERY))
def test_a_single_row_of_a_single_example(moment, strategy):
    problem = make_layer_problem(rows=1, examples=1)
    for gradient in _gradients(moment, strategy, problem.stored_NI, problem.weight_OI, problem.cotangent_NO, 1):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0


ROWS = [
    (moment, family(keep=0.3, design=design))
    for family in (RowSample, ExampleSample)
    for moment in (COTANGENT, STORED)
    for design in DESIGNS
    if not isinstance(design, Poisson)
]


@pytest.mark.parametrize(("moment", "strategy"), parametrized(ROWS))
def test_a_single_row_is_exact(moment, strategy):
    problem = make_layer_problem(rows=1, examples=1)
    grad_input, grad_weight = _gradients(
        moment, strategy, problem.stored_NI, problem.weight_OI, problem.cotangent_NO, 1
    )
    torch.testing.assert_close(grad_input, problem.input_gradient)
    torch.testing.assert_close(grad_weight, problem.weight_gradient)


@pytest.mark.parametrize(("moment", "strategy"), parametrized(EVERY))
def test_flat_scores_and_duplicate_rows_are_unbiased(moment, strategy):
    generator = torch.Generator().manual_seed(5)
    row_I, row_O = (torch.randn(1, size, generator=generator, dtype=torch.float64) for size in (6, 4))
    # Three times the same row in each of seven examples: every row score is equal, every atom the same.
    problem = LayerProblem(
        row_I.sign().repeat(21, 1) + 0.01 * row_I,
        row_O.sign().repeat(21, 1) + 0.01 * row_O,
        torch.randn(4, 6, generator=generator, dtype=torch.float64),
        7,
    )
    report = check_law(strategy, moment=moment, problem=problem, draws=6000)
    assert not report.biased, str(report)


def test_identical_rows_cost_nothing_where_the_size_is_fixed():
    """All atoms alike: any K of N rows, weighted N / K, give dW exactly; a random size does not."""
    problem = LayerProblem(torch.ones(12, 3).double(), torch.ones(12, 2).double(), torch.ones(2, 3).double())
    for design in (Systematic(), Pivotal()):
        strategy = RowSample(keep=0.25, design=design)
        stated = strategy.law.variance(problem.stored_NI, problem.cotangent_NO, moment=STORED)
        assert float(stated.weight) == pytest.approx(0, abs=1e-9)
        grad_weight = _gradients(STORED, strategy, problem.stored_NI, problem.weight_OI, problem.cotangent_NO, 1)[1]
        torch.testing.assert_close(grad_weight, problem.weight_gradient)
    poisson = RowSample(keep=0.25, design=Poisson())
    assert float(poisson.law.variance(problem.stored_NI, problem.cotangent_NO, moment=STORED).weight) > 100


FULL = [
    (COTANGENT, RowSample(keep=1.0)),
    (STORED, RowSample(keep=1.0)),
    (COTANGENT, ColumnSample(keep=1.0)),
    (STORED, FeatureSample(keep=1.0)),
    (STORED, FeatureSample(keep=1.0, rows_per_mask=4)),
    (COTANGENT, ExampleSample(keep=1.0)),
    (STORED, ExampleSample(keep=1.0)),
    (COTANGENT, ElementMask(keep=1.0)),
    (STORED, ElementMask(keep=1.0)),
    (COTANGENT, RowSample(keep=1.0, design=Pivotal())),
    (COTANGENT, RowSample(keep=1.0, design=Poisson())),
    (COTANGENT, RowSample(keep=1.0, design=WinnerTakeAll())),
    (COTANGENT, LowRank(rank=5)),
    (STORED, LowRank(rank=11)),
]


@pytest.mark.parametrize(("moment", "strategy"), parametrized(FULL))
def test_a_full_budget_drawn_all_the_same_is_exact_and_has_no_variance(moment, strategy):
    grad_input, grad_weight = _of_problem(moment, strategy)
    torch.testing.assert_close(grad_input, PROBLEM.input_gradient, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_weight, PROBLEM.weight_gradient, rtol=1e-10, atol=1e-10)
    stated = strategy.law.variance(
        PROBLEM.stored_NI, PROBLEM.cotangent_NO, PROBLEM.weight_OI, moment=moment, examples=PROBLEM.examples
    )
    assert float(stated.input + stated.weight) == pytest.approx(0, abs=1e-12)
    assert strategy.is_exact or isinstance(strategy, LowRank)


@pytest.mark.parametrize("design", DESIGNS, ids=repr)
@pytest.mark.parametrize("count", [4, 9])
def test_a_count_of_all_atoms_or_more(design, count):
    scores = torch.tensor([3.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    selection = design.draw(scores, count)
    assert selection.index_K.shape == (4,)
    if not isinstance(design, WithReplacement):
        assert sorted(selection.index_K.tolist()) == [0, 1, 2, 3]
        torch.testing.assert_close(selection.weight_K, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("design", DESIGNS, ids=repr)
def test_all_zero_scores_draw_evenly_with_finite_weights(design):
    counts = torch.zeros(6, dtype=torch.float64)
    for _ in range(1000):
        selection = design.draw(torch.zeros(6), 2)
        assert torch.isfinite(selection.weight_K).all()
        counts.index_add_(0, selection.index_K, selection.weight_K)
    torch.testing.assert_close(counts / 1000, torch.ones(6, dtype=torch.float64), rtol=0, atol=0.3)


@pytest.mark.parametrize("design", DESIGNS, ids=repr)
def test_atoms_of_probability_zero_are_never_drawn(design):
    scores = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    probabilities = water_filling(scores, 2)
    for _ in range(500):
        assert (probabilities[design.draw(scores, 2).index_K] > 0).all()


@pytest.mark.parametrize(("moment", "strategy"), parametrized(EVERY))
def test_repeated_steps_differ_and_equal_seeds_do_not(moment, strategy):
    first, again = (_of_problem(moment, strategy, 0)[1] for _ in range(2))
    assert torch.equal(first, again)
    assert any(not torch.equal(first, _of_problem(moment, strategy, seed)[1]) for seed in range(1, 7))


def _poisoned(matrix, row, column, value):
    poisoned = matrix.clone()
    poisoned[row, column] = value
    return poisoned


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize(("moment", "strategy"), parametrized(EVERY))
def test_a_number_that_is_not_finite_is_never_hidden(moment, strategy, value):
    for seed in range(4):
        row, column = 5 * seed, seed
        grad_weight = _of_problem(moment, strategy, seed, stored_NI=_poisoned(PROBLEM.stored_NI, row, column, value))[1]
        assert not torch.isfinite(grad_weight).all(), "a number in X that is not finite was hidden from dW"
        gradients = _of_problem(
            moment, strategy, seed, cotangent_NO=_poisoned(PROBLEM.cotangent_NO, row, column, value)
        )
        # A stored sample of random size may be empty, and dW zero whatever G is; the exact dX still tells.
        told = 1 if moment is STORED and isinstance(getattr(strategy, "design", None), Poisson) else 2
        for gradient in gradients[:told]:
            assert not torch.isfinite(gradient).all(), "a number in G that is not finite was hidden"


@pytest.mark.parametrize(("moment", "strategy"), parametrized(EVERY))
def test_tensors_of_nothing_but_nan_do_not_crash(moment, strategy):
    nothing = {
        "stored_NI": torch.full_like(PROBLEM.stored_NI, float("nan")),
        "cotangent_NO": torch.full_like(PROBLEM.cotangent_NO, float("nan")),
    }
    for gradient in _of_problem(moment, strategy, **nothing):
        assert torch.isnan(gradient).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("moment", "strategy"), parametrized(EVERY))
def test_dtypes_are_kept(moment, strategy, dtype):
    problem = [tensor.to(dtype) for tensor in (PROBLEM.stored_NI, PROBLEM.weight_OI, PROBLEM.cotangent_NO)]
    grad_input, grad_weight = _gradients(moment, strategy, *problem, PROBLEM.examples)
    assert grad_input.dtype == grad_weight.dtype == dtype
    assert torch.isfinite(grad_input).all()
    assert torch.isfinite(grad_weight).all()


FROZEN = [
    (COTANGENT, RowSample(keep=0.5, scores=score))
    for score in (None, Uniform(), StoredNorm(), CotangentNorm(), ProductNorm())
]


@pytest.mark.parametrize(("moment", "strategy"), parametrized(FROZEN))
def test_a_frozen_weight_leaves_an_unbiased_input_gradient(moment, strategy):
    operands = Operands(moment, None, PROBLEM.cotangent_NO, PROBLEM.weight_OI, PROBLEM.examples)
    draws = torch.func.vmap(
        lambda _: strategy.draw(operands).input_gradient(PROBLEM.weight_OI), randomness="different"
    )(torch.zeros(20_000))
    errors = draws - PROBLEM.input_gradient
    standard_error = errors.square().sum((1, 2)).mean() / 20_000
    assert float(errors.mean(0).square().sum() / standard_error) < 30
    assert float((standard_error / PROBLEM.input_gradient.square().sum()).sqrt()) < 0.01


def test_dropped_rows_would_hide_a_bias_where_scores_do_not_cover_the_gradient():
    """A row of X that is zero has a StoredNorm of zero, but its cotangent still belongs to dX: hence the floor."""
    stored_NI = PROBLEM.stored_NI.clone()
    stored_NI[:8] = 0
    problem = dataclasses.replace(PROBLEM, stored_NI=stored_NI)
    for score in (StoredNorm(), ProductNorm()):
        report = check_law(RowSample(keep=0.6, scores=score), problem=problem)
        assert report.ok, str(report)


def test_rows_of_the_two_operands_must_match():
    with pytest.raises(ShapeError, match=r"\(21, 11\) and \(20, 5\)"):
        RowSample(keep=0.5).law.variance(PROBLEM.stored_NI, PROBLEM.cotangent_NO[:20])


@pytest.mark.parametrize(
    ("strategy", "moment"),
    [
        (ColumnSample(keep=0.5), STORED),
        (FeatureSample(keep=0.5), COTANGENT),
        (StochasticRounding(bits=4), COTANGENT),
    ],
    ids=repr,
)
def test_a_moment_without_meaning_has_no_draw(strategy, moment):
    operands = Operands(moment, DenseMatrix(PROBLEM.stored_NI), PROBLEM.cotangent_NO, PROBLEM.weight_OI)
    message = rf"{type(strategy).__name__}\(.*\) cannot .*: {strategy.misplacement_reason}"
    act = strategy.store if moment is Moment.STORED else strategy.draw
    with pytest.raises(PlacementError, match=message):
        act(operands)
    if moment is Moment.STORED:
        with pytest.raises(PlacementError, match=message):
            strategy.restore((), 1, 1, torch.float32)


def test_the_scale_of_hadamard_is_that_of_the_padded_length():
    """Published code scaled by r N for N / r; twins with that mistake are caught in test_law_check.py."""
    drawn = Hadamard().draw(torch.zeros(1), 21, 21)
    gram = torch.func.vmap(
        lambda _: Hadamard().draw(torch.zeros(1), 21, 8).project(torch.eye(21, dtype=torch.float64)),
        randomness="different",
    )(torch.zeros(20_000))
    mean = (gram.mT @ gram).mean(0)
    torch.testing.assert_close(mean, torch.eye(21, dtype=torch.float64), rtol=0, atol=0.05)
    assert drawn.count == 21


def test_projection_of_all_rows_is_not_claimed_to_be_exact_by_its_law():
    stated = RowProjection(keep=0.999).law.variance(PROBLEM.stored_NI, PROBLEM.cotangent_NO)
    assert float(stated.weight) > 0

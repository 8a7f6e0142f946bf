"""Every strategy at every moment keeps its law: unbiased, and of the stated variance within 5 %."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cheapgrad.ops.linear import sketched_linear
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import (
    ColumnSample,
    DenseMatrix,
    LowRank,
    Moment,
    Operands,
    Pivotal,
    PredictedNorm,
    RowSample,
    StochasticRounding,
    Systematic,
)
from cheapgrad.sketch.law import LayerTensors
from cheapgrad.sketch.range_basis import RangeBasis
from cheapgrad.testing import LayerProblem, check_law, make_layer_problem
from tests.sketch.cases import COTANGENT, LAZY, PLACED, STORED, parametrized

DRAWS = 16_000
# Over all strategies together, by chance alone, one failure in a million runs.
ALPHA = 1e-6 / (len(PLACED) + 50)
PROBLEM = make_layer_problem()


@pytest.mark.parametrize(("moment", "strategy"), parametrized(PLACED))
def test_law(moment, strategy):
    report = check_law(strategy, moment=moment, problem=PROBLEM, draws=DRAWS, alpha=ALPHA)
    assert report.ok, str(report)
    # Nothing is vacuous: every one of these strategies has noise in every gradient it touches.
    assert all(target.measured_variance > 0 for target in report.targets)
    assert {target.name for target in report.targets} == ({"dW"} if moment is STORED else {"dX", "dW"})


@pytest.mark.parametrize("own_basis", [True, False], ids=["own basis", "basis of other data"])
@pytest.mark.parametrize(("moment", "strategy"), parametrized(LAZY))
def test_lazy_low_rank_keeps_its_law_for_whatever_basis_it_holds(moment, strategy, own_basis):
    matrix = PROBLEM.stored_NI if moment is STORED else PROBLEM.cotangent_NO
    memory = RangeBasis(refresh=10**9)
    held = memory.basis_for(matrix if own_basis else torch.randn_like(matrix), strategy.rank // 2)
    weight_OI = PROBLEM.weight_OI if moment is COTANGENT else None
    tensors = LayerTensors(PROBLEM.stored_NI, PROBLEM.cotangent_NO, weight_OI)
    predicted = strategy.variance_given_basis(tensors, moment, held)
    report = check_law(
        strategy, moment=moment, problem=PROBLEM, draws=DRAWS, alpha=ALPHA, memory=memory, predicted=predicted
    )
    assert report.ok, str(report)


@pytest.mark.parametrize("moment", [STORED, COTANGENT])
def test_lazy_low_rank_with_a_basis_of_every_step_is_unbiased(moment):
    report = check_law(LowRank(rank=4, refresh=1), moment=moment, problem=PROBLEM, draws=DRAWS, alpha=ALPHA)
    assert not report.biased, str(report)


def test_predicted_norms_keep_their_law():
    strategy = RowSample(keep=0.5, scores=PredictedNorm())
    memory = strategy.new_memory()
    strategy.observe(PROBLEM.cotangent_NO, PROBLEM.examples, memory)
    rows = PROBLEM.stored_NI.shape[0]
    predicted_norm_N = memory.predict(rows, PROBLEM.examples, PROBLEM.stored_NI.device)
    assert predicted_norm_N.shape == (rows,)
    predicted = strategy.law.variance(
        PROBLEM.stored_NI,
        PROBLEM.cotangent_NO,
        moment=STORED,
        examples=PROBLEM.examples,
        predicted_norm_N=predicted_norm_N,
    )
    report = check_law(
        strategy, moment=STORED, problem=PROBLEM, draws=DRAWS, alpha=ALPHA, memory=memory, predicted=predicted
    )
    assert report.ok, str(report)
    blind = strategy.law.variance(PROBLEM.stored_NI, PROBLEM.cotangent_NO, moment=STORED, examples=PROBLEM.examples)
    assert float(blind.weight) != float(predicted.weight)


# Beyond enumeration the cross terms of dW are an approximation: this is how good it is when atoms are nearly parallel.
@pytest.mark.parametrize("design", [Systematic(), Pivotal()], ids=repr)
@pytest.mark.parametrize("rows", [12, 21, 48])
@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_the_approximated_cross_terms_stay_within_the_tolerance(design, rows, shared):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def spread():
        return 0.3 + 3 * torch.rand(rows, 1, generator=generator, dtype=torch.float64) ** 2

    stored_NI = (draw(rows, 11) + shared * draw(1, 11)) * spread()
    cotangent_NO = (draw(rows, 5) + shared * draw(1, 5)) * spread()
    problem = LayerProblem(stored_NI, cotangent_NO, draw(5, 11))
    report = check_law(RowSample(keep=0.5, design=design), moment=STORED, problem=problem, draws=DRAWS, alpha=ALPHA)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("moment", "strategy"),
    parametrized([(moment, strategy) for moment, strategy in PLACED if getattr(strategy, "keep", 0.5) in {0.4, 0.5}]),
)
def test_the_linear_layer_draws_what_the_strategy_draws(moment, strategy):
    """From the same seed, dX and dW of the layer equal the strategy's own, called by hand."""
    x, weight = PROBLEM.stored_NI.clone().requires_grad_(), PROBLEM.weight_OI.clone().requires_grad_()
    plan = Plan(**{moment.value: strategy})
    torch.manual_seed(11)
    output = sketched_linear(x, weight, None, plan, examples=PROBLEM.examples)
    output.backward(PROBLEM.cotangent_NO)

    torch.manual_seed(11)
    expected = _by_hand(moment, strategy)
    torch.testing.assert_close(x.grad, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, expected[1], rtol=1e-12, atol=1e-12)


def _by_hand(moment, strategy):
    dense = DenseMatrix(PROBLEM.stored_NI)
    if moment is Moment.STORED:
        kept = strategy.store(Operands(moment, dense, examples=PROBLEM.examples))
        stand_in = strategy.restore(kept, *PROBLEM.stored_NI.shape, torch.float64).dense()
        return PROBLEM.input_gradient, PROBLEM.cotangent_NO.mT @ stand_in
    operands = Operands(moment, dense, PROBLEM.cotangent_NO, PROBLEM.weight_OI, PROBLEM.examples)
    stand_in = strategy.draw(operands).dense()
    return stand_in @ PROBLEM.weight_OI, stand_in.mT @ PROBLEM.stored_NI


def test_two_sketches_of_one_layer_are_unbiased_together():
    """Stored and cotangent sketches are independent, so the product of both is right on average."""
    plan = Plan(stored=StochasticRounding(bits=4), cotangent=ColumnSample(keep=0.6))

    def loss(weight_OI):
        return (
            sketched_linear(PROBLEM.stored_NI, weight_OI, None, plan, PROBLEM.examples) * PROBLEM.cotangent_NO
        ).sum()

    def draw(_):
        return torch.func.grad(loss)(PROBLEM.weight_OI)

    draws = 20_000
    errors = torch.func.vmap(draw, randomness="different")(torch.zeros(draws)) - PROBLEM.weight_gradient
    squared_norm = PROBLEM.weight_gradient.square().sum()
    # A weighted sum of squared normal numbers has at most the tail of one of them: beyond 30 lies a chance of 4e-8.
    standard_error = errors.flatten(1).square().sum(1).mean() / draws
    assert float(errors.mean(0).square().sum() / standard_error) < 30
    assert float((standard_error / squared_norm).sqrt()) < 0.01
    assert float(errors.flatten(1).std(0).min()) > 0


def test_reports_are_data():
    report = check_law(RowSample(keep=0.5), draws=4000)
    assert dataclasses.asdict(report) == report.to_dict()

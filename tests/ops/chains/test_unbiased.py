"""Every outcome of a design, and of two codes, listed: the gradients of a chain are right on average, exactly."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from cheapgrad import Rule, approximate
from cheapgrad.auditing import measure_gradient_moments
from cheapgrad.ops.chains import chain
from cheapgrad.ops.chains.chain import chain_of, run_stage, settle
from cheapgrad.ops.chains.linear_stage import LinearStage
from cheapgrad.ops.chains.norm_stage import LayerNormStage
from cheapgrad.sketch import DenseMatrix, Pivotal, RowSample, StochasticRounding, Systematic, Uniform
from tests.networks.twins import use_one_code_twice
from tests.ops.chains.networks import Chosen, convert, draw_parameters
from tests.sketch.enumeration import enumerate_design

ROWS, FEATURES = 5, 6
CHAINS = {
    "norm linear": lambda: [nn.LayerNorm(FEATURES), nn.Linear(FEATURES, 4)],
    "linear gelu linear": lambda: [nn.Linear(FEATURES, 7), nn.GELU(), nn.Linear(7, 3)],
    "norm linear relu linear": lambda: [
        nn.LayerNorm(FEATURES),
        nn.Linear(FEATURES, 7),
        nn.ReLU(),
        nn.Linear(7, 3, bias=False),
    ],
}
STRATEGIES = (RowSample(0.4), RowSample(0.6, design=Pivotal()), RowSample(0.4, Uniform(), Systematic()))


def gradients_of(model, x, cotangent):
    return [g.flatten() for g in torch.autograd.grad(model(x), [x, *model.parameters()], cotangent)]


def outcomes_of(strategy, cotangent, monkeypatch):
    """Return the different samples with their chances ``[M]`` and weights ``[M, N]``."""
    scores = torch.ones(ROWS) if isinstance(strategy.scores, Uniform) else cotangent.norm(dim=1)
    listed = enumerate_design(strategy.design, scores.double(), strategy.kept_count(ROWS), monkeypatch)
    weights, place = np.unique(listed.weights.round(12), axis=0, return_inverse=True)
    return torch.as_tensor(np.bincount(place.ravel(), listed.chances)), torch.as_tensor(weights)


def draws_and_exact(build, strategy, monkeypatch, weigh=lambda weight: weight):
    """Return chances, weights, the gradients of every outcome, and the exact ones."""
    model = draw_parameters(nn.Sequential(*build()))
    exact_model = copy.deepcopy(model)
    x = torch.randn(ROWS, FEATURES, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(model(x)) * torch.tensor([0.2, 1.0, 3.0, 0.5, 1.5]).view(-1, 1)
    chances, weights = outcomes_of(strategy, cotangent, monkeypatch)
    convert(model, strategy)
    draws = []
    for weight_N in weights:
        index = weight_N.nonzero().flatten()
        chosen = Chosen(monkeypatch, index, weigh(weight_N[index]))
        draws.append(gradients_of(model, x, cotangent))
        assert len(chosen.cotangents) == 1
    return chances, weights, draws, gradients_of(exact_model, x, cotangent)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("build", CHAINS.values(), ids=CHAINS)
def test_the_mean_of_all_outcomes_is_the_gradient_and_their_spread_is_the_law(build, strategy, monkeypatch):
    chances, weights, draws, exact = draws_and_exact(build, strategy, monkeypatch)
    assert abs(float(chances.sum()) - 1) < 1e-12
    assert len(chances) >= 3, "nothing is vacuous"
    for position, truth in enumerate(exact):
        drawn = torch.stack([draw[position] for draw in draws])
        torch.testing.assert_close(chances @ drawn, truth, rtol=1e-10, atol=1e-12)
    # Rows of the root are orthogonal: sum (1 / p - 1) ||a_n||**2.
    probability_N = 1 / weights.max(0).values
    spread = chances @ (torch.stack([draw[0] for draw in draws]) - exact[0]).square().sum(1)
    row_norms_N = exact[0].view(ROWS, -1).square().sum(1)
    torch.testing.assert_close(spread, ((1 / probability_N - 1) * row_norms_N).sum(), rtol=1e-9, atol=1e-12)


def test_a_twin_without_weights_is_caught(monkeypatch):
    build = CHAINS["norm linear relu linear"]
    chances, _, draws, exact = draws_and_exact(build, STRATEGIES[0], monkeypatch, weigh=torch.ones_like)
    for position, truth in enumerate(exact):
        drawn = torch.stack([draw[position] for draw in draws])
        assert (chances @ drawn - truth).norm() > 0.1 * truth.norm()


class Shifts:
    """An unbiased codec that adds a step to every entry or takes it away: the next of given patterns of signs."""

    step = 0.3

    def __init__(self, patterns):
        self.patterns = list(patterns)

    def store(self, operands, memory=None):
        matrix = operands.stored_dense()
        return (matrix + self.step * torch.tensor(self.patterns.pop(0), dtype=matrix.dtype).view(matrix.shape),)

    def restore(self, kept, rows, inputs, dtype):
        return DenseMatrix(kept[0])


def norm_and_linear(x, norm, linear, codec):
    stage = LayerNormStage(norm.eps, x.shape[-1], codec)
    hidden = run_stage(x, stage, (norm.weight, norm.bias), None, None)
    return run_stage(hidden, LinearStage(), (linear.weight, linear.bias), None, settle(chain_of(hidden)))


@pytest.mark.parametrize("twice", [False, True], ids=["two codes", "one code twice"])
def test_every_outcome_of_two_codes_of_a_norm(twice):
    norm, linear = draw_parameters(nn.LayerNorm(4)), draw_parameters(nn.Linear(4, 3))
    x = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(1, 3, dtype=torch.float64)
    wanted = [x, norm.weight, norm.bias, linear.weight, linear.bias]
    exact = torch.autograd.grad(linear(norm(x)), wanted, cotangent)
    patterns = list(itertools.product((-1.0, 1.0), repeat=4))
    pairs = [(p, p) for p in patterns] if twice else list(itertools.product(patterns, repeat=2))
    total = [torch.zeros_like(value) for value in exact]
    for pair in pairs:
        output = norm_and_linear(x, norm, linear, Shifts(pair))
        for part, value in zip(total, torch.autograd.grad(output, wanted, cotangent), strict=True):
            part += value / len(pairs)
    if twice:
        # E[c c] is x_hat**2 plus the variance of a code: the gradient of the input is off, what is linear is not.
        assert (total[0] - exact[0]).norm() > 1e-3 * exact[0].norm()
        torch.testing.assert_close(total[1:], list(exact[1:]), rtol=1e-10, atol=1e-12)
    else:
        torch.testing.assert_close(total, list(exact), rtol=1e-10, atol=1e-12)


def norm_moments(monkeypatch, twice):
    """Return the moments of the input's gradient of a norm that keeps two bits: bias shows in few features."""
    if twice:
        use_one_code_twice(monkeypatch)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    x = torch.randn(64, 8, requires_grad=True)
    exact = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    convert(model, None, stored=StochasticRounding(2))

    def draw():
        return torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])

    return measure_gradient_moments(draw, exact, draws=600)


def test_codes_of_a_norm_are_unbiased(monkeypatch):
    moments = norm_moments(monkeypatch, twice=False)
    assert moments.unbiased, moments
    assert moments.detectable_relative_bias < 0.02, "inconclusive"


def test_one_code_used_twice_is_caught(monkeypatch):
    assert not norm_moments(monkeypatch, twice=True).unbiased


@pytest.mark.parametrize("reads_codes", [False, True], ids=["right", "twin that reads them"])
def test_an_activation_behind_codes_of_a_norm_does_not_read_them(reads_codes, monkeypatch):
    # It is not linear in its input: it keeps what it needs of the real one.
    if reads_codes:
        monkeypatch.setattr(chain, "_rebuilds_for", lambda before, stage: before.stage.rebuilds_output)
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8))
    x, wanted = torch.randn(64, 8), [model[0].bias, *model[2].parameters()]

    def draw():
        return torch.autograd.grad(model(x).square().sum(), wanted)

    exact = draw()
    rules = Rule(cotangent=RowSample(0.9)), Rule("0", stored=StochasticRounding(2))
    approximate(model, *rules, skip_small=False)
    assert measure_gradient_moments(draw, exact, draws=250).unbiased != reads_codes

"""Audit of random gradients whose bias and variance are known."""

from __future__ import annotations

import json
import math

import pytest
import torch

from cheapgrad.auditing import measure_gradient_moments
from cheapgrad.errors import BudgetError, GradientDrawError

N, I, O = 32, 12, 6


def layer(seed, *, sparse=False):
    """Return the input, the cotangent and the exact gradients of a linear layer; sparse inputs make rare entries."""
    generator = torch.Generator().manual_seed(seed)
    rows_NI = torch.randn(N, I, generator=generator)
    if sparse:
        rows_NI = rows_NI * (torch.rand(N, I, generator=generator) < 0.08)
    grad_NO = torch.randn(N, O, generator=generator) * torch.rand(N, 1, generator=generator).exp()
    return rows_NI, grad_NO, generator


def exact_gradient(rows_NI, grad_NO):
    return [grad_NO.T @ rows_NI, grad_NO.sum(0)]


def sampled_rows(rows_NI, grad_NO, generator, keep_N, scale=1.0, weight_N=None):
    """Return a draw function that keeps row n with probability keep_N[n], weighted unless told otherwise."""
    weight_N = 1 / keep_N if weight_N is None else weight_N

    def draw():
        mask_N = (torch.rand(N, generator=generator) < keep_N) * weight_N * scale
        kept_NO = grad_NO * mask_N.unsqueeze(1)
        return [kept_NO.T @ rows_NI, kept_NO.sum(0)]

    return draw


def uniform(keep):
    return torch.full((N,), keep)


def test_relative_variance_is_the_sampling_law():
    rows_NI, grad_NO, generator = layer(0)
    exact = exact_gradient(rows_NI, grad_NO)
    moments = measure_gradient_moments(sampled_rows(rows_NI, grad_NO, generator, uniform(0.25)), exact, draws=4000)
    # Independent masks: (1/p - 1) times the sum of the squared norms of the rows' contributions.
    contributions = (grad_NO.square().sum(1) * (rows_NI.square().sum(1) + 1)).sum()
    law = 3 * contributions / sum(tensor.square().sum() for tensor in exact)
    assert abs(moments.relative_variance - law) < 5 * moments.relative_variance_standard_error
    assert moments.relative_variance_standard_error < 0.02 * law
    assert moments.squared_norm == pytest.approx(sum(float(tensor.square().sum()) for tensor in exact), rel=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_unbiased_rows_pass(keep, sparse):
    rows_NI, grad_NO, generator = layer(1, sparse=sparse)
    draw = sampled_rows(rows_NI, grad_NO, generator, uniform(keep))
    moments = measure_gradient_moments(draw, exact_gradient(rows_NI, grad_NO))
    assert moments.unbiased
    assert 0 < moments.detectable_relative_bias < 2


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("keep", [0.06, 0.3])
def test_no_false_alarm_in_200_audits(keep, sparse):
    alarms = 0
    for seed in range(50):
        rows_NI, grad_NO, generator = layer(100 + seed, sparse=sparse)
        draw = sampled_rows(rows_NI, grad_NO, generator, uniform(keep))
        alarms += not measure_gradient_moments(draw, exact_gradient(rows_NI, grad_NO)).unbiased
    assert alarms == 0


def low_variance(scale):
    exact = [torch.linspace(-1, 2, 60).reshape(6, 10), torch.ones(5)]
    generator = torch.Generator().manual_seed(2)

    def draw():
        return [tensor * (scale + 0.02 * torch.randn(tensor.shape, generator=generator)) for tensor in exact]

    return draw, exact


def test_one_percent_of_scale_is_seen():
    draw, exact = low_variance(1.01)
    moments = measure_gradient_moments(draw, exact)
    assert moments.detectable_relative_bias < 0.01
    assert not moments.unbiased
    assert moments.z_along_gradient > moments.band
    draw, exact = low_variance(1.0)
    assert measure_gradient_moments(draw, exact).unbiased


def test_detectable_bias_is_detected_99_times_in_100():
    draw, exact = low_variance(1.0)
    stated = [measure_gradient_moments(draw, exact, draws=64).detectable_relative_bias for _ in range(20)]
    draw, exact = low_variance(1.0 + sum(stated) / len(stated))
    found = [not measure_gradient_moments(draw, exact, draws=64).unbiased for _ in range(100)]
    assert sum(found) >= 96


def test_missing_weights_are_seen():
    rows_NI, grad_NO, generator = layer(3)
    draw = sampled_rows(rows_NI, grad_NO, generator, uniform(0.5), weight_N=torch.ones(N))
    assert not measure_gradient_moments(draw, exact_gradient(rows_NI, grad_NO)).unbiased


def test_weights_of_the_wrong_probabilities_are_seen():
    # Score-based probabilities, but weights as if they were uniform.
    rows_NI, grad_NO, generator = layer(4)
    score_N = grad_NO.norm(dim=1)
    keep_N = (16 * score_N / score_N.sum()).clamp(max=1)
    exact = exact_gradient(rows_NI, grad_NO)
    assert measure_gradient_moments(sampled_rows(rows_NI, grad_NO, generator, keep_N), exact).unbiased
    draw = sampled_rows(rows_NI, grad_NO, generator, keep_N, weight_N=torch.full((N,), 2.0))
    assert not measure_gradient_moments(draw, exact).unbiased


def test_one_layer_scaled_by_one_percent_is_named():
    draw, exact = low_variance(1.0)
    generator = torch.Generator().manual_seed(5)

    def wrong_bias():
        return [draw()[0], exact[1] * (1.01 + 0.02 * torch.randn(5, generator=generator))]

    moments = measure_gradient_moments(wrong_bias, exact, names=["weight", "bias"])
    assert not moments.unbiased
    suspects = [tensor.name for tensor in moments.tensors if tensor.max_abs_z > moments.band]
    assert suspects == ["bias"]


def test_top_k_is_infinitely_wrong():
    rows_NI, grad_NO, _ = layer(6)
    kept = grad_NO.norm(dim=1).topk(16).indices
    biased = exact_gradient(rows_NI[kept], grad_NO[kept])
    moments = measure_gradient_moments(lambda: biased, exact_gradient(rows_NI, grad_NO))
    assert moments.max_abs_z == math.inf
    assert not moments.unbiased
    assert moments.to_dict()["max_abs_z"] == "inf"


def test_constant_tensor_beside_a_random_one_must_be_right():
    draw, exact = low_variance(1.0)
    right = measure_gradient_moments(lambda: [draw()[0], exact[1]], exact)
    assert right.unbiased
    assert right.tensors[1].max_abs_z == 0
    wrong = measure_gradient_moments(lambda: [draw()[0], exact[1] + torch.tensor([0, 0, 1e-3, 0, 0])], exact)
    assert wrong.tensors[1].max_abs_z == math.inf
    assert not wrong.unbiased


def test_exact_draws_have_no_variance_and_no_bias():
    exact = [torch.randn(4, 3), torch.randn(3)]
    moments = measure_gradient_moments(lambda: exact, exact, draws=8)
    assert (moments.relative_variance, moments.max_abs_z, moments.unbiased) == (0, 0, True)


def test_rounding_is_not_bias():
    rows_NI, grad_NO, _ = layer(7)
    order = torch.randperm(N)
    reordered = exact_gradient(rows_NI[order], grad_NO[order])
    assert measure_gradient_moments(lambda: reordered, exact_gradient(rows_NI, grad_NO), draws=8).unbiased


def test_bias_in_a_corner_is_seen():
    exact = [torch.randn(64, 128, generator=torch.Generator().manual_seed(8))]
    generator = torch.Generator().manual_seed(9)
    corner = torch.zeros(64, 128)
    corner[0, :16] = 1.0

    def draw(bias):
        return [exact[0] + bias * corner + 0.5 * torch.randn(64, 128, generator=generator)]

    biased = measure_gradient_moments(lambda: draw(2.0), exact)
    # Sixteen of 8192 entries: too few to move the projection on the gradient, enough to move the groups they are in.
    assert abs(biased.z_along_gradient) < biased.band
    assert not biased.unbiased
    assert measure_gradient_moments(lambda: draw(0.0), exact).unbiased


def test_rare_events_are_no_bias():
    # Every entry lives on one large event that most audits never see, beside a small one that they always see.
    generator = torch.Generator().manual_seed(10)
    exact = [torch.full((40, 100), 1.0)]

    def draw():
        rare = (torch.rand(40, 100, generator=generator) < 1e-3) / 1e-3
        return [0.5 * rare + 0.5 + 0.001 * torch.randn(40, 100, generator=generator)]

    moments = measure_gradient_moments(draw, exact)
    assert moments.unbiased
    assert moments.relative_variance > 50


def test_zero_gradient():
    generator = torch.Generator().manual_seed(9)
    moments = measure_gradient_moments(lambda: [torch.randn(20, generator=generator)], [torch.zeros(20)])
    assert moments.unbiased
    assert moments.relative_variance == math.inf
    assert measure_gradient_moments(lambda: [torch.zeros(20)], [torch.zeros(20)]).relative_variance == 0


def test_exact_gradient_is_copied_before_the_first_draw():
    parameter = torch.nn.Parameter(torch.ones(10))
    parameter.grad = torch.full((10,), 3.0)

    def draw():
        parameter.grad.fill_(4.0)
        return [parameter.grad]

    assert measure_gradient_moments(draw, [parameter.grad], draws=8).max_abs_z == math.inf


def test_draws_are_a_fixed_number_and_are_announced():
    calls, announced = [], []

    def draw():
        calls.append(1)
        return [torch.full((3,), float("1"))]

    measure_gradient_moments(draw, [torch.ones(3)], draws=17, progress=lambda *done: announced.append(done))
    assert len(calls) == 17
    assert announced == [(position, 17) for position in range(1, 18)]


def test_global_randomness_is_left_alone():
    exact = [torch.ones(30)]
    torch.manual_seed(10)
    measure_gradient_moments(lambda: exact, exact, draws=8)
    after = torch.rand(1)
    torch.manual_seed(10)
    assert torch.equal(after, torch.rand(1))


def test_record_is_strict_json():
    draw, exact = low_variance(1.0)
    record = measure_gradient_moments(draw, exact, draws=8).to_dict()
    loaded = json.loads(json.dumps(record, allow_nan=False))
    assert loaded["unbiased"] is True
    assert loaded["tensors"][1]["name"] == "1"


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        ([torch.ones(3)], "draw 1 has 1 tensors, but the exact gradient has 2"),
        ([torch.ones(3), None], r"draw 1: tensor 'bias' is None; return zeros of shape \(2,\)"),
        ([torch.ones(4), torch.ones(2)], r"'weight' has shape \(4,\), but the exact gradient has \(3,\)"),
        ([torch.ones(3), torch.tensor([math.nan, 1])], "'bias' has entries that are not finite"),
    ],
)
def test_draws_that_do_not_fit(gradient, message):
    with pytest.raises(GradientDrawError, match=message):
        measure_gradient_moments(lambda: gradient, [torch.ones(3), torch.ones(2)], names=["weight", "bias"])


def test_exact_gradient_that_cannot_be_compared():
    with pytest.raises(GradientDrawError, match="has no tensors"):
        measure_gradient_moments(list, [])
    with pytest.raises(GradientDrawError, match="1 names for 2 tensors"):
        measure_gradient_moments(list, [torch.ones(1), torch.ones(1)], names=["weight"])
    with pytest.raises(GradientDrawError, match="the exact gradient: tensor '0' has entries that are not finite"):
        measure_gradient_moments(list, [torch.tensor(math.inf)])


def test_bad_settings():
    with pytest.raises(BudgetError, match="draws must be a whole number of at least 8, but got 7"):
        measure_gradient_moments(list, [torch.ones(1)], draws=7)
    with pytest.raises(BudgetError, match=r"alpha must be in \(0, 1\), but got 1.5"):
        measure_gradient_moments(list, [torch.ones(1)], alpha=1.5)


def test_a_row_that_few_draws_see_is_no_alarm():
    # One row of ten is kept with probability 0.05: one series of 32 draws in five never sees it.
    exact = torch.ones(10, 64)
    chances = torch.tensor([0.05, *[0.5] * 9]).unsqueeze(1)
    generator = torch.Generator().manual_seed(0)

    def draw():
        return [exact * (torch.rand(10, 1, generator=generator) < chances) / chances]

    assert all(measure_gradient_moments(draw, [exact], draws=32).unbiased for _ in range(60))

"""The share of trials in which a convention matters, and its exact interval."""

from __future__ import annotations

import json

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from cheapgrad.errors import ArgumentError, BudgetError, ConventionError, ForwardResultError, TrialError
from cheapgrad.kinks import Bifurcation, Conventions, Ties, bifurcation
from cheapgrad.kinks._binomial import clopper_pearson


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999999])
@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 50), (3, 10), (50, 50), (439, 1000), (1, 20000)])
def test_interval_is_that_of_the_beta_distribution(successes, trials, confidence):
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    assert clopper_pearson(successes, trials, confidence) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("probability", [0.0, 0.03, 0.3, 0.5, 0.97, 1.0])
def test_interval_covers_the_probability_as_often_as_it_says(probability):
    # All outcomes of 20 trials, each with its chance: no statistics.
    covered = 0.0
    for successes in range(21):
        low, high = clopper_pearson(successes, 20, 0.9)
        covered += stats.binom.pmf(successes, 20, probability) * (low <= probability <= high)
    assert covered >= 0.9


WEIGHT = torch.ones(1, requires_grad=True)


def _kink_every_fourth(trial):
    return torch.relu(WEIGHT - int(trial % 4 == 0)).sum() * 2


def test_trials_that_stand_on_a_kink_are_counted():
    found = bifurcation(_kink_every_fourth, [WEIGHT], trials=40)
    assert (found.trials, found.differing, found.unrepeatable, found.fraction) == (40, 10, 0, 0.25)
    assert (found.low, found.high) == clopper_pearson(10, 40, 0.95)
    # The gradient is 0 under one convention and 2 under the other.
    assert found.largest_difference == 1.0


def test_equal_conventions_never_differ():
    same = (Conventions(relu=0.5), Conventions(relu=0.5))
    found = bifurcation(_kink_every_fourth, [WEIGHT], trials=20, conventions=same)
    assert (found.differing, found.low, found.largest_difference) == (0, 0.0, 0.0)


def test_tolerance_separates_small_differences_from_large_ones():
    def loss(trial):
        x = torch.tensor([0.0, 1.0, 1.0])
        return (torch.relu(WEIGHT - 1) * (0.01 if trial % 2 else 1.0) + (WEIGHT * x).sum()).sum()

    exact = bifurcation(loss, [WEIGHT], trials=10)
    loose = bifurcation(loss, [WEIGHT], trials=10, tolerance=0.1)
    assert (exact.differing, loose.differing) == (10, 5)
    assert loose.largest_difference == pytest.approx(1 / 3)


def test_ties_of_pooling_count_too():
    def loss(trial):
        image = (WEIGHT * torch.tensor([1.0, 2.0, 2.0, trial % 2 * 5.0])).view(1, 1, 2, 2)
        slopes = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2)
        return functional.max_pool2d(image + slopes * (WEIGHT - 1), 2).sum()

    pair = (Conventions(), Conventions(max_pool=Ties.EVEN))
    assert bifurcation(loss, [WEIGHT], trials=10, conventions=pair).differing == 5


def test_random_draws_are_the_same_under_both_conventions():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1))

    def loss(trial):
        return model(torch.randn(4, 8)).square().mean()

    found = bifurcation(loss, list(model.parameters()), trials=5)
    # Half of what reaches the ReLU was dropped to an exact zero, but dropout sends nothing back through it: only the
    # choice itself could differ, and with the same draws it does not.
    assert (found.differing, found.unrepeatable) == (0, 0)


def test_parameters_may_be_drawn_by_the_loss():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 1, bias=False))

    def loss(trial):
        generator = torch.Generator().manual_seed(trial)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
        return model(torch.ones(2, 6)).sum()

    found = bifurcation(loss, list(model.parameters()), trials=30)
    # Sums of six entries of {-1, 0, 1} are 0 with chance 141/729 each, and a unit on its kink matters with chance 2/3.
    expected = 1 - (1 - 141 / 729 * 2 / 3) ** 6
    assert found.low < expected < found.high
    assert found.unrepeatable == 0


def test_gradient_that_changes_by_itself_is_told_apart():
    calls = []

    def loss(trial):
        calls.append(None)
        return (WEIGHT - WEIGHT.detach()).sum() * len(calls)

    found = bifurcation(loss, [WEIGHT], trials=6)
    assert (found.differing, found.unrepeatable) == (6, 6)


def test_trial_that_is_not_the_same_twice_is_refused():
    calls = []

    def loss(trial):
        calls.append(None)
        return WEIGHT.sum() * len(calls)

    with pytest.raises(TrialError, match=r"trial 0 returned the loss 1\.0 once and 2\.0 another time"):
        bifurcation(loss, [WEIGHT], trials=3)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"trials": 0}, "at least 1, but got 0"),
        ({"trials": 5, "confidence": 1.5}, r"confidence must be in \(0, 1\), but got 1.5"),
        ({"trials": 5, "tolerance": -1e-3}, "tolerance must be at least 0, but got -0.001"),
        ({"trials": 5, "tolerance": float("nan")}, "but got nan"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_runs(arguments, match):
    def loss(trial):
        raise AssertionError("ran")

    with pytest.raises(BudgetError, match=match):
        bifurcation(loss, [WEIGHT], **arguments)


@pytest.mark.parametrize(
    ("result", "match"), [(torch.ones(2), r"trial 0 returned shape \(2,\)"), (1.0, "trial 0 returned float")]
)
def test_loss_that_is_no_scalar_is_refused(result, match):
    with pytest.raises(ForwardResultError, match=match):
        bifurcation(lambda trial: result, [WEIGHT], trials=3)
    assert _get_current_function_mode_stack() == []


def test_unused_parameter_has_gradient_zero():
    unused = torch.ones(2, requires_grad=True)
    found = bifurcation(_kink_every_fourth, [unused, WEIGHT], trials=4)
    assert (found.differing, found.unused) == (1, (0,))
    assert Bifurcation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_loss_that_uses_no_parameter_is_refused():
    unused = torch.ones(2, requires_grad=True)
    with pytest.raises(ForwardResultError, match=r"depended on none of the 1 parameter\(s\) in any of 4 trial"):
        bifurcation(_kink_every_fourth, unused, trials=4)


def test_parameters_may_be_one_tensor_or_a_generator():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).requires_grad_(False)
    model[0].weight.zero_().requires_grad_()
    model[0].bias.zero_().requires_grad_()

    def loss(trial):
        return model(torch.ones(1, 3)).sum()

    for parameters in (model[0].weight, [model[0].weight], model.parameters(), tuple(model.parameters())):
        assert bifurcation(loss, parameters, trials=3).differing == 3


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ([], "at least one tensor, but got none"),
        (nn.Linear(2, 2), r"got the module Linear; pass list\(model.parameters\(\)\)"),
        ({"weight": WEIGHT}, r"got a dict of 1; .* of a dictionary its list\(values\(\)\)"),
        (3.0, "got a float"),
        ([WEIGHT, "bias"], "number 1 is a str 'bias'"),
        ([torch.ones(2)], r"parameter 0, of shape \(2,\), does not require a gradient"),
    ],
)
def test_parameters_that_are_none_are_refused(parameters, match):
    with pytest.raises(ArgumentError, match=match):
        bifurcation(_kink_every_fourth, parameters, trials=2)


def test_loss_and_conventions_of_another_kind_are_refused():
    with pytest.raises(ArgumentError, match=r"but got a Tensor of shape \(\)"):
        bifurcation(WEIGHT.sum(), [WEIGHT], trials=2)
    with pytest.raises(ConventionError, match="two conventions are needed, but got 1 of them"):
        bifurcation(_kink_every_fourth, [WEIGHT], trials=2, conventions=(Conventions(),))
    with pytest.raises(ConventionError, match=r"but got 1\.0"):
        bifurcation(_kink_every_fourth, [WEIGHT], trials=2, conventions=(Conventions(), 1.0))


def test_record_is_json_and_comes_back():
    found = bifurcation(_kink_every_fourth, [WEIGHT], trials=4)
    assert Bifurcation.from_dict(json.loads(json.dumps(found.to_dict()))) == found

"""Noise in units of an optimizer's steps, against plain loops over every entry."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad import AuditReport, audit, audit_step
from cheapgrad.auditing.preconditioned_noise import read_second_moments
from cheapgrad.errors import OptimizerStateError
from cheapgrad.sketch import RowSample
from tests.auditing import planted
from tests.auditing.planted import make_batch, make_even_optimizer, make_network, mean_loss, right_loss
from tests.rescaled import Rescaled

_MICRO_BATCHES = 16


def train(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        right_loss(model, make_batch(10 + step)).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


class Rotated(torch.optim.Optimizer):
    """Keeps second moments, but not those of the gradient's own entries."""

    def __init__(self, parameters):
        super().__init__(parameters, {"betas": (0.9, 0.99), "eps": 1e-8})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"step": 1, "exp_avg_sq": torch.ones_like(parameter), "basis": None}


def make_adam(parameters, **settings):
    return torch.optim.Adam(parameters, lr=1e-3, **settings)


def zero_adam(parameters):
    optimizer = make_adam(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def test_it_is_the_sum_over_entries_that_loops_give():
    model = make_network(planted.exact)
    noises = []

    def noisy(x, weight, grad):
        noises.append(0.01 * torch.randn(weight.shape) * torch.linspace(0, 1, weight.shape[1]))
        return grad @ weight, grad.T @ x + noises[-1]

    model[3].own_backward = noisy
    optimizer = train(model, make_adam(model.parameters(), eps=1e-5, betas=(0.9, 0.95)))
    batch = make_batch()
    parts = torch.arange(planted.B).split(planted.B // _MICRO_BATCHES)
    parameters = list(model.parameters())
    singles = [torch.autograd.grad(right_loss(model, tuple(t[part] for t in batch)), parameters) for part in parts]
    noises.clear()
    before = copy.deepcopy(optimizer.state_dict())
    report = audit(model, mean_loss, batch, reference=right_loss, optimizer=optimizer, draws=20)
    # The last ones are of the costs.
    errors = torch.stack(noises[:20]).double()
    above = below = 0.0
    for position, parameter in enumerate(parameters):
        gradients = torch.stack([part[position] for part in singles]).double()
        sigma = gradients.var(0) / _MICRO_BATCHES
        moment = optimizer.state[parameter]["exp_avg_sq"].double() / (1 - 0.95**3)
        added = errors.var(0) if parameter is model[3].weight else torch.zeros_like(sigma)
        divisor = ((moment + added).sqrt() + 1e-5) ** 2
        above += float((added / divisor).sum())
        below += float((sigma / divisor).sum())
    assert report.preconditioned_noise_fraction == pytest.approx(above / below, rel=1e-5)
    # Another sum altogether.
    assert report.noise_fraction != pytest.approx(above / below, rel=0.2)
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before["state"][key][name]) for name, value in state.items())
    assert f"({report.preconditioned_noise_fraction:.3g} in units of the optimizer's steps)." in report.verdict()
    assert AuditReport.from_dict(report.to_dict()) == report


def test_where_all_entries_are_divided_alike_it_is_the_noise_fraction():
    model = make_network(planted.sampled_rows())
    optimizer = make_even_optimizer(model)
    report = audit(model, mean_loss, make_batch(), reference=right_loss, optimizer=optimizer)
    assert report.preconditioned_noise_fraction == pytest.approx(report.noise_fraction, rel=1e-4)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_it_does_not_depend_on_the_units_of_a_parameter(scale):
    """The last weight in other units: steps in units of the optimizer are the same, lengths of gradients are not."""
    reports = []
    for factor in (1.0, scale):
        model = make_network(planted.exact)
        model[3], model[5] = nn.Linear(planted.H, planted.H), Rescaled(model[5], factor)
        adam = make_adam(model.parameters(), eps=0.0)
        for step in range(3):
            adam.zero_grad()
            mean_loss(model, make_batch(10 + step)).backward()
            with torch.no_grad():
                aside = [parameter.clone() for parameter in model.parameters()]
                adam.step()
                for parameter, value in zip(model.parameters(), aside, strict=True):
                    parameter.copy_(value)
        cheapgrad.approximate(model, cheapgrad.Rule("3", cotangent=RowSample(keep=0.5)), skip_small=False)
        reports.append(audit(model, mean_loss, make_batch(), optimizer=adam, draws=32))
    first, second = reports
    assert second.preconditioned_noise_fraction == pytest.approx(first.preconditioned_noise_fraction, rel=1e-3)
    assert not 0.8 < second.noise_fraction / first.noise_fraction < 1.25


@pytest.mark.parametrize(
    "make",
    [
        make_adam,
        lambda parameters: make_adam(parameters, amsgrad=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, betas=(0.8, 0.9)),
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
    ],
)
def test_second_moments_of_a_gradient_that_never_changes_are_its_squares(make):
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))]
    gradients = [torch.tensor([1.0, -2.0, 0.0]), torch.full((2, 2), 1e-3)]
    optimizer = make(parameters)
    for _ in range(5):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    found = read_second_moments(optimizer, ["a", "b"], parameters)
    assert [(one.position, one.epsilon) for one in found.known] == [(0, 1e-8), (1, 1e-8)]
    assert found.remarks == ()
    for moment, gradient in zip(found.known, gradients, strict=True):
        torch.testing.assert_close(moment.read(), gradient.double().square(), rtol=1e-4, atol=0.0)


def test_a_centred_optimizer_divides_by_the_deviation():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.RMSprop([parameter], centered=True, alpha=0.9)
    values = torch.tensor([1.0, 3.0] * 100)
    for value in values:
        parameter.grad = value.view(1)
        optimizer.step()
    weights = 0.9 ** torch.arange(199, -1, -1).double()
    mean = (weights * values).sum() / weights.sum()
    deviation = (weights * (values - mean).square()).sum() / weights.sum()
    (moment,) = read_second_moments(optimizer, ["a"], [parameter]).known
    assert float(moment.read()) == pytest.approx(float(deviation), rel=1e-4)


def test_parameters_without_steps_are_left_out_and_named():
    model = make_network(planted.sampled_rows())
    held = [parameter for name, parameter in model.named_parameters() if name != "0.weight"]
    optimizer = train(model, make_adam(held))
    report = audit(model, mean_loss, make_batch(), reference=right_loss, optimizer=optimizer, draws=8)
    (remark,) = [remark for remark in report.remarks if "units of its steps" in remark]
    assert "does not hold 1 of 6 parameters, the first one is 0.weight" in remark
    everything = audit(
        model,
        mean_loss,
        make_batch(),
        reference=right_loss,
        optimizer=train(model, make_adam(model.parameters())),
        draws=8,
    )
    # The noise is all in another tensor: less of the mini-batch's is left to divide by.
    assert report.preconditioned_noise_fraction > 1.05 * everything.preconditioned_noise_fraction


def test_noise_in_parameters_that_it_does_not_step_leaves_it_unknown():
    model = make_network(planted.sampled_rows())
    held = [parameter for name, parameter in model.named_parameters() if name != "3.weight"]
    optimizer = train(model, make_adam(held))
    report = audit(model, mean_loss, make_batch(), reference=right_loss, optimizer=optimizer, draws=8)
    assert report.preconditioned_noise_fraction is None
    assert any(
        "noise is added to 1 parameters that it does not step, the first one is 3.weight" in r for r in report.remarks
    )
    assert "units of the optimizer" not in report.verdict()


def test_moments_of_another_shape_are_refused():
    model = make_network(planted.exact)
    optimizer = train(model, make_adam(model.parameters()))
    state = optimizer.state_dict()
    backwards = make_adam(reversed(list(model.parameters())))
    backwards.load_state_dict(state)
    with pytest.raises(
        OptimizerStateError, match=r"second moments of '0.weight' .* have shape \(5,\), and .* \(24, 12\)"
    ):
        audit(model, mean_loss, make_batch(), optimizer=backwards, draws=8)


def test_the_remark_on_hidden_noise_gives_way_to_the_figure():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        model[4].weight.mul_(0.1)
    batch = torch.randn(64, 8), torch.randint(4, (64,))
    optimizer = make_adam(model.parameters())
    mean_loss(model, batch).backward()
    with torch.no_grad():
        aside = copy.deepcopy(model.state_dict())
        optimizer.step()
        model.load_state_dict(aside)
    cheapgrad.approximate(
        model, *[cheapgrad.Rule(str(at), cotangent=RowSample(0.5)) for at in (0, 2)], skip_small=False
    )
    told, untold = (audit(model, mean_loss, batch, optimizer=given) for given in (optimizer, None))
    assert any("pass optimizer= to cheapgrad.audit for its figure" in remark for remark in untold.remarks)
    assert untold.preconditioned_noise_fraction is None
    assert told.remarks == ()
    assert told.preconditioned_noise_fraction > 3 * told.noise_fraction


def test_it_is_unknown_where_the_mini_batch_or_the_noise_of_entries_is():
    model = make_network(planted.sampled_rows())
    optimizer = train(model, make_adam(model.parameters()))
    settings = {"reference": right_loss, "optimizer": optimizer, "draws": 8}
    report = audit(model, mean_loss, make_batch(), split=False, **settings)
    assert report.preconditioned_noise_fraction is None
    assert "noise in units of the optimizer's steps unknown, because the mini-batch's variance is" in report.remarks

    model = planted.make_drawing_network()
    settings = {"reference": lambda model, batch: mean_loss(model[1:], batch), "seed": 0, "draws": 8}
    optimizer = train(model, make_adam(model.parameters()))
    report = audit(model, mean_loss, make_batch(), optimizer=optimizer, **settings)
    assert report.forward_noise == "not shared"
    assert report.preconditioned_noise_fraction is None
    (remark,) = [remark for remark in report.remarks if "units of the optimizer's steps unknown" in remark]
    assert "because the step and its reference draw different random numbers" in remark


def test_what_a_loop_leaves_is_weighed_too():
    model = make_network(planted.sampled_rows())
    optimizer = train(model, make_adam(model.parameters()))
    batch = make_batch()
    settings = {"reference": right_loss, "optimizer": optimizer, "draws": 32}

    def loop():
        mean_loss(model, batch).backward()

    expected = audit(model, mean_loss, batch, **settings).preconditioned_noise_fraction
    found = audit_step(model, mean_loss, batch, loop, **settings).preconditioned_noise_fraction
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "steps", "message"),
    [
        (
            lambda parameters: torch.optim.lr_scheduler.StepLR(make_adam(parameters), 1),
            0,
            "but is a StepLR; pass the one that steps the parameters, of a scheduler its .optimizer",
        ),
        (zero_adam, 0, "the Adam has seen no gradient but zeros"),
        (lambda parameters: "adam", 0, "optimizer must be a torch.optim.Optimizer, but is a str 'adam'"),
        (make_adam, 0, "the Adam has no state for any of the 6 trainable parameters"),
        (torch.optim.Adagrad, 0, "the Adagrad has no state for any of the 6"),
        (torch.optim.SGD, 1, "the SGD has no state for any of the 6 trainable parameters"),
        (lambda parameters: torch.optim.SGD(parameters, momentum=0.9), 1, "the SGD keeps no .* but momentum_buffer"),
        (torch.optim.Adadelta, 1, "the Adadelta keeps no .* but step, square_avg, acc_delta; pass Adam, AdamW"),
        (torch.optim.Adagrad, 1, "the Adagrad keeps no .* but step, sum"),
        (lambda parameters: make_adam([nn.Parameter(torch.ones(2))]), 0, "the Adam holds none of this model's 6"),
        (lambda parameters: Rotated(parameters), 1, "the Rotated keeps no .* but step, exp_avg_sq, basis; pass Adam"),
    ],
)
def test_other_optimizers_are_refused_before_anything_is_drawn(make, steps, message):
    model = make_network(planted.exact)
    optimizer = make(list(model.parameters()))
    if steps:
        train(model, optimizer, steps)
    calls = []

    def count(model, batch):
        calls.append(1)
        return mean_loss(model, batch)

    with pytest.raises(OptimizerStateError, match=message):
        audit(model, count, make_batch(), optimizer=optimizer, draws=8)
    assert calls == []
    assert all(parameter.grad is None for parameter in model.parameters())

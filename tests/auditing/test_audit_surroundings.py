"""An audit leaves everything as it was, and refuses by name what it cannot compare."""

from __future__ import annotations

import math
import random

import numpy
import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad import audit
from cheapgrad.errors import (
    BackwardError,
    BatchOrderError,
    BiasedGradientError,
    BudgetError,
    ForwardError,
    GradientDrawError,
    LossError,
    ModelTypeError,
    NondeterministicForwardError,
    ReferenceGradientError,
    UnknownNameError,
)
from cheapgrad.sketch import RowSample, StochasticRounding
from cheapgrad.sketch.scores import PredictedNorm
from tests.auditing import planted
from tests.auditing.planted import make_batch, make_network, mean_loss, right_loss


def network_with_state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(planted.I, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, planted.C))
    rows = RowSample(keep=0.5, scores=PredictedNorm())
    cheapgrad.approximate(model, cheapgrad.Rule("*", stored=rows), skip_small=False)
    return model


def snapshot(model):
    memories = [layer._cheapgrad.plan.stored_memory for layer in (model[0], model[3])]
    return [
        *(tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]),
        *(parameter.grad.clone() for parameter in model.parameters()),
        torch.get_rng_state(),
        torch.tensor([random.getstate()[1][0], numpy.random.get_state()[2], random.getstate()[1][-1]]),
        torch.tensor([module.training for module in model.modules()]),
        *(value.clone() for memory in memories for value in vars(memory).values() if isinstance(value, torch.Tensor)),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(fails):
    model, batch = network_with_state(), make_batch()
    mean_loss(model, batch).backward()
    fired = []
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter))
    owned = [parameter.grad for parameter in model.parameters()]
    buffers = list(model.buffers())
    before = snapshot(model)
    # Two of them are the running norms of the converted layers.
    assert len(before) == 20

    def loss_fn(model, batch):
        random.random()
        numpy.random.rand()
        loss = mean_loss(model, batch)
        if fails and random.random() < 0.05:
            model.eval()
            raise OSError("disk full")
        return loss

    if fails:
        with pytest.raises(ForwardError, match="the loss function raised OSError: disk full"):
            audit(model, loss_fn, batch, seed=0)
    else:
        audit(model, loss_fn, batch, seed=0, draws=8)
    after = snapshot(model)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), owned, strict=True))
    assert all(one is two for one, two in zip(model.buffers(), buffers, strict=True))
    assert not fired
    mean_loss(model, batch).backward()
    assert len(fired) == 1


def test_same_seed_same_report():
    batch = make_batch()
    model = make_network(planted.sampled_rows(), dropout=0.2)
    reports = []
    for seed in (0, 0, 1):
        torch.rand(int(torch.randint(1, 9, ())))
        reports.append(audit(model, mean_loss, batch, reference=right_loss, seed=seed, draws=8))
    assert reports[0] == reports[1]
    assert reports[0].max_abs_z != reports[2].max_abs_z


def test_dropout_needs_a_seed():
    model = make_network(planted.exact, dropout=0.3)
    with pytest.raises(NondeterministicForwardError, match=r"draws random numbers \(losses 1\.\d+ and 1\.\d+ for"):
        audit(model, mean_loss, make_batch())
    assert audit(model.eval(), mean_loss, make_batch(), draws=8).forward_noise == "none"


def test_generator_of_its_own_is_refused():
    generator = torch.Generator().manual_seed(0)

    def loss_fn(model, batch):
        return mean_loss(model, (batch[0] + torch.randn(planted.B, planted.I, generator=generator), batch[1]))

    with pytest.raises(NondeterministicForwardError, match="two exact steps with the same seed differ"):
        audit(make_network(planted.exact), loss_fn, make_batch(), seed=0)


def test_random_backward_pass_without_a_reference_is_refused():
    with pytest.raises(ReferenceGradientError, match="so its backward pass is random"):
        audit(make_network(planted.sampled_rows()), mean_loss, make_batch())


def test_time_first_batch_is_refused():
    torch.manual_seed(0)
    model = nn.RNN(4, 5)

    def loss_fn(model, batch):
        return model(batch)[0][-1].square().mean()

    batch = torch.randn(7, 3, 4)
    with pytest.raises(BatchOrderError, match="with the batch's 7 entries of the first axis in reverse order"):
        audit(model, loss_fn, batch, draws=8)
    report = audit(model, loss_fn, batch, draws=8, split=False)
    assert report.unbiased
    assert report.noise_fraction is None


def recurrent_loss(model, batch):
    output = model(batch)[0]
    return (output[:, -1] if model.batch_first else output[-1]).square().mean()


def gradients_of(model, batch):
    return torch.autograd.grad(recurrent_loss(model, batch), list(model.parameters()))


@pytest.mark.parametrize(
    ("dropout", "options"),
    [(0.4, {"seed": 0}), (0.0, {"reference": gradients_of}), (0.4, {"reference": gradients_of, "seed": 0})],
    ids=["dropout", "gradients as reference", "both"],
)
def test_order_is_checked_in_evaluation_mode_where_the_loss_does_not_tell(dropout, options):
    torch.manual_seed(0)
    time_first, batch_first = (nn.RNN(4, 5, 2, dropout=dropout, batch_first=value) for value in (False, True))
    batch = torch.randn(7, 3, 4)
    with pytest.raises(BatchOrderError, match=r"the loss in evaluation mode is .* with the batch's 7 entries of"):
        audit(time_first, recurrent_loss, batch, draws=8, **options)
    assert time_first.training
    assert audit(time_first, recurrent_loss, batch, draws=8, split=False, **options).noise_fraction is None
    report = audit(batch_first, recurrent_loss, batch, draws=8, **options)
    assert report.noise_fraction is not None
    assert not any("order" in remark for remark in report.remarks)


def fails_in_evaluation_mode(model, batch):
    if not model.training:
        raise OSError("no labels")
    return mean_loss(model, batch)


def always_drops(model, batch):
    return mean_loss(model, (nn.functional.dropout(batch[0], 0.3, training=True), batch[1]))


def infinite_in_evaluation_mode(model, batch):
    return mean_loss(model, batch) + (0.0 if model.training else math.inf)


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [
        (fails_in_evaluation_mode, "in evaluation mode the loss function raised OSError: no labels"),
        (always_drops, "it draws random numbers in evaluation mode too"),
        (infinite_in_evaluation_mode, "in evaluation mode the loss is inf"),
    ],
)
def test_order_that_cannot_be_checked_is_remarked(loss_fn, reason):
    report = audit(make_network(planted.exact, dropout=0.2), loss_fn, make_batch(), seed=0, draws=8)
    assert f"nobody checked whether the order of the batch's examples changes its loss: {reason}" in report.remarks
    assert report.noise_fraction is not None


def test_reference_for_whole_batches_only_leaves_the_mini_batch_unknown():
    def reference(model, batch):
        if len(batch[0]) < planted.B:
            raise ValueError(f"compiled for {planted.B} examples")
        return right_loss(model, batch)

    report = audit(make_network(planted.one_percent_too_long), mean_loss, make_batch(), reference=reference, draws=8)
    expected = "mini-batch variance unknown: on 3 examples, the reference raised ValueError: compiled for 48 examples"
    assert expected in report.remarks
    assert report.noise_fraction is None
    assert not report.unbiased


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: model(batch[0]), r"but returned a tensor of shape \(48, 5\)"),
        (lambda model, batch: mean_loss(model, batch).item(), "but returned 1.* of type float"),
        (lambda model, batch: mean_loss(model, batch).detach(), "does not require grad"),
        (lambda model, batch: torch.complex(*[mean_loss(model, batch)] * 2), "a tensor of torch.complex64"),
    ],
)
def test_losses_that_are_none(loss_fn, message):
    with pytest.raises(LossError, match=message):
        audit(make_network(planted.exact), loss_fn, make_batch())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reference", [None, right_loss])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_losses_that_are_not_finite_are_named_as_in_plans(value, reference, dropout):
    def loss_fn(model, batch):
        return mean_loss(model, batch) + value

    model = make_network(planted.exact, dropout=dropout)
    words = f"is {value}, so it has no gradient to compare noise with; look for such values in the batch, or"
    exact = None if reference is None else loss_fn
    with pytest.raises(LossError, match=f"the loss of the batch {words} audit before the model diverges"):
        audit(model, loss_fn, make_batch(), reference=exact, seed=0)
    with pytest.raises(LossError, match=rf"the loss of batches\[0\] {words} plan before the model diverges"):
        cheapgrad.plan(
            make_network(planted.exact), loss_fn, [make_batch(1), make_batch(2)], memory=0.5, skip_small=False
        )


def test_micro_batches_without_a_loss_leave_the_mini_batch_variance_unknown():
    x, classes = make_batch()
    # Nothing counts in the first micro-batch: its mean is that of no examples.
    classes[: planted.B // 8] = -100
    report = audit(make_network(planted.exact), mean_loss, (x, classes), draws=8)
    assert report.noise_fraction is None
    assert any("the loss of the batch is nan" in remark for remark in report.remarks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 7}, "draws must be a whole number of at least 8, but got 7"),
        ({"alpha": 0}, r"alpha must be in \(0, 1\), but got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, but got -1"),
        ({"tolerance": 1.5}, r"tolerance must be a number in \[0, 1\), but got 1.5"),
        ({"tolerance": math.nan}, r"tolerance must be a number in \[0, 1\), but got nan"),
        ({"tolerance": "x"}, r"tolerance must be a number in \[0, 1\), but got 'x'"),
        ({"tolerance": None}, r"tolerance must be a number in \[0, 1\), but got None"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(BudgetError, match=message):
        audit(make_network(planted.exact), mean_loss, make_batch(), **settings)


def test_models_that_cannot_be_audited():
    with pytest.raises(ModelTypeError, match=r"model must be a torch\.nn\.Module, but got 3 of type int"):
        audit(3, mean_loss, make_batch())
    with pytest.raises(ModelTypeError, match="the ReLU has no parameter that requires grad"):
        audit(nn.ReLU(), mean_loss, make_batch())


def test_steps_that_fail_or_overflow():
    def infinite(x, weight, grad):
        return grad @ weight, torch.full_like(weight, math.inf)

    def broken(x, weight, grad):
        raise OSError("no kernel")

    with pytest.raises(GradientDrawError, match=r"draw 1: tensor '3\.weight' has entries that are not finite"):
        audit(make_network(infinite), mean_loss, make_batch(), reference=right_loss)
    with pytest.raises(BackwardError, match="the backward pass raised OSError: no kernel"):
        audit(make_network(broken), mean_loss, make_batch(), reference=right_loss)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"0.weight": torch.ones(1)}, r"no gradient for '0\.bias' \(5 of 6 are missing\)"),
        ([torch.ones(1)], "returned 1 values, but the model has 6 trainable parameters"),
        (3, "returned a int, but the model has 6"),
    ],
)
def test_references_that_are_none(made, message):
    with pytest.raises(ReferenceGradientError, match=message):
        audit(make_network(planted.exact), mean_loss, make_batch(), reference=lambda model, batch: made)


def test_reference_that_raises_is_named():
    def reference(model, batch):
        raise IndexError("no such example")

    with pytest.raises(ReferenceGradientError, match="the reference raised IndexError: no such example") as caught:
        audit(make_network(planted.exact), mean_loss, make_batch(), reference=reference)
    assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_reference_that_is_not_finite_is_named(value):
    def reference(model, batch):
        return [torch.full_like(parameter, value) for parameter in model.parameters()]

    with pytest.raises(ReferenceGradientError, match="a gradient that is not finite"):
        audit(make_network(planted.exact), mean_loss, make_batch(), reference=reference)


def test_loss_function_that_changes_parameters_is_named_and_undone():
    model = make_network(planted.exact)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def changes(model, batch):
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        return mean_loss(model, batch)

    with pytest.raises(LossError, match=r"changed 1 parameters, the first one is '0\.weight'"):
        audit(model, changes, make_batch())
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_an_exact_gradient_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))

    def kinked(model, batch):
        return model(batch).square().mean() + (model[1].weight * 0).abs().sqrt().sum()

    with pytest.raises(GradientDrawError, match=r"the exact gradient of '1.weight' is not finite \(loss \d"):
        audit(model, kinked, torch.randn(8, 4))


class Recurrent(nn.Module):
    """Scores of sequences, from the last of their states."""

    def __init__(self, classes, dropout, *, batch_first):
        super().__init__()
        self.body = nn.GRU(6, 16, 2, dropout=dropout, batch_first=batch_first)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.body(x)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_time_first_batches_are_refused_before_anything_was_learned(seed, dropout):
    # The loss of a network that has learned nothing is about log(classes), in whatever order it reads.
    torch.manual_seed(seed)
    time_first, batch_first = (Recurrent(10, dropout, batch_first=value) for value in (False, True))
    batch = torch.randn(12, 12, 6), torch.randint(0, 10, (12, 12))

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    with pytest.raises(BatchOrderError, match="the gradient differs by"):
        audit(time_first, loss_fn, batch, draws=8, seed=0)
    assert audit(batch_first, loss_fn, batch, draws=8, seed=0).noise_fraction == 0


def test_dropout_that_hardly_moves_the_loss_is_no_random_backward_pass():
    drawn = 0
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.02), nn.Linear(16, 1000))
        batch = torch.randn(64, 8), torch.randint(0, 1000, (64,))
        report = audit(
            model, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), batch, draws=8, seed=0
        )
        drawn += report.forward_noise == "shared"
    assert drawn == 8


def test_report_has_no_such_parameter_and_may_be_too_coarse():
    report = audit(make_network(planted.sampled_rows(keep=0.2)), mean_loss, make_batch(), reference=right_loss)
    with pytest.raises(UnknownNameError, match=r"no parameter '3\.weights'; did you mean '3\.weight'"):
        report.layer("3.weights")
    report.assert_unbiased()
    report.assert_unbiased(within=report.detectable_relative_bias)
    with pytest.raises(BiasedGradientError, match=r"0\.0001 was asked for; use about"):
        report.assert_unbiased(within=1e-4)
    with pytest.raises(BudgetError, match="relative_bias must be a positive fraction, but got 0"):
        report.draws_needed(0)


def test_model_without_double_precision_is_audited_without_the_check():
    class SinglePrecision(nn.Linear):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise TypeError("single precision only")
            return super().forward(x)

    torch.manual_seed(0)
    model = SinglePrecision(planted.I, planted.C)
    report = audit(model, mean_loss, make_batch(), draws=8)
    assert report.unbiased
    assert not report.derivative_checked
    assert "not checked against differences of the loss (TypeError: single precision only)" in str(report)

    other = nn.Linear(planted.I, planted.C)
    report = audit(other, lambda _, batch: mean_loss(other, batch), make_batch(), draws=8)
    assert not report.derivative_checked


def test_batches_that_are_not_cut():
    model = make_network(planted.exact)
    x, y = make_batch()
    one = audit(model, mean_loss, (x[:1], y[:1]), draws=8)
    assert any("the batch is a single example" in remark for remark in one.remarks)
    extra = audit(model, lambda model, batch: mean_loss(model, batch[:2]), (x, y, torch.ones(3)), draws=8)
    assert any("share no first axis" in remark for remark in extra.remarks)
    assert extra.noise_fraction is None


def test_converted_layers_with_stored_rounding_share_dropout():
    model = network_with_state()
    cheapgrad.get_handle(model).revert()
    cheapgrad.approximate(model, cheapgrad.Rule("*", stored=StochasticRounding(bits=4)), skip_small=False)
    report = audit(model, mean_loss, make_batch(), seed=0, draws=16)
    assert report.forward_noise == "shared"
    assert report.relative_variance < 0.05
    assert any("do not add up" in remark for remark in report.remarks) or report.noise_fraction is not None

"""Audits of gradients whose bias and variance are known."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad import audit
from cheapgrad.errors import BiasedGradientError
from cheapgrad.sketch import LowRank, RowSample, StochasticRounding
from tests.auditing import planted
from tests.auditing.planted import make_batch, make_network, mean_loss, right_loss


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "strategies",
    [
        {"stored": StochasticRounding(bits=4)},
        {"cotangent": RowSample(keep=0.5)},
        {"stored": StochasticRounding(bits=2), "cotangent": RowSample(keep=0.25)},
        {"cotangent": LowRank(rank=4)},
    ],
    ids=str,
)
def test_converted_networks_are_unbiased(strategies, dropout):
    model = make_network(planted.exact, dropout)
    model[3] = nn.Linear(planted.H, planted.H)
    cheapgrad.approximate(model, cheapgrad.Rule("*", **strategies), skip_small=False)
    report = audit(model, mean_loss, make_batch(), seed=3)
    assert report.unbiased, str(report)
    assert report.draws == 64
    assert report.derivative_checked
    assert report.relative_variance > 0
    assert report.forward_noise == ("shared" if dropout else "none")
    # Only errors that are far larger than the mean's own uncertainty would go unseen.
    assert 0 < report.detectable_relative_bias < 0.5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("backward", "unbiased"),
    [
        (planted.exact, True),
        (planted.sampled_rows(), True),
        (planted.noisy(0.3), True),
        (planted.one_percent_too_long, False),
        (planted.top_rows, False),
        (planted.sampled_rows(weighted=False), False),
        (planted.sampled_twice, False),
        (planted.noisy(0.02, scale=1.01), False),
    ],
)
def test_own_backward_passes_against_a_reference(backward, unbiased, dropout):
    report = audit(make_network(backward, dropout), mean_loss, make_batch(), reference=right_loss, seed=0)
    assert report.unbiased == unbiased, str(report)
    if not unbiased:
        assert [layer.name for layer in report.biased_layers] == ["3.weight"]
        with pytest.raises(BiasedGradientError, match=r"BIASED in 1 of 6 parameters: 3\.weight"):
            report.assert_unbiased()


@pytest.mark.parametrize("backward", [planted.one_percent_too_long, planted.top_rows])
def test_deterministic_mistakes_are_found_without_a_reference(backward):
    report = audit(make_network(backward), mean_loss, make_batch(), draws=8)
    assert not report.unbiased
    assert report.derivative_checked
    assert [layer.name for layer in report.biased_layers] == ["3.weight"]
    assert report.max_abs_z == math.inf
    assert "even without sketches" in report.verdict()


def test_deterministic_error_is_the_error():
    report = audit(make_network(planted.one_percent_too_long), mean_loss, make_batch(), draws=8)
    assert report.layer("3.weight").deterministic_error == pytest.approx(0.01, rel=1e-3)
    assert report.layer("0.weight").deterministic_error == 0


def test_hooks_on_parameters_are_seen():
    model = make_network(planted.exact)
    assert audit(model, mean_loss, make_batch(), draws=8).unbiased
    model[5].weight.register_hook(lambda gradient: 1.01 * gradient)
    report = audit(model, mean_loss, make_batch(), draws=8)
    assert [layer.name for layer in report.biased_layers] == ["5.weight"]
    assert report.layer("5.weight").deterministic_error == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_one_percent_beside_loud_sketches_is_seen(factor):
    model = make_network(planted.exact)
    model[3] = nn.Linear(planted.H, planted.H)
    cheapgrad.approximate(model, cheapgrad.Rule("*", cotangent=RowSample(keep=0.2)), skip_small=False)
    factors = [factor]
    model[3].weight.register_hook(lambda gradient: factors[0] * gradient)

    def reference(model, batch):
        factors[0] = 1.0
        try:
            with cheapgrad.get_handle(model).exact():
                return torch.autograd.grad(mean_loss(model, batch), list(model.parameters()))
        finally:
            factors[0] = factor

    report = audit(model, mean_loss, make_batch(), reference=reference, draws=16)
    assert report.unbiased == (factor == 1)
    assert report.layer("3.weight").deterministic_error == pytest.approx(factor - 1, rel=0.01)
    # From the draws alone nobody could tell.
    assert report.layer("3.weight").detectable_relative_bias > 0.1
    if factor != 1:
        assert [layer.name for layer in report.biased_layers] == ["3.weight"]


def test_lower_precision_of_both_is_no_error_of_the_reference():
    model = make_network(planted.exact)
    model[3] = nn.Linear(planted.H, planted.H)

    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mean_loss(model, batch)

    for seed in range(10):
        report = audit(model, loss_fn, make_batch(seed), draws=8)
        assert report.derivative_checked
        assert report.unbiased


def test_kinks_are_no_errors():
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(planted.I, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, planted.C)
        )
        report = audit(model, mean_loss, make_batch(seed), draws=8)
        assert report.derivative_checked
        assert report.unbiased


def test_variance_is_the_sampling_law():
    model, batch, keep = make_network(planted.sampled_rows(keep=0.5)).double(), make_batch(), 0.5
    batch = batch[0].double(), batch[1]
    report = audit(model, mean_loss, batch, reference=right_loss, draws=1000, split=False)
    # Independent coins: (1/p - 1) times the sum of the squared norms of the rows' contributions.
    rows, cotangents = _tensors_of_own_layer(model, batch)
    law = (1 / keep - 1) * float((rows.square().sum(1) * cotangents.square().sum(1)).sum())
    measured = report.layer("3.weight").relative_variance * report.layer("3.weight").squared_norm
    assert measured == pytest.approx(law, rel=0.06)
    assert report.relative_variance == pytest.approx(law / report.squared_norm, rel=0.06)
    assert report.relative_variance_standard_error < 0.02 * report.relative_variance
    assert report.layer("0.weight").relative_variance < 1e-20


def _tensors_of_own_layer(model, batch):
    rows = []
    handle = model[3].register_forward_hook(lambda module, inputs, output: rows.extend([inputs[0], output]))
    loss = mean_loss(model, batch)
    handle.remove()
    return rows[0].detach(), torch.autograd.grad(loss, rows[1])[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_noise_fraction_is_against_the_spread_of_examples(reduction):
    model = make_network(planted.noisy(0.5)).double()
    generator = torch.Generator().manual_seed(5)
    batch = (
        torch.randn(512, planted.I, generator=generator, dtype=torch.float64),
        torch.randint(planted.C, (512,), generator=generator),
    )

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction)

    def reference(model, batch):
        return right_loss(model, batch) * (len(batch[1]) if reduction == "sum" else 1)

    report = audit(model, loss_fn, batch, reference=reference, draws=16)
    # Brute force: the gradient of every single example.
    singles = torch.stack(
        [
            torch.cat(
                [tensor.flatten() for tensor in torch.autograd.grad(right_loss(model, (x, y)), model.parameters())]
            )
            for x, y in zip(batch[0].split(1), batch[1].split(1), strict=True)
        ]
    )
    variance = float(singles.var(0).sum()) * (512 if reduction == "sum" else 1 / 512)
    estimated = report.mini_batch_relative_variance * report.squared_norm
    assert estimated == pytest.approx(variance, rel=0.25)
    assert report.noise_fraction == pytest.approx(report.relative_variance / report.mini_batch_relative_variance)


def test_exact_layers_with_most_of_the_variance_do_not_hide_the_noise_of_the_others():
    rows = {"cotangent": RowSample(0.5)}

    def look(scale, *patterns, examples=64, **strategies):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        with torch.no_grad():
            model[4].weight.mul_(scale)
        rules = [cheapgrad.Rule(pattern, **(strategies or rows)) for pattern in patterns]
        if rules:
            cheapgrad.approximate(model, *rules, skip_small=False)
        batch = torch.randn(examples, 8), torch.randint(4, (examples,))
        report = audit(model, mean_loss, batch, draws=64)
        return report, [remark for remark in report.remarks if "in the mean over all entries" in remark]

    # What comes back through a small head is small: the smaller, the more is hidden.
    for scale in (0.2, 0.1, 0.02):
        report, (remark,) = look(scale, "0", "2")
        entries = sum(layer.coordinates for layer in report.layers)
        expected = sum(layer.coordinates * layer.noise_fraction for layer in report.layers) / entries
        shown = float(re.search(r"by itself is (\S+) in the mean", remark).group(1))
        assert shown == pytest.approx(expected, rel=0.05)
        assert expected > 0.5 > 10 * report.noise_fraction
        assert "is in 4.weight" in remark
    # Nothing is hidden where all are drawn alike, the exact layer has little variance, or nothing is added.
    assert look(0.1, "0", "2", "4")[1] == []
    assert look(10.0, "0", "2")[1] == []
    assert look(0.1)[1] == []
    # Nor is noise that nobody would notice.
    assert look(0.1, "0", "2", stored=StochasticRounding(8))[1] == []


def test_detectable_bias_is_detected():
    quiet = audit(make_network(planted.noisy(0.3)), mean_loss, make_batch(), reference=right_loss)
    visible = quiet.layer("3.weight").detectable_relative_bias
    assert 0.005 < visible < 0.1
    found = []
    for seed in range(8):
        model = make_network(planted.noisy(0.3, scale=1 + visible))
        report = audit(model, mean_loss, make_batch(), reference=right_loss, seed=seed, split=False)
        found.append(not report.unbiased)
        assert report.draws == 128
        assert report.layer("3.weight").scale == pytest.approx(1 + visible, rel=0.5 * visible)
    assert all(found)
    needed = quiet.draws_needed(visible / 2)
    assert needed == pytest.approx(4 * 64, abs=1)


def test_alarm_of_the_first_half_alone_is_none():
    # Rows that come once in a hundred draws: a few dozen draws miss them and look like a tight, wrong distribution.
    rare = planted.sampled_rows(keep=0.02)
    audits = [
        audit(make_network(rare), mean_loss, make_batch(), reference=right_loss, seed=seed, split=False, draws=16)
        for seed in range(30)
    ]
    assert all(report.unbiased for report in audits)
    dismissed = [report for report in audits if report.confirmed]
    assert dismissed
    assert all(report.draws == 32 for report in dismissed)


def test_compiled_model_is_compared_with_eager_code():
    model = make_network(planted.exact)
    model[3] = nn.Linear(planted.H, planted.H)
    cheapgrad.approximate(model, cheapgrad.Rule("*", cotangent=RowSample(keep=0.5)), skip_small=False)
    compiled = torch.compile(model, backend="aot_eager")
    report = audit(compiled, mean_loss, make_batch(), draws=16)
    assert report.unbiased
    assert report.relative_variance > 0


def test_checkpointing_is_exact():
    model = make_network(planted.exact, dropout=0.3)

    def loss_fn(model, batch):
        hidden = torch.utils.checkpoint.checkpoint(model[:4], batch[0], use_reentrant=False)
        return nn.functional.cross_entropy(model[4:](hidden), batch[1])

    report = audit(model, loss_fn, batch=make_batch(), reference=right_loss, seed=0, draws=8)
    assert report.unbiased
    assert report.relative_variance < 1e-10
    assert report.forward_noise == "shared"


def test_lower_precision_is_biased_unless_tolerated():
    model = make_network(planted.exact)
    model[3] = nn.Linear(planted.H, planted.H)

    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mean_loss(model, batch)

    strict = audit(model, loss_fn, make_batch(), reference=right_loss, draws=8)
    assert not strict.unbiased
    assert 1e-4 < strict.relative_bias < 0.02
    assert audit(model, loss_fn, make_batch(), reference=right_loss, draws=8, tolerance=0.05).unbiased


def test_tolerance_does_not_hide_what_is_larger():
    report = audit(
        make_network(planted.top_rows), mean_loss, make_batch(), reference=right_loss, draws=8, tolerance=0.1
    )
    assert not report.unbiased


def test_masks_that_differ_are_said_to_differ():
    model = planted.make_drawing_network()

    def without(model, batch):
        return mean_loss(model[1:], batch)

    report = audit(model, mean_loss, make_batch(), reference=without, seed=0, draws=150)
    assert report.forward_noise == "not shared"
    assert report.unbiased
    # The two variances are equal; their difference is small against what each of them is.
    own = audit(model, mean_loss, make_batch(), reference=without, seed=0, draws=8).relative_variance
    assert abs(report.relative_variance) < 0.2 * report.mini_batch_relative_variance + abs(own)


def test_reference_of_gradients():
    model, batch = make_network(planted.sampled_rows()), make_batch()

    def as_list(model, batch):
        return torch.autograd.grad(right_loss(model, batch), list(model.parameters()))

    def by_name(model, batch):
        return dict(zip(dict(model.named_parameters()), as_list(model, batch), strict=True))

    assert audit(model, mean_loss, batch, reference=as_list).unbiased
    assert audit(model, mean_loss, batch, reference=by_name).unbiased
    assert not audit(model, mean_loss, batch, reference=lambda *_: [2 * tensor for tensor in as_list(*_)]).unbiased


def test_parameters_without_gradient_and_frozen_ones():
    model = make_network(planted.sampled_rows())
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    model[0].weight.requires_grad_(False)
    report = audit(model, mean_loss, make_batch(), reference=right_loss)
    assert report.unbiased
    names = [layer.name for layer in report.layers]
    assert "unused" in names
    assert "0.weight" not in names
    assert report.layer("unused").cosine == 1


def test_costs_are_those_of_the_ledger():
    model = nn.Sequential(nn.Linear(planted.I, 128), nn.ReLU(), nn.Linear(128, planted.C))
    batch = make_batch()
    cheapgrad.approximate(model, cheapgrad.Rule("2", stored=StochasticRounding(bits=4)), skip_small=False)
    report = audit(model, mean_loss, batch, draws=8)
    layer = report.layer("2.weight")
    assert layer.exact_backward_flops == 2 * 2 * planted.B * 128 * planted.C
    assert layer.module == "2"
    assert report.layer("2.bias").held_bytes is None
    scanned = cheapgrad.scan(model, batch[0], loss=lambda output: nn.functional.cross_entropy(output, batch[1]))
    assert report.held_bytes == scanned.total.saved_bytes
    assert report.backward_flops == scanned.total.backward_flops

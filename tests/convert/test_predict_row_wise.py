"""Predicted variances of activations and norms against draws; what has no local law is said to have none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from cheapgrad import Rule, approximate, recipes
from cheapgrad.convert.kinds import row_wise
from cheapgrad.sketch import LayerShape, RowSample, StochasticRounding, Variance
from tests.contexts.layers import LlamaRMSNorm

ROWS, FEATURES, DRAWS = 96, 80, 700
# Of the mean squared error: the law holds where the truth is inside, and the band is narrow enough to tell.
WIDEST, ALLOWED = 0.04, 0.05
NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(FEATURES),
    "LayerNorm, no parameters": lambda: nn.LayerNorm(FEATURES, elementwise_affine=False, eps=0.1),
    "RMSNorm": lambda: nn.RMSNorm(FEATURES),
    "RMSNorm, eps": lambda: nn.RMSNorm(FEATURES, eps=0.2, elementwise_affine=False),
    "of a library": lambda: LlamaRMSNorm(FEATURES),
}
SMOOTH = {
    "GELU": nn.GELU,
    "GELU, tanh": lambda: nn.GELU(approximate="tanh"),
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "Hardswish": nn.Hardswish,
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "Softplus": lambda: nn.Softplus(beta=2.0, threshold=5.0),
    "LogSigmoid": nn.LogSigmoid,
    "Softsign": nn.Softsign,
    "Tanhshrink": nn.Tanhshrink,
    "ELU": lambda: nn.ELU(alpha=0.5),
    "CELU": lambda: nn.CELU(alpha=2.0),
    "SELU": nn.SELU,
}
EXACT = {
    "ReLU": nn.ReLU,
    "Hardtanh": lambda: nn.Hardtanh(-1.0, 0.5),
    "LeakyReLU": nn.LeakyReLU,
    "Softshrink": nn.Softshrink,
    "Threshold": lambda: nn.Threshold(0.1, 2.0),
    "Dropout": nn.Dropout,
}
CASES = [(name, build, bits) for name, build in {**NORMS, **SMOOTH}.items() for bits in (2, 4)]


def problem(build, rule):
    """Return a converted module with parameters of its own, its handle, an input and a cotangent."""
    torch.manual_seed(0)
    module = build()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    x = (torch.randn(ROWS, FEATURES) * (0.2 + 2 * torch.rand(ROWS, 1)) + torch.randn(ROWS, 1)).requires_grad_()
    # As cotangents are: a few entries count for most of it.
    cotangent = torch.randn(ROWS, FEATURES) * torch.rand(ROWS, FEATURES).square()
    return module, approximate(module, rule, skip_small=False), x, cotangent


def draw_errors(module, handle, x, cotangent, *, damage=lambda gradient: gradient):
    """Return draws of the squared errors of dX and of the weight's gradient ``[DRAWS, 1 or 2]``."""
    leaves = [x, module.weight] if getattr(module, "weight", None) is not None else [x]
    with handle.exact():
        exact = torch.autograd.grad(module(x), leaves, cotangent)
    squares = []
    for _ in range(DRAWS):
        drawn = torch.autograd.grad(module(x), leaves, cotangent)
        pairs = zip(drawn, exact, strict=True)
        squares.append([float((damage(one) - two).double().square().sum()) for one, two in pairs])
    return torch.tensor(squares, dtype=torch.float64)


def assert_agrees(squares, predicted):
    """Check that the mean square is the predicted one, with an error small enough for a twentieth to show."""
    for position, value in enumerate(predicted[: squares.shape[1]]):
        ratio = float(squares[:, position].mean()) / value
        error = float(squares[:, position].std()) / DRAWS**0.5 / value
        assert 4 * error < WIDEST, f"inconclusive: standard error {error:.3f}"
        assert abs(ratio - 1) < ALLOWED, f"measured / predicted = {ratio:.3f} ± {error:.3f}"


def predicted(handle, module, x, cotangent):
    (row,) = handle.predict(lambda: (module(x) * cotangent).sum())
    assert not row.unpredicted
    return row.input_variance, row.weight_variance


@pytest.mark.parametrize(("name", "build", "bits"), CASES, ids=[f"{name}-{bits}" for name, _, bits in CASES])
def test_prediction_is_what_draws_show(name, build, bits):
    module, handle, x, cotangent = problem(build, Rule(stored=StochasticRounding(bits)))
    variances = predicted(handle, module, x, cotangent)
    assert variances[0] > 0
    assert_agrees(draw_errors(module, handle, x, cotangent), variances)


@pytest.mark.parametrize("name", ["LayerNorm", "GELU"])
def test_twins_are_caught(name, monkeypatch):
    build = {**NORMS, **SMOOTH}[name]
    module, handle, x, cotangent = problem(build, Rule(stored=StochasticRounding(4)))
    variances = predicted(handle, module, x, cotangent)
    with pytest.raises(AssertionError, match="measured / predicted"):
        # Two per cent too long.
        assert_agrees(draw_errors(module, handle, x, cotangent, damage=lambda gradient: 1.02 * gradient), variances)
    law_name = "norm_law" if name in NORMS else "slope_law"
    honest = getattr(row_wise, law_name)

    def wrong(*arguments, **options):
        law = honest(*arguments, **options)

        def variance(tensors, moment):
            stated = law._variance(tensors, moment)
            return Variance(1.1 * stated.input, 1.1 * stated.weight)

        return dataclasses.replace(law, _variance=variance)

    monkeypatch.setattr(row_wise, law_name, wrong)
    with pytest.raises(AssertionError, match="measured / predicted"):
        assert_agrees(draw_errors(module, handle, x, cotangent), predicted(handle, module, x, cotangent))


@pytest.mark.parametrize("name", EXACT)
def test_what_is_exact_is_predicted_to_be(name):
    module, handle, x, cotangent = problem(EXACT[name], Rule(stored=StochasticRounding(4)))
    assert predicted(handle, module, x, cotangent) == (0.0, None)


def test_bytes_of_the_laws_are_those_of_the_rows():
    for build in (NORMS["LayerNorm"], NORMS["RMSNorm"], nn.GELU, nn.ReLU):
        module, handle, x, _ = problem(build, Rule(stored=StochasticRounding(4)))
        module(x)
        (row,) = handle.rows
        codec = module._cheapgrad.plan.stored
        law = (
            row_wise.norm_law(codec, 1e-5, module.weight, centred=True)
            if hasattr(module, "weight")
            else row_wise.slope_law(row_wise.Activation(type(build()).__name__.lower()), codec)
        )
        assert law.saved_bytes(LayerShape(ROWS, FEATURES, FEATURES)) == row.saved_bytes


def test_a_frozen_input_has_no_variance():
    module, handle, x, cotangent = problem(NORMS["LayerNorm"], Rule(stored=StochasticRounding(4)))
    (row,) = handle.predict(lambda: (module(x.detach()) * cotangent).sum())
    assert row.input_variance == 0
    assert row.weight_variance > 0


class Attending(nn.Module):
    """A norm whose input an attention computes its queries, keys and values from again."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(64), nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x):
        normal = self.norm(x)
        return self.attention(normal, normal, normal, need_weights=False)[0]


def test_a_norm_whose_input_is_kept_for_an_attention_is_exact():
    model = Attending()
    handle = approximate(model, recipes.memory(2), skip_small=False)
    x = torch.randn(4, 8, 64, requires_grad=True)

    def loss():
        return model(x).square().sum()

    for _ in range(2):
        loss().backward()
    rows = {row.name: row for row in handle.predict(loss)}
    assert model.norm._cheapgrad.plan.root_use.is_kept == (rows["norm"].weight_variance == 0)


def test_what_has_no_law_of_its_own_is_listed():
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), Attending())
    handle = approximate(model, Rule(stored=StochasticRounding(4), cotangent=RowSample(0.5)), skip_small=False)
    x = torch.randn(4, 8, 64)
    rows = {row.name: row for row in handle.predict(lambda: model(x).square().sum())}
    assert {name for name, row in rows.items() if row.unpredicted} == {"0", "2", "4.norm", "4.attention"}
    assert all(row.input_variance is None for row in rows.values() if row.unpredicted)
    assert rows["1"].weight_variance > 0
    text = " ".join(handle.summary().split())
    assert "no variance of 0, 2, 4.norm can be predicted: rows are drawn at the end of a chain" in text
    assert "no variance of 4.attention can be predicted: the projections of an attention" in text

"""Predictions of a handle, and the table it prints."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cheapgrad import Rule, approximate
from cheapgrad.errors import ShapeError
from cheapgrad.sketch import LowRank, Moment, RowSample, StochasticRounding
from tests.convert.models import HALF, Network, convert, gradients, same
from tests.placements import PLACEMENTS


def squared_loss(model, x):
    return lambda: model(x).square().sum()


@pytest.mark.parametrize("strategy", [HALF, LowRank(8, refresh=3)], ids=repr)
def test_predict_leaves_gradients_and_random_state_alone(strategy):
    model, x = Network(classes=16), torch.randn(16, 32)
    handle = convert(model, strategy=strategy)
    model(x).sum().backward()
    held = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    handle.predict(squared_loss(model, x))
    assert same([parameter.grad for parameter in model.parameters()], held)
    assert torch.equal(torch.get_rng_state(), state)
    expected = gradients(model, x)
    handle.predict(squared_loss(model, x))
    assert same(gradients(model, x), expected), "the next draw is the one it would have been"


def test_predict_works_in_eval_mode_and_under_no_grad():
    model, x = Network(), torch.randn(16, 32)
    handle = convert(model)
    rows = handle.predict(squared_loss(model, x))
    model.eval()
    with torch.no_grad():
        assert handle.predict(squared_loss(model, x)) == rows
    assert not model.training


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.name)
def test_predicted_numbers_are_the_laws(placement):
    torch.manual_seed(7)
    layer = nn.Linear(32, 24)
    handle = approximate(layer, placement.rule(), skip_small=False)
    x = torch.randn(4, 5, 32, requires_grad=True)
    target = torch.randn(4, 5, 24)
    (row,) = handle.predict(lambda: (layer(x) - target).square().sum())
    cotangent_NO = (2 * (layer(x) - target)).detach().reshape(-1, 24)
    rows_NI = x.detach().reshape(-1, 32)
    expected = {"weight": 0.0, "input": 0.0}
    for strategy, moment in ((placement.stored, Moment.STORED), (placement.cotangent, Moment.COTANGENT)):
        if strategy is None:
            continue
        law = strategy.law.variance(rows_NI, cotangent_NO, layer.weight.detach(), moment=moment, examples=4)
        expected["weight"] += float(law.weight)
        expected["input"] += float(law.input)
    # A lazily refreshed basis is found anew, at random, whenever the law is evaluated.
    tolerance = 0.15 if "refresh" in placement.name else 1e-5
    # Where both moments act, dW is not the sum of two laws: test_predict_measured holds it to draws.
    if placement.stored is None or placement.cotangent is None:
        assert row.weight_variance == pytest.approx(expected["weight"], rel=tolerance)
    assert row.input_variance == pytest.approx(expected["input"], rel=tolerance)
    weight_gradient = cotangent_NO.mT @ rows_NI
    assert row.weight_norm_squared == pytest.approx(float(weight_gradient.square().sum()), rel=1e-5)
    assert row.input_norm_squared == pytest.approx(
        float((cotangent_NO @ layer.weight.detach()).square().sum()), rel=1e-5
    )
    assert row.relative_variance == row.weight_variance / row.weight_norm_squared


def test_predicted_variance_is_what_draws_show():
    torch.manual_seed(2)
    layer = nn.Linear(16, 16)
    handle = convert(layer)
    x = torch.randn(32, 16)
    (row,) = handle.predict(squared_loss(layer, x))

    def weight_gradient():
        return torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]

    with handle.exact():
        exact = weight_gradient()
    squares = torch.stack([(weight_gradient() - exact).square().sum() for _ in range(3000)])
    error = squares.std() / 3000**0.5
    assert error < 0.02 * row.weight_variance
    assert abs(squares.mean() - row.weight_variance) < 5 * error


def test_uses_add_up_and_recomputation_does_not_count_twice():
    layer = nn.Linear(16, 16)
    x = torch.randn(8, 16)
    handle = convert(layer)
    once = handle.predict(lambda: layer(x).square().sum())[0].weight_variance
    twice = handle.predict(lambda: layer(x).square().sum() + layer(x).square().sum())[0].weight_variance
    again = handle.predict(lambda: checkpoint(layer, x, use_reentrant=False).square().sum())[0].weight_variance
    assert twice == pytest.approx(2 * once)
    assert again == pytest.approx(once)


def test_frozen_weights_have_no_variance_of_their_own():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16).requires_grad_(False))
    handle = convert(model)
    rows = handle.predict(squared_loss(model, torch.randn(8, 16)))
    assert rows[0].weight_variance > 0
    assert rows[1].weight_variance is None
    assert rows[1].input_variance > 0


@pytest.mark.parametrize(
    ("closure", "text"),
    [
        (lambda: None, "returned None"),
        (lambda: torch.randn(3, requires_grad=True), r"returned a tensor of shape \(3,\)"),
        (lambda: torch.tensor(1.0), r"returned a tensor of shape \(\)"),
    ],
)
def test_a_closure_without_a_loss_is_refused(closure, text):
    model = Network()
    handle = convert(model)
    with pytest.raises(ShapeError, match=text):
        handle.predict(closure)
    assert all(module._cheapgrad.probe is None for module in model.modules() if hasattr(module, "_cheapgrad"))


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    """Let summaries be as wide as they need to be, whatever runs the tests."""
    monkeypatch.delenv("COLUMNS", raising=False)


def test_summary_before_a_batch():
    handle = convert(Network())
    text = handle.summary()
    assert text == str(handle)
    assert text.startswith("cheapgrad: 6 of 6 matched layers converted")
    assert "bytes and FLOPs appear after the first training batch" in text
    assert "relative variances appear after handle.predict(closure)" in text
    assert "modelled" not in text
    assert repr(handle) == "<cheapgrad.Handle of Network: 6 of 6 layers converted>"


def test_summary_after_a_batch_and_a_prediction():
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)), torch.randn(64, 256)
    handle = approximate(model, Rule(stored=StochasticRounding(4), cotangent=RowSample(0.25)))
    model(x).sum().backward()
    handle.predict(squared_loss(model, x))
    lines = handle.summary().splitlines()
    assert lines[0] == "cheapgrad: 2 of 3 matched layers converted"
    # 64 x 256 floats; 4 bits and 4 bytes per group of 64. The activation's 64 x 512 floats, and one bit for each.
    assert lines[1].startswith("inputs kept by these layers 192.00 KiB → 13.00 KiB, their backward products ")
    first = next(line for line in lines if line.startswith("0 "))
    assert "64.00 KiB → 9.00 KiB" in first
    # The text of this column is broken over lines.
    assert "stored=StochasticRounding(bits=" in handle.summary()
    assert "RowSample(keep=0.25)" in handle.summary()
    # Dense: 4 N I O for dX and dW; a quarter of the rows in both.
    assert "33.55 MFLOP → 8.39 MFLOP" in first
    assert f"{handle.rows[0].relative_variance:.3g}" in first
    assert "too small to pay" in handle.summary()


def predicted_encoder_layer():
    """Return the handle of a layer of PyTorch's own, all of it converted and predicted."""
    torch.manual_seed(2)
    model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    handle = approximate(model, Rule(stored=StochasticRounding(4), cotangent=RowSample(0.5)), skip_small=False)
    handle.predict(squared_loss(model, torch.randn(4, 8, 64)))
    return handle


@pytest.mark.parametrize("columns", [None, "150", "100", "72", "50", "5"])
def test_summary_never_loses_a_variance(columns, monkeypatch):
    handle = predicted_encoder_layer()
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    lines = handle.summary().splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("layer"))
    # What explains the cells stands below them.
    cells = "\n".join(
        line for line in lines[first:] if not line.startswith(("no ", "not shown", "bytes and", "codecs of"))
    )
    expected = [row.relative_variance for row in handle.rows]
    assert sum(value is not None for value in expected) >= 2
    for value in expected:
        assert value is None or f"{value:.3g}" in cells
    assert all(name in lines[first] for name in ("layer", "rel. var. dW"))
    if columns is None:
        assert all(name in lines[first] for name in ("kind", "saved", "backward"))
        assert "not shown" not in handle.summary()
    elif int(columns) >= 50:
        assert max(map(len, cells.splitlines())) <= int(columns)


def test_summary_uses_the_width_of_the_terminal(monkeypatch):
    handle = predicted_encoder_layer()
    monkeypatch.setenv("COLUMNS", "72")
    assert "not shown in 72 columns of text: kind, backward; handle.rows has all of it" in handle.summary()
    monkeypatch.setenv("COLUMNS", "300")
    assert "not shown" not in handle.summary()


def test_footers_say_nothing_of_cells_that_are_filled():
    text = predicted_encoder_layer().summary()
    assert "appear after" not in text
    # Of attention there is no model; its row keeps its dashes, and footers say whose they are and why.
    assert "no bytes and FLOPs of self_attn: no batch came by, or there is no model of it" in text
    assert "no variance of self_attn can be predicted: the projections of an attention have inputs" in text


def test_rows_serialise():
    handle = convert(Network(), strategy=HALF)
    data = handle.rows[0].to_dict()
    assert data["name"] == "blocks.0.fc1"
    assert data["cotangent"] == "RowSample(keep=0.5)"
    assert data["saved_bytes"] is None

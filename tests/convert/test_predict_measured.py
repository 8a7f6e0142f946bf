"""Predictions against measurements: whole layers, with both moments at once, memories, autocast and output sizes."""

import copy

import pytest
import torch
from torch import nn

from cheapgrad import Rule, approximate, get_handle
from cheapgrad.sketch import ExampleSample, LowRank, PredictedNorm, RowProjection, RowSample, StochasticRounding

DRAWS = 1500


def tokens(rows=6, length=5, inputs=12):
    """Rows whose norms differ, and a loss that looks at some positions far more than at others."""
    torch.manual_seed(3)
    x = torch.randn(rows, length, inputs, dtype=torch.float64) * torch.rand(rows, length, 1, dtype=torch.float64)
    return x, torch.tensor([1.0, 0.02, 0.3, 0.05, 2.0], dtype=torch.float64).view(1, -1, 1)


def measured_variance(model, loss):
    layer = model[0]
    with get_handle(model).exact():
        (exact,) = torch.autograd.grad(loss(), layer.weight)
    squares = [(torch.autograd.grad(loss(), layer.weight)[0] - exact).square().sum() for _ in range(DRAWS)]
    return torch.stack(squares).mean().item()


@pytest.mark.parametrize(
    "strategies",
    [
        {"stored": StochasticRounding(2, group=8), "cotangent": RowSample(0.3)},
        {"stored": RowSample(0.5), "cotangent": RowSample(0.5)},
        {"stored": RowSample(0.5), "cotangent": RowProjection(0.5)},
        {"stored": StochasticRounding(2, group=8), "cotangent": ExampleSample(0.5)},
    ],
    ids=repr,
)
def test_both_moments_at_once(strategies):
    x, weights = tokens()
    model = nn.Sequential(nn.Linear(12, 4)).double()

    def loss():
        return (model(x) * weights).square().sum()

    handle = approximate(model, Rule(**strategies), skip_small=False)
    handle.predict(loss)
    # The stored term is an average over sixteen drawn cotangents, hence the wider band.
    assert measured_variance(model, loss) / handle.rows[0].weight_variance == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("stored", [RowSample(0.4, scores=PredictedNorm()), LowRank(4, refresh=10**9)], ids=repr)
def test_what_a_layer_remembers_is_in_the_prediction(stored):
    x, weights = tokens()
    model = nn.Sequential(nn.Linear(12, 4)).double()

    def loss():
        return (model(x) * weights).square().sum()

    handle = approximate(model, Rule(stored=stored), skip_small=False)
    for _ in range(5):
        loss().backward()
    handle.predict(loss)
    predicted = handle.rows[0].weight_variance
    assert measured_variance(model, loss) / predicted == pytest.approx(1, abs=0.1)
    # The test can tell: without the memory the prediction is another.
    plain = stored.law.variance(x.view(-1, 12), 2 * (model(x).detach() * weights**2).view(-1, 4), examples=6)
    if isinstance(stored, RowSample):
        assert abs(float(plain.weight) / predicted - 1) > 0.2


def test_prediction_under_autocast():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    handle = approximate(model, Rule(stored=StochasticRounding(4), cotangent=RowSample(0.5)), skip_small=False)
    x = torch.randn(16, 32, requires_grad=True)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    handle.predict(loss)
    assert all(row.relative_variance > 0 and row.input_norm_squared > 0 for row in handle.rows)


def test_prediction_with_an_output_size():
    layer = nn.ConvTranspose2d(4, 4, 3, stride=2)
    handle = approximate(layer, Rule(stored=StochasticRounding(4)), skip_small=False)
    x = torch.randn(2, 4, 8, 8)
    handle.predict(lambda: layer(x, output_size=[18, 18]).square().mean())
    assert handle.rows[0].weight_variance > 0


@pytest.mark.parametrize("by_pickle", [False, True])
def test_a_copy_made_in_exact_mode_is_not_exact_for_ever(by_pickle, tmp_path):
    model = nn.Sequential(nn.Linear(256, 256))
    handle = approximate(model, Rule(cotangent=RowSample(0.5)))
    with handle.exact():
        if by_pickle:
            torch.save(model, tmp_path / "model.pt")
            twin = torch.load(tmp_path / "model.pt", weights_only=False)
        else:
            twin = copy.deepcopy(model)
    x = torch.randn(16, 256)
    twin(x).square().sum().backward()
    exact = torch.autograd.grad(nn.functional.linear(x, twin[0].weight, twin[0].bias).square().sum(), twin[0].weight)[0]
    assert not torch.allclose(twin[0].weight.grad, exact)


def test_predictions_leave_the_statistics_of_batch_norms_alone():
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    handle = approximate(model, Rule("0", stored=StochasticRounding(4)), skip_small=False)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.randn(32, 16)
    handle.predict(lambda: model(x).square().mean())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_layer_that_was_replaced_is_said_to_be_gone():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    handle = approximate(model, Rule(stored=StochasticRounding(4)), skip_small=False)
    model[1] = nn.Linear(16, 16)
    assert [row.status for row in handle.rows] == ["converted", "gone"]
    # The table wraps long remarks.
    assert "the layer was replaced or removed since it was" in handle.summary()

"""Forward mode: what it costs by the ledger, and what really runs."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from cheapgrad.cost import (
    ForwardModeCost,
    ForwardModeMeasurement,
    measure_forward_mode,
    predict_forward_mode,
    scan,
)
from cheapgrad.errors import BudgetError, ForwardModeError, ForwardResultError, ModelTypeError
from tests.cost.operators import define_operator


def chain(depth=3, width=16):
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())])


@pytest.mark.parametrize("directions", [1, 2, 5, 16])
@pytest.mark.parametrize("depth", [1, 3])
def test_chain_costs_one_and_two_for_each_direction(directions, depth):
    model, rows = chain(depth), torch.randn(4, 16)
    predicted = predict_forward_mode(scan(model, rows), directions)
    measured = measure_forward_mode(model, rows, directions=directions, along_inputs=True)
    assert measured.factor == predicted.factor == 1 + 2 * directions
    assert measured.forward_flops == predicted.forward_flops == 2 * 4 * 16 * 16 * depth


@pytest.mark.parametrize("directions", [2, 7])
def test_input_that_does_not_vary_saves_half_of_the_first_layers_tangents_but_one(directions):
    model, rows = chain(depth=4), torch.randn(4, 16)
    measured = measure_forward_mode(model, rows, directions=directions)
    # The tangent of the input is zero, and multiplied all the same: once, not once for each direction.
    assert measured.factor == 1 + 2 * directions - (directions - 1) / 4
    assert measured.factor < predict_forward_mode(scan(model, rows), directions).factor


MODELS = {
    "transformer layer": (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)),
    "convolutions": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, groups=2)),
        torch.randn(2, 3, 10, 10),
    ),
    "recurrence": (nn.GRU(4, 4, batch_first=True), torch.randn(2, 3, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_prediction_is_attained_where_everything_varies_and_a_bound_elsewhere(name):
    model, batch = MODELS[name]
    predicted = predict_forward_mode(scan(model, batch), 3)
    # A recurrence starts from a state that does not vary.
    slack = {"recurrence": 1 / 3}.get(name, 0.0)

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    everything = measure_forward_mode(model, batch, directions=3, along_inputs=True, loss=first)
    parameters = measure_forward_mode(model, batch, directions=3, loss=first)
    assert predicted.factor == 7.0
    assert everything.factor == pytest.approx(predicted.factor - slack)
    assert parameters.factor < everything.factor


def test_crossover_is_where_reverse_mode_costs_the_same():
    model, rows = chain(depth=4), torch.randn(4, 16)
    cost = predict_forward_mode(scan(model, rows), 1)
    assert cost.reverse_factor == 2.75
    assert 1 + cost.tangent * cost.crossover_directions == pytest.approx(cost.reverse_factor)
    assert cost.full_gradient_factor == 1 + 2 * 4 * (16 * 16 + 16)


def test_layer_with_three_operands_has_three_tangents():
    class Form(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Bilinear(4, 4, 4)

        def forward(self, x):
            return self.layer(x, x.tanh())

    assert predict_forward_mode(scan(Form(), torch.ones(2, 4)), 2).factor == 7.0


def test_unknown_operations_leave_the_prediction_open():
    class Doubled(nn.Module):
        def forward(self, x):
            return define_operator("doubled_forward", gradient_flops=10)(x)

    for model in (nn.ReLU(), Doubled()):
        cost = predict_forward_mode(scan(model, torch.ones(3, requires_grad=True)), 2)
        assert (cost.tangent, cost.factor, cost.crossover_directions, cost.full_gradient_factor) == (None,) * 4


def test_model_and_random_state_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    measure_forward_mode(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), directions=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_operation_without_forward_mode_is_named():
    with pytest.raises(ForwardModeError, match="mkldnn_rnn_layer"):
        measure_forward_mode(nn.LSTM(4, 4), torch.randn(2, 3, 4), directions=2, loss=lambda output: output[0])


@pytest.mark.parametrize(("directions", "match"), [(0, "but got 0"), (2.5, "but got 2.5")])
def test_number_of_directions_is_checked(directions, match):
    model, rows = chain(), torch.randn(4, 16)
    with pytest.raises(BudgetError, match=match):
        measure_forward_mode(model, rows, directions=directions)
    with pytest.raises(BudgetError, match=match):
        predict_forward_mode(scan(model, rows), directions)


def test_model_that_is_none_is_refused():
    with pytest.raises(ModelTypeError, match="got function"):
        measure_forward_mode(lambda x: x, torch.ones(2), directions=1)


def test_result_that_is_no_tensor_is_refused():
    with pytest.raises(ForwardResultError, match="the model returned tuple"):
        measure_forward_mode(nn.GRU(4, 4), torch.randn(2, 3, 4), directions=1)
    with pytest.raises(ForwardResultError, match="the loss returned float"):
        measure_forward_mode(nn.Linear(4, 4), torch.randn(3, 4), directions=1, loss=lambda output: 1.0)


def test_records_are_json_and_come_back():
    model, rows = chain(), torch.randn(4, 16)
    cost, measured = predict_forward_mode(scan(model, rows), 2), measure_forward_mode(model, rows, directions=2)
    assert ForwardModeCost.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost
    assert ForwardModeMeasurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured

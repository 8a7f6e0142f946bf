"""Layer sensitivities on matrices whose trace and top direction are known."""

from __future__ import annotations

import math

import pytest
import torch

from cheapgrad.curvature import DenseOperator, MeanOperator
from cheapgrad.curvature.sensitivities import measure_sensitivities
from cheapgrad.errors import BudgetError, OverlapError, ShapeError


def batch(examples, parts, parameters=12):
    rows = torch.randn(parts, examples // parts, parameters, dtype=torch.float64)
    return MeanOperator([DenseOperator(each.T @ each / len(each)) for each in rows])


def test_trace_and_top_are_those_of_all_data():
    """White data: the trace is 12 and the curvature along any direction is 1."""
    layers = [measure_sensitivities({"x": (batch(24, 2), batch(48, 4))}, seed=seed)[0] for seed in range(200)]

    def distance(name, truth):
        values = torch.tensor([getattr(layer, name) for layer in layers])
        return float((values.mean() - truth).abs() / (values.std() / math.sqrt(len(layers))))

    assert distance("trace", 12.0) < 3
    assert distance("held_out_top", 1.0) < 3
    assert distance("same_batch_top", 1.0) > 6
    measured = float(torch.tensor([layer.trace for layer in layers]).var())
    stated = sum(layer.trace_standard_error**2 for layer in layers) / len(layers)
    # What the two parts of the variance share is counted twice: too large, by up to a part.
    assert 0.9 < stated / measured < 2.0


def test_several_layers_keep_their_order_and_names():
    operators = {name: (torch.eye(size) * 3, torch.eye(size) * 2) for name, size in (("b", 3), ("a", 5))}
    layers = measure_sensitivities(operators)
    assert [(layer.name, layer.parameters, layer.trace, layer.mean_eigenvalue) for layer in layers] == [
        ("b", 3, 6.0, 2.0),
        ("a", 5, 10.0, 2.0),
    ]
    assert layers[0].trace_standard_error is None
    assert layers[0].held_out_top_standard_error is None
    assert layers[0].same_batch_top == pytest.approx(3.0)


def test_bad_input():
    with pytest.raises(ShapeError, match="at least one layer, but got none"):
        measure_sensitivities({})
    with pytest.raises(ShapeError, match="layer 'x' has 2 parameters in one batch's operator, but 3"):
        measure_sensitivities({"x": (torch.eye(2), torch.eye(3))})
    with pytest.raises(BudgetError, match="draws must be a whole number of at least 1, but got 0"):
        measure_sensitivities({"x": (torch.eye(2), torch.eye(2))}, draws=0)
    same = DenseOperator(torch.eye(2))
    with pytest.raises(OverlapError, match="share 1 of 1"):
        measure_sensitivities({"x": (same, same)})

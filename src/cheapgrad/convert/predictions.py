"""Predictions of a converted layer, read from its strategies' laws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cheapgrad.convert.sketched_layer import Conversion, SketchedLayer
from cheapgrad.sketch import AbstractStrategy, Moment


def _strategies(conversion: Conversion) -> list[tuple[AbstractStrategy, Moment]]:
    pairs = ((conversion.plan.stored, Moment.STORED), (conversion.plan.cotangent, Moment.COTANGENT))
    return [(strategy, moment) for strategy, moment in pairs if strategy is not None]


def predict_sizes(module: SketchedLayer) -> dict[str, float | None]:
    """Return bytes and FLOPs for the sizes last seen, as fields of a `LayerRecord`."""
    conversion = module._cheapgrad
    kind, shape = conversion.kind, conversion.shape
    if shape is None:
        return {}
    return {
        "exact_saved_bytes": kind.saved_bytes(None, Moment.STORED, shape),
        "saved_bytes": kind.saved_bytes(conversion.plan.stored, Moment.STORED, shape),
        "exact_backward_flops": kind.flops(None, Moment.COTANGENT, shape),
        "backward_flops": _flops(conversion),
    }


def _flops(conversion: Conversion) -> float:
    """Return the FLOPs of dX and dW; where both strategies act, the two products are counted apart."""
    kind, shape, plan = conversion.kind, conversion.shape, conversion.plan
    if plan.stored is None or plan.cotangent is None:
        strategy, moment = _strategies(conversion)[0]
        return kind.flops(strategy, moment, shape)
    # The cotangent's sketch serves dX; dW takes the cheaper of the two, since a row sketch is not drawn twice.
    exact_input = kind.flops(None, Moment.COTANGENT, shape) / 2
    of_cotangent = kind.flops(plan.cotangent, Moment.COTANGENT, shape) / 2
    return of_cotangent + min(of_cotangent, kind.flops(plan.stored, Moment.STORED, shape) - exact_input)


def predict_variances(module: SketchedLayer, gradients: dict[int, Tensor]) -> dict[str, Any]:
    """Return variances and norms from the probed passes, as fields of a `LayerRecord`."""
    conversion = module._cheapgrad
    probe = conversion.probe
    if probe is None or not probe.uses:
        return {}
    totals = {"weight_variance": 0.0, "input_variance": 0.0, "input_norm_squared": 0.0}
    for x, grad, wants_input in probe.uses:
        for strategy, moment in _strategies(conversion):
            variance = conversion.kind.variance(module, strategy, moment, x, grad, wants_input)
            totals["weight_variance"] += float(variance.weight)
            totals["input_variance"] += float(variance.input)
        if wants_input:
            totals["input_norm_squared"] += _input_norm_squared(module, x, grad)
    weight_gradient = gradients.get(id(module.weight))
    if weight_gradient is None:
        return {**totals, "weight_variance": None, "weight_norm_squared": None}
    return {**totals, "weight_norm_squared": float(weight_gradient.double().square().sum())}


def _input_norm_squared(module: SketchedLayer, x: Tensor, grad: Tensor) -> float:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = module._cheapgrad.original_class.forward(module, leaf)
        (grad_input,) = torch.autograd.grad(output, leaf, grad)
    return float(grad_input.double().square().sum())

"""Predictions of a converted layer, read from its strategies' laws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cheapgrad.convert.sketched_layer import Conversion, SketchedLayer
from cheapgrad.sketch import AbstractStrategy, LayerShape, Moment
from cheapgrad.sketch.law import dense_bytes, dense_flops


def _strategies(conversion: Conversion) -> list[tuple[AbstractStrategy, Moment]]:
    pairs = ((conversion.plan.stored, Moment.STORED), (conversion.plan.cotangent, Moment.COTANGENT))
    return [(strategy, moment) for strategy, moment in pairs if strategy is not None]


def predict_sizes(module: SketchedLayer) -> dict[str, float | None]:
    """Return bytes and FLOPs for the sizes last seen, as fields of a `LayerRecord`."""
    conversion = module._cheapgrad
    shape = conversion.shape
    if shape is None:
        return {}
    return {
        "exact_saved_bytes": dense_bytes(shape),
        "saved_bytes": _saved_bytes(conversion, shape),
        "exact_backward_flops": dense_flops(shape),
        "backward_flops": _flops(conversion, shape),
    }


def _saved_bytes(conversion: Conversion, shape: LayerShape) -> float:
    stored = conversion.plan.stored
    return dense_bytes(shape) if stored is None else stored.law.saved_bytes(shape, Moment.STORED)


def _flops(conversion: Conversion, shape: LayerShape) -> float:
    """Return the least of the exact FLOPs and each strategy's; where both act, dX and dW are counted apart."""
    stored, cotangent = conversion.plan.stored, conversion.plan.cotangent
    half = dense_flops(shape) / 2
    if stored is None or cotangent is None:
        strategy, moment = _strategies(conversion)[0]
        return strategy.law.flops(shape, moment)
    # The cotangent's sketch serves dX; dW takes the cheaper of the two, since a row sketch is not drawn twice.
    cotangent_flops = cotangent.law.flops(shape, Moment.COTANGENT)
    stored_flops = stored.law.flops(shape, Moment.STORED)
    return cotangent_flops / 2 + min(cotangent_flops / 2, stored_flops - half)


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

"""Predictions of a converted layer, read from its strategies' laws."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from cheapgrad.convert.kinds import LayerKind, LayerUse
from cheapgrad.convert.sketched_layer import Conversion, SketchedLayer
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractStrategy, ExampleSample, Moment, Operands, RowProjection, RowSample, Variance

# Strategies that sketch the row axis.
_ROW_SKETCHES = (RowSample, ExampleSample, RowProjection)
_AVERAGED_DRAWS = 16


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
    probe = module._cheapgrad.probe
    reason = why_unpredicted(module._cheapgrad)
    if reason:
        return {"unpredicted": reason}
    if probe is None or not probe.uses:
        return {}
    variances = [_variance_of_use(module, use) for use in probe.uses]
    weight_gradient = gradients.get(id(getattr(module, "weight", None)))
    return {
        "weight_variance": sum(float(variance.weight) for variance in variances)
        if weight_gradient is not None
        else None,
        "weight_norm_squared": _norm_squared(weight_gradient) if weight_gradient is not None else None,
        "input_variance": sum(float(variance.input) for variance in variances),
        "input_norm_squared": sum(_norm_squared(gradients[id(x)]) for x in probe.inputs if id(x) in gradients),
    }


def why_unpredicted(conversion: Conversion) -> str:
    """Return why no law gives the variance of a layer from its own tensors, or an empty string."""
    if conversion.kind.variance is None:
        return (
            "the projections of an attention have inputs and cotangents of their own, which nobody sees from outside; "
            "the law of a linear layer holds for each"
        )
    if conversion.kind.row_wise and conversion.plan.cotangent is not None:
        return (
            "rows are drawn at the end of a chain, by a cotangent that is not this operation's own; cheapgrad.audit "
            "measures the whole"
        )
    return ""


def _norm_squared(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _variance_of_use(module: SketchedLayer, use: LayerUse) -> Variance:
    kind, plan = module._cheapgrad.kind, module._cheapgrad.plan
    of_stored = of_cotangent = None
    if plan.cotangent is not None:
        of_cotangent = kind.predict_variance(module, plan.cotangent, Moment.COTANGENT, use, plan.cotangent_memory)
        if isinstance(plan.cotangent, _ROW_SKETCHES) and isinstance(plan.stored, _ROW_SKETCHES):
            # Rows that are sketched in what is stored are not sketched again for dW.
            of_cotangent = Variance(of_cotangent.input, torch.zeros_like(of_cotangent.weight))
    if plan.stored is not None:
        uses = [use] if of_cotangent is None or not of_cotangent.weight.any() else _drawn_uses(kind, plan, use)
        each = [kind.predict_variance(module, plan.stored, Moment.STORED, drawn, plan.stored_memory) for drawn in uses]
        of_stored = Variance(each[0].input, torch.stack([variance.weight for variance in each]).mean())
    if of_stored is None or of_cotangent is None:
        return of_stored or of_cotangent  # type: ignore[return-value] - a plan has at least one of the two
    return Variance(of_stored.input + of_cotangent.input, of_stored.weight + of_cotangent.weight)


def _drawn_uses(kind: LayerKind, plan: Plan, use: LayerUse) -> list[LayerUse]:
    """Return the use with drawn cotangents in the place of G.

    Both draws are independent, so ``Var dW = Var_cotangent(X, G) + E[Var_stored(X, G_hat)]``; the second term is
    averaged over a few draws of ``G_hat``.
    """
    rows_NO = kind.cotangent_rows(use.cotangent.double())
    operands = Operands(Moment.COTANGENT, None, rows_NO, None, use.examples)
    draws = [plan.draw(operands).dense() for _ in range(_AVERAGED_DRAWS)]
    return [dataclasses.replace(use, cotangent=kind.cotangent_like(draw, use.cotangent)) for draw in draws]

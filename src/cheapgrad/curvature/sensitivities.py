"""How sensitive each layer is: trace and top eigenvalue of its curvature, with their spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.curvature.operators import AbstractOperator, as_operator
from cheapgrad.curvature.split_sample import split_sample
from cheapgrad.errors import ArgumentError, ShapeError, check_count, check_instance, describe_value


@dataclass(frozen=True)
class LayerSensitivity:
    """The curvature of the loss along one layer's parameters.

    Attributes:
        name: of the layer.
        parameters: how many it has.
        trace: sum of all eigenvalues, on batch b.
        trace_standard_error: over random vectors and micro-batches of b; None where one of them is single.
        same_batch_top: largest eigenvalue of batch a: over-stated.
        held_out_top: curvature along the same direction on batch b.
        held_out_top_standard_error: over micro-batches of b; None where it has a single one.
    """

    name: str
    parameters: int
    trace: float
    trace_standard_error: float | None
    same_batch_top: float
    held_out_top: float
    held_out_top_standard_error: float | None

    @property
    def mean_eigenvalue(self) -> float:
        """The trace over the number of parameters."""
        return self.trace / self.parameters


def measure_sensitivities(
    operators: Mapping[str, tuple[Any, Any]], *, draws: int = 16, seed: int = 0
) -> tuple[LayerSensitivity, ...]:
    """Measure each layer's trace and top eigenvalue, the latter on another batch than the one that chose it.

    Args:
        operators: by layer name, the layer's curvature on batch a and on batch b, such as
            ``GaussNewton(model, loss, batch, parameters=["conv1.weight"])`` on each.
        draws: random vectors for the trace, at least 1.
        seed: of these vectors, and of nothing else.

    Returns:
        One record for each layer, in the order given.

    Law:
        The trace is unbiased: no direction is chosen, so the batch adds no bias. Its variance has two parts, random
        vectors (``2 (‖H‖² - Σ H_ii²) / draws``) and micro-batches; the standard error adds an estimate of each, and so
        counts what they have in common twice. The held-out top is unbiased for the curvature of all data along a's
        direction. The spread of same-batch tops over slices of the data, which some papers use, does not see their
        bias. Cost a layer: an eigenvector on a, `draws` + 1 products on b.

    Raises:
        BudgetError: if `draws` is no positive whole number.
        ArgumentError: if a layer has no pair of operators.
        ShapeError: if there is no layer, or a layer's operators differ in size.
        OverlapError: if a layer's operators share micro-batches.

    Example:
        >>> a, b = torch.diag(torch.tensor([5.0, 1.0])), torch.diag(torch.tensor([4.0, 1.0]))
        >>> (layer,) = measure_sensitivities({"head": (a, b)})
        >>> layer.trace, layer.same_batch_top, layer.held_out_top
        (5.0, 5.0, 4.0)

    References:
        Top eigenvalues: HAWQ (arXiv:1905.03696) and Q-BERT (arXiv:1909.05840); traces: HAWQ-V2 (arXiv:1911.03852).
    """
    check_count("draws", draws)
    check_instance("operators", operators, Mapping, "use {name: (operator_a, operator_b)}")
    for name, pair in operators.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ArgumentError(
                f"layer {name!r} must have a pair (operator_a, operator_b), but got {describe_value(pair)}"
            )
    if not operators:
        raise ShapeError("sensitivities need at least one layer, but got none; pass {name: (operator_a, operator_b)}")
    return tuple(
        _measure_layer(name, as_operator(a), as_operator(b), draws, seed) for name, (a, b) in operators.items()
    )


def _measure_layer(
    name: str, operator_a: AbstractOperator, operator_b: AbstractOperator, draws: int, seed: int
) -> LayerSensitivity:
    if operator_a.shape != operator_b.shape:
        raise ShapeError(
            f"layer {name!r} has {operator_a.shape[0]} parameters in one batch's operator, but {operator_b.shape[0]} "
            "in the other's"
        )
    sample = split_sample(operator_a, operator_b, 1)
    trace, error = _estimate_trace(operator_b, draws, seed)
    top_error = float(sample.standard_error[0])
    return LayerSensitivity(
        name=name,
        parameters=operator_b.shape[0],
        trace=trace,
        trace_standard_error=error,
        same_batch_top=float(sample.same_batch[0]),
        held_out_top=float(sample.held_out[0]),
        held_out_top_standard_error=None if math.isnan(top_error) else top_error,
    )


def _estimate_trace(operator: AbstractOperator, draws: int, seed: int) -> tuple[float, float | None]:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (operator.shape[0], draws), generator=generator) * 2 - 1
    signs_PR = signs.to(operator.device, operator.dtype)
    parts = operator.micro_batches
    values_BR = torch.stack([(signs_PR * (part.operator @ signs_PR)).sum(0).double().cpu() for part in parts])
    weights = torch.tensor([part.weight for part in parts], dtype=torch.float64)
    by_draw, by_part = weights @ values_BR, values_BR.mean(1)
    trace = by_draw.mean()
    if draws < 2 or len(parts) < 2:
        return float(trace), None
    from_draws = by_draw.var() / draws
    from_parts: Tensor = (weights * (by_part - trace).square()).sum() / (len(parts) - 1)
    return float(trace), float((from_draws + from_parts).sqrt())

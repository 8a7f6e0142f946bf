"""Bits for every layer: the least total penalty under a budget, exactly."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cheapgrad.errors import BudgetError, NonFiniteCurvatureError, ShapeError, check_count, check_instance

_MOST_STATES = 3_000_000
_PRICES = 33

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class LayerBits:
    """What a layer may be quantized to.

    Args:
        name: of the layer.
        bits: the choices, such as ``(4, 8)``.
        penalties: of each choice, such as `quantization_penalty` gives them; of any sign, finite.
        costs: of each choice, in the unit of the budget (bytes, bit operations, seconds), at least 0.

    Raises:
        ShapeError: if there is not one penalty and one cost for each choice.
        BudgetError: if one of them is not finite, or a cost is negative.
    """

    name: str
    bits: tuple[int, ...]
    penalties: tuple[float, ...]
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check that all fit."""
        if not self.bits or not len(self.bits) == len(self.penalties) == len(self.costs):
            raise ShapeError(
                f"layer {self.name!r} needs one penalty and one cost for each choice of bits, at least one, but got "
                f"{len(self.bits)}, {len(self.penalties)} and {len(self.costs)}"
            )
        for what, values, least in (("penalty", self.penalties, -math.inf), ("cost", self.costs, 0.0)):
            for bits, value in zip(self.bits, values, strict=True):
                if not math.isfinite(value) or value < least:
                    allowed = "finite" if least else "finite and at least 0"
                    where = f"the {what} of layer {self.name!r} at {bits} bits"
                    raise BudgetError(f"{where} must be {allowed}, but got {value!r}")


@dataclass(frozen=True)
class BitAllocation:
    """The bits of every layer.

    Attributes:
        bits: by layer name.
        penalty: total, the least there is.
        cost: total, at most the budget.
        budget: what was asked for.
    """

    bits: dict[str, int]
    penalty: float
    cost: float
    budget: float


def allocate_bits(layers: Sequence[LayerBits], budget: float) -> BitAllocation:
    """Choose bits for every layer: least total penalty, total cost at most the budget.

    ``min Σ penalty_i(b_i)`` subject to ``Σ cost_i(b_i) ≤ budget``, one choice a layer. Partial choices are kept only if
    no other is both cheaper and better, and if the best that could still become of them (a Lagrangian bound) beats a
    solution that is known already.

    Args:
        layers: at least one, with names of their own. Layers that have to agree, such as a residual connection and what
            it is added to, are one: add their penalties and costs.
        budget: in the unit of the layers' costs.

    Returns:
        An optimal allocation: nothing within the budget has a smaller penalty, up to rounding.

    Law:
        Exact. Ties are broken towards the lower cost. Cost: grows with the number of undominated partial choices,
        thousands for a few dozen layers; at 3 million it gives up by an error.

    Raises:
        BudgetError: if the cheapest choices exceed the budget, the budget is no number, or the search grows too large.
        ArgumentError: if a layer is no `LayerBits`.
        ShapeError: if there is no layer, or two have the same name.

    Example:
        >>> stem = LayerBits("stem", (4, 8), (9.0, 1.0), (4.0, 8.0))
        >>> head = LayerBits("head", (4, 8), (2.0, 0.5), (4.0, 8.0))
        >>> allocate_bits([stem, head], 12.0).bits
        {'stem': 8, 'head': 4}

    References:
        The problem is that of HAWQ-V3 (arXiv:2011.10680), solved there by an integer-programming package.
    """
    for index, layer in enumerate(layers):
        check_instance(f"layers[{index}]", layer, LayerBits, "use LayerBits(name, bits, penalties, costs)")
    names = [layer.name for layer in layers]
    if not layers or len(set(names)) < len(names):
        raise ShapeError(f"layers must be at least one, with different names, but got {names!r}")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or math.isnan(budget):
        raise BudgetError(f"budget must be a number, but got {budget!r}")
    cheapest = math.fsum(min(layer.costs) for layer in layers)
    # Sums in another order than the caller's: the last digit of a budget may not decide.
    dearest = math.fsum(max(layer.costs) for layer in layers)
    slack = 1e-12 * dearest
    if cheapest > budget + slack:
        raise BudgetError(f"the cheapest choices cost {cheapest:g} in total, above the budget of {budget:g}")
    chosen = _search(layers, min(budget, dearest) + slack)
    return BitAllocation(
        bits={layer.name: layer.bits[index] for layer, index in zip(layers, chosen, strict=True)},
        penalty=math.fsum(layer.penalties[index] for layer, index in zip(layers, chosen, strict=True)),
        cost=math.fsum(layer.costs[index] for layer, index in zip(layers, chosen, strict=True)),
        budget=float(budget),
    )


def _search(layers: Sequence[LayerBits], budget: float) -> list[int]:
    """Return the index of the choice of every layer."""
    prices, bounds, incumbent = _bound_suffixes(layers, budget)
    least_rest = [math.fsum(min(layer.costs) for layer in layers[start:]) for start in range(len(layers) + 1)]
    costs, penalties = np.zeros(1), np.zeros(1)
    trail: list[tuple[Array, Array]] = []
    for place, layer in enumerate(layers):
        options = np.arange(len(layer.bits))
        parents = np.repeat(np.arange(len(costs)), len(options))
        choices = np.tile(options, len(costs))
        new_costs = costs[parents] + np.asarray(layer.costs)[choices]
        new_penalties = penalties[parents] + np.asarray(layer.penalties)[choices]
        room = budget - new_costs
        reachable = np.full(len(room), -math.inf)
        for price, bound in zip(prices, bounds[place + 1], strict=True):
            reachable = np.maximum(reachable, bound - price * room)
        kept = np.flatnonzero((room >= least_rest[place + 1]) & (new_penalties + reachable <= incumbent))
        # The cheaper first, of equal ones the better: what follows is useless unless it is better than all before.
        kept = kept[np.lexsort((new_penalties[kept], new_costs[kept]))]
        best_before = np.minimum.accumulate(np.concatenate([[math.inf], new_penalties[kept][:-1]]))
        kept = kept[new_penalties[kept] < best_before]
        if len(kept) > _MOST_STATES:
            raise BudgetError(
                f"more than {_MOST_STATES} partial choices are undominated after {place + 1} of {len(layers)} layers; "
                "round costs to a coarser unit, or offer fewer choices of bits"
            )
        costs, penalties = new_costs[kept], new_penalties[kept]
        trail.append((parents[kept], choices[kept]))
    index, chosen = int(penalties.argmin()), []
    for parents, choices in reversed(trail):
        chosen.append(int(choices[index]))
        index = int(parents[index])
    return chosen[::-1]


def _bound_suffixes(layers: Sequence[LayerBits], budget: float) -> tuple[list[float], list[list[float]], float]:
    """Return prices of the cost, the least priced total of all layers from each one on, and a penalty within reach."""
    rates = sorted(
        {
            (layer.penalties[low] - layer.penalties[high]) / (layer.costs[high] - layer.costs[low])
            for layer in layers
            for low in range(len(layer.bits))
            for high in range(len(layer.bits))
            if layer.costs[high] > layer.costs[low] and layer.penalties[low] > layer.penalties[high]
        }
    )
    solutions = [_price_out(layers, price) for price in [0.0, *rates, *([2 * rates[-1] + 1] if rates else [])]]
    feasible = [penalty for penalty, cost in solutions if cost <= budget]
    cheapest = math.fsum(min(zip(layer.costs, layer.penalties, strict=True))[1] for layer in layers)
    reached = min([cheapest, *feasible])
    # Prices around the one at which the cost passes the budget give the tightest bounds.
    turn = sum(cost > budget for _, cost in solutions[1 : len(rates) + 1])
    prices = [0.0, *rates[max(0, turn - _PRICES // 2) : turn + _PRICES // 2 + 1]]
    bounds = [[0.0] * len(prices)]
    for layer in reversed(layers):
        pairs = list(zip(layer.penalties, layer.costs, strict=True))
        bounds.append(
            [
                rest + min(penalty + price * cost for penalty, cost in pairs)
                for price, rest in zip(prices, bounds[-1], strict=True)
            ]
        )
    scale = math.fsum(max(abs(penalty) for penalty in layer.penalties) for layer in layers)
    return prices, bounds[::-1], reached + 1e-12 * scale


def _price_out(layers: Sequence[LayerBits], price: float) -> tuple[float, float]:
    """Return penalty and cost of the choices that are best, each by itself, when cost has a price."""
    picked = [
        min((penalty + price * cost, cost, penalty) for penalty, cost in zip(layer.penalties, layer.costs, strict=True))
        for layer in layers
    ]
    return math.fsum(each[2] for each in picked), math.fsum(each[1] for each in picked)


def quantization_penalty(weight: Tensor, bits: int, trace: float) -> float:
    """Return ``(trace / n) ‖Q(W) - W‖²``, the loss that rounding a layer's n weights is expected to add, times two.

    Q rounds to the nearest of ``2^bits - 1`` levels, symmetric around zero, each output channel by its own largest
    weight.

    Args:
        weight: ``[O, ...]``.
        bits: from 2 to 16.
        trace: of the curvature of the mean loss over the layer's weights: `measure_sensitivities`.

    Returns:
        The penalty, in the unit of the loss.

    Law:
        Exact for what it says; as a prediction of the loss it takes the rounding errors for unrelated to the
        curvature's directions, and the gradient for zero.

    Raises:
        BudgetError: if `bits` is out of range, or the trace is not finite.
        ShapeError: if there is no weight.
        NonFiniteCurvatureError: if a weight is not finite.

    Example:
        >>> quantization_penalty(torch.tensor([[1.0, 0.4]]), 2, trace=2.0)  # rounded to 1 and 0
        0.16...

    References:
        HAWQ-V2 (arXiv:1911.03852).
    """
    check_count("bits", bits, minimum=2)
    if bits > 16 or isinstance(trace, bool) or not isinstance(trace, numbers.Real) or not math.isfinite(trace):
        raise BudgetError(f"bits must be from 2 to 16 and the trace finite, but got bits={bits!r}, trace={trace!r}")
    check_instance("weight", weight, Tensor)
    if weight.ndim == 0 or weight.numel() == 0:
        raise ShapeError(f"weight must be [O, ...] with at least one entry, but got the shape {tuple(weight.shape)}")
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise NonFiniteCurvatureError(f"{bad} of {weight.numel()} weights are not finite, so nothing can be rounded")
    rows = weight.detach().double().reshape(weight.shape[0], -1)
    levels = 2 ** (bits - 1) - 1
    step = rows.abs().amax(1, keepdim=True) / levels
    rounded = torch.where(step > 0, (rows / torch.where(step > 0, step, 1.0)).round() * step, rows)
    return trace / rows.numel() * float((rounded - rows).square().sum())

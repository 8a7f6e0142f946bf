"""What torch itself returns as the derivative at its kinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class TorchConvention:
    """What torch returned at one kink; see `measure_torch_conventions`.

    Attributes:
        function: which function, with the arguments that matter.
        point: where, one number for each entry of its input; all entries are independent variables.
        gradient: of the sum of what it returned, entry by entry.
    """

    function: str
    point: tuple[float, ...]
    gradient: tuple[float, ...]


def measure_torch_conventions(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[TorchConvention, ...]:
    """Ask the torch that is installed what it returns as the derivative at kinks and ties.

    Two functions that are equal everywhere may differ here: ``relu`` and ``clamp(min=0)`` do.

    Args:
        device: where to ask.
        dtype: in which floating-point type.

    Returns:
        One record for each function and point, in a fixed order.

    Law:
        Nothing is looked up: every gradient is computed by the call. At a tie of more entries than two, or on another
        device, a kernel may choose otherwise.

    Example:
        >>> {row.function: row.gradient for row in measure_torch_conventions() if row.point == (0.0,)}["abs(x)"]
        (0.0,)
    """
    found = []
    for function, point, program in _CASES:
        x = torch.tensor(point, device=device, dtype=dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad(program(x).sum(), x)
        found.append(TorchConvention(function, point, tuple(gradient.tolist())))
    return tuple(found)


def _half(x: Tensor) -> Tensor:
    """Return a slope that is exact in every dtype."""
    return torch.full((1,), 0.5, dtype=x.dtype, device=x.device)


def _ones(x: Tensor) -> Tensor:
    return torch.ones_like(x)


_ZERO, _TIE = (0.0,), (1.0, 1.0)

_CASES: tuple[tuple[str, tuple[float, ...], Callable[[Tensor], Tensor]], ...] = (
    ("relu(x)", _ZERO, torch.relu),
    ("clamp(x, min=0)", _ZERO, lambda x: x.clamp(min=0)),
    ("clamp(x, -1, 1)", (-1.0, 1.0), lambda x: x.clamp(-1, 1)),
    ("where(x > 0, x, 0)", _ZERO, lambda x: torch.where(x > 0, x, 0)),
    ("where(x >= 0, x, 0)", _ZERO, lambda x: torch.where(x >= 0, x, 0)),
    ("threshold(x, 0, 0)", _ZERO, lambda x: functional.threshold(x, 0, 0)),
    ("relu6(x)", (0.0, 6.0), functional.relu6),
    ("hardtanh(x)", (-1.0, 1.0), functional.hardtanh),
    ("hardswish(x)", (-3.0, 3.0), functional.hardswish),
    ("hardsigmoid(x)", (-3.0, 3.0), functional.hardsigmoid),
    ("softshrink(x, 0.5)", (-0.5, 0.5), functional.softshrink),
    ("leaky_relu(x, 0.5)", _ZERO, lambda x: functional.leaky_relu(x, 0.5)),
    ("prelu(x, 0.5)", _ZERO, lambda x: functional.prelu(x, _half(x))),
    ("elu(x, 0.5)", _ZERO, lambda x: functional.elu(x, 0.5)),
    ("selu(x)", _ZERO, functional.selu),
    ("abs(x)", _ZERO, torch.abs),
    ("l1_loss(x, 0)", _ZERO, lambda x: functional.l1_loss(x, torch.zeros_like(x))),
    ("hinge_embedding_loss(x, -1)", (1.0,), lambda x: functional.hinge_embedding_loss(x, -_ones(x))),
    ("margin_ranking_loss(x, 0, 1)", _ZERO, lambda x: functional.margin_ranking_loss(x, torch.zeros_like(x), _ones(x))),
    ("maximum(x[0], x[1])", _TIE, lambda x: torch.maximum(x[0], x[1])),
    ("minimum(x[0], x[1])", _TIE, lambda x: torch.minimum(x[0], x[1])),
    ("fmax(x[0], x[1])", _TIE, lambda x: torch.fmax(x[0], x[1])),
    ("fmin(x[0], x[1])", _TIE, lambda x: torch.fmin(x[0], x[1])),
    ("max(x)", _TIE, torch.max),
    ("min(x)", _TIE, torch.min),
    ("amax(x)", _TIE, torch.amax),
    ("amin(x)", _TIE, torch.amin),
    ("max(x, dim=0)", _TIE, lambda x: x.max(dim=0).values),
    ("median(x)", _TIE, torch.median),
    ("norm(x, inf)", _TIE, lambda x: torch.linalg.vector_norm(x, float("inf"))),
    ("logsumexp(x)", _TIE, lambda x: torch.logsumexp(x, 0)),
    ("topk(x, 1)", _TIE, lambda x: x.topk(1).values),
    ("sort(x)[0]", _TIE, lambda x: x.sort().values[0]),
    ("max_pool1d(x, 2)", _TIE, lambda x: functional.max_pool1d(x[None], 2)),
    ("max_pool2d(x, (1, 2))", _TIE, lambda x: functional.max_pool2d(x[None, None], (1, 2))),
    ("adaptive_max_pool1d(x, 1)", _TIE, lambda x: functional.adaptive_max_pool1d(x[None], 1)),
    ("norm(x, 1)", (0.0, 0.0), lambda x: torch.linalg.vector_norm(x, 1)),
    ("norm(x, 2)", (0.0, 0.0), lambda x: torch.linalg.vector_norm(x)),
    ("sqrt(x)", _ZERO, torch.sqrt),
    ("sqrt(sum(x²))", (0.0, 0.0), lambda x: x.pow(2).sum().sqrt()),
    ("relu(x) - relu(-x), which is x", _ZERO, lambda x: torch.relu(x) - torch.relu(-x)),
    ("relu(-x) + x - relu(x), which is 0", _ZERO, lambda x: torch.relu(-x) + x - torch.relu(x)),
)

"""Activations as data: forward, slope, and the interval or the branches of the slope; one line each, in one place.

Forward and backward are PyTorch's own kernels, so that values, slopes at kinks and what becomes of NaN are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Smooth:
    """An activation whose slope takes every value of an interval.

    Attributes:
        forward: (x, options) to the output.
        backward: (cotangent, x or output, options) to the cotangent of x.
        interval: options to (lowest slope, highest slope, a slope that many entries have).
        reads_output: whether `backward` reads the output instead of x.
        defaults: options and their values.
        stock_tensors: how many tensors of the size of x PyTorch's graph holds, on a CPU and elsewhere.
    """

    forward: Callable[[Tensor, Options], Tensor]
    backward: Callable[[Tensor, Tensor, Options], Tensor]
    interval: Callable[[Options], tuple[float, float, float]]
    reads_output: bool = False
    defaults: Mapping[str, Any] | None = None
    stock_tensors: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class PiecewiseLinear:
    """An activation with two slopes.

    Attributes:
        forward: (x, options) to the output.
        branch: (ones, x, options) to 1 or 0, the branch taken by every entry.
        backward: (cotangent, branch as 0 or 1, options) to the cotangent of x.
        defaults: options and their values.
    """

    forward: Callable[[Tensor, Options], Tensor]
    branch: Callable[[Tensor, Tensor, Options], Tensor]
    backward: Callable[[Tensor, Tensor, Options], Tensor]
    defaults: Mapping[str, Any] | None = None


def _log_sigmoid_backward(grad: Tensor, x: Tensor, options: Options) -> Tensor:
    # The kernel wants what its forward left behind: exp(-|x|) on CPU, nothing elsewhere.
    return grad * torch.sigmoid(-x)


def _softsign_backward(grad: Tensor, x: Tensor, options: Options) -> Tensor:
    # PyTorch has no kernel for it: these are the operations of its graph.
    size = x.abs() + 1
    return grad / size - grad * (x / size / size) * x.sgn()


def _elu(x: Tensor, options: Options) -> Tensor:
    return functional.elu(x, options["alpha"])


def _celu_backward(grad: Tensor, x: Tensor, options: Options) -> Tensor:
    return aten.elu_backward(grad, options["alpha"], 1.0, 1 / options["alpha"], False, x)


def _gelu_written_out(x: Tensor, options: Options) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

# Extremes of slopes, to the seventh digit; rounding beyond an end costs what a rounding costs.
_GELU = (-0.1289042, 1.1289042, 1.0)
_GELU_TANH = (-0.1289931, 1.1289931, 1.0)

SMOOTH: dict[str, Smooth] = {
    "gelu": Smooth(
        lambda x, options: functional.gelu(x, approximate=options["approximate"]),
        lambda grad, x, options: aten.gelu_backward(grad, x, approximate=options["approximate"]),
        lambda options: _GELU if options["approximate"] == "none" else _GELU_TANH,
        defaults={"approximate": "none"},
    ),
    # GPT-2's, written out: the same function as the one above in other roundings.
    "gelu_written_out": Smooth(
        _gelu_written_out,
        lambda grad, x, options: aten.gelu_backward(grad, x, approximate="tanh"),
        lambda options: _GELU_TANH,
        stock_tensors=(4, 4),
    ),
    # x sigmoid(1.702 x) = silu(1.702 x) / 1.702.
    "quick_gelu": Smooth(
        lambda x, options: x * torch.sigmoid(1.702 * x),
        lambda grad, x, options: aten.silu_backward(grad, 1.702 * x),
        lambda options: (-0.0998394, 1.0998394, 1.0),
        stock_tensors=(2, 2),
    ),
    "silu": Smooth(
        lambda x, options: functional.silu(x),
        lambda grad, x, options: aten.silu_backward(grad, x),
        lambda options: (-0.0998394, 1.0998394, 1.0),
    ),
    "mish": Smooth(
        lambda x, options: functional.mish(x),
        lambda grad, x, options: aten.mish_backward(grad, x),
        lambda options: (-0.1125262, 1.0884982, 1.0),
    ),
    "hardswish": Smooth(
        lambda x, options: functional.hardswish(x),
        lambda grad, x, options: aten.hardswish_backward(grad, x),
        lambda options: (-0.5, 1.5, 1.0),
    ),
    "tanh": Smooth(
        lambda x, options: torch.tanh(x),
        lambda grad, y, options: aten.tanh_backward(grad, y),
        lambda options: (0.0, 1.0, 1.0),
        reads_output=True,
    ),
    "sigmoid": Smooth(
        lambda x, options: torch.sigmoid(x),
        lambda grad, y, options: aten.sigmoid_backward(grad, y),
        lambda options: (0.0, 0.25, 0.25),
        reads_output=True,
    ),
    "softplus": Smooth(
        lambda x, options: functional.softplus(x, options["beta"], options["threshold"]),
        lambda grad, x, options: aten.softplus_backward(grad, x, options["beta"], options["threshold"]),
        lambda options: (0.0, 1.0, 1.0),
        defaults={"beta": 1.0, "threshold": 20.0},
    ),
    "log_sigmoid": Smooth(
        lambda x, options: functional.logsigmoid(x),
        _log_sigmoid_backward,
        lambda options: (0.0, 1.0, 1.0),
        stock_tensors=(2, 1),
    ),
    "softsign": Smooth(
        lambda x, options: functional.softsign(x),
        _softsign_backward,
        lambda options: (0.0, 1.0, 1.0),
        stock_tensors=(2, 2),
    ),
    "tanhshrink": Smooth(
        lambda x, options: functional.tanhshrink(x),
        lambda grad, x, options: grad - aten.tanh_backward(grad, torch.tanh(x)),
        lambda options: (0.0, 1.0, 1.0),
    ),
    "elu": Smooth(
        _elu,
        lambda grad, x, options: aten.elu_backward(grad, options["alpha"], 1.0, 1.0, False, x),
        lambda options: (min(0.0, options["alpha"]), max(1.0, options["alpha"]), 1.0),
        defaults={"alpha": 1.0},
    ),
    "celu": Smooth(
        lambda x, options: functional.celu(x, options["alpha"]),
        _celu_backward,
        lambda options: (0.0, 1.0, 1.0),
        defaults={"alpha": 1.0},
    ),
    "selu": Smooth(
        lambda x, options: functional.selu(x),
        lambda grad, x, options: aten.elu_backward(grad, SELU_ALPHA, SELU_SCALE, 1.0, False, x),
        lambda options: (0.0, SELU_ALPHA * SELU_SCALE, SELU_SCALE),
    ),
}

PIECEWISE_LINEAR: dict[str, PiecewiseLinear] = {
    "relu": PiecewiseLinear(
        lambda x, options: functional.relu(x),
        lambda ones, x, options: aten.threshold_backward(ones, x, 0),
        lambda grad, branch, options: aten.threshold_backward(grad, branch, 0),
    ),
    "leaky_relu": PiecewiseLinear(
        lambda x, options: functional.leaky_relu(x, options["negative_slope"]),
        lambda ones, x, options: aten.leaky_relu_backward(ones, x, 0.0, False),
        lambda grad, branch, options: aten.leaky_relu_backward(grad, branch, options["negative_slope"], False),
        defaults={"negative_slope": 0.01},
    ),
    "relu6": PiecewiseLinear(
        lambda x, options: functional.relu6(x),
        lambda ones, x, options: aten.hardtanh_backward(ones, x, 0.0, 6.0),
        lambda grad, branch, options: aten.threshold_backward(grad, branch, 0),
    ),
    "hardtanh": PiecewiseLinear(
        lambda x, options: functional.hardtanh(x, options["min_val"], options["max_val"]),
        lambda ones, x, options: aten.hardtanh_backward(ones, x, options["min_val"], options["max_val"]),
        lambda grad, branch, options: aten.threshold_backward(grad, branch, 0),
        defaults={"min_val": -1.0, "max_val": 1.0},
    ),
    "hardsigmoid": PiecewiseLinear(
        lambda x, options: functional.hardsigmoid(x),
        # Slopes are 0 and 1/6.
        lambda ones, x, options: (aten.hardsigmoid_backward(ones, x) * 6 + 0.5).floor(),
        lambda grad, branch, options: aten.hardsigmoid_backward(grad, 6 - 6 * branch),
    ),
    "hardshrink": PiecewiseLinear(
        lambda x, options: functional.hardshrink(x, options["lambd"]),
        lambda ones, x, options: aten.hardshrink_backward(ones, x, options["lambd"]),
        lambda grad, branch, options: aten.threshold_backward(grad, branch, 0),
        defaults={"lambd": 0.5},
    ),
    "softshrink": PiecewiseLinear(
        lambda x, options: functional.softshrink(x, options["lambd"]),
        lambda ones, x, options: aten.softshrink_backward(ones, x, options["lambd"]),
        lambda grad, branch, options: aten.threshold_backward(grad, branch, 0),
        defaults={"lambd": 0.5},
    ),
    # PyTorch has no defaults here; with these it is a ReLU.
    "threshold": PiecewiseLinear(
        lambda x, options: functional.threshold(x, options["threshold"], options["value"]),
        lambda ones, x, options: aten.threshold_backward(ones, x, options["threshold"]),
        lambda grad, branch, options: aten.threshold_backward(grad, branch, 0),
        defaults={"threshold": 0.0, "value": 0.0},
    ),
}

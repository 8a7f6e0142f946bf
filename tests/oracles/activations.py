"""Activations and their slopes by definition, in double precision."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import erf, expit, log_expit

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848, 1.0507009873554804934
_ROOT = math.sqrt(2 / math.pi)


def _density(x):
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def _quick_gelu_slope(x):
    share = 1 / (1 + np.exp(-1.702 * x))
    return share * (1 + 1.702 * x * (1 - share))


def _gelu_tanh_slope(x):
    inner = np.tanh(_ROOT * (x + 0.044715 * x**3))
    return (1 + inner) / 2 + x / 2 * (1 - inner**2) * _ROOT * (1 + 3 * 0.044715 * x**2)


def _mish_slope(x):
    inner = np.tanh(-log_expit(-x))
    return inner + x * (1 - inner**2) * expit(x)


# Name and options -> slope.
SLOPES = {
    ("gelu", ()): lambda x: (1 + erf(x / math.sqrt(2))) / 2 + x * _density(x),
    ("gelu", (("approximate", "tanh"),)): _gelu_tanh_slope,
    ("gelu_written_out", ()): _gelu_tanh_slope,
    ("quick_gelu", ()): _quick_gelu_slope,
    ("silu", ()): lambda x: expit(x) * (1 + x * expit(-x)),
    ("mish", ()): _mish_slope,
    ("hardswish", ()): lambda x: np.where(x < -3, 0, np.where(x > 3, 1, x / 3 + 0.5)),
    ("tanh", ()): lambda x: 1 - np.tanh(x) ** 2,
    ("sigmoid", ()): lambda x: expit(x) * expit(-x),
    ("softplus", ()): lambda x: np.where(x > 20, 1, expit(x)),
    ("softplus", (("beta", 2.0), ("threshold", 3.0))): lambda x: np.where(2 * x > 3, 1, expit(2 * x)),
    ("log_sigmoid", ()): lambda x: expit(-x),
    ("softsign", ()): lambda x: 1 / (1 + np.abs(x)) ** 2,
    ("tanhshrink", ()): lambda x: np.tanh(x) ** 2,
    ("elu", ()): lambda x: np.where(x > 0, 1, np.exp(x)),
    ("elu", (("alpha", 1.7),)): lambda x: np.where(x > 0, 1, 1.7 * np.exp(x)),
    ("celu", (("alpha", 0.5),)): lambda x: np.where(x > 0, 1, np.exp(x / 0.5)),
    ("celu", ()): lambda x: np.where(x > 0, 1, np.exp(x)),
    ("selu", ()): lambda x: _SELU_SCALE * np.where(x > 0, 1, _SELU_ALPHA * np.exp(x)),
    ("relu", ()): lambda x: np.where(x > 0, 1, 0),
    ("leaky_relu", ()): lambda x: np.where(x > 0, 1, 0.01),
    ("leaky_relu", (("negative_slope", 0.3),)): lambda x: np.where(x > 0, 1, 0.3),
    ("relu6", ()): lambda x: np.where((x > 0) & (x < 6), 1, 0),
    ("hardtanh", ()): lambda x: np.where((x > -1) & (x < 1), 1, 0),
    ("hardtanh", (("min_val", -0.5), ("max_val", 2.0))): lambda x: np.where((x > -0.5) & (x < 2), 1, 0),
    ("hardsigmoid", ()): lambda x: np.where((x > -3) & (x < 3), 1 / 6, 0),
    ("hardshrink", ()): lambda x: np.where(np.abs(x) > 0.5, 1, 0),
    ("hardshrink", (("lambd", 1.2),)): lambda x: np.where(np.abs(x) > 1.2, 1, 0),
    ("softshrink", ()): lambda x: np.where(np.abs(x) > 0.5, 1, 0),
    ("softshrink", (("lambd", 0.0),)): lambda x: np.where(np.abs(x) > 0, 1, 0),
    ("threshold", (("threshold", -0.5), ("value", 20.0))): lambda x: np.where(x > -0.5, 1, 0),
}

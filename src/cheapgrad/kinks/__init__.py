"""Kinks: conventions, counts and limiting gradients where a program is not smooth.

Everything here works on any PyTorch code; it knows nothing of sketches.
"""

from __future__ import annotations

from cheapgrad.kinks.bifurcation import Bifurcation, bifurcation
from cheapgrad.kinks.conventions import Conventions, apply_conventions
from cheapgrad.kinks.directional_gradient import DirectionalGradient, directional_gradient
from cheapgrad.kinks.kink_report import KinkReport, KinkRow
from cheapgrad.kinks.max_pool import (
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)
from cheapgrad.kinks.relu import relu
from cheapgrad.kinks.ties import Ties
from cheapgrad.kinks.torch_conventions import TorchConvention, measure_torch_conventions
from cheapgrad.kinks.watch import KinkWatch, watch

__all__ = [
    "Bifurcation",
    "Conventions",
    "DirectionalGradient",
    "KinkReport",
    "KinkRow",
    "KinkWatch",
    "Ties",
    "TorchConvention",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "apply_conventions",
    "bifurcation",
    "directional_gradient",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "measure_torch_conventions",
    "relu",
    "watch",
]

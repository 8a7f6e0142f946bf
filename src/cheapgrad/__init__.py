"""Cheaper derivatives for PyTorch: unbiased random estimates in the backward pass, with the truth about every one."""

from __future__ import annotations

from cheapgrad import errors, sketch
from cheapgrad._version import __version__
from cheapgrad.convert import Handle, LayerRecord, Rule, approximate, get_handle
from cheapgrad.cost import CostReport, scan

__all__ = [
    "CostReport",
    "Handle",
    "LayerRecord",
    "Rule",
    "__version__",
    "approximate",
    "errors",
    "get_handle",
    "scan",
    "sketch",
]

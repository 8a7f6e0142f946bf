"""Cheaper derivatives for PyTorch: unbiased random estimates in the backward pass, with the truth about every one.

Names are imported when they are first asked for, so that ``import cheapgrad`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cheapgrad._version import __version__

if TYPE_CHECKING:
    from cheapgrad import auditing, cost, curvature, errors, kinks, ops, planning, recipes, sketch, testing
    from cheapgrad.auditing import AuditReport, audit, audit_step
    from cheapgrad.convert import Handle, LayerRecord, Rule, approximate, get_handle
    from cheapgrad.cost import CostReport, scan
    from cheapgrad.ops.cross_entropy import linear_cross_entropy
    from cheapgrad.planning import Controller, Plan, plan

_ROOMS = ("auditing", "cost", "curvature", "errors", "kinks", "ops", "planning", "recipes", "sketch", "testing")
# Public name -> the room it comes from.
_NAMES = {
    "AuditReport": "auditing",
    "Controller": "planning",
    "CostReport": "cost",
    "Handle": "convert",
    "LayerRecord": "convert",
    "Plan": "planning",
    "Rule": "convert",
    "approximate": "convert",
    "audit": "auditing",
    "audit_step": "auditing",
    "get_handle": "convert",
    "plan": "planning",
    "linear_cross_entropy": "ops.cross_entropy",
    "scan": "cost",
}

__all__ = [
    "AuditReport",
    "Controller",
    "CostReport",
    "Handle",
    "LayerRecord",
    "Plan",
    "Rule",
    "__version__",
    "approximate",
    "audit",
    "audit_step",
    "auditing",
    "cost",
    "curvature",
    "errors",
    "get_handle",
    "kinks",
    "linear_cross_entropy",
    "ops",
    "plan",
    "planning",
    "recipes",
    "scan",
    "sketch",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"cheapgrad.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(f"cheapgrad.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'cheapgrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

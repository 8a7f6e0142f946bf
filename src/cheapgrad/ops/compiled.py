"""All layers that compiled graphs hold as one operator; see `cheapgrad.ops.chains.operator`."""

from __future__ import annotations

from cheapgrad.ops.attention import run_projection
from cheapgrad.ops.chains.joining import LAYERS, overwrite
from cheapgrad.ops.chains.operator import define_operator, plan_text

define_operator({**LAYERS, "projection": run_projection}, overwrite)

__all__ = ["plan_text"]

"""Conversion: rules to modules of a live model, in place and back."""

from __future__ import annotations

from cheapgrad.convert.approximate import approximate
from cheapgrad.convert.handle import Handle, get_handle
from cheapgrad.convert.layer_record import LayerRecord
from cheapgrad.convert.rule import Rule
from cheapgrad.convert.uncovered import HeldElsewhere

__all__ = ["Handle", "HeldElsewhere", "LayerRecord", "Rule", "approximate", "get_handle"]

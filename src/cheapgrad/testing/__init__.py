"""For users who add an estimator: a small awkward problem, and a checker that holds a strategy to its law."""

from __future__ import annotations

from cheapgrad.testing.law_check import LawReport, TargetReport, check_law
from cheapgrad.testing.layer_problem import LayerProblem, make_layer_problem

__all__ = ["LawReport", "LayerProblem", "TargetReport", "check_law", "make_layer_problem"]

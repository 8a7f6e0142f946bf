"""Planning: from a budget to rules, and what cheaper, noisier steps are worth."""

from __future__ import annotations

from cheapgrad.planning.frontier import Frontier, Option, Point
from cheapgrad.planning.local_quadratic import LocalQuadratic
from cheapgrad.planning.make_plan import plan
from cheapgrad.planning.record import Plan, PlanFigures, PlannedLayer
from cheapgrad.planning.tradeoff import Tradeoff, tradeoff

__all__ = [
    "Frontier",
    "LocalQuadratic",
    "Option",
    "Plan",
    "PlanFigures",
    "PlannedLayer",
    "Point",
    "Tradeoff",
    "plan",
    "tradeoff",
]

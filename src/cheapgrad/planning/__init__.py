"""Planning: from a budget to rules, and what cheaper, noisier steps are worth."""

from __future__ import annotations

from cheapgrad.planning.adam_correction import adam_learning_rate_factor
from cheapgrad.planning.controller import Controller
from cheapgrad.planning.controller_law import NoiseSchedule
from cheapgrad.planning.controller_state import ControlRecord
from cheapgrad.planning.frontier import Frontier, Option, Point
from cheapgrad.planning.held import HeldPart
from cheapgrad.planning.local_quadratic import LocalQuadratic
from cheapgrad.planning.make_plan import plan
from cheapgrad.planning.record import Plan, PlanFigures, PlannedLayer
from cheapgrad.planning.tradeoff import Tradeoff, tradeoff

__all__ = [
    "ControlRecord",
    "Controller",
    "Frontier",
    "HeldPart",
    "LocalQuadratic",
    "NoiseSchedule",
    "Option",
    "Plan",
    "PlanFigures",
    "PlannedLayer",
    "Point",
    "Tradeoff",
    "adam_learning_rate_factor",
    "plan",
    "tradeoff",
]

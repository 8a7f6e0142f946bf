"""Sampling designs: how a set of atoms is drawn once their scores are known."""

from __future__ import annotations

from cheapgrad.sketch.designs._abstract import AbstractDesign
from cheapgrad.sketch.designs.ordered_pivotal import OrderedPivotal
from cheapgrad.sketch.designs.pivotal import Pivotal
from cheapgrad.sketch.designs.poisson import Poisson
from cheapgrad.sketch.designs.systematic import Systematic
from cheapgrad.sketch.designs.winner_take_all import WinnerTakeAll
from cheapgrad.sketch.designs.with_replacement import WithReplacement

__all__ = ["AbstractDesign", "OrderedPivotal", "Pivotal", "Poisson", "Systematic", "WinnerTakeAll", "WithReplacement"]

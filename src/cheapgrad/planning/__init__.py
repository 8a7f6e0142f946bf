"""Planning: from a budget to rules, and what cheaper, noisier steps are worth."""

from __future__ import annotations

from cheapgrad.planning.local_quadratic import LocalQuadratic
from cheapgrad.planning.tradeoff import Tradeoff, tradeoff

__all__ = ["LocalQuadratic", "Tradeoff", "tradeoff"]

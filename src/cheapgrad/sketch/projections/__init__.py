"""Random projections of the row axis, as drawn sketches."""

from __future__ import annotations

from cheapgrad.sketch.projections._abstract import AbstractProjection, DrawnProjection
from cheapgrad.sketch.projections.count_sketch import CountSketch
from cheapgrad.sketch.projections.gaussian import Gaussian
from cheapgrad.sketch.projections.hadamard import Hadamard
from cheapgrad.sketch.projections.rademacher import Rademacher

__all__ = ["AbstractProjection", "CountSketch", "DrawnProjection", "Gaussian", "Hadamard", "Rademacher"]

"""Sketches: unbiased random stand-ins for what is stored of a layer's input, or for its cotangent.

Strategies are frozen dataclasses with a `law` (bias, variance, cost). The parts they are made of, scores, designs and
projections, are public too.
"""

from __future__ import annotations

from cheapgrad.sketch._sampling import AbstractSampling
from cheapgrad.sketch._strategy import AbstractDrawnCotangent, AbstractStrategy
from cheapgrad.sketch.column_sample import ColumnSample
from cheapgrad.sketch.designs import (
    AbstractDesign,
    OrderedPivotal,
    Pivotal,
    Poisson,
    Systematic,
    WinnerTakeAll,
    WithReplacement,
)
from cheapgrad.sketch.element_mask import ElementMask
from cheapgrad.sketch.example_sample import ExampleSample
from cheapgrad.sketch.feature_sample import FeatureSample
from cheapgrad.sketch.law import Law, LayerShape, LayerTensors, Variance
from cheapgrad.sketch.low_rank import LowRank
from cheapgrad.sketch.moment import Moment
from cheapgrad.sketch.operands import AbstractStoredMatrix, DenseMatrix, Operands
from cheapgrad.sketch.projections import (
    AbstractProjection,
    CountSketch,
    Gaussian,
    Hadamard,
    Rademacher,
)
from cheapgrad.sketch.row_projection import RowProjection
from cheapgrad.sketch.row_sample import RowSample
from cheapgrad.sketch.scores import (
    AbstractScore,
    ColumnNorm,
    CotangentNorm,
    JointNorm,
    PredictedNorm,
    ProductNorm,
    StoredNorm,
    Uniform,
)
from cheapgrad.sketch.selection import Selection
from cheapgrad.sketch.stochastic_rounding import StochasticRounding
from cheapgrad.sketch.value import from_dict
from cheapgrad.sketch.water_filling import minimum_variance, water_filling

__all__ = [
    "AbstractDesign",
    "AbstractDrawnCotangent",
    "AbstractProjection",
    "AbstractSampling",
    "AbstractScore",
    "AbstractStoredMatrix",
    "AbstractStrategy",
    "ColumnNorm",
    "ColumnSample",
    "CotangentNorm",
    "CountSketch",
    "DenseMatrix",
    "ElementMask",
    "ExampleSample",
    "FeatureSample",
    "Gaussian",
    "Hadamard",
    "JointNorm",
    "Law",
    "LayerShape",
    "LayerTensors",
    "LowRank",
    "Moment",
    "Operands",
    "OrderedPivotal",
    "Pivotal",
    "Poisson",
    "PredictedNorm",
    "ProductNorm",
    "Rademacher",
    "RowProjection",
    "RowSample",
    "Selection",
    "StochasticRounding",
    "StoredNorm",
    "Systematic",
    "Uniform",
    "Variance",
    "WinnerTakeAll",
    "WithReplacement",
    "from_dict",
    "minimum_variance",
    "water_filling",
]

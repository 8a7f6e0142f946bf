"""One table of strategies at the moments where they may be placed; a new strategy is a new row."""

from __future__ import annotations

import pytest

from cheapgrad.sketch import (
    ColumnNorm,
    ColumnSample,
    CotangentNorm,
    CountSketch,
    ElementMask,
    ExampleSample,
    FeatureSample,
    Gaussian,
    Hadamard,
    JointNorm,
    LowRank,
    Moment,
    OrderedPivotal,
    Pivotal,
    Poisson,
    PredictedNorm,
    ProductNorm,
    Rademacher,
    RowProjection,
    RowSample,
    StochasticRounding,
    StoredNorm,
    Systematic,
    Uniform,
    WinnerTakeAll,
    WithReplacement,
)

COTANGENT, STORED = Moment.COTANGENT, Moment.STORED
DESIGNS = (
    Systematic(),
    Systematic(permute=False),
    Pivotal(),
    OrderedPivotal(),
    Poisson(),
    WithReplacement(),
    WinnerTakeAll(),
)
KINDS = (Rademacher(), Gaussian(), Hadamard(), CountSketch())


def _placed():
    for score in (
        Uniform(),
        StoredNorm(),
        CotangentNorm(),
        ProductNorm(),
        JointNorm(),
        JointNorm(3.0),
    ):
        yield COTANGENT, RowSample(keep=0.5, scores=score)
    for score in (Uniform(), StoredNorm(), PredictedNorm()):
        yield STORED, RowSample(keep=0.5, scores=score)
    for score in (Uniform(), CotangentNorm(), JointNorm(), ColumnNorm()):
        yield COTANGENT, ColumnSample(keep=0.6, scores=score)
    for score in (Uniform(), StoredNorm()):
        yield STORED, FeatureSample(keep=0.5, scores=score)
        yield STORED, FeatureSample(keep=0.5, scores=score, rows_per_mask=4)
    for design in DESIGNS:
        yield COTANGENT, RowSample(keep=0.4, design=design)
        yield STORED, RowSample(keep=0.4, design=design)
        yield COTANGENT, ExampleSample(keep=0.6, design=design)
        yield STORED, ExampleSample(keep=0.6, design=design)
        yield COTANGENT, ColumnSample(keep=0.6, design=design)
        yield STORED, FeatureSample(keep=0.5, design=design)
        yield COTANGENT, LowRank(rank=3, design=design)
        yield STORED, LowRank(rank=3, design=design)
        if not isinstance(design, Poisson):
            yield STORED, FeatureSample(keep=0.3, design=design, rows_per_mask=5)
    for by_magnitude in (True, False):
        yield COTANGENT, ElementMask(keep=0.5, by_magnitude=by_magnitude)
        yield STORED, ElementMask(keep=0.5, by_magnitude=by_magnitude)
    for kind in KINDS:
        yield COTANGENT, RowProjection(keep=0.5, kind=kind)
        yield STORED, RowProjection(keep=0.5, kind=kind)
    for bits in (2, 4, 8):
        yield STORED, StochasticRounding(bits=bits)
        yield STORED, StochasticRounding(bits=bits, group=8)


LAZY = [(COTANGENT, LowRank(rank=4, refresh=3)), (STORED, LowRank(rank=4, refresh=3))]
PLACED = list(_placed())


def parametrized(placed):
    """Return the rows as pytest parameters ``moment, strategy``."""
    return [pytest.param(moment, strategy, id=f"{moment.value}={strategy!r}") for moment, strategy in placed]

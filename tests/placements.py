"""Every strategy at every moment it works at, for layers of at least 32 features: the rows of several tables."""

from __future__ import annotations

from dataclasses import dataclass

from cheapgrad import Rule
from cheapgrad.convert.rule import Pattern
from cheapgrad.sketch import (
    AbstractStrategy,
    ColumnNorm,
    ColumnSample,
    CountSketch,
    ElementMask,
    ExampleSample,
    FeatureSample,
    Gaussian,
    Hadamard,
    JointNorm,
    LowRank,
    OrderedPivotal,
    Pivotal,
    Poisson,
    PredictedNorm,
    ProductNorm,
    Rademacher,
    RowProjection,
    RowSample,
    StochasticRounding,
    Uniform,
    WinnerTakeAll,
    WithReplacement,
)


@dataclass(frozen=True)
class Placement:
    """Strategies of one rule.

    Attributes:
        stored: strategy for what is kept of the input.
        cotangent: strategy for the cotangent.
        selects: whether one draw zeroes whole entries and mixes none, so that a diagonal dW stays diagonal.
    """

    stored: AbstractStrategy | None = None
    cotangent: AbstractStrategy | None = None
    selects: bool = True

    @property
    def name(self) -> str:
        """Both fields as they are written in a rule."""
        fields = (("stored", self.stored), ("cotangent", self.cotangent))
        return ", ".join(f"{field}={strategy!r}" for field, strategy in fields if strategy is not None)

    def rule(self, pattern: Pattern = "*") -> Rule:
        """Return the rule."""
        return Rule(pattern, stored=self.stored, cotangent=self.cotangent)


PLACEMENTS = (
    Placement(cotangent=RowSample(0.5)),
    Placement(cotangent=RowSample(0.5, Uniform(), Poisson())),
    Placement(cotangent=RowSample(0.5, ProductNorm(), WithReplacement())),
    Placement(cotangent=RowSample(0.5, JointNorm(), Pivotal())),
    Placement(cotangent=RowSample(0.5, design=OrderedPivotal())),
    Placement(cotangent=RowSample(0.5, design=WinnerTakeAll())),
    Placement(cotangent=ColumnSample(0.5)),
    Placement(cotangent=ColumnSample(0.5, ColumnNorm())),
    Placement(cotangent=ExampleSample(0.5)),
    Placement(cotangent=ElementMask(0.5, by_magnitude=False)),
    Placement(cotangent=RowProjection(0.5, Rademacher()), selects=False),
    Placement(cotangent=RowProjection(0.5, Hadamard()), selects=False),
    Placement(cotangent=LowRank(8), selects=False),
    Placement(cotangent=LowRank(8, refresh=3), selects=False),
    Placement(stored=RowSample(0.5)),
    Placement(stored=RowSample(0.5, PredictedNorm())),
    Placement(stored=FeatureSample(0.5)),
    Placement(stored=FeatureSample(0.5, rows_per_mask=20)),
    Placement(stored=ExampleSample(0.5)),
    Placement(stored=ElementMask(0.5, by_magnitude=False)),
    Placement(stored=RowProjection(0.5, Gaussian()), selects=False),
    Placement(stored=RowProjection(0.5, CountSketch()), selects=False),
    Placement(stored=LowRank(8), selects=False),
    Placement(stored=StochasticRounding(2)),
    Placement(stored=StochasticRounding(4)),
    Placement(stored=StochasticRounding(8)),
    Placement(stored=StochasticRounding(4), cotangent=RowSample(0.5)),
    Placement(stored=RowSample(0.5), cotangent=RowSample(0.5)),
    Placement(stored=FeatureSample(0.5), cotangent=ColumnSample(0.5)),
)

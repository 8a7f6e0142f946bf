"""Strategies from text."""

from __future__ import annotations

import pytest

from cheapgrad import sketch
from cheapgrad.cli.strategies import parse_strategies
from cheapgrad.errors import BudgetError, PlacementError, StrategyTextError, UnknownNameError


def parse(text):
    (method,) = parse_strategies([text])
    return method


@pytest.mark.parametrize(
    ("text", "stored", "cotangent"),
    [
        ("RowSample(keep=0.25)@cotangent", None, sketch.RowSample(keep=0.25)),
        ("RowSample(0.25) @ stored", sketch.RowSample(keep=0.25), None),
        ("LowRank(rank=8)@stored", sketch.LowRank(rank=8), None),
        (
            "RowSample(keep=.5, scores=Uniform())@cotangent",
            None,
            sketch.RowSample(keep=0.5, scores=sketch.Uniform()),
        ),
        (
            "RowProjection(0.5, kind=CountSketch())@cotangent",
            None,
            sketch.RowProjection(keep=0.5, kind=sketch.CountSketch()),
        ),
        (
            "StochasticRounding(bits=2, group=32)@stored+ColumnSample(keep=0.5, design=Pivotal())@cotangent",
            sketch.StochasticRounding(bits=2, group=32),
            sketch.ColumnSample(keep=0.5, design=sketch.Pivotal()),
        ),
        ("RowSample(keep=0.5, scores=None)@stored", sketch.RowSample(keep=0.5), None),
    ],
)
def test_text_becomes_strategies(text, stored, cotangent):
    method = parse(text)
    assert (method.stored, method.cotangent) == (stored, cotangent)


def test_budgets_of_one_family_are_counted():
    methods = parse_strategies(
        ["RowSample(0.5)@cotangent", "LowRank(4)@stored", "RowSample(0.25)@cotangent", "RowSample(0.5)@stored"]
    )
    assert [method.budget for method in methods] == [0, 0, 1, 0]
    assert methods[0].family == methods[2].family == "RowSample@cotangent"
    assert methods[0].label == "RowSample(0.5)@cotangent"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("RowSampel(keep=0.5)@stored", UnknownNameError, "'RowSampel' .* did you mean 'RowSample'"),
        ("Nonsense(1)@stored", UnknownNameError, "strategies are .*LowRank.*StochasticRounding"),
        ("AbstractStrategy()@stored", UnknownNameError, "'AbstractStrategy'"),
        ("water_filling(1)@stored", UnknownNameError, "'water_filling'"),
        ("RowSample(keep=0.5)@cotangnet", UnknownNameError, "'cotangnet' .* did you mean 'cotangent'"),
        ("RowSample(kep=0.5)@stored", UnknownNameError, "no parameter 'kep' .* did you mean 'keep'"),
        ("RowSample(**{'keep': 1})@stored", UnknownNameError, r"no parameter '\*\*'"),
        ("RowSample(keep=0.5, design=Pivottal())@stored", UnknownNameError, "did you mean 'Pivotal'"),
        ("RowSample(keep=0.5, design=Pivotal)@stored", StrategyTextError, r"write Pivotal\(\)"),
        ("RowSample()@stored", StrategyTextError, "missing a required argument: 'keep'"),
        ("RowSample(1, 2, 3, 4, 5)@stored", StrategyTextError, "too many positional"),
        ("RowSample(keep=0.5)", StrategyTextError, "does not say where it acts"),
        ("RowSample(keep=0.5)@'stored'", StrategyTextError, "does not say where it acts"),
        ("Systematic()@stored", StrategyTextError, "is no strategy"),
        ("0.5@stored", StrategyTextError, "'0.5' .* is no strategy"),
        ("RowSample(0.5)@stored + RowSample(0.5)@stored", StrategyTextError, "two strategies for stored"),
        ("RowSample(keep='x')@stored", StrategyTextError, "'x'.* is not understood"),
        ("RowSample(keep=open('f'))@stored", UnknownNameError, "'open'"),
        ("__import__('os').system('true')@stored", StrategyTextError, "not understood"),
        ("RowSample(keep=[0.5])@stored", StrategyTextError, "not understood"),
        ("", StrategyTextError, "cannot read the strategy ''"),
        ("RowSample(", StrategyTextError, "cannot read"),
        ("(" * 500, StrategyTextError, "cannot read"),
        ("RowSample(keep=1.5)@stored", BudgetError, "got 1.5"),
        ("RowSample(keep=-0.5)@stored", BudgetError, "got -0.5"),
        ("RowSample(keep=True)@stored", BudgetError, "got True"),
        ("StochasticRounding(bits=3)@stored", BudgetError, "got 3"),
        ("StochasticRounding(bits=4)@cotangent", PlacementError, r"StochasticRounding\(bits=4\)"),
    ],
)
def test_bad_text(text, error, message):
    with pytest.raises(error, match=message):
        parse(text)

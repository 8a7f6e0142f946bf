"""Every bad input gets a named error with its value, the range and what to do, and the model stays as it was."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import cheapgrad
from cheapgrad import Rule, approximate
from cheapgrad.errors import (
    BudgetError,
    CheapgradError,
    ConversionError,
    ModelTypeError,
    NoMatchError,
    PlacementError,
    RuleError,
    UnknownNameError,
)
from cheapgrad.sketch import (
    ColumnNorm,
    ColumnSample,
    CotangentNorm,
    ElementMask,
    ExampleSample,
    FeatureSample,
    JointNorm,
    LowRank,
    Poisson,
    PredictedNorm,
    ProductNorm,
    RowProjection,
    RowSample,
    StochasticRounding,
    from_dict,
)
from tests.convert.models import HALF, Network, convert, picture

WITH_KEEP = (RowSample, ColumnSample, FeatureSample, ExampleSample, ElementMask, RowProjection)


@pytest.mark.parametrize("keep", [0, 0.0, -0.25, 1.5, math.nan, math.inf, True, False, "half", None, 0.5j])
@pytest.mark.parametrize("strategy", WITH_KEEP)
def test_keep_outside_its_range(strategy, keep):
    with pytest.raises(BudgetError, match=rf"keep must be .*in \(0, 1\], but got {re.escape(repr(keep))}.*use e\.g\."):
        strategy(keep)


@pytest.mark.parametrize("bits", [0, 1, 3, 16, -4, True, 4.0, "4", None])
def test_bits_outside_their_set(bits):
    with pytest.raises(BudgetError, match=rf"bits must be 2, 4 or 8, but got {re.escape(repr(bits))}"):
        StochasticRounding(bits)


@pytest.mark.parametrize(("group", "text"), [(4, "at least 8, but got 4"), (12, "multiple of 8, but got 12")])
def test_groups_that_do_not_pack(group, text):
    with pytest.raises(BudgetError, match=text):
        StochasticRounding(4, group=group)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, None])
def test_rank_below_one(rank):
    with pytest.raises(BudgetError, match=rf"rank must be a whole number of at least 1, but got {rank!r}"):
        LowRank(rank)


def test_refresh_below_one_and_rank_without_room():
    with pytest.raises(BudgetError, match="refresh must be a whole number of at least 1, but got 0"):
        LowRank(4, refresh=0)
    with pytest.raises(BudgetError, match=r"rank must be at least 2 with refresh .* but got 1"):
        LowRank(1, refresh=2)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: Rule("*"), RuleError, r"the rule for '\*' has neither stored= nor cotangent=; give at least one"),
        (lambda: Rule(3, cotangent=HALF), RuleError, r"pattern must be a glob .* but got 3"),
        (lambda: Rule(int, cotangent=HALF), RuleError, r"pattern 'int' is a type, but not a torch\.nn\.Module type"),
        (lambda: Rule(cotangent=0.5), RuleError, r"cotangent must be a strategy such as .* but got 0\.5 of type float"),
        (lambda: Rule(stored=RowSample), RuleError, r"stored must be a strategy such as .*RowSample.* of type \w*Meta"),
        (
            lambda: Rule(stored=ColumnSample(0.5)),
            PlacementError,
            r"ColumnSample\(keep=0\.5\) has no meaning in stored=: it samples output features.*; use it in cotangent=",
        ),
        (
            lambda: Rule(cotangent=FeatureSample(0.5)),
            PlacementError,
            r"FeatureSample\(keep=0\.5\) has no meaning in cotangent=: .*; use it in stored=",
        ),
        (
            lambda: Rule(cotangent=StochasticRounding(4)),
            PlacementError,
            r"StochasticRounding\(bits=4\) has no meaning in cotangent=: the cotangent is not stored.* in stored=",
        ),
        (
            lambda: Rule(stored=RowSample(0.5, CotangentNorm())),
            PlacementError,
            r"CotangentNorm\(\) has no meaning in stored=: the cotangent does not exist.*; use StoredNorm",
        ),
        (lambda: Rule(stored=RowSample(0.5, JointNorm())), PlacementError, r"JointNorm\(\) has no meaning in stored="),
        (lambda: RowSample(0.5, ColumnNorm()), PlacementError, r"ColumnNorm\(\) does not score rows"),
        (lambda: ColumnSample(0.5, ProductNorm()), PlacementError, r"ProductNorm\(\) does not score columns"),
        (lambda: RowSample(0.5, scores="norm"), PlacementError, r"scores must be a score .* but got 'norm'"),
        (lambda: RowSample(0.5, design=0.3), PlacementError, r"design must be a sampling design .* but got 0\.3"),
        (lambda: RowProjection(0.5, kind="hadamard"), PlacementError, r"'hadamard'"),
        (lambda: FeatureSample(0.5, rows_per_mask=0), BudgetError, "rows_per_mask must be a whole number .* but got 0"),
        (lambda: FeatureSample(0.5, design=Poisson(), rows_per_mask=2), PlacementError, r"=2 .*Poisson\(\)"),
        (lambda: PredictedNorm(momentum=2.0), BudgetError, r"momentum must be in \(0, 1\], but got 2\.0"),
        (lambda: ElementMask(0.5, by_magnitude="yes"), PlacementError, "by_magnitude must be .* but got 'yes'"),
        (
            lambda: from_dict({"type": "RowSampel", "keep": 0.5}),
            UnknownNameError,
            "'RowSampel'; did you mean 'RowSample'",
        ),
    ],
)
def test_bad_values_have_names(build, error, text):
    with pytest.raises(error, match=text):
        build()


def raise_in_predicate(name, module):
    if name == "head":
        raise LookupError("from the predicate")
    return True


BAD_CALLS = [
    (lambda model: approximate(model), RuleError, "no rule was given; pass e.g."),
    (lambda model: approximate(model, HALF), RuleError, r"must be cheapgrad\.Rule objects, but got RowSample\("),
    (
        lambda model: convert(model, "*", "blocks.0.fc_1"),
        NoMatchError,
        r"the rule for 'blocks\.0\.fc_1' matches no layer; did you mean 'blocks\.0\.fc1'.*\(convertible layers: '",
    ),
    (lambda model: convert(model, nn.Conv2d), NoMatchError, "matches no layer .*convertible layers: 'blocks.0.fc1'"),
    (lambda model: convert(model, lambda name, module: False), NoMatchError, "matches no layer"),
    (
        lambda model: convert(nn.Sequential(model, nn.Bilinear(2, 2, 2)), "*", "1"),
        NoMatchError,
        "the rule for '1' matches only layers that cannot be converted: Bilinear",
    ),
    (
        lambda model: convert(model, "*", strategy=LowRank(11)),
        BudgetError,
        r"rank=11 is larger than the layer's 10 output features; use a rank in \[1, 10\]",
    ),
    (
        lambda model: approximate(model, Rule(stored=LowRank(33)), skip_small=False),
        BudgetError,
        r"rank=33 is larger than the layer's 32 input features; use a rank in \[1, 32\]",
    ),
    (lambda model: convert(model, raise_in_predicate), LookupError, "from the predicate"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS)
def test_the_model_is_left_untouched(call, error, text):
    model = Network()
    before = picture(model)
    with pytest.raises(error, match=text):
        call(model)
    assert picture(model) == before


def test_a_second_conversion_leaves_the_first_as_it_was():
    model = Network()
    convert(model, "head")
    before = picture(model)
    with pytest.raises(ConversionError, match="layer 'head' is converted already"):
        convert(model)
    assert picture(model) == before


@pytest.mark.parametrize("thing", [None, "model", nn.Linear, torch.zeros(2), [nn.Linear(2, 2)], lambda x: x])
def test_something_else_than_a_module(thing):
    with pytest.raises(ModelTypeError, match=r"model must be a torch\.nn\.Module, but got .* of type \w+"):
        approximate(thing, Rule(cotangent=HALF))


def test_a_model_without_convertible_layers():
    with pytest.raises(NoMatchError, match=r"matches no layer \(convertible layers: none in this model\)"):
        approximate(nn.Identity(), Rule(cotangent=HALF))


def test_every_error_is_also_the_built_in_one():
    for error in (BudgetError, PlacementError, RuleError, NoMatchError):
        assert issubclass(error, (CheapgradError, ValueError))
        assert issubclass(error, ValueError)
    assert issubclass(ModelTypeError, TypeError)
    assert issubclass(ConversionError, RuntimeError)
    assert cheapgrad.errors.CheapgradError is CheapgradError

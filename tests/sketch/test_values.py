"""Strategies and their parts are values: immutable, comparable, printable, JSON-able, checked when they are built."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest

import cheapgrad.sketch as sketch
from cheapgrad.errors import BudgetError, CheapgradError, PlacementError, UnknownNameError
from cheapgrad.sketch import (
    ColumnNorm,
    ColumnSample,
    CotangentNorm,
    ElementMask,
    ExampleSample,
    FeatureSample,
    Gaussian,
    JointNorm,
    LayerShape,
    LowRank,
    Moment,
    Pivotal,
    Poisson,
    PredictedNorm,
    ProductNorm,
    RowProjection,
    RowSample,
    StochasticRounding,
    StoredNorm,
    Systematic,
    from_dict,
)
from tests.sketch.cases import COTANGENT, DESIGNS, KINDS, LAZY, PLACED, STORED, parametrized

SCORES = (sketch.Uniform(), StoredNorm(), CotangentNorm(), ProductNorm(), JointNorm(2.0), ColumnNorm(), PredictedNorm())
VALUES = list(dict.fromkeys([strategy for _, strategy in PLACED + LAZY] + [*DESIGNS, *KINDS, *SCORES]))


def test_every_public_value_is_in_the_table():
    public = {
        value
        for name in sketch.__all__
        if isinstance(value := getattr(sketch, name), type)
        and issubclass(value, sketch.AbstractStrategy | sketch.AbstractDesign | sketch.AbstractScore)
        and not name.startswith("Abstract")
    }
    assert public <= {type(value) for value in VALUES}


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_json_round_trip(value):
    text = json.dumps(value.to_dict())
    again = from_dict(json.loads(text))
    assert again == value
    assert type(again) is type(value)
    assert hash(again) == hash(value)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_copies_are_equal(value):
    assert copy.deepcopy(value) == value
    assert pickle.loads(pickle.dumps(value)) == value
    assert dataclasses.replace(value) == value


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_it_prints_builds_it_again(value):
    assert eval(repr(value), vars(sketch)) == value


@pytest.mark.parametrize("value", [*VALUES, Systematic()], ids=repr)
def test_values_are_frozen(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, 0.125)


def test_different_values_differ():
    assert len(set(VALUES)) == len(VALUES)
    assert RowSample(keep=0.5) != ExampleSample(keep=0.5)
    assert RowSample(keep=0.5) != RowSample(keep=0.25)
    assert RowSample(keep=0.5) != RowSample(keep=0.5, design=Pivotal())


def test_printing_leaves_defaults_out():
    assert repr(RowSample(keep=0.25)) == "RowSample(keep=0.25)"
    assert repr(RowSample(0.5, JointNorm(), Pivotal())) == "RowSample(keep=0.5, scores=JointNorm(), design=Pivotal())"
    assert repr(RowProjection(0.5, Gaussian())) == "RowProjection(keep=0.5, kind=Gaussian())"


@pytest.mark.parametrize("data", [{"type": "RowSampel", "keep": 0.5}, {"keep": 0.5}])
def test_an_unknown_type_names_the_nearest(data):
    name = data.get("type", "")
    with pytest.raises(UnknownNameError, match=f"unknown type {name!r}.*known: .*ColumnSample") as caught:
        from_dict(data)
    assert ("did you mean 'RowSample'" in str(caught.value)) == bool(name)


KEEPING = (RowSample, ColumnSample, FeatureSample, ExampleSample, ElementMask, RowProjection)


@pytest.mark.parametrize("keep", [0, 0.0, -0.5, 1.0001, 2, float("nan"), float("inf")])
@pytest.mark.parametrize("strategy", KEEPING)
def test_keep_out_of_range(strategy, keep):
    with pytest.raises(BudgetError, match=rf"keep must be in \(0, 1\], but got {keep!r}; use e.g. keep=0.5") as caught:
        strategy(keep=keep)
    assert isinstance(caught.value, (CheapgradError, ValueError))


@pytest.mark.parametrize(("keep", "name"), [(True, "bool"), ("0.5", "str"), (None, "NoneType"), ([0.5], "list")])
@pytest.mark.parametrize("strategy", KEEPING)
def test_keep_that_is_no_number(strategy, keep, name):
    with pytest.raises(BudgetError, match=r"keep must be a number in \(0, 1\], but got .* of type " + name):
        strategy(keep=keep)


@pytest.mark.parametrize("strategy", KEEPING)
def test_keep_as_an_int_is_a_float(strategy):
    assert strategy(keep=1) == strategy(keep=1.0)
    assert strategy(keep=1).is_exact
    assert isinstance(strategy(keep=1).keep, float)


@pytest.mark.parametrize("strategy", [RowSample, ColumnSample, FeatureSample, ExampleSample])
def test_scores_and_designs_that_are_none(strategy):
    with pytest.raises(PlacementError, match=r"scores must be a score such as CotangentNorm\(\), but got 'norm'"):
        strategy(keep=0.5, scores="norm")
    with pytest.raises(PlacementError, match=r"design must be a sampling design such as Systematic\(\), but got 'wta'"):
        strategy(keep=0.5, design="wta")
    with pytest.raises(PlacementError, match=r"but got <class .*Pivotal'>"):
        strategy(keep=0.5, design=Pivotal)


@pytest.mark.parametrize(
    ("strategy", "score", "message"),
    [
        (RowSample, ColumnNorm(), r"ColumnNorm\(\) does not score rows, which RowSample samples"),
        (ExampleSample, ColumnNorm(), r"ColumnNorm\(\) does not score rows, which ExampleSample samples"),
        (ColumnSample, ProductNorm(), r"ProductNorm\(\) does not score columns, which ColumnSample samples"),
        (ColumnSample, PredictedNorm(), r"PredictedNorm\(\) does not score columns, which ColumnSample samples"),
        (ColumnSample, StoredNorm(), r"StoredNorm\(\) scores input features, but ColumnSample samples output features"),
        (FeatureSample, PredictedNorm(), r"PredictedNorm\(\) does not score columns, which FeatureSample samples"),
    ],
)
def test_scores_of_another_axis(strategy, score, message):
    with pytest.raises(PlacementError, match=message):
        strategy(keep=0.5, scores=score)


@pytest.mark.parametrize("score", [CotangentNorm(), ProductNorm(), JointNorm()], ids=repr)
@pytest.mark.parametrize("strategy", [RowSample, ExampleSample])
def test_scores_that_see_a_cotangent_that_does_not_exist_yet(strategy, score):
    with pytest.raises(PlacementError) as caught:
        strategy(keep=0.5, scores=score).check_placement(STORED)
    text = str(caught.value)
    assert text.startswith(f"{score!r} has no meaning in stored=: the cotangent does not exist at forward time")
    assert "StoredNorm(), PredictedNorm() or Uniform()" in text
    strategy(keep=0.5, scores=score).check_placement(COTANGENT)


@pytest.mark.parametrize(
    ("strategy", "moment", "reason"),
    [
        (ColumnSample(keep=0.5), STORED, "it samples output features, and what is stored of X has none"),
        (FeatureSample(keep=0.5), COTANGENT, "it samples input features, and the cotangent has none"),
        (StochasticRounding(bits=4), COTANGENT, "the cotangent is not stored, so rounding it saves neither"),
    ],
    ids=repr,
)
def test_a_moment_without_meaning(strategy, moment, reason):
    other = COTANGENT if moment is STORED else STORED
    with pytest.raises(PlacementError) as caught:
        strategy.check_placement(moment)
    text = str(caught.value)
    assert f"{strategy!r} has no meaning in {moment.value}=: {reason}" in text
    assert f"use it in {other.value}=" in text


@pytest.mark.parametrize(("moment", "strategy"), parametrized(PLACED + LAZY))
def test_every_row_of_the_table_may_be_placed_there(moment, strategy):
    strategy.check_placement(moment)
    strategy.check_layer(11, 5, moment)
    law = strategy.law
    assert law.bias == 0.0
    assert moment in law.moments
    assert law.estimates
    assert law.formula
    assert law.fails_when


def test_masks_per_group_of_rows():
    with pytest.raises(BudgetError, match="rows_per_mask must be a whole number of at least 1, but got 0"):
        FeatureSample(keep=0.5, rows_per_mask=0)
    with pytest.raises(PlacementError, match=r"rows_per_mask=3 needs a design of fixed size, but got Poisson\(\)"):
        FeatureSample(keep=0.5, rows_per_mask=3, design=Poisson())


def test_other_arguments_out_of_range():
    with pytest.raises(PlacementError, match="permute must be True or False, but got 1"):
        Systematic(permute=1)
    with pytest.raises(PlacementError, match="by_magnitude must be True or False, but got 1"):
        ElementMask(keep=0.5, by_magnitude=1)
    with pytest.raises(BudgetError, match=r"momentum must be in \(0, 1\], but got 1.5"):
        PredictedNorm(momentum=1.5)
    for balance in (0, -1.0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(BudgetError, match=f"balance must be a finite number above 0, but got {balance!r}"):
            JointNorm(balance=balance)


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_kept_count_is_the_nearest_whole_number_of_at_least_one(keep, size):
    count = RowSample(keep=keep).kept_count(size)
    assert 1 <= count <= size
    assert abs(count - keep * size) <= 0.5 or (count == 1 and keep * size < 0.5)
    assert RowProjection(keep=keep).kept_count(size) == count


def test_costs_fall_with_the_budget():
    shape = LayerShape(rows=128, inputs=64, outputs=32)
    keeps = (0.1, 0.25, 0.5, 0.75, 1.0)
    for moment, build in (
        (COTANGENT, lambda keep: RowSample(keep=keep)),
        (COTANGENT, lambda keep: ColumnSample(keep=keep)),
        (STORED, lambda keep: FeatureSample(keep=keep)),
    ):
        flops = [build(keep).law.flops(shape, moment) for keep in keeps]
        assert flops == sorted(flops)
        assert flops[-1] == 4 * 128 * 64 * 32
    ranks = [LowRank(rank=rank).law.saved_bytes(shape, Moment.STORED) for rank in (1, 4, 16)]
    assert ranks == sorted(ranks)

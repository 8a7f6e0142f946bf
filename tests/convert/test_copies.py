"""Copies, pickles and state_dicts of converted models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from cheapgrad import Rule, approximate, get_handle
from cheapgrad.errors import ConversionError, ModelTypeError
from cheapgrad.sketch import LowRank, PredictedNorm, RowSample
from tests.convert.models import HALF, Network, convert, gradients, same
from tests.copies import COPIES
from tests.placements import PLACEMENTS


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.name)
def test_a_copy_draws_what_the_original_draws(placement, duplicate):
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(3, 5, 32)
    stock = copy.deepcopy(model)
    approximate(model, placement.rule(), skip_small=False)
    for seed in range(4):
        gradients(model, x, seed)
    twin = duplicate(model)
    assert type(twin[0]) is type(model[0])
    assert twin[0].weight is not model[0].weight
    # Running estimates travel along, and then part ways.
    assert same(gradients(twin, x), gradients(model, x))
    handle = get_handle(twin)
    with handle.exact():
        assert same(gradients(twin, x), gradients(stock, x))
        assert not same(gradients(model, x), gradients(stock, x)), "the copy has a switch of its own"
    handle.revert()
    assert type(twin[0]) is nn.Linear
    assert type(model[0]) is not nn.Linear


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_sharing_survives_a_copy(duplicate):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1] = model[0]
    model[2].weight = model[0].weight
    convert(model)
    twin = duplicate(model)
    assert twin[0] is twin[1]
    assert twin[0].weight is twin[2].weight
    assert len({id(module._cheapgrad.switch) for module in twin}) == 1


def test_a_handle_copies_with_its_model():
    handle = convert(Network())
    for twin in (copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        assert twin.model is not handle.model
        twin.revert()
        assert type(twin.model.head) is nn.Linear
        assert type(handle.model.head) is not nn.Linear


def test_patterns_need_not_be_picklable():
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model, lambda name, module: True)
    pickle.dumps(model)


def test_a_compiled_layer_pickles_as_stock_does():
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model)
    model[0].compile(backend="eager")
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin[0]) is type(model[0])


def test_state_dicts_fit_plain_models_both_ways():
    plain, model = Network(), Network()
    approximate(model, Rule(stored=RowSample(0.5, PredictedNorm()), cotangent=LowRank(4, refresh=2)), skip_small=False)
    for _ in range(3):
        gradients(model, torch.randn(8, 32))
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(8, 32)
    assert torch.equal(plain(x), model(x))
    fresh = Network()
    model.load_state_dict(fresh.state_dict(), strict=True)
    assert torch.equal(fresh(x), model(x))
    assert not list(model.buffers())


def test_running_estimates_stay_beside_the_parameters():
    model = nn.Sequential(nn.Linear(32, 32))
    approximate(
        model, Rule(stored=RowSample(0.5, PredictedNorm()), cotangent=LowRank(8, refresh=100)), skip_small=False
    )
    gradients(model, torch.randn(3, 5, 32))
    plan = model[0]._cheapgrad.plan
    means, basis = plan.stored_memory._mean_T, plan.cotangent_memory._basis_DR
    assert means.shape == (5,)
    assert basis.shape == (32, 4)
    twin = copy.deepcopy(model)[0]._cheapgrad.plan
    assert torch.equal(twin.stored_memory._mean_T, means)
    assert torch.equal(twin.cotangent_memory._basis_DR, basis)
    assert twin.cotangent_memory._basis_DR is not basis
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_moving_and_casting_a_converted_model_works():
    model = nn.Sequential(nn.Linear(32, 32))
    approximate(
        model, Rule(cotangent=LowRank(8, refresh=100), stored=RowSample(0.5, PredictedNorm())), skip_small=False
    )
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert all(gradient.dtype == dtype for gradient in gradients(model, torch.randn(3, 5, 32, dtype=dtype)))


def test_get_handle_refuses_what_has_no_one_handle():
    with pytest.raises(ModelTypeError, match=r"must be a torch\.nn\.Module, but got 'network' of type str"):
        get_handle("network")
    with pytest.raises(ConversionError, match="no converted layer"):
        get_handle(Network())
    model = Network()
    convert(model, "blocks.0.*")
    convert(model, "head")
    with pytest.raises(ConversionError, match="layers of 2 conversions"):
        get_handle(model)


def test_get_handle_lists_the_layers():
    model = Network()
    approximate(model, Rule("*.fc1", cotangent=HALF), skip_small=False)
    assert [(row.name, row.kind, row.status, row.cotangent) for row in get_handle(model).rows] == [
        ("blocks.0.fc1", "Linear", "converted", "RowSample(keep=0.5)"),
        ("blocks.1.fc1", "Linear", "converted", "RowSample(keep=0.5)"),
    ]

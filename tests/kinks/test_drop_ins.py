"""Rectifiers and max-pooling with a chosen derivative, against torch and against definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cheapgrad import kinks
from cheapgrad.errors import ConventionError
from cheapgrad.kinks import Ties

POOLS = {
    "1d": (kinks.max_pool1d, functional.max_pool1d, (2, 3, 11)),
    "2d": (kinks.max_pool2d, functional.max_pool2d, (2, 3, 7, 6)),
    "3d": (kinks.max_pool3d, functional.max_pool3d, (2, 5, 4, 6)),
}
ADAPTIVE = {
    "1d": (kinks.adaptive_max_pool1d, functional.adaptive_max_pool1d, (2, 3, 11), 4),
    "2d": (kinks.adaptive_max_pool2d, functional.adaptive_max_pool2d, (2, 3, 7, 6), (3, 4)),
    "3d": (kinks.adaptive_max_pool3d, functional.adaptive_max_pool3d, (2, 3, 5, 4, 6), (2, 3, 4)),
}
GEOMETRIES = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "stride": 1, "dilation": 2},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
]


def gradient(function, x, cotangent=None):
    x = x.clone().requires_grad_()
    y = function(x)
    return torch.autograd.grad(y, x, torch.ones_like(y) if cotangent is None else cotangent)[0]


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, -2.0])
def test_relu_multiplies_the_cotangent_by_the_chosen_slope(slope):
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0])
    found = gradient(lambda x: kinks.relu(x, at_zero=slope), x, torch.tensor([3.0, 3.0, 5.0, 7.0]))
    assert found.tolist() == [0.0, 3 * slope, 5 * slope, 7.0]


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_relu_has_the_values_of_torch(slope):
    x = torch.cat([torch.randn(50), torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])])
    assert torch.equal(kinks.relu(x, slope).nan_to_num(-1), torch.relu(x).nan_to_num(-1))
    assert torch.equal(gradient(lambda x: kinks.relu(x, slope), x[:50]), gradient(torch.relu, x[:50]))


def test_relu_composes_with_forward_mode_and_vmap():
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda x: kinks.relu(x, 0.25), (x,), (torch.full_like(x, 4.0),))
    assert tangent.tolist() == [0.0, 1.0, 4.0]
    assert torch.func.vmap(torch.func.grad(lambda x: kinks.relu(x, 0.25)))(x).tolist() == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("slope", [float("nan"), float("inf"), "half", True, None])
def test_slope_that_is_no_finite_number_is_refused(slope):
    with pytest.raises(ConventionError, match=repr(slope)):
        kinks.relu(torch.zeros(1), at_zero=slope)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("axes", POOLS)
def test_pooling_without_ties_is_that_of_torch(axes, geometry):
    ours, theirs, shape = POOLS[axes]
    x = torch.randn(shape, dtype=torch.float64)
    expected, positions = theirs(x, **geometry, return_indices=True)
    cotangent = torch.randn_like(expected)
    for ties in Ties:
        pooled, found = ours(x, **geometry, return_indices=True, ties=ties)
        assert torch.equal(pooled, expected)
        assert torch.equal(found, positions)
        torch.testing.assert_close(
            gradient(lambda x, ties=ties: ours(x, **geometry, ties=ties), x, cotangent),
            gradient(lambda x: theirs(x, **geometry), x, cotangent),
        )


@pytest.mark.parametrize("axes", ADAPTIVE)
def test_adaptive_pooling_without_ties_is_that_of_torch(axes):
    ours, theirs, shape, output_size = ADAPTIVE[axes]
    x = torch.randn(shape, dtype=torch.float64)
    expected, positions = theirs(x, output_size, return_indices=True)
    cotangent = torch.randn_like(expected)
    for ties in Ties:
        pooled, found = ours(x, output_size, return_indices=True, ties=ties)
        assert torch.equal(pooled, expected)
        assert torch.equal(found, positions)
        torch.testing.assert_close(
            gradient(lambda x, ties=ties: ours(x, output_size, ties=ties), x, cotangent),
            gradient(lambda x: theirs(x, output_size), x, cotangent),
        )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("axes", POOLS)
def test_first_is_what_torch_does_at_ties(axes, geometry):
    ours, theirs, shape = POOLS[axes]
    x = torch.randint(0, 2, shape).double()
    assert torch.equal(ours(x, **geometry, return_indices=True)[1], theirs(x, **geometry, return_indices=True)[1])
    assert torch.equal(gradient(lambda x: ours(x, **geometry), x), gradient(lambda x: theirs(x, **geometry), x))


def test_each_rule_at_a_tie_of_three():
    x = torch.tensor([[[[1.0, 5.0, 5.0], [0.0, 2.0, 5.0]]]])
    expected = {
        Ties.FIRST: [[0, 6, 0], [0, 0, 0]],
        Ties.LAST: [[0, 0, 0], [0, 0, 6]],
        Ties.EVEN: [[0, 2, 2], [0, 0, 2]],
    }
    for ties, entries in expected.items():
        found = gradient(lambda x, ties=ties: kinks.max_pool2d(x, (2, 3), ties=ties), x, torch.full((1, 1, 1, 1), 6.0))
        assert found[0, 0].tolist() == entries


def test_even_adaptive_windows_of_unequal_size_share_among_their_own_entries():
    x = torch.zeros(1, 5)
    # The windows of 5 entries for 2 outputs are [0, 3) and [2, 5).
    assert gradient(lambda x: kinks.adaptive_max_pool1d(x, 2, ties=Ties.EVEN), x)[0].tolist() == pytest.approx(
        [1 / 3, 1 / 3, 2 / 3, 1 / 3, 1 / 3]
    )


def test_pooling_has_the_forward_mode_of_the_same_rule():
    x = torch.tensor([[1.0, 1.0, 0.0]])
    for ties, slope in ((Ties.FIRST, 1.0), (Ties.LAST, 2.0), (Ties.EVEN, 1.5)):
        _, tangent = torch.func.jvp(
            lambda x, ties=ties: kinks.max_pool1d(x, 3, ties=ties), (x,), (torch.tensor([[1.0, 2.0, 4.0]]),)
        )
        assert tangent.item() == slope


def test_rule_that_is_none_is_refused():
    with pytest.raises(ConventionError, match=r"Ties\.FIRST.*'even'"):
        kinks.max_pool2d(torch.zeros(1, 2, 2), 2, ties="even")


def test_geometry_is_refused_by_torch_itself():
    with pytest.raises(RuntimeError, match="pad"):
        kinks.max_pool2d(torch.zeros(1, 1, 4, 4), 2, padding=3)

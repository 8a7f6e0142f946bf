"""Second derivatives and forward mode are refused by name, and work inside `exact`."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, jvp
from torch.utils.checkpoint import checkpoint

from cheapgrad import get_handle
from cheapgrad.errors import ForwardModeError, SecondDerivativeError
from cheapgrad.sketch import ExampleSample, LowRank, RowSample, StochasticRounding
from tests.contexts.layers import CONVOLUTION_2D, LINEAR, SEQUENCE, TRANSPOSED_LINEAR
from tests.contexts.runners import converted_model
from tests.contexts.table import REFUSALS, Row
from tests.placements import Placement

PLACEMENTS = (
    Placement(cotangent=RowSample(0.5)),
    Placement(stored=StochasticRounding(4)),
    Placement(stored=RowSample(0.5), cotangent=LowRank(8)),
    Placement(cotangent=ExampleSample(0.5)),
)
ROWS = [Row(layer, placement) for layer in (LINEAR, CONVOLUTION_2D) for placement in PLACEMENTS]
ROWS += [Row(SEQUENCE, PLACEMENTS[0]), Row(TRANSPOSED_LINEAR, PLACEMENTS[0])]

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def loss_of(output):
    return output.pow(3).sum()


def random_input(row):
    return torch.randn_like(row.layer.identity_input())


def in_eager(model, x):
    x = x.requires_grad_()
    (first,) = torch.autograd.grad(loss_of(model(x)), model[0].weight, create_graph=True)
    return torch.autograd.grad(first.square().sum(), model[0].weight)[0]


def of_the_input(model, x):
    x = x.requires_grad_()
    (first,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


class Checkpointed(torch.nn.Sequential):
    """Runs its layer through a checkpoint."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def in_checkpoint(model, x):
    return in_eager(Checkpointed(model[0]), x)


def of_functions(model, x):
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def squared_gradient(weight):
        def loss(weight):
            return loss_of(functional_call(model, {**parameters, "0.weight": weight}, (x,)))

        return grad(loss)(weight).square().sum()

    return grad(squared_gradient)(parameters["0.weight"])


SECOND_DERIVATIVES = {"eager": in_eager, "input": of_the_input, "checkpoint": in_checkpoint, "func": of_functions}


@every_row
@pytest.mark.parametrize("derivative", SECOND_DERIVATIVES.values(), ids=SECOND_DERIVATIVES)
def test_second_derivatives_are_refused_and_exact_ones_are_right(row, derivative):
    model, x = converted_model(row, "cpu").double(), random_input(row).double()
    with pytest.raises(SecondDerivativeError, match=r"second derivative .* `with handle\.exact\(\):`"):
        derivative(model, x.clone())
    handle = get_handle(model)
    with handle.exact():
        found = derivative(model, x.clone())
    handle.revert()
    torch.testing.assert_close(found, derivative(model, x.clone()), rtol=0, atol=0)


def test_first_derivatives_with_a_graph_are_those_without():
    row = ROWS[0]
    model, x = converted_model(row, "cpu"), random_input(row).requires_grad_()
    drawn = []
    for create_graph in (False, True):
        torch.manual_seed(3)
        drawn.append(torch.autograd.grad(loss_of(model(x)), [x, model[0].weight], create_graph=create_graph))
    assert all(torch.equal(one, two) for one, two in zip(*drawn, strict=True))


def with_dual_numbers(model, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent.clone()


def with_func_jvp(model, x, tangent):
    return jvp(model, (x,), (tangent,))[1]


def over_reverse(model, x, tangent):
    return jvp(lambda x: grad(lambda x: loss_of(model(x)))(x), (x,), (tangent,))[1]


@every_row
@pytest.mark.parametrize("push", [with_dual_numbers, with_func_jvp], ids=["dual numbers", "func.jvp"])
def test_forward_mode_is_refused_and_exact_is_right(row, push):
    model, x, tangent = converted_model(row, "cpu"), random_input(row), random_input(row)
    with pytest.raises(ForwardModeError, match=r"forward-mode .* `with handle\.exact\(\):`"):
        push(model, x, tangent)
    handle = get_handle(model)
    with handle.exact():
        found = push(model, x, tangent)
    bias = model[0].bias
    with torch.no_grad():
        expected = model(tangent) - (model(torch.zeros_like(tangent)) if bias is not None else 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_row
def test_forward_over_reverse_is_refused_and_exact_is_right(row):
    model, x, tangent = converted_model(row, "cpu").double(), random_input(row).double(), random_input(row).double()
    with pytest.raises((ForwardModeError, SecondDerivativeError), match=r"`with handle\.exact\(\):`"):
        over_reverse(model, x, tangent)
    handle = get_handle(model)
    with handle.exact():
        found = over_reverse(model, x, tangent)
    handle.revert()
    torch.testing.assert_close(found, over_reverse(model, x, tangent), rtol=0, atol=0)


def test_every_refusal_of_these_kinds_is_in_the_table():
    assert {refusal.error for refusal in REFUSALS} >= {"SecondDerivativeError", "ForwardModeError"}

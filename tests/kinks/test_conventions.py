"""Conventions as a context: which calls follow, and that nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from cheapgrad import kinks
from cheapgrad.errors import ConventionError
from cheapgrad.kinks import Conventions, Ties, apply_conventions

RELUS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "functional": functional.relu,
    "functional in place": lambda x: functional.relu(x, inplace=True),
    "functional_": functional.relu_,
    "torch": torch.relu,
    "torch_": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
}
POOLS = {
    "module 1d": (nn.MaxPool1d(2), (1, 1, 2)),
    "module 2d": (nn.MaxPool2d((1, 2)), (1, 1, 1, 2)),
    "module 3d": (nn.MaxPool3d((1, 1, 2)), (1, 1, 1, 1, 2)),
    "indices 1d": (lambda x: nn.MaxPool1d(2, return_indices=True)(x)[0], (1, 1, 2)),
    "indices 2d": (lambda x: functional.max_pool2d(x, (1, 2), return_indices=True)[0], (1, 1, 1, 2)),
    "torch": (lambda x: torch.max_pool2d(x, (1, 2)), (1, 1, 1, 2)),
    "torch indices": (lambda x: torch.max_pool1d_with_indices(x, 2)[0], (1, 1, 2)),
    "adaptive 1d": (nn.AdaptiveMaxPool1d(1), (1, 1, 2)),
    "adaptive 2d": (nn.AdaptiveMaxPool2d(1), (1, 1, 1, 2)),
    "adaptive 3d": (nn.AdaptiveMaxPool3d(1), (1, 1, 1, 1, 2)),
    "adaptive indices": (lambda x: functional.adaptive_max_pool2d(x, 1, return_indices=True)[0], (1, 1, 1, 2)),
}


@pytest.mark.parametrize("name", RELUS)
def test_every_form_of_relu_follows(name):
    x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    with apply_conventions(Conventions(relu=0.25)) as calls:
        y = RELUS[name](x * 1)
    (3 * y).sum().backward()
    assert y.tolist() == [0.0, 0.0, 2.0]
    assert x.grad.tolist() == [0.0, 0.75, 3.0]
    assert calls == {"relu": 1}


@pytest.mark.parametrize("name", POOLS)
def test_every_form_of_pooling_follows(name):
    pool, shape = POOLS[name]
    for ties, expected in ((Ties.FIRST, [1.0, 0.0]), (Ties.LAST, [0.0, 1.0]), (Ties.EVEN, [0.5, 0.5])):
        x = torch.ones(shape, requires_grad=True)
        with apply_conventions(Conventions(max_pool=ties)) as calls:
            pool(x).sum().backward()
        assert x.grad.flatten().tolist() == expected
        assert sum(calls.values()) == 1


def test_model_follows_and_its_values_do_not_change():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    images = torch.randn(3, 1, 8, 8)
    images[0] = 0.0
    nn.init.zeros_(model[0].bias)

    def gradients():
        output = model(images)
        return output, torch.autograd.grad(output.sum(), list(model.parameters()))

    stock, stock_gradients = gradients()
    with apply_conventions(Conventions()) as calls:
        same, same_gradients = gradients()
    with apply_conventions(Conventions(relu=1.0)):
        other, other_gradients = gradients()
    assert calls == {"relu": 1, "max_pool2d": 1}
    assert torch.equal(stock, same)
    assert torch.equal(stock, other)
    for one, two in zip(stock_gradients, same_gradients, strict=True):
        torch.testing.assert_close(one, two)
    # The black picture stands on the kink of every ReLU, and only through the bias of the convolution.
    assert not torch.allclose(stock_gradients[1], other_gradients[1])
    assert all(torch.equal(stock_gradients[i], other_gradients[i]) for i in (2, 3))


def test_backward_may_run_outside():
    x = torch.zeros(1, requires_grad=True)
    with apply_conventions(Conventions(relu=1.0)):
        y = torch.relu(x)
    y.backward()
    assert x.grad.item() == 1.0


def test_inner_context_wins_and_the_outer_one_comes_back():
    x = torch.zeros(3, requires_grad=True)
    with apply_conventions(Conventions(relu=1.0)):
        outer = torch.relu(x[0])
        with apply_conventions(Conventions(relu=0.5)):
            inner = torch.relu(x[1])
        again = torch.relu(x[2])
    (outer + inner + again).backward()
    assert x.grad.tolist() == [1.0, 0.5, 1.0]


def test_nothing_stays_behind_after_an_exception():
    before = len(_get_current_function_mode_stack())
    with pytest.raises(RuntimeError, match="cannot be multiplied"), apply_conventions(Conventions(relu=1.0)):
        torch.relu(torch.ones(2, 3) @ torch.ones(2, 3))
    assert len(_get_current_function_mode_stack()) == before
    x = torch.zeros(1, requires_grad=True)
    torch.relu(x).backward()
    assert x.grad.item() == 0.0


def test_compiled_model_follows_and_comes_back():
    compiled = torch.compile(nn.ReLU(), backend="aot_eager")
    x = torch.zeros(1, requires_grad=True)
    slopes = []
    for slope in (0.0, 1.0, 0.5, 0.0):
        with apply_conventions(Conventions(relu=slope)):
            slopes.append(torch.autograd.grad(compiled(x), x)[0].item())
    slopes.append(torch.autograd.grad(compiled(x), x)[0].item())
    assert slopes == [0.0, 1.0, 0.5, 0.0, 0.0]


def test_context_that_touched_nothing_says_so():
    with apply_conventions(Conventions(relu=1.0)) as calls:
        torch.clamp(torch.zeros(3), min=0)
    assert calls == {}


def test_leaf_in_place_is_refused_as_torch_refuses_it():
    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(RuntimeError, match="in-place"), apply_conventions(Conventions(relu=1.0)):
        x.relu_()


@pytest.mark.parametrize(("arguments", "match"), [({"relu": "one"}, "'one'"), ({"max_pool": "first"}, "'first'")])
def test_bad_conventions_are_refused(arguments, match):
    with pytest.raises(ConventionError, match=match):
        Conventions(**arguments)


@pytest.mark.parametrize(
    ("conventions", "match"),
    [
        (3, "but got 3; write e.g. kinks.Conventions"),
        ({"relu": 1.0}, r"but got \{'relu': 1.0\}"),
        (Conventions, "but got the class Conventions itself"),
    ],
)
def test_what_is_no_convention_is_refused_before_anything_runs(conventions, match):
    with pytest.raises(ConventionError, match=match), apply_conventions(conventions):
        raise AssertionError("ran")
    assert _get_current_function_mode_stack() == []


def test_drop_ins_keep_their_own_convention_inside_the_context():
    x = torch.zeros(1, requires_grad=True)
    with apply_conventions(Conventions(relu=1.0)):
        kinks.relu(x, at_zero=0.25).backward()
    assert x.grad.item() == 0.25

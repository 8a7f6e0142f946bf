"""Sketched activations in the contexts of the table: compiled, checkpointed, mapped, under autocast, refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from cheapgrad.cost import measure_held_bytes
from cheapgrad.errors import ForwardModeError, SecondDerivativeError
from cheapgrad.ops.activation import Activation
from cheapgrad.ops.activations import sketched_activation
from cheapgrad.sketch import StochasticRounding

FOUR_BITS = StochasticRounding(4)
ACTIVATIONS = [Activation("gelu"), Activation("sigmoid"), Activation("leaky_relu")]


def named(activation):
    return activation.name


class Sketched(nn.Module):
    """The activation as a module."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation

    def forward(self, x):
        return sketched_activation(x, self.activation, FOUR_BITS)


def fixed_input(rows=48, features=64):
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(0)) * 2


def slopes(run, x):
    """Return the gradient of the sum: the slope that backward used."""
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    y.sum().backward()
    return y.detach(), leaf.grad


def check(activation, run, x):
    """Slopes lie on the grid, within a step of the true ones, and their mean over draws is the truth."""
    exact = activation.derivative(x.double(), activation.forward(x.double()))
    torch.manual_seed(0)
    y, drawn = slopes(run, x)
    torch.testing.assert_close(y, activation.forward(x), rtol=1e-5, atol=1e-6)
    if activation.slope_kind != "smooth":
        assert torch.equal(drawn, exact.to(drawn.dtype))
        return
    grid = activation.codec(4).grid
    position = (drawn.double() - grid.low) / grid.step
    torch.testing.assert_close(position, position.round(), rtol=0, atol=1e-4)
    assert ((drawn - exact).abs() <= grid.step * (1 + 1e-4)).all()
    draws = torch.stack([slopes(run, x)[1] for _ in range(40)]).double()
    assert (draws[0] != draws[1]).any(), "every step has to draw anew"
    directions = torch.randn(20, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    projected = torch.einsum("mni,dni->md", draws - exact, directions)
    assert (projected.mean(0).abs() <= 5 * projected.std(0) / 40**0.5).all()


@pytest.mark.parametrize(
    ("context", "activation"),
    [
        # One stands for all where a compilation takes seconds.
        ("inductor", ACTIVATIONS[0]),
        *((context, each) for context in ("eager", "aot_eager", "checkpoint", "reentrant") for each in ACTIVATIONS),
    ],
)
def test_slopes_in_context(activation, context):
    model = Sketched(activation)
    if context in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        run = torch.compile(model, backend=context, fullgraph=True)
    elif context == "eager":
        run = model
    else:

        def run(x):
            return checkpoint(model, x, use_reentrant=context == "reentrant")

    check(activation, run, fixed_input())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=named)
def test_copies_of_a_mapped_function_draw_apart_and_stay_unbiased(activation):
    x = fixed_input(1, 64)[0]
    exact = activation.derivative(x.double(), activation.forward(x.double()))
    per_copy = vmap(
        grad(lambda row: sketched_activation(row, activation, FOUR_BITS).sum()), randomness="different", in_dims=0
    )
    drawn = per_copy(x.expand(500, 64)).double()
    error = drawn - exact
    if activation.slope_kind != "smooth":
        assert error.abs().max() < 1e-6
        return
    assert (drawn[0] != drawn[1]).any()
    projected = error @ torch.randn(64, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (projected.mean(0).abs() <= 5 * projected.std(0) / 500**0.5).all()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=named)
def test_under_autocast(activation):
    x = fixed_input().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.clone().requires_grad_()
        y = sketched_activation(leaf, activation, FOUR_BITS)
    assert y.dtype == activation.forward(x).dtype
    (gradient,) = torch.autograd.grad(y.float().sum(), leaf)
    assert gradient.dtype == torch.bfloat16
    exact = activation.derivative(x.float(), activation.forward(x.float()))
    step = 0.0 if activation.slope_kind != "smooth" else activation.codec(4).grid.step
    assert ((gradient.float() - exact).abs() <= step + 0.01).all()


@pytest.mark.parametrize(
    ("backend", "activation"), [("aot_eager", Activation("leaky_relu")), ("inductor", Activation("gelu"))]
)
def test_compiled_graphs_hold_codes_and_nothing_else(backend, activation):
    """A network compiled whole: what a layer before holds is its own, the activation adds its codes."""
    torch._dynamo.reset()
    run = torch.compile(Sketched(activation), backend=backend, fullgraph=True)
    x = fixed_input().requires_grad_()
    held = measure_held_bytes(lambda: run(x), exclude=[x]).total_bytes
    assert held <= 48 * (64 * 4 // 8 + 2)


def test_a_second_derivative_is_refused():
    x = fixed_input().requires_grad_()
    (first,) = torch.autograd.grad(sketched_activation(x, Activation("gelu"), FOUR_BITS).sum(), x, create_graph=True)
    with pytest.raises(SecondDerivativeError, match=r"through a sketched activation \(gelu\)"):
        first.sum().backward()


def test_forward_mode_is_refused():
    x = fixed_input().requires_grad_()
    with forward_ad.dual_level(), pytest.raises(ForwardModeError, match="asked of a sketched activation"):
        sketched_activation(forward_ad.make_dual(x, torch.ones_like(x)), Activation("gelu"), FOUR_BITS)

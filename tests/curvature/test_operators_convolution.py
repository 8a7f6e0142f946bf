"""The convolution that curvature products use, against PyTorch's, to the second derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from cheapgrad.curvature.operators.convolution import NativeConvolutions, _Convolution

# Dimensions, arguments, whether the weight is that of a transposed convolution, kernel size, bias.
CASES: dict[str, tuple[int, dict[str, Any], bool, int, bool]] = {
    "1-d": (1, {}, False, 2, True),
    "strided, padded, dilated": (2, {"stride": (2, 1), "padding": 1, "dilation": 2}, False, 2, True),
    "groups": (2, {"groups": 2, "padding": (1, 0)}, False, 2, False),
    "depthwise": (2, {"groups": 4, "stride": 2}, False, 2, True),
    "3-d": (3, {"stride": 2, "padding": 1}, False, 2, True),
    "valid": (2, {"padding": "valid"}, False, 2, True),
    "same": (2, {"padding": "same", "dilation": 2}, False, 3, True),
    "same, of even size": (2, {"padding": "same"}, False, 2, True),
    "transposed": (2, {"stride": 2, "output_padding": 1, "dilation": 2}, True, 2, True),
    "transposed, groups": (1, {"stride": 2, "padding": 1, "groups": 2}, True, 3, False),
    "transposed, 3-d": (3, {}, True, 2, True),
}


def _make(name: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return a convolution by name, and its tensors: input, weight and perhaps bias."""
    dimensions, arguments, is_transposed, size, has_bias = CASES[name]
    groups = arguments.get("groups", 1)
    x = torch.randn(2, 4, *[6] * dimensions, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4 // groups, *[size] * dimensions, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True) if has_bias else None
    kind = "conv_transpose" if is_transposed else "conv"
    function = getattr(torch_functional, f"{kind}{dimensions}d")
    leaves = [tensor for tensor in (x, weight, bias) if tensor is not None]
    return lambda: function(x, weight, bias, **arguments), leaves


@pytest.mark.parametrize("name", CASES)
def test_two_derivatives_equal_those_of_the_stock_convolution(name: str) -> None:
    convolve, leaves = _make(name)
    directions = [torch.randn_like(leaf) for leaf in leaves]

    def differentiate() -> list[Tensor]:
        output = convolve()
        grads = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        return [output, *grads, *torch.autograd.grad(grads, leaves, directions)]

    expected = differentiate()
    with NativeConvolutions():
        found = differentiate()
        kind = type(convolve().grad_fn).__name__
    assert (kind == f"{_Convolution.__name__}Backward") == (name != "same, of even size")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_backward_from_zeros_is_linear_in_them(name: str) -> None:
    """The transposed map: what a direction of inputs, weights and bias does to the output."""
    convolve, leaves = _make(name)
    directions = [torch.randn_like(leaf) for leaf in leaves]
    output = convolve()
    cotangent = torch.randn_like(output)
    expected = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
    with NativeConvolutions() as native:
        output = convolve()
        zeros = torch.zeros_like(output, requires_grad=True)
        with native.from_zeros():
            pulled = torch.autograd.grad(output, leaves, zeros, create_graph=True)
        (tangent,) = torch.autograd.grad(pulled, zeros, directions)
        found = torch.autograd.grad(output, leaves, cotangent)
    assert all(part.abs().max() == 0 for part in pulled)
    # ⟨cotangent, J direction⟩ = ⟨Jᵀ cotangent, direction⟩, and outside of the block gradients are what they were.
    products = [float((a * b).sum()) for a, b in zip(expected, directions, strict=True)]
    assert float((tangent * cotangent).sum()) == pytest.approx(sum(products), rel=1e-11)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_what_is_not_wanted_is_not_computed() -> None:
    """An input that needs no gradient, a frozen weight, an unbatched picture."""
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 2, 2, requires_grad=True)
    with NativeConvolutions():
        (grad,) = torch.autograd.grad(torch.conv2d(x, weight).square().sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(grad, weight, weight.detach())
        frozen = torch.conv2d(x.requires_grad_(), weight.detach())
        assert torch.autograd.grad(frozen.sum(), x)[0].shape == x.shape
        assert torch.conv2d(x[0], weight).shape == (2, 3, 3)
    # The sum of squares is quadratic in the weight: its Hessian at the weight itself is its gradient.
    torch.testing.assert_close(second, grad.detach())

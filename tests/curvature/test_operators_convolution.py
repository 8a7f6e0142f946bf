"""The convolution that Hessian products use, against PyTorch's, to the second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as torch_functional

from cheapgrad.curvature.operators.convolution import NativeConvolutions, _Convolution

CASES: dict[str, tuple[int, dict[str, Any], int, bool]] = {
    "1-d": (1, {}, 1, True),
    "strided, padded, dilated": (2, {"stride": (2, 1), "padding": 1, "dilation": 2}, 1, True),
    "groups": (2, {"groups": 2, "padding": (1, 0)}, 2, False),
    "depthwise": (2, {"groups": 4, "stride": 2}, 4, True),
    "3-d": (3, {"stride": 2, "padding": 1}, 1, True),
    "same": (2, {"padding": "same"}, 1, True),
}


@pytest.mark.parametrize("name", CASES)
def test_two_derivatives_equal_those_of_the_stock_convolution(name: str) -> None:
    dimensions, arguments, groups, has_bias = CASES[name]
    x = torch.randn(2, 4, *[6] * dimensions, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4 // groups, *[2] * dimensions, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True) if has_bias else None
    leaves = [tensor for tensor in (x, weight, bias) if tensor is not None]
    directions = [torch.randn_like(leaf) for leaf in leaves]
    function = (torch_functional.conv1d, torch_functional.conv2d, torch_functional.conv3d)[dimensions - 1]

    def differentiate() -> list[torch.Tensor]:
        output = function(x, weight, bias, **arguments)
        grads = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        return [output, *grads, *torch.autograd.grad(grads, leaves, directions)]

    expected = differentiate()
    with NativeConvolutions():
        found = differentiate()
        kind = type(function(x, weight, bias, **arguments).grad_fn).__name__
    assert (kind == f"{_Convolution.__name__}Backward") == (name != "same")
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

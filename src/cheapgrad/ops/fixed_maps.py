"""Fixed linear maps of images, average pooling and padding: their backward pass needs the sizes of the input alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

_aten = torch.ops.aten
# Name -> what PyTorch runs forward, and backward as ``(grad, input, *arguments)``, where the input's sizes are read.
_KERNELS: dict[str, tuple[Any, Any]] = {
    "average pooling over 2 axes": (_aten.avg_pool2d.default, _aten.avg_pool2d_backward.default),
    "average pooling over 3 axes": (_aten.avg_pool3d.default, _aten.avg_pool3d_backward.default),
    # The sizes that are asked for are those of the cotangent.
    "adaptive average pooling over 2 axes": (
        _aten._adaptive_avg_pool2d.default,
        lambda grad, x, sizes: _aten._adaptive_avg_pool2d_backward(grad, x),
    ),
    "adaptive average pooling over 3 axes": (
        _aten._adaptive_avg_pool3d.default,
        lambda grad, x, sizes: _aten._adaptive_avg_pool3d_backward(grad, x),
    ),
    **{
        f"{kind} padding over {axes} ax{'is' if axes == 1 else 'es'}": (
            getattr(_aten, f"{kind}_pad{axes}d").default,
            getattr(_aten, f"{kind}_pad{axes}d_backward").default,
        )
        for kind in ("reflection", "replication")
        for axes in (1, 2, 3)
    },
}


@dataclass(frozen=True)
class Layout:
    """What PyTorch's kernels read of an input in their backward pass.

    Attributes:
        shape: its sizes.
        memory_format: the one that its strides suggest, and that its gradient gets.
    """

    shape: tuple[int, ...]
    memory_format: torch.memory_format

    def blank(self, grad: Tensor) -> Tensor:
        """Return a tensor of this layout that nothing was written to, one number where that is enough."""
        if grad.device.type == "cpu" and self.memory_format is torch.contiguous_format:
            return grad.new_empty(()).expand(self.shape)
        # The strides of other formats need their storage; and kernels elsewhere first copy what is not contiguous.
        return torch.empty(self.shape, dtype=grad.dtype, device=grad.device, memory_format=self.memory_format)


@dataclass(frozen=True)
class FixedMap:
    """A linear map of images without parameters.

    Attributes:
        name: which one, a key of PyTorch's kernels here.
        arguments: what PyTorch's kernel takes behind the input; sequences as tuples.
        adds_axis: whether the kernel wants an axis of length 1 before the last one, as averages over one axis do.
    """

    name: str
    arguments: tuple[Any, ...]
    adds_axis: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, bit for bit as PyTorch does."""
        output = _KERNELS[self.name][0](x.unsqueeze(-2) if self.adds_axis else x, *self.arguments)
        return output.squeeze(-2) if self.adds_axis else output

    def layout_of(self, x: Tensor) -> Layout:
        """Return what backward is told of an input."""
        wide = x.unsqueeze(-2) if self.adds_axis else x
        return Layout(tuple(wide.shape), suggest_memory_format(wide))

    def backward(self, grad: Tensor, layout: Layout) -> Tensor:
        """Return the cotangent of the input, bit for bit and in the memory format as PyTorch does.

        Args:
            grad: cotangent of the output.
            layout: of the input.
        """
        wide = grad.unsqueeze(-2) if self.adds_axis else grad
        result = _KERNELS[self.name][1](wide, layout.blank(grad), *self.arguments)
        return result.squeeze(-2) if self.adds_axis else result


class _SizesOnly(torch.autograd.Function):
    """Saves nothing. Backward is made of operations that autograd knows, so that it can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, fixed_map: FixedMap) -> Tensor:
        return fixed_map.forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.fixed_map = inputs
        ctx.layout = ctx.fixed_map.layout_of(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.fixed_map.backward(grad, ctx.layout), None


class _EagerSizesOnly(_SizesOnly):
    """The same in forward mode too; compiled graphs take no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *ignored: Any) -> Tensor:
        return ctx.fixed_map.forward(tangent)


def sketched_fixed_map(x: Tensor, fixed_map: FixedMap) -> Tensor:
    """Return what PyTorch returns, holding nothing for the backward pass, where PyTorch holds the input.

    Args:
        x: ``[B, C, ...]`` or ``[C, ...]``, floating point.
        fixed_map: which map.

    **Law** The gradient is exact, bit for bit; so are second derivatives and forward mode. Held: nothing.

    >>> arguments = ((1, 2), (1, 2), (0, 0), False, True, None)
    >>> pooling = FixedMap("average pooling over 2 axes", arguments, adds_axis=True)
    >>> x = torch.arange(6.0).view(1, 6).requires_grad_()
    >>> output = sketched_fixed_map(x, pooling)
    >>> output.detach(), torch.autograd.grad(output.sum(), x)[0]
    (tensor([[0.5000, 2.5000, 4.5000]]), tensor([[0.5000, 0.5000, 0.5000, 0.5000, 0.5000, 0.5000]]))
    """
    return (_SizesOnly if torch.compiler.is_compiling() else _EagerSizesOnly).apply(x, fixed_map)

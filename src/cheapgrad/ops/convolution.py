"""Convolutions of one, two and three axes and their transposes, with a sketched backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops._convolution_geometry import ConvolutionConfig, Geometry
from cheapgrad.ops._convolution_products import Backward, convolution_gradients
from cheapgrad.ops._guards import refuse_forward_mode
from cheapgrad.ops._kept_images import is_rounded_in_place, keep_images, restore_images
from cheapgrad.ops._saved_operands import hand_back, save_operands, split_operands
from cheapgrad.ops.linear import cast_for_autocast, may_need_grad
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import AbstractSampling, random

__all__ = ["ConvolutionConfig", "sketched_convolution"]

_NAME = "convolution"


class _SketchedConvolution(torch.autograd.Function):
    """Forward is `torch.convolution`; backward uses what the plan keeps and draws."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, geometry: Geometry, *kept: Tensor
    ) -> Tensor:
        weight, bias = random.anchor_parameters(weight, bias, kept)
        return geometry.forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, plan, geometry, *kept = inputs
        ctx.geometry, ctx.weight_shape = geometry, weight.shape
        ctx.in_place = is_rounded_in_place(plan.stored, x)
        save_operands(ctx, x, weight, plan, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            backward = _at_hand(ctx, saved, grad)
            _observe(ctx.plan, backward)
            grad_input, grad_weight = convolution_gradients(ctx.plan, backward)
            grad_bias = grad.sum((0, *range(2, grad.dim()))) if ctx.needs_input_grad[2] else None
        return hand_back(ctx, _NAME, grad, saved, (grad_input, grad_weight, grad_bias))


class _EagerSketchedConvolution(_SketchedConvolution):
    """The same, refusing forward mode by name; compiled graphs take no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode(_NAME)


def _at_hand(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> Backward:
    weight, kept = split_operands(ctx, saved)
    return Backward(
        geometry=ctx.geometry,
        input_shape=ctx.input_shape,
        weight_shape=ctx.weight_shape,
        grad=grad,
        weight=weight,
        kept=restore_images(ctx.plan, kept, ctx.geometry, ctx.input_shape, grad.dtype, in_place=ctx.in_place)
        if ctx.needs_input_grad[1]
        else None,
    )


def _observe(plan: Plan, backward: Backward) -> None:
    """Let running estimates of stored pixels take in the norm of what each of them will be multiplied by."""
    if plan.stored_memory is None or not isinstance(plan.stored, AbstractSampling):
        return
    norm_N = backward.geometry.patch_norms_of_cotangent(backward.grad, backward.kernel, backward.input_shape)
    plan.observe(norm_N.unsqueeze(1), backward.input_shape[0])


def sketched_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: ConvolutionConfig, plan: Plan
) -> Tensor:
    r"""Return what the stock module returns, bit for bit, with the backward pass of `plan`.

    X is a matrix whose rows are (example, pixel) and whose features are input channels; G likewise with output ones.
    What is *stored* is a random stand-in for X, and dW, being linear in X, is unbiased:

    * `ExampleSample`: dW from the kept examples only. `FeatureSample` with one mask and one group: dW from the kept
      input channels only. All others save memory, not time: a dense stand-in is rebuilt for the native kernel.

    What is used of the *cotangent*:

    * `ExampleSample`: dX and dW of the kept examples (a product score is the product of whole examples' norms).
    * `ColumnSample`: dX and dW from the kept output channels, the same number in every group. Groups with a single
      output channel leave nothing to sample and are exact.
    * `RowSample`: dW from the windows at the kept pixels only, and dX exact. The pixels are the output's; for a
      transposed convolution, where windows slide over G, the input's. `ProductNorm` uses the windows' norms. It saves
      products; on a CPU gathering the windows takes back the time unless channels are many (128) and kept pixels few.
    * `ElementMask`, `RowProjection`, `LowRank`: a dense stand-in for G; no time is saved.

    db is always exact. Pixels or examples that are sketched in what is stored are not sketched again for dW.

    Args:
        x: input, shape ``[B, I, ...]`` or ``[I, ...]``, floating point.
        weight: shape ``[O, I / Q, ...]``, or ``[I, O / Q, ...]`` if transposed.
        bias: shape ``[O]``, or None.
        config: the module's options.
        plan: the strategies; a plan without strategies, or with full budgets, runs PyTorch's own code. So does an
            empty batch.

    Returns:
        Shape ``[B, O, ...]`` or ``[O, ...]``.

    **Law** Bias 0 for dX, dW and db; variances in `cheapgrad.ops.convolution_law.convolution_variance`. For padding
    modes other than zeros, X is the padded input; PyTorch's reflection and replication keep the unpadded one as well.

    Raises:
        SecondDerivativeError: when a gradient through it is differentiated again.
        ForwardModeError: in forward-mode differentiation.

    >>> module = torch.nn.Conv2d(3, 4, 3)
    >>> config = ConvolutionConfig.from_module(module)
    >>> sketched_convolution(torch.ones(2, 3, 8, 8), module.weight, module.bias, config, Plan()).shape
    torch.Size([2, 4, 6, 6])

    References:
        Sampling pixels and channels of what is stored: arXiv:2007.10412. Probing over pixels, arXiv:2106.06998, whose
        periodic shifts are replaced here by windows with the layer's own padding, dilation and groups.
    """
    is_batch = x.dim() == weight.dim()
    if plan.is_exact or x.numel() == 0 or not (is_batch or x.dim() == weight.dim() - 1):
        return config.forward(x, weight, bias)
    images, geometry = config.resolve(x if is_batch else x.unsqueeze(0), weight)
    # After padding, as in the stock module: autocast pads in single precision.
    images, weight, bias = cast_for_autocast(images, weight, bias)
    kept: tuple[Tensor, ...] = ()
    if plan.stored is not None and may_need_grad(weight):
        kept = keep_images(plan, images)
    function = _SketchedConvolution if torch.compiler.is_compiling() else _EagerSketchedConvolution
    output = function.apply(images, weight, bias, plan, geometry, *kept)
    return output if is_batch else output.squeeze(0)

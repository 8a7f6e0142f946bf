"""Norms over images: statistics of a channel over the batch, or of a group of channels in every example."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops._guards import differentiate_once, refuse_forward_mode
from cheapgrad.ops._norm_codes import NormCodes, encode_normalised, matrix_sizes, second_codec
from cheapgrad.ops.linear import may_need_grad
from cheapgrad.sketch import LayerShape, Moment, StochasticRounding, Variance, random
from cheapgrad.sketch.rounding_covariance import variance_of_sums

_NAME = "norm"


@dataclass(frozen=True)
class Normalisation:
    """Which entries of an image ``[B, C, ...]`` share a mean and a variance.

    Attributes:
        groups: in how many groups the channels are cut, every example by itself (as many as channels: instance norm);
            None for each channel over the whole batch.
        eps: added to the variance.
    """

    groups: int | None
    eps: float

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means and ``1 / sqrt(var + eps)``, in single precision at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.groups is None:
            return torch.ops.aten.native_batch_norm(x, None, None, None, None, True, 0.0, self.eps)[1:]
        batch, channels = x.shape[:2]
        pixels = x.numel() // (batch * channels)
        _, mean, rstd = torch.ops.aten.native_group_norm(
            x.contiguous(), None, None, batch, channels, pixels, self.groups, self.eps
        )
        return mean, rstd

    def per_channel(self, of_means: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return something known for every mean as ``[B, C]``, for an image of this shape."""
        batch, channels = shape[:2]
        if self.groups is None:
            return of_means.view(1, channels).expand(batch, channels)
        wide = of_means.view(batch, self.groups, 1).expand(batch, self.groups, channels // self.groups)
        return wide.reshape(batch, channels)

    def sum_alike(self, values_BC: Tensor) -> Tensor:
        """Return, for every example and channel, the sum over all that share its mean."""
        if self.groups is None:
            return values_BC.sum(0, keepdim=True).expand(values_BC.shape)
        batch, channels = values_BC.shape
        sums = values_BC.reshape(batch, self.groups, channels // self.groups).sum(2)
        return self.per_channel(sums, values_BC.shape)

    def count_means(self, shape: tuple[int, ...]) -> int:
        """Return how many means there are for an image of this shape."""
        return shape[1] if self.groups is None else shape[0] * self.groups


class _SketchedNorm(torch.autograd.Function):
    """Forward hands on what PyTorch computed; backward multiplies two independent codes of the normalised image."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        output: Tensor,
        tie: Tensor | None,
        rstd: Tensor,
        norm: Normalisation,
        codec: StochasticRounding,
        *codes: Tensor,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            # A factor of one that formally depends on what was drawn, or the draw may be repeated in backward.
            return output * random.anchor(torch.ones((), dtype=output.dtype, device=output.device), codes)
        # A tensor of its own: what follows may overwrite it.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, _, tie, rstd, ctx.norm, ctx.codec, *codes = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.save_for_backward(weight, tie, rstd, *codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, tie, rstd, *codes = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(ctx, grad, weight, rstd, NormCodes(tuple(codes), ctx.codec, ctx.shape, rstd.dtype))
        tied = [differentiate_once(gradient, _NAME, grad, tie, weight) for gradient in gradients]
        return (*tied, *([None] * (len(ctx.needs_input_grad) - 3)))


def _gradients(
    ctx: Any, grad: Tensor, weight: Tensor | None, rstd: Tensor, codes: NormCodes
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    norm, shape = ctx.norm, ctx.shape
    images = shape[:2]
    sum_BC, first_BC, second_BC = (sums.view(images) for sums in codes.sums_with(grad))
    grad_weight = first_BC.sum(0).to(weight.dtype) if wants_weight and weight is not None else None
    grad_bias = sum_BC.sum(0).to(grad.dtype if weight is None else weight.dtype) if wants_bias else None
    if not wants_input:
        return None, grad_weight, grad_bias
    # dx = rstd (weight grad - mean(weight grad) - x_hat mean(weight grad x_hat)), linear in grad and in the first code.
    scale_C = torch.ones_like(sum_BC[0]) if weight is None else weight.to(rstd.dtype)
    rstd_BC = norm.per_channel(rstd, shape) * (norm.count_means(shape) / math.prod(shape))
    grad_input = codes.combine(
        grad,
        of_grad=norm.per_channel(rstd, shape) * scale_C,
        of_code=-rstd_BC * norm.sum_alike(second_BC * scale_C),
        constant=-rstd_BC * norm.sum_alike(sum_BC * scale_C),
    )
    return grad_input.to(ctx.dtype), grad_weight, grad_bias


class _EagerSketchedNorm(_SketchedNorm):
    """The same, refusing forward mode by name; compiled graphs take no Function that defines a jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        refuse_forward_mode(_NAME)


def sketched_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Normalisation,
    codec: StochasticRounding,
    stock: Callable[[Tensor], tuple[Tensor, Tensor | None, Tensor | None]],
) -> Tensor:
    r"""Return ``x_hat * weight + bias`` as PyTorch does, holding two codes of ``x_hat`` in place of the input.

    With ``g = weight * grad``, the gradient of the input is ``(g - mean(g) - x_hat mean(g x_hat)) / sqrt(var + eps)``:
    quadratic in ``x_hat``. Its two factors are decoded from independent codes, so that their product is unbiased. The
    second one only enters the mean, over many entries, and has two bits.

    Args:
        x: image ``[B, C, ...]`` or matrix ``[B, C]``, floating point.
        weight: shape ``[C]``, or None.
        bias: shape ``[C]``, or None.
        norm: what is normalised together.
        codec: for the first code.
        stock: PyTorch's own forward; called once, with the detached input, so that running statistics follow. Returns
            the output, and means and ``1 / sqrt(var + eps)`` if it has them at hand.

    Returns:
        In the shape of `x`, bit-identical to PyTorch's.

    **Law** Bias 0; variances in `norm_variance`, bytes in `norm_saved_bytes`.

    Raises:
        SecondDerivativeError: when a gradient through it is differentiated again.
        ForwardModeError: in forward-mode differentiation.
    """
    with torch.no_grad():
        value = x.detach()
        output, mean, rstd = stock(value)
        if mean is None or rstd is None or torch.finfo(rstd.dtype).bits < 32:
            mean, rstd = norm.statistics(value)
        centre, scale = (norm.per_channel(of_means, x.shape) for of_means in (mean, rstd))
        codes = encode_normalised(value, centre, scale, codec, twice=may_need_grad(x))
    if torch.compiler.is_compiling():
        return _SketchedNorm.apply(x, weight, bias, output, None, rstd, norm, codec, *codes)
    # No bytes, but a child of x: stands for it where a second derivative is refused, so that x itself is not held.
    tie = x.reshape(-1)[:0].clone()
    return _EagerSketchedNorm.apply(x, weight, bias, output, tie, rstd, norm, codec, *codes)


def norm_saved_bytes(
    shape: tuple[int, ...], norm: Normalisation, codec: StochasticRounding, wants_input: bool, element_bytes: int
) -> float:
    """Return the bytes held: ``1 / sqrt(var + eps)`` once for each mean, one code, and a second one if x needs it.

    Args:
        shape: of the input.
        norm: what is normalised together.
        codec: for the first code.
        wants_input: whether the input needs a gradient.
        element_bytes: bytes per element of the statistics.
    """
    rows, columns = matrix_sizes(shape)
    sizes = LayerShape(rows, columns, columns)
    codecs = (codec, second_codec(codec)) if wants_input else (codec,)
    codes = sum(each.law.saved_bytes(sizes, Moment.STORED) for each in codecs)
    return norm.count_means(shape) * element_bytes + codes


def norm_variance(
    x: Tensor, weight: Tensor | None, grad: Tensor, norm: Normalisation, codec: StochasticRounding
) -> Variance:
    r"""Return the expected squared errors of dx and dweight.

    With a and b the two decoded codes, errors e and d, ``m = mean(g x_hat)`` and ``V = Var mean(g d)`` for each set of
    entries that are normalised together::

        E ||dx_hat - dx||**2 = sum_sets (1 / (var + eps)) ((m**2 + V) sum Var(e) + V sum x_hat**2)
        E ||dw_hat - dw||**2 = sum_channels Var(sum grad e)

    exactly: V and the last line by `variance_of_sums`, since neighbours share a draw.

    Args:
        x: the input.
        weight: shape ``[C]``, or None.
        grad: cotangent of the output.
        norm: what is normalised together.
        codec: of the first code.
    """
    images, sizes = (*x.shape[:2], -1), matrix_sizes(x.shape)
    rows = (*x.shape[:2], 1)
    mean, rstd = norm.statistics(x.detach())
    scale = norm.per_channel(rstd, x.shape).view(rows)
    x_hat = (x.detach().to(rstd.dtype).view(images) - norm.per_channel(mean, x.shape).view(rows)) * scale
    matrix, grad = x_hat.reshape(sizes), grad.double().reshape(images)
    scaled = grad if weight is None else grad * weight.detach().double().view(1, -1, 1)
    entries = x.numel() / norm.count_means(x.shape)

    def numbered(numbers: Tensor) -> Tensor:
        return numbers.reshape(rows).expand(x_hat.shape).reshape(sizes)

    def total(values: Tensor) -> Tensor:
        return norm.sum_alike(values.sum(2))

    means = torch.arange(norm.count_means(x.shape), device=x.device)
    of_means = variance_of_sums(
        second_codec(codec), matrix, scaled.reshape(sizes) / entries, numbered(norm.per_channel(means, x.shape))
    )
    of_mean_BC = norm.per_channel(of_means, x.shape)
    along_BC = total(scaled * x_hat) / entries
    noise = codec.entry_variance(matrix).view(x_hat.shape)
    of_input_BC = (along_BC**2 + of_mean_BC) * noise.sum(2) + of_mean_BC * x_hat.double().square().sum(2)
    channel = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    of_weight = variance_of_sums(codec, matrix, grad.reshape(sizes), numbered(channel))
    return Variance((of_input_BC * scale.view(x.shape[:2]).double() ** 2).sum(), of_weight.sum())

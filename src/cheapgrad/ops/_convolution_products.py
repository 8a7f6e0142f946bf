"""Sketched dX and dW of a convolution: from kept examples, kept pixels, kept output channels, or a dense stand-in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.ops._convolution_geometry import (
    Geometry,
    as_images,
    as_matrix,
    gather_patches,
    gather_pixels,
    in_layout_of,
    pixel_squares,
)
from cheapgrad.ops._kept_images import AbstractKeptImages
from cheapgrad.ops.plan import Plan
from cheapgrad.sketch import ColumnSample, ExampleSample, Moment, Operands, RowSample, Selection
from cheapgrad.sketch.drawn import DrawnRows
from cheapgrad.sketch.operands import AbstractStoredMatrix

Gradients = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Backward:
    """What a backward pass of a convolution has at hand.

    Attributes:
        geometry: the convolution.
        input_shape: ``(B, I, ...)``.
        weight_shape: of the module's weight.
        grad: the cotangent G, shape ``[B, O, ...]``.
        weight: W, or None where the input needs no gradient.
        kept: what is kept of X, or None where the weight needs no gradient.
    """

    geometry: Geometry
    input_shape: Sequence[int]
    weight_shape: Sequence[int]
    grad: Tensor
    weight: Tensor | None
    kept: AbstractKeptImages | None

    @property
    def kernel(self) -> Sequence[int]:
        """Kernel sizes."""
        return self.weight_shape[2:]

    def input_gradient(self, grad: Tensor) -> Tensor | None:
        """Return dX for a stand-in for the whole cotangent."""
        if self.weight is None:
            return None
        return self.geometry.input_gradient(grad, self.weight, self.input_shape)

    def weight_gradient(self, grad: Tensor) -> Tensor | None:
        """Return dW for a stand-in for the whole cotangent."""
        if self.kept is None:
            return None
        return self.kept.weight_gradient(self.geometry, grad, self.weight_shape)


class _Deferred(AbstractStoredMatrix):
    """Norms of what is stored, as a matrix with one column, computed only if a score reads them."""

    def __init__(self, compute: Callable[[], Tensor], sketches_rows: bool = False) -> None:
        self._compute = compute
        self.sketches_rows = sketches_rows

    def dense(self) -> Tensor:
        return self._compute().unsqueeze(1)


def convolution_gradients(plan: Plan, backward: Backward) -> Gradients:
    """Return dX and dW, each None where it is not needed."""
    grad_input, grad_weight = _dispatch(plan, backward)
    # A change of layout here would slow down every layer below.
    return None if grad_input is None else in_layout_of(backward.grad, grad_input), grad_weight


def _dispatch(plan: Plan, backward: Backward) -> Gradients:
    strategy = plan.cotangent
    if isinstance(strategy, ExampleSample):
        return _from_examples(strategy, backward)
    if isinstance(strategy, RowSample):
        return backward.input_gradient(backward.grad), _weight_from_pixels(strategy, backward)
    if isinstance(strategy, ColumnSample) and output_channels_per_group(backward.weight_shape, backward.geometry) > 1:
        return _from_channels(strategy, backward)
    if strategy is None or isinstance(strategy, ColumnSample):
        return backward.input_gradient(backward.grad), backward.weight_gradient(backward.grad)
    return _from_stand_in(plan, backward)


def _from_stand_in(plan: Plan, backward: Backward) -> Gradients:
    grad = backward.grad
    drawn = plan.draw(Operands(Moment.COTANGENT, None, as_matrix(grad), None, grad.shape[0]))
    stand_in = as_images(drawn.dense(), grad.shape)
    # Rows that are sketched in what is stored are not sketched a second time.
    once = isinstance(drawn, DrawnRows) and backward.kept is not None and backward.kept.sketches_rows
    return backward.input_gradient(stand_in), backward.weight_gradient(grad if once else stand_in)


# --- examples --------------------------------------------------------------------------------------------------------


def example_operands(backward: Backward) -> Operands:
    """Return what the score of an example may look at: norms of whole examples, as matrices of B rows."""
    kept, axes = backward.kept, range(1, backward.grad.dim())
    return Operands(
        Moment.COTANGENT,
        None if kept is None else _Deferred(lambda: _norms(kept.images(), axes), kept.sketches_rows),
        _norms(backward.grad, axes).unsqueeze(1),
        None if backward.weight is None else backward.weight.flatten(1),
        backward.grad.shape[0],
    )


def _from_examples(strategy: ExampleSample, backward: Backward) -> Gradients:
    geometry, kept = backward.geometry, backward.kept
    selection = strategy.select(example_operands(backward), backward.grad.shape[0])
    grad_K = selection.apply(backward.grad, 0)
    grad_input, grad_weight = None, None
    if backward.weight is not None:
        kept_shape = (grad_K.shape[0], *backward.input_shape[1:])
        grad_input = selection.lift(geometry.input_gradient(grad_K, backward.weight, kept_shape), 0)
    if kept is not None and kept.sketches_rows:
        grad_weight = backward.weight_gradient(backward.grad)
    elif kept is not None:
        grad_weight = geometry.weight_gradient(kept.examples(selection.index_K), grad_K, backward.weight_shape)
        grad_weight = grad_weight + kept.poison().to(grad_weight.dtype)
    return grad_input, grad_weight


# --- pixels ----------------------------------------------------------------------------------------------------------


def _weight_from_pixels(strategy: RowSample, backward: Backward) -> Tensor | None:
    kept, geometry = backward.kept, backward.geometry
    if kept is None or kept.sketches_rows:
        return backward.weight_gradient(backward.grad)
    images = kept.images()
    centre, sliding = (images, backward.grad) if geometry.transposed else (backward.grad, images)
    rows = centre.shape[0] * math.prod(centre.shape[2:])
    selection = strategy.select(_pixel_operands(backward, images), rows)
    weight_K = selection.weight_K.to(centre.dtype).unsqueeze(1)
    centre_KD = gather_pixels(centre, selection.index_K) * weight_K
    patches = gather_patches(sliding, geometry, backward.kernel, centre.shape[2:], selection.index_K)
    product = _contract_patches(centre_KD, patches, geometry.groups).reshape(backward.weight_shape)
    return product + kept.poison().to(product.dtype)


def _pixel_operands(backward: Backward, images: Tensor) -> Operands:
    """Return what the score of a centre pixel may look at: norms of pixels and patches, as matrices of one column."""
    geometry, grad = backward.geometry, backward.grad
    if geometry.transposed:
        cotangent_N = geometry.patch_norms_of_cotangent(grad, backward.kernel, images.shape)
        stored = _Deferred(lambda: pixel_squares(images).sqrt().flatten())
    else:
        cotangent_N = pixel_squares(grad).sqrt().flatten()
        stored = _Deferred(lambda: geometry.patch_norms_of_input(images, backward.kernel))
    return Operands(Moment.COTANGENT, stored, cotangent_N.unsqueeze(1), None, grad.shape[0])


def _contract_patches(centre_KD: Tensor, patches_KZD: Tensor, groups: int) -> Tensor:
    """Return ``sum_k centre_k patch_k`` per group, shape ``[centre channels, sliding channels / Q, Z]``."""
    count, positions, channels = patches_KZD.shape
    centre_QDK = centre_KD.view(count, groups, centre_KD.shape[1] // groups).permute(1, 2, 0)
    patches_QKZD = patches_KZD.view(count, positions, groups, channels // groups).permute(2, 0, 1, 3)
    product = centre_QDK @ patches_QKZD.flatten(2)
    return product.reshape(centre_KD.shape[1], positions, channels // groups).transpose(1, 2)


# --- output channels -------------------------------------------------------------------------------------------------


def output_channels_per_group(weight_shape: Sequence[int], geometry: Geometry) -> int:
    """Return O / Q."""
    return weight_shape[1] if geometry.transposed else weight_shape[0] // geometry.groups


def channel_operands(backward: Backward) -> Operands:
    """Return what the score of an output channel may look at: norms of channels of G, and of their weights."""
    grad = backward.grad
    norm_O = _norms(grad, [0, *range(2, grad.dim())])
    weight_OI = None
    if backward.weight is not None:
        weight_OI = _norms(_output_first(backward.weight, backward.geometry).flatten(1), [1]).unsqueeze(1)
    # No score of columns reads what is stored; that it is there says that the draw serves dW.
    stored = None if backward.kept is None else _Deferred(lambda: norm_O)
    return Operands(Moment.COTANGENT, stored, norm_O.unsqueeze(0), weight_OI, grad.shape[0])


def _select_channels(strategy: ColumnSample, backward: Backward) -> Selection:
    """Draw the same number of output channels in every group."""
    groups = backward.geometry.groups
    scores_O = strategy.evaluate_scores(channel_operands(backward))
    per_group = scores_O.shape[0] // groups
    count = strategy.kept_count(per_group)
    if groups == 1:
        return strategy.design.draw(scores_O, count)
    drawn = strategy.design.draw(scores_O.view(groups, per_group), count)
    first_Q = torch.arange(groups, device=scores_O.device).unsqueeze(1) * per_group
    index_K = (drawn.index_K + first_Q).flatten()
    return Selection(index_K, drawn.weight_K.flatten(), scores_O.shape[0], drawn.may_repeat)


def _from_channels(strategy: ColumnSample, backward: Backward) -> Gradients:
    geometry, kept = backward.geometry, backward.kept
    selection = _select_channels(strategy, backward)
    grad_K = in_layout_of(backward.grad, selection.apply(backward.grad, 1))
    if grad_K.shape[1] == 0:
        return _zeros(backward)
    grad_input, grad_weight = None, None
    if backward.weight is not None:
        kept_weight = _module_layout(selection.gather(_output_first(backward.weight, geometry), 0), geometry)
        grad_input = geometry.input_gradient(grad_K, kept_weight, backward.input_shape)
    if kept is not None:
        shape = list(backward.weight_shape)
        shape[0 if not geometry.transposed else 1] = grad_K.shape[1] // (geometry.groups if geometry.transposed else 1)
        product = _output_first(kept.weight_gradient(geometry, grad_K, shape), geometry)
        grad_weight = _module_layout(selection.lift(product, 0), geometry)
    return grad_input, grad_weight


def _zeros(backward: Backward) -> Gradients:
    """Return the estimate of a sample of random size that came out empty."""
    grad = backward.grad
    return (
        None if backward.weight is None else grad.new_zeros(backward.input_shape),
        None if backward.kept is None else grad.new_zeros(backward.weight_shape),
    )


def _output_first(weight: Tensor, geometry: Geometry) -> Tensor:
    """Return a module's weight as ``[O, I / Q, ...]``."""
    if not geometry.transposed:
        return weight
    grouped = weight.reshape(geometry.groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)


def _module_layout(weight: Tensor, geometry: Geometry) -> Tensor:
    """Return ``[O, I / Q, ...]`` as the module holds it; the inverse of `_output_first`."""
    if not geometry.transposed:
        return weight
    grouped = weight.reshape(geometry.groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)


def _norms(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Return Euclidean norms over `dims`, in single precision at least."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=tuple(dims), dtype=dtype)

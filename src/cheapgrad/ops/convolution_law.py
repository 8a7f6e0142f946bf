"""Laws of sketched convolutions: variance, FLOPs and saved bytes, through the laws of the strategies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.ops._convolution_geometry import ConvolutionConfig
from cheapgrad.ops._convolution_products import (
    Backward,
    channel_operands,
    example_operands,
    output_channels_per_group,
)
from cheapgrad.ops._kept_images import WholeImages, entry_variance_of
from cheapgrad.sketch import (
    AbstractStrategy,
    ColumnSample,
    ElementMask,
    ExampleSample,
    FeatureSample,
    LayerShape,
    LowRank,
    Moment,
    Poisson,
    RowProjection,
    RowSample,
    StochasticRounding,
    Variance,
)


@dataclass(frozen=True)
class ConvolutionShape:
    """Sizes of a convolution layer at one input.

    Attributes:
        input_shape: ``(B, I, ...)``, paddings other than zeros on both sides applied.
        output_shape: ``(B, O, ...)``.
        weight_shape: of the module's weight.
        groups: Q.
        transposed: whether it is a transposed convolution.
        element_bytes: bytes per element of X.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    element_bytes: int = 4

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, config: ConvolutionConfig) -> ConvolutionShape:
        """Return the sizes for an input; nothing is computed.

        Args:
            x: shape ``[B, I, ...]`` or ``[I, ...]``.
            weight: the module's weight.
            config: the module's options.
        """
        x_meta, weight_meta = (torch.empty(tensor.shape, device="meta") for tensor in (x, weight))
        images, geometry = config.resolve(x_meta if x.dim() == weight.dim() else x_meta.unsqueeze(0), weight_meta)
        output = geometry.forward(images, weight_meta)
        shapes = (tuple(images.shape), tuple(output.shape), tuple(weight.shape))
        return cls(*shapes, config.groups, config.transposed, x.element_size())

    @property
    def product_flops(self) -> float:
        """FLOPs of dX, of dW, and of the forward product: 2 N_out O (I / Q) Z, or 2 N_in I (O / Q) Z if transposed."""
        centre = self.input_shape if self.transposed else self.output_shape
        return 2.0 * centre[0] * math.prod(centre[2:]) * math.prod(self.weight_shape)

    def as_layer(self) -> LayerShape:
        """Return the sizes as those of a matrix of input pixels."""
        return LayerShape(
            rows=self.input_shape[0] * math.prod(self.input_shape[2:]),
            inputs=self.input_shape[1],
            outputs=self.output_shape[1],
            examples=self.input_shape[0],
            element_bytes=self.element_bytes,
        )


def convolution_flops(strategy: AbstractStrategy | None, moment: Moment, shape: ConvolutionShape) -> float:
    """Return the FLOPs of the backward products dX and dW (multiply and add count 1 each), sketching products included.

    Padding counts as if it were pixels, as the native kernels and FLOP counters count it; scores are not counted.

    Args:
        strategy: a strategy, or None for the exact products.
        moment: where it is placed.
        shape: the layer's sizes.
    """
    product = shape.product_flops
    if strategy is None or strategy.is_exact:
        return 2 * product
    if moment is Moment.STORED:
        return product + _stored_flops(strategy, shape)
    return _cotangent_flops(strategy, shape)


def _stored_flops(strategy: AbstractStrategy, shape: ConvolutionShape) -> float:
    """Return the FLOPs of dW and of rebuilding X."""
    product, examples, channels = shape.product_flops, shape.input_shape[0], shape.input_shape[1]
    rows = shape.as_layer().rows
    if isinstance(strategy, ExampleSample):
        return product * strategy.design.expected_count(examples, strategy.kept_count(examples)) / examples
    if isinstance(strategy, FeatureSample) and strategy.rows_per_mask is None and shape.groups == 1:
        return product * strategy.design.expected_count(channels, strategy.kept_count(channels)) / channels
    if isinstance(strategy, RowProjection):
        return product + strategy.kind.flops(rows, strategy.kept_count(rows), 2 * channels)
    if isinstance(strategy, LowRank):
        return product + 2.0 * min(strategy.rank, rows) * rows * channels
    return product


def _cotangent_flops(strategy: AbstractStrategy, shape: ConvolutionShape) -> float:
    product, examples, channels = shape.product_flops, shape.output_shape[0], shape.output_shape[1]
    rows = examples * math.prod(shape.output_shape[2:])
    if isinstance(strategy, ExampleSample):
        return 2 * product * strategy.design.expected_count(examples, strategy.kept_count(examples)) / examples
    if isinstance(strategy, ColumnSample):
        per_group = channels // shape.groups
        # Coins in several groups at once have no static size: every channel is multiplied, by 0 or 1 / p.
        if per_group < 2 or (shape.groups > 1 and isinstance(strategy.design, Poisson)):
            return 2 * product
        return 2 * product * strategy.design.expected_count(per_group, strategy.kept_count(per_group)) / per_group
    if isinstance(strategy, RowSample):
        centre = shape.input_shape if shape.transposed else shape.output_shape
        rows = centre[0] * math.prod(centre[2:])
        return product * (1 + strategy.design.expected_count(rows, strategy.kept_count(rows)) / rows)
    if isinstance(strategy, RowProjection):
        return 2 * product + strategy.kind.flops(rows, strategy.kept_count(rows), 2 * channels)
    if isinstance(strategy, LowRank):
        return 2 * product + 2.0 * min(strategy.rank, rows) * rows * channels
    return 2 * product


def convolution_saved_bytes(strategy: AbstractStrategy | None, moment: Moment, shape: ConvolutionShape) -> float:
    """Return the bytes held for backward in place of X (the weight is not counted: it exists anyway)."""
    layer = shape.as_layer()
    if strategy is None or strategy.is_exact or moment is Moment.COTANGENT:
        return float(layer.rows * layer.inputs * layer.element_bytes)
    return strategy.law.saved_bytes(layer, moment)


def convolution_variance(
    strategy: AbstractStrategy,
    moment: Moment,
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    config: ConvolutionConfig,
) -> Variance:
    r"""Return ``E ||dX_hat - dX||**2`` and ``E ||dW_hat - dW||**2`` of a sketched convolution.

    dW of a group is a matrix product over pixels, of X and the cotangent unfolded onto the input's grid, or of the
    unfolded X and G on the output's grid; each strategy's own law is applied to the product in which what it sketches
    stands folded. Examples and output channels are summed as the gradients they are. Both gradients are taken to be
    needed, and the cotangent, the input and the weight to be exact.

    Args:
        strategy: a strategy.
        moment: where it is placed.
        x: the layer's input, shape ``[B, I, ...]`` or ``[I, ...]``.
        weight: the module's weight.
        grad: the cotangent, in the shape of the output.
        config: the module's options.

    Returns:
        0-dim float64 tensors. NaN where the law is not stated: dX of `RowProjection` and `LowRank` placed at the
        cotangent, and of `ElementMask` there with padding modes other than zeros.

    Law:
        As of the strategy. Takes the memory of an unfolded X or G, Z times the tensor's own, and as many exact
        gradients as there are examples or output channels to sample: for predictions and tests, not for every step.

    >>> module, x = torch.nn.Conv1d(2, 2, 3), torch.ones(4, 2, 8)
    >>> config = ConvolutionConfig.from_module(module)
    >>> grad = torch.ones(4, 2, 6)
    >>> convolution_variance(ExampleSample(0.5), Moment.STORED, x, module.weight, grad, config).weight
    tensor(0., dtype=torch.float64)
    """
    with torch.no_grad():
        x, grad, weight = x.detach().double(), grad.detach().double(), weight.detach().double()
        if x.dim() < weight.dim():
            x, grad = x.unsqueeze(0), grad.unsqueeze(0)
        layer = _Layer(config, x, weight, grad)
        if moment is Moment.STORED:
            return _grid_variance(strategy, layer, moment, on_output=False)
        if isinstance(strategy, ExampleSample):
            return _example_variance(strategy, layer)
        if isinstance(strategy, ColumnSample):
            return _channel_variance(strategy, layer)
        if isinstance(strategy, RowSample):
            return _grid_variance(strategy, layer, moment, on_output=not config.transposed)
        weight_variance = _grid_variance(strategy, layer, moment, on_output=True).weight
        return Variance(_entry_input_variance(strategy, layer), weight_variance)


class _Layer:
    """The tensors of one layer in float64, with exact gradients and unfolded matrices."""

    def __init__(self, config: ConvolutionConfig, x: Tensor, weight: Tensor, grad: Tensor) -> None:
        self.config, self.x, self.weight, self.grad = config, x, weight, grad
        self.images, self.geometry = config.resolve(x, weight)

    @property
    def backward(self) -> Backward:
        """What the operation has at hand; scores are computed from it."""
        images, grad = self.images, self.grad
        return Backward(self.geometry, images.shape, self.weight.shape, grad, self.weight, WholeImages(images))

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Return dX through the padding."""
        with torch.enable_grad():
            x = self.x.clone().requires_grad_()
            return torch.autograd.grad(self.config.forward(x, self.weight, None), x, grad)[0]

    def weight_gradient(self, grad: Tensor) -> Tensor:
        """Return dW."""
        return self.geometry.weight_gradient(self.images, grad, self.weight.shape)

    def product(self, on_output: bool) -> tuple[Tensor, Tensor]:
        """Return the matrices ``[Q, N, .]`` of X and of G whose product per group is dW, on one of the two grids."""
        kernel = self.weight.shape[2:]
        if on_output:
            return self.stack(self.geometry.unfold_input(self.images, kernel)), self.stack(self.grad)
        unfolded = self.geometry.unfold_cotangent(self.grad, kernel, self.images.shape)
        return self.stack(self.images), self.stack(unfolded)

    def stack(self, images: Tensor) -> Tensor:
        """Return images as matrices ``[Q, N, .]``, one for each group of channels."""
        groups = self.geometry.groups
        grouped = images.reshape(images.shape[0], groups, -1, math.prod(images.shape[2:]))
        return grouped.permute(1, 0, 3, 2).flatten(1, 2)


def _grid_variance(strategy: AbstractStrategy, layer: _Layer, moment: Moment, on_output: bool) -> Variance:
    """Return the variance of dW by the strategy's law on one grid, with an exact dX."""
    stored, cotangent = layer.product(on_output)
    if isinstance(strategy, StochasticRounding):
        noise = layer.stack(entry_variance_of(strategy, layer.images))
        return Variance(noise.new_zeros(()), (noise.sum(-1) * cotangent.square().sum(-1)).sum())
    return strategy.law.variance(stored, cotangent, moment=moment, examples=layer.x.shape[0])


def _example_variance(strategy: ExampleSample, layer: _Layer) -> Variance:
    backward, design = layer.backward, strategy.design
    examples = layer.x.shape[0]
    scores = strategy.evaluate_scores(example_operands(backward))
    count = strategy.kept_count(examples)
    weight_norms = torch.stack(
        [
            layer.geometry.weight_gradient(image, grad, layer.weight.shape).square().sum()
            for image, grad in zip(layer.images.split(1), layer.grad.split(1), strict=True)
        ]
    )
    input_norms = layer.input_gradient(layer.grad).square().flatten(1).sum(1)

    def weight_sum(weights: Tensor) -> Tensor:
        return layer.weight_gradient(_scaled(layer.grad, weights, 0)).square().sum()

    def input_sum(weights: Tensor) -> Tensor:
        return (weights**2 * input_norms).sum()

    return Variance(
        design.variance(input_norms, scores, count, input_sum), design.variance(weight_norms, scores, count, weight_sum)
    )


def _channel_variance(strategy: ColumnSample, layer: _Layer) -> Variance:
    """Sum over groups, whose draws are independent and whose gradients are disjoint."""
    per_group = output_channels_per_group(layer.weight.shape, layer.geometry)
    if per_group < 2:
        nothing = torch.zeros((), dtype=torch.float64, device=layer.grad.device)
        return Variance(nothing, nothing)
    scores_O = strategy.evaluate_scores(channel_operands(layer.backward))
    scores_QO = scores_O.view(layer.geometry.groups, per_group)
    return Variance(
        _sum_over_groups(strategy, scores_QO, lambda weights: layer.input_gradient(_scaled(layer.grad, weights, 1))),
        _sum_over_groups(strategy, scores_QO, lambda weights: layer.weight_gradient(_scaled(layer.grad, weights, 1))),
    )


def _sum_over_groups(strategy: ColumnSample, scores_QO: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the variance of a gradient, given as a function of weights over the output channels."""
    groups, per_group = scores_QO.shape
    count = strategy.kept_count(per_group)
    identity = torch.eye(groups * per_group, dtype=torch.float64, device=scores_QO.device)
    total = identity.new_zeros(())
    for scores, masks in zip(scores_QO, identity.view(groups, per_group, -1), strict=True):

        def squared_norm(weights: Tensor, masks: Tensor = masks) -> Tensor:
            return gradient(weights.double() @ masks).square().sum()

        norms = torch.stack([squared_norm(one) for one in identity[:per_group, :per_group]])
        total = total + strategy.design.variance(norms, scores, count, squared_norm)
    return total


def _scaled(images: Tensor, weights: Tensor, dim: int) -> Tensor:
    shape = [1] * images.dim()
    shape[dim] = -1
    return images * weights.to(images.dtype).view(shape)


def _entry_input_variance(strategy: AbstractStrategy, layer: _Layer) -> Tensor:
    """Return the variance of dX where entries of G are masked independently; NaN where no law is stated."""
    if not isinstance(strategy, ElementMask) or layer.config.padding_mode != "zeros":
        return torch.full((), math.nan, dtype=torch.float64, device=layer.grad.device)
    # ||dX||**2 of a unit cotangent at (pixel, channel): the squared weights that do not fall on the padding.
    unit = layer.config.forward(torch.ones_like(layer.x), layer.weight.square(), None)
    # As a product with one group per channel, the law of dW sums exactly (variance of an entry) x (its squared norm).
    as_rows = [images.movedim(1, 0).flatten(1).unsqueeze(2) for images in (unit.sqrt(), layer.grad)]
    return strategy.law.variance(as_rows[0], as_rows[1], moment=Moment.COTANGENT).weight

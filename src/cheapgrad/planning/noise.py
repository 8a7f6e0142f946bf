"""Variance that a sketch adds to the whole gradient: in its own layers, and in all layers below them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops._convolution_geometry import as_matrix
from cheapgrad.ops._kept_images import entry_variance_of
from cheapgrad.ops.convolution import ConvolutionConfig
from cheapgrad.ops.plan import Plan as LayerPlan
from cheapgrad.planning.capture import Call
from cheapgrad.planning.passed_down import Noise, PassedDown, row_norms, scale_rows
from cheapgrad.planning.row_noise import measure_row_noise, row_squares, samples_rows
from cheapgrad.sketch import AbstractStrategy, ExampleSample, Moment, StochasticRounding

# Draws of a strategy whose noise is not computed from its atoms.
_DRAWS = 4
# Codes of more rows than these are judged by so many of them, drawn by the squared norms that meet their errors.
_CODED_ROWS = 384
_ROW_SEED = 20241102


@torch.no_grad()
def measure_cotangent_noise(
    chain: Sequence[Call],
    strategies: Sequence[AbstractStrategy],
    below: PassedDown,
    scale: Tensor | None = None,
    samples_bias: bool = False,
    is_folded: bool = False,
) -> list[Noise]:
    r"""Return the noise of each of several strategies for the cotangent of one chain of calls.

    Rows have `measure_row_noise`, examples of convolutions the same in the design's form. Other strategies are drawn a
    few times; below the layer, the energy of their error is multiplied by the amplification that was measured for rows.

    Args:
        chain: calls of layers that share one draw, the last one being where it is drawn.
        strategies: to choose from.
        below: tangents at the first call's input.
        scale: factor of every row of the cotangents (of every example, for convolutions): how large sketches above
            make them; None leaves them as they are.
        samples_bias: whether the gradient of a bias is summed over kept rows, as it is in every chain of several layers
            and in a layer whose input is stored by a strategy of its own.
        is_folded: as in `measure_row_noise`.
    """
    rows = [strategy for strategy in strategies if samples_rows(strategy, chain)]
    of_rows = iter(measure_row_noise(chain, rows, below, scale, samples_bias, is_folded) if rows else ())
    found = []
    for strategy in strategies:
        if samples_rows(strategy, chain):
            found.append(next(of_rows))
        elif isinstance(strategy, ExampleSample):
            found.append(_image_noise(chain[0], strategy, below, scale))
        elif len(chain) > 1:
            raise RuntimeError(f"{strategy!r} is not shared by the layers of a chain")
        else:
            found.append(_drawn_noise(chain[0], strategy, below).scaled(_energy(chain[0], scale)))
    return found


@torch.no_grad()
def measure_stored_noise(
    call: Call,
    strategy: AbstractStrategy,
    below: PassedDown,
    layers: Sequence[str] = (),
    scale: Tensor | None = None,
) -> Noise:
    """Return the noise of what is stored of a layer's input, by the strategy's law.

    Of itself it is in the layer's own weight alone. In a chain, the activation before the layer keeps codes of its
    slope as well, and their noise goes down.

    Args:
        call: the call.
        strategy: the strategy.
        below: tangents at the inputs of calls.
        layers: all layers that take the strategy.
        scale: as in `measure_cotangent_noise`.
    """
    if scale is not None:
        call = dataclasses.replace(call, cotangent=scale_rows(call, scale))
    own = _input_noise(_draw_rows(call, strategy), strategy)
    return own + _slope_noise(call, strategy, below, layers, scale)


def _draw_rows(call: Call, strategy: AbstractStrategy) -> Call:
    """Return a call of few of its rows, weighted to stand for all: the noise of codes is a sum over rows."""
    rows = call.input.numel() // max(1, call.input.shape[-1])
    if not isinstance(strategy, StochasticRounding) or not call.is_matrix or rows <= _CODED_ROWS:
        return call
    if call.input.shape[-1] % strategy.group:
        return call
    index_K, factor_K = _choose_rows(row_squares(call.use.cotangent))
    x_KI = call.input.reshape(rows, -1)[index_K]
    g_KO = call.use.cotangent.reshape(rows, -1)[index_K] * factor_K.to(call.use.cotangent.dtype).unsqueeze(1)
    return dataclasses.replace(call, input=x_KI, cotangent=g_KO)


def _choose_rows(energy_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows drawn with chances by their energy, half of them evenly, and the roots of their weights."""
    chances_N = energy_N.double().clamp_min(0)
    rows = len(chances_N)
    chances_N = 0.5 * chances_N / chances_N.sum().clamp_min(1e-300) + 0.5 / rows
    generator = torch.Generator(chances_N.device).manual_seed(_ROW_SEED)
    index_K = torch.multinomial(chances_N, _CODED_ROWS, replacement=True, generator=generator)
    return index_K, (1 / (chances_N[index_K] * _CODED_ROWS)).sqrt()


def joins_codes(call: Call, strategy: AbstractStrategy, layers: Sequence[str]) -> bool:
    """Tell whether a call and the one before it make a chain of codes.

    Args:
        call: the call.
        strategy: for what is stored.
        layers: all layers that take it.
    """
    before = call.before
    return isinstance(strategy, StochasticRounding) and before is not None and before.layer in layers


def _slope_noise(
    call: Call, strategy: AbstractStrategy, below: PassedDown, layers: Sequence[str], scale: Tensor | None
) -> Noise:
    """Return the noise of a coded slope: ``Σ_nj Var(f'_nj) dy_nj²``, times what meets it in the layers before.

    Errors of one row are taken as independent where several of them meet, which is below the layer before.
    """
    before, dy = call.before, call.input_gradient
    if not joins_codes(call, strategy, layers) or call.activation is None or before is None or dy is None:
        return Noise()
    stage, held = call.activation
    if stage.activation.slope_kind != "smooth" or not isinstance(strategy, StochasticRounding):
        # The branch of a piecewise linear activation is kept exactly.
        return Noise()
    dy_NO, held_NO = dy.reshape(-1, dy.shape[-1]), held.reshape(-1, held.shape[-1])
    factor_N = torch.ones(len(dy_NO), dtype=torch.float64, device=dy.device) if scale is None else scale
    index = slice(None)
    if len(dy_NO) > _CODED_ROWS and dy_NO.shape[-1] % strategy.group == 0:
        index, weight = _choose_rows(row_squares(dy_NO) * factor_N.square())
        factor_N = factor_N[index] * weight
    slope_NO = stage.activation.derivative(held_NO[index], held_NO[index])
    variance_NO = stage.activation.codec(strategy.bits).entry_variance(slope_NO) * dy_NO[index].double().square()
    variance_NO = variance_NO * factor_N.square().unsqueeze(1)
    module: Any = before.module
    own = 0.0
    if module.weight.requires_grad:
        own += before.weight_factor**2 * float(variance_NO.sum(1) @ row_squares(before.input)[index].double())
    if module.bias is not None and module.bias.requires_grad:
        own += before.bias_factor**2 * float(variance_NO.sum())
    weight_OI = module.weight if before.kind.name == "Linear" else module.weight.t()
    reached = float(variance_NO.sum(0) @ weight_OI.double().square().sum(1)) if before.wants_input else 0.0
    return Noise(own, below.amplification(before) * reached if reached else 0.0)


def _input_noise(call: Call, strategy: AbstractStrategy) -> Noise:
    if isinstance(strategy, StochasticRounding) and not call.is_matrix and call.module.groups == 1:
        return Noise(own=call.weight_factor**2 * _rounded_image_noise(call, strategy))
    kind = call.kind
    found = kind.predict_variance(call.module, strategy, Moment.STORED, call.use, strategy.new_memory())
    return Noise(own=call.weight_factor**2 * float(found.weight))


def _energy(call: Call, scale: Tensor | None) -> float:
    if scale is None:
        return 1.0
    squares = row_norms(call, call.use.cotangent).square()
    return float(scale.square() @ squares / squares.sum().clamp_min(1e-300))


def _rounded_image_noise(call: Call, strategy: StochasticRounding) -> float:
    """Return ``Σ_n Var(x_n) ‖patch of G that meets pixel n‖²``, without unfolding."""
    images, geometry = _geometry(call)
    module: Any = call.module
    cotangent = _batched(call, call.use.cotangent)
    norm_N = geometry.patch_norms_of_cotangent(cotangent, module.weight.shape[2:], images.shape)
    return float(as_matrix(entry_variance_of(strategy, images)).sum(1) @ norm_N.square())


def _geometry(call: Call) -> tuple[Tensor, Any]:
    module: Any = call.module
    cotangent = call.use.cotangent
    output_size = list(cotangent.shape[-len(module.kernel_size) :]) if module.transposed else None
    config = ConvolutionConfig.from_module(module, call.input, output_size)
    return config.resolve(_batched(call, call.input), module.weight)


def _batched(call: Call, images: Tensor) -> Tensor:
    weight: Any = call.module.weight
    return images if images.dim() == weight.dim() else images.unsqueeze(0)


def _image_noise(call: Call, strategy: ExampleSample, below: PassedDown, scale: Tensor | None) -> Noise:
    """Return the noise of sampled examples of a convolution."""
    images, geometry = _geometry(call)
    module: Any = call.module
    grad = _batched(call, call.use.cotangent if scale is None else scale_rows(call, scale))
    # Under autocast the input and the cotangent may be of different types.
    dtype = torch.promote_types(torch.promote_types(images.dtype, grad.dtype), torch.float32)
    images, grad = images.to(dtype), grad.to(dtype)
    examples, shape = images.shape[0], module.weight.shape
    norms = grad.flatten(1).double().norm(dim=1)
    scores = norms if strategy.scores is None else _image_scores(call, strategy, images, geometry, grad)
    count = strategy.kept_count(examples)

    def squared_norm_of_sum(weights: Tensor) -> Tensor:
        scaled = grad * weights.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1))
        return geometry.weight_gradient(images, scaled, shape).double().square().sum()

    own = 0.0
    if module.weight.requires_grad:
        each = [
            geometry.weight_gradient(image, part, shape).double().square().sum()
            for image, part in zip(images.split(1), grad.split(1), strict=True)
        ]
        variance = strategy.design.variance(torch.stack(each), scores, count, squared_norm_of_sum)
        own = call.weight_factor**2 * float(variance)
    products_ZB = below.of(call)
    if products_ZB is None:
        return Noise(own)
    if scale is not None:
        products_ZB = products_ZB * scale
    squares = products_ZB.square().mean(0)

    def below_squared(weights: Tensor) -> Tensor:
        return (products_ZB @ weights.double()).square().mean()

    return Noise(own, float(strategy.design.variance(squares, scores, count, below_squared)))


def _image_scores(call: Call, strategy: ExampleSample, images: Tensor, geometry: Any, grad: Tensor) -> Tensor:
    from cheapgrad.ops._convolution_products import Backward, example_operands
    from cheapgrad.ops._kept_images import WholeImages

    module: Any = call.module
    weight = module.weight.detach() if call.wants_input else None
    kept = WholeImages(images) if module.weight.requires_grad else None
    backward = Backward(geometry, images.shape, module.weight.shape, grad, weight, kept)
    return strategy.evaluate_scores(example_operands(backward))


def _drawn_noise(call: Call, strategy: AbstractStrategy, below: PassedDown) -> Noise:
    """Return the noise of a few draws of the layer's own backward pass."""
    module: Any = call.module
    x = call.input.clone().requires_grad_(call.wants_input)
    wanted = [tensor for tensor in (x, module.weight) if tensor.requires_grad]
    with torch.enable_grad():
        exact_output = call.kind.run(module, LayerPlan(), x)
        output = call.kind.run(module, LayerPlan(cotangent=strategy, cotangent_memory=strategy.new_memory()), x)
    exact = torch.autograd.grad(exact_output, wanted, call.use.cotangent)
    errors = torch.zeros(len(wanted), dtype=torch.float64)
    for _ in range(_DRAWS):
        drawn = torch.autograd.grad(output, wanted, call.use.cotangent, retain_graph=True)
        pairs = zip(drawn, exact, strict=True)
        errors += torch.stack([(one - other).double().square().sum().cpu() for one, other in pairs])
    errors /= _DRAWS
    of_input = float(errors[0]) if call.wants_input else 0.0
    of_weight = call.weight_factor**2 * float(errors[-1]) if module.weight.requires_grad else 0.0
    return Noise(of_weight, below.amplification(call) * of_input)

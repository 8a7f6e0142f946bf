"""Variance that a sketch adds to the whole gradient: in its own layers, and in all layers below them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.ops._convolution_geometry import as_matrix
from cheapgrad.ops.convolution import ConvolutionConfig
from cheapgrad.ops.plan import Plan as LayerPlan
from cheapgrad.planning.capture import Call
from cheapgrad.sketch import (
    AbstractStrategy,
    DenseMatrix,
    ExampleSample,
    Moment,
    Operands,
    StochasticRounding,
)
from cheapgrad.sketch._row_sampling import AbstractRowSampling, _weight_atoms
from cheapgrad.sketch.water_filling import water_filling

# Draws of a strategy whose noise is not computed from its atoms.
_DRAWS = 4


@dataclass(frozen=True)
class Noise:
    """Expected squared error of the gradient.

    Attributes:
        own: of the parameters of the layers that are sketched.
        passed_down: of the parameters of all layers below them.
    """

    own: float = 0.0
    passed_down: float = 0.0

    @property
    def total(self) -> float:
        """Of all parameters."""
        return self.own + self.passed_down

    def scaled(self, factor: float) -> Noise:
        """Return it multiplied by a factor."""
        return Noise(self.own * factor, self.passed_down * factor)

    def __add__(self, other: Noise) -> Noise:
        return Noise(self.own + other.own, self.passed_down + other.passed_down)


class PassedDown:
    """What the rows of a gradient dX become further down, projected on random directions.

    For a row n of dX, ``v_zn = ⟨u_zn, dX_n⟩`` is the product of z with what that row alone adds to the gradients of all
    parameters below; over z its square has the expectation ``‖Jᵀ dX_n‖²``. For convolutions a row is an example.
    """

    def __init__(self) -> None:
        self._products: dict[int, list[Tensor]] = {}

    def take(self, call: Call, tangent: Tensor) -> None:
        """Take in the tangent of a call's input."""
        if call.input_gradient is None:
            return
        product = tangent * call.input_gradient
        rows = product.sum(-1).flatten() if call.is_matrix else product.flatten(1).sum(1)
        self._products.setdefault(id(call), []).append(rows.double())

    def of(self, call: Call) -> Tensor | None:
        """Return v for all probes and rows, shape ``[probes, N]``; None where nothing is below."""
        products = self._products.get(id(call))
        return None if products is None else torch.stack(products)

    def amplification(self, call: Call) -> float:
        """Return the squared error below for each unit of squared error in the rows of dX."""
        products_ZN = self.of(call)
        if products_ZN is None or call.input_gradient is None:
            return 0.0
        squared_norm = float(call.input_gradient.double().square().sum())
        return float(products_ZN.square().sum(1).mean()) / squared_norm if squared_norm else 0.0


@torch.no_grad()
def measure_cotangent_noise(
    chain: Sequence[Call],
    strategy: AbstractStrategy,
    below: PassedDown,
    scale: Tensor | None = None,
    samples_bias: bool = False,
) -> Noise:
    r"""Return the noise of a strategy that acts on the cotangent of one chain of calls.

    Sampled rows (or examples) n with inclusion probabilities p stand for what they add to the whole gradient,
    ``a_n = (g_n x_nᵀ of every layer of the chain, Jᵀ dX_n)``: ``Σ_nm (p_nm / (p_n p_m) − 1) ⟨a_n, a_m⟩``, in the form
    that the design's law gives it. Other strategies are drawn a few times; below the layer, the energy of their error
    is multiplied by the amplification that was measured for rows.

    Args:
        chain: calls of layers that share one draw, the last one being where it is drawn.
        strategy: the strategy.
        below: tangents at the first call's input.
        scale: factor of every row of the cotangents (of every example, for convolutions): how large sketches above
            make them; None leaves them as they are.
        samples_bias: whether the gradient of a bias is summed over kept rows, as it is in every chain of several layers
            and in a layer whose input is stored by a strategy of its own.
    """
    if isinstance(strategy, ExampleSample) and not chain[0].is_matrix:
        return _image_noise(chain[0], strategy, below, scale)
    if isinstance(strategy, AbstractRowSampling) and chain[0].is_matrix:
        return _row_noise(chain, strategy, below, scale, samples_bias or len(chain) > 1)
    if len(chain) > 1:
        raise RuntimeError(f"{strategy!r} is not shared by the layers of a chain")
    return _drawn_noise(chain[0], strategy, below).scaled(_energy(chain[0], scale))


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
    return _input_noise(call, strategy) + _slope_noise(call, strategy, below, layers, scale)


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
    slope = stage.activation.derivative(held, held)
    variance = stage.activation.codec(strategy.bits).entry_variance(slope) * dy.double().square()
    variance_NO = variance.reshape(-1, variance.shape[-1])
    if scale is not None:
        variance_NO = variance_NO * scale.square().unsqueeze(1)
    module: Any = before.module
    own = 0.0
    if module.weight.requires_grad:
        own += float(variance_NO.sum(1) @ row_norms(before, before.input).square())
    if module.bias is not None and module.bias.requires_grad:
        own += float(variance_NO.sum())
    weight_OI = module.weight if before.kind.name == "Linear" else module.weight.t()
    reached = float(variance_NO.sum(0) @ weight_OI.double().square().sum(1)) if before.wants_input else 0.0
    return Noise(own, below.amplification(before) * reached if reached else 0.0)


def _input_noise(call: Call, strategy: AbstractStrategy) -> Noise:
    if isinstance(strategy, StochasticRounding) and not call.is_matrix and call.module.groups == 1:
        return Noise(own=_rounded_image_noise(call, strategy))
    kind = call.kind
    return Noise(own=float(kind.variance(call.module, strategy, Moment.STORED, call.use, strategy.new_memory()).weight))


def row_norms(call: Call, cotangent: Tensor) -> Tensor:
    """Return the norms of the rows of a cotangent, of its examples for a convolution, in float64.

    Args:
        call: of the layer.
        cotangent: in the shape of its output.
    """
    rows = cotangent.reshape(-1, cotangent.shape[-1]) if call.is_matrix else cotangent.flatten(1)
    return rows.double().norm(dim=1)


def scale_rows(call: Call, scale: Tensor) -> Tensor:
    """Return the call's cotangent with its rows, or examples, multiplied by factors.

    Args:
        call: of the layer.
        scale: one factor for each.
    """
    cotangent = call.use.cotangent
    shape = (*cotangent.shape[:-1], 1) if call.is_matrix else (-1, *[1] * (cotangent.dim() - 1))
    return cotangent * scale.to(cotangent.dtype).view(shape)


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
    return float(strategy.entry_variance(as_matrix(images)).sum(1) @ norm_N.square())


def _geometry(call: Call) -> tuple[Tensor, Any]:
    module: Any = call.module
    cotangent = call.use.cotangent
    output_size = list(cotangent.shape[-len(module.kernel_size) :]) if module.transposed else None
    config = ConvolutionConfig.from_module(module, call.input, output_size)
    return config.resolve(_batched(call, call.input), module.weight)


def _batched(call: Call, images: Tensor) -> Tensor:
    weight: Any = call.module.weight
    return images if images.dim() == weight.dim() else images.unsqueeze(0)


def _row_noise(
    chain: Sequence[Call],
    strategy: AbstractRowSampling,
    below: PassedDown,
    scale: Tensor | None,
    samples_bias: bool,
) -> Noise:
    matrices = [_matrices(call, scale) for call in chain]
    operands = _operands(chain, *matrices[-1])
    scores, block = strategy._block_scores(operands, matrices[-1][1].shape[0])
    count = strategy.kept_count(scores.shape[-1])

    def variance(squared_norms: Tensor, squared_norm_of_sum: Callable[[Tensor], Tensor]) -> float:
        return float(strategy.design.variance(squared_norms.double(), scores, count, squared_norm_of_sum))

    own = 0.0
    for call, (x_NI, g_NO) in zip(chain, matrices, strict=True):
        module: Any = call.module
        if module.weight.requires_grad:
            squares, of_sum = _product_atoms(x_NI, g_NO, block)
            own += variance(squares, of_sum)
        if samples_bias and module.bias is not None and module.bias.requires_grad:
            own += variance(*_sum_atoms(g_NO, block))
    products_ZN = below.of(chain[0])
    if products_ZN is None:
        return Noise(own)
    if scale is not None:
        products_ZN = products_ZN * scale
    return Noise(own, variance(*_scalar_atoms(products_ZN.view(len(products_ZN), -1, block).sum(2))))


def _operands(chain: Sequence[Call], stored_NI: Tensor, cotangent_NO: Tensor) -> Operands:
    """Return what the draw at the end of a chain sees."""
    top = chain[-1]
    if len(chain) > 1:
        return Operands(Moment.COTANGENT, None, cotangent_NO, examples=top.use.examples)
    weight: Any = top.module.weight
    stored = DenseMatrix(stored_NI) if weight.requires_grad else None
    weight_OI = weight.detach() if top.kind.name == "Linear" else weight.detach().t()
    needed_OI = weight_OI if top.wants_input else None
    return Operands(Moment.COTANGENT, stored, cotangent_NO, needed_OI, top.use.examples)


@torch.no_grad()
def draw_weights(chain: Sequence[Call], strategy: AbstractStrategy, scale: Tensor | None) -> Tensor | None:
    """Return ``1 / √p_n`` for every row of a chain: how much larger the rows are that the codes below meet.

    Args:
        chain: calls of layers that share one draw.
        strategy: of their cotangent.
        scale: as in `measure_cotangent_noise`.
    """
    if not isinstance(strategy, AbstractRowSampling) or not chain[0].is_matrix:
        return None
    matrices = _matrices(chain[-1], scale)
    scores, block = strategy._block_scores(_operands(chain, *matrices), matrices[1].shape[0])
    probabilities = water_filling(scores, strategy.kept_count(scores.shape[-1]))
    inverse = torch.where(probabilities > 0, 1 / probabilities, 0.0).sqrt()
    return inverse.repeat_interleave(block)


def _matrices(call: Call, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    x_NI = call.input.reshape(-1, call.input.shape[-1])
    cotangent = call.use.cotangent if scale is None else scale_rows(call, scale)
    g_NO = cotangent.reshape(x_NI.shape[0], -1)
    dtype = torch.promote_types(x_NI.dtype, torch.float32)
    return x_NI.to(dtype), g_NO.to(dtype)


Atoms = tuple[Tensor, Callable[[Tensor], Tensor]]


def _product_atoms(x_NI: Tensor, g_NO: Tensor, block: int) -> Atoms:
    """Return the atoms ``g_n x_nᵀ``, or their sums over blocks of rows."""
    if block > 1:
        return _weight_atoms(x_NI.unsqueeze(0), g_NO.unsqueeze(0), block)
    squares = x_NI.square().sum(1) * g_NO.square().sum(1)
    return squares, lambda weights: ((g_NO * weights.to(g_NO.dtype).unsqueeze(1)).mT @ x_NI).double().square().sum()


def _sum_atoms(g_NO: Tensor, block: int) -> Atoms:
    """Return the atoms of the gradient of a bias."""
    sums = g_NO if block == 1 else g_NO.view(-1, block, g_NO.shape[1]).sum(1)
    return sums.square().sum(1), lambda weights: (weights.to(sums.dtype) @ sums).double().square().sum()


def _scalar_atoms(products_ZN: Tensor) -> Atoms:
    """Return atoms of which only products with random directions are known."""
    return products_ZN.square().mean(0), lambda weights: (products_ZN @ weights.double()).square().mean()


def _image_noise(call: Call, strategy: ExampleSample, below: PassedDown, scale: Tensor | None) -> Noise:
    """Return the noise of sampled examples of a convolution."""
    images, geometry = _geometry(call)
    module: Any = call.module
    grad = _batched(call, call.use.cotangent if scale is None else scale_rows(call, scale))
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
        own = float(strategy.design.variance(torch.stack(each), scores, count, squared_norm_of_sum))
    products_ZB = below.of(call)
    if products_ZB is None:
        return Noise(own)
    if scale is not None:
        products_ZB = products_ZB * scale
    return Noise(own, float(strategy.design.variance(*_ordered(_scalar_atoms(products_ZB), scores, count))))


def _ordered(atoms: Atoms, scores: Tensor, count: int) -> tuple[Tensor, Tensor, int, Callable[[Tensor], Tensor]]:
    return atoms[0], scores, count, atoms[1]


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
    of_weight = float(errors[-1]) if module.weight.requires_grad else 0.0
    return Noise(of_weight, below.amplification(call) * of_input)

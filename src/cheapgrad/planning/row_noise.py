"""Variance of sampled rows: one chain of calls, all budgets of a strategy at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from cheapgrad.planning.capture import Call
from cheapgrad.planning.passed_down import Noise, PassedDown, scale_rows
from cheapgrad.sketch import AbstractStrategy, DenseMatrix, Moment, Operands
from cheapgrad.sketch._row_sampling import AbstractRowSampling, _weight_atoms
from cheapgrad.sketch.designs._abstract import AbstractFixedSizeDesign, approximate_variance
from cheapgrad.sketch.water_filling import water_filling

# Features are folded to so many with random signs, where cross terms need not be exact.
_FOLD = 48
_FOLD_SEED = 20241101


def samples_rows(strategy: AbstractStrategy, chain: Sequence[Call]) -> TypeGuard[AbstractRowSampling]:
    """Tell whether a strategy samples rows of plain matrices."""
    return isinstance(strategy, AbstractRowSampling) and chain[0].is_matrix


@torch.no_grad()
def measure_row_noise(
    chain: Sequence[Call],
    strategies: Sequence[AbstractRowSampling],
    below: PassedDown,
    scale: Tensor | None = None,
    samples_bias: bool = False,
    is_folded: bool = False,
) -> list[Noise]:
    r"""Return the noise of every one of several row-sampling strategies on one chain.

    Rows n with inclusion probabilities p stand for what they add to the whole gradient, ``a_n = (g_n x_nᵀ of every
    layer of the chain, Jᵀ dX_n)``: ``Σ_nm (p_nm / (p_n p_m) − 1) ⟨a_n, a_m⟩``, in the form that the design gives it. It
    is linear in the products ``⟨a_n, a_m⟩``, so that all layers are one sum.

    Args:
        chain: calls of layers that share one draw, the last one being where it is drawn.
        strategies: their budgets and scores.
        below: tangents at the first call's input.
        scale: factor of every row of the cotangents, or None.
        samples_bias: whether a layer's bias gradient is summed over kept rows; it always is in longer chains.
        is_folded: whether ``‖Σ_n c_n a_n‖²`` is estimated from features folded with random signs: unbiased over the
            signs, within a fifth of its size for matrices of low rank, and much cheaper.
    """
    matrices = [_matrices(call, scale) for call in chain]
    draws = [_Draw.of(chain, strategy, matrices[-1]) for strategy in strategies]
    found: dict[int, Noise] = {}
    for block in dict.fromkeys(draw.block for draw in draws):
        own = _own_atoms(chain, matrices, block, samples_bias or len(chain) > 1, is_folded)
        products_ZN = below.of(chain[0])
        if products_ZN is not None:
            products_ZN = products_ZN if scale is None else products_ZN * scale
            products_ZN = products_ZN.view(len(products_ZN), -1, block).sum(2)
        chosen = [position for position, draw in enumerate(draws) if draw.block == block]
        owns = _variances([draws[position] for position in chosen], own)
        below_them = [0.0] * len(chosen)
        if products_ZN is not None:
            below_them = _variances([draws[position] for position in chosen], _scalar_atoms(products_ZN))
        found.update((position, Noise(*pair)) for position, *pair in zip(chosen, owns, below_them, strict=True))
    return [found[position] for position in range(len(draws))]


@dataclass(frozen=True)
class _Draw:
    """How a strategy draws the rows of one chain."""

    strategy: AbstractRowSampling
    scores: Tensor
    block: int
    probabilities: Tensor

    @classmethod
    def of(
        cls,
        chain: Sequence[Call],
        strategy: AbstractRowSampling,
        matrices: tuple[Tensor, Tensor],
        known: dict[object, tuple[Tensor, int]] | None = None,
    ) -> _Draw:
        scored = dataclasses.replace(strategy, keep=0.5)
        known = {} if known is None else known
        if scored not in known:
            known[scored] = strategy._block_scores(_operands(chain, *matrices), matrices[1].shape[0])
        scores, block = known[scored]
        return cls(strategy, scores, block, water_filling(scores, strategy.kept_count(scores.shape[-1])))

    @property
    def excess(self) -> Tensor:
        """``1/p − 1``, zero where nothing is drawn."""
        return torch.where(self.probabilities > 0, 1 / self.probabilities - 1, 0.0)


def row_noise_sizes(chain: Sequence[Call], strategies: Sequence[AbstractRowSampling]) -> list[tuple[float, float]]:
    """Return ``Σ_n (1/p_n − 1) ‖a_n‖²`` for every strategy, noise but for cross terms: of the chain, and of its dX.

    Batches differ by it: few rows that carry the gradient make it large. The second one is still to be multiplied by
    the squared norm that a unit of dX has below.

    Args:
        chain: calls of layers that share one draw.
        strategies: their budgets and scores.
    """
    rows = chain[-1].use.cotangent.numel() // chain[-1].use.cotangent.shape[-1]
    energy = torch.zeros(2, rows, dtype=torch.float64, device=chain[-1].input.device)
    for call in chain:
        energy[0] += row_squares(call.input) * row_squares(call.use.cotangent) * call.weight_factor**2
    if chain[0].input_gradient is not None:
        energy[1] += row_squares(chain[0].input_gradient)
    matrices, known = _matrices(chain[-1], None), {}
    sizes = []
    for strategy in strategies:
        draw = _Draw.of(chain, strategy, matrices, known)
        own, below = (energy.view(2, -1, draw.block).sum(2) @ draw.excess).tolist()
        sizes.append((own, below))
    return sizes


def row_squares(tensor: Tensor) -> Tensor:
    """Return the squared norms of the rows of a tensor, all but the last axis being one."""
    return torch.linalg.vector_norm(tensor.reshape(-1, tensor.shape[-1]), dim=1).square()


@torch.no_grad()
def draw_weights(chain: Sequence[Call], strategy: AbstractStrategy, scale: Tensor | None) -> Tensor | None:
    """Return ``1 / √p_n`` for every row of a chain: how much larger the rows are that the codes below meet.

    Args:
        chain: calls of layers that share one draw.
        strategy: of their cotangent.
        scale: as in `measure_row_noise`.
    """
    if not isinstance(strategy, AbstractRowSampling) or not chain[0].is_matrix:
        return None
    draw = _Draw.of(chain, strategy, _matrices(chain[-1], scale))
    inverse = torch.where(draw.probabilities > 0, 1 / draw.probabilities, 0.0).sqrt()
    return inverse.repeat_interleave(draw.block)


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


def _matrices(call: Call, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    x_NI = call.input.reshape(-1, call.input.shape[-1])
    cotangent = call.use.cotangent if scale is None else scale_rows(call, scale)
    g_NO = cotangent.reshape(x_NI.shape[0], -1)
    dtype = torch.promote_types(x_NI.dtype, torch.float32)
    return x_NI.to(dtype), g_NO.to(dtype)


@dataclass(frozen=True)
class _Atoms:
    """Squared norms ``[N]``, and weights ``[S, N]`` to the squared norms ``[S]`` of weighted sums."""

    squared_norms: Tensor
    squared_norms_of_sums: Callable[[Tensor], Tensor]


def _variances(draws: Sequence[_Draw], atoms: _Atoms) -> list[float]:
    """Return the design's variance for every draw; those with a closed form in p together."""
    variances = [0.0] * len(draws)
    together = [position for position, draw in enumerate(draws) if _has_closed_form(draw)]
    if together:
        probabilities = torch.stack([draws[position].probabilities for position in together])
        values = approximate_variance(atoms.squared_norms, probabilities, atoms.squared_norms_of_sums)
        for position, value in zip(together, values.tolist(), strict=True):
            variances[position] = value
    for position, draw in enumerate(draws):
        if position not in together:
            count = draw.strategy.kept_count(draw.scores.shape[-1])
            variances[position] = float(
                draw.strategy.design.variance(
                    atoms.squared_norms, draw.scores, count, lambda w: atoms.squared_norms_of_sums(w.unsqueeze(0))[0]
                )
            )
    return variances


def _has_closed_form(draw: _Draw) -> bool:
    design = draw.strategy.design
    return isinstance(design, AbstractFixedSizeDesign) and design.is_approximated(draw.probabilities)


def _own_atoms(
    chain: Sequence[Call], matrices: Sequence[tuple[Tensor, Tensor]], block: int, has_biases: bool, is_folded: bool
) -> _Atoms:
    """Return the atoms of all weights and biases of a chain, as one vector each."""
    squares: list[Tensor] = []
    sums: list[Callable[[Tensor], Tensor]] = []
    for call, (x_NI, g_NO) in zip(chain, matrices, strict=True):
        module: Any = call.module
        if module.weight.requires_grad:
            own_NO = _in_units(g_NO, call.weight_factor)
            squares.append(_product_squares(x_NI, own_NO, block))
            pair = (_fold(x_NI, 0), _fold(own_NO, 1)) if is_folded else (x_NI, own_NO)
            sums.append(_product_sums(*pair, block))
        if has_biases and module.bias is not None and module.bias.requires_grad:
            own_NO = _in_units(g_NO, call.bias_factor)
            sums_NO = own_NO if block == 1 else own_NO.view(-1, block, own_NO.shape[1]).sum(1)
            squares.append(sums_NO.square().sum(1).double())
            sums.append(_plain_sums(sums_NO))
    if not squares:
        empty = torch.zeros(matrices[-1][1].shape[0] // block, dtype=torch.float64, device=matrices[-1][1].device)
        return _Atoms(empty, lambda weights: weights.new_zeros(len(weights)))
    return _Atoms(torch.stack(squares).sum(0), lambda weights: torch.stack([one(weights) for one in sums]).sum(0))


def _in_units(cotangent: Tensor, factor: float) -> Tensor:
    return cotangent if factor == 1 else cotangent * factor


def _product_squares(x_NI: Tensor, g_NO: Tensor, block: int) -> Tensor:
    """Return the squared norms of ``g_n x_nᵀ``, or of their sums over blocks of rows."""
    if block > 1:
        return _weight_atoms(x_NI.unsqueeze(0), g_NO.unsqueeze(0), block)[0].double()
    return (row_squares(x_NI) * row_squares(g_NO)).double()


def _product_sums(x_NI: Tensor, g_NO: Tensor, block: int) -> Callable[[Tensor], Tensor]:
    """Return ``w -> ‖Σ_n w_n g_n x_nᵀ‖²``."""

    def squared_norm(weights_N: Tensor) -> Tensor:
        weights_N = weights_N.to(g_NO.dtype).repeat_interleave(block) if block > 1 else weights_N.to(g_NO.dtype)
        return torch.linalg.vector_norm((g_NO * weights_N.unsqueeze(1)).mT @ x_NI, dtype=torch.float64).square()

    return lambda weights: torch.stack([squared_norm(weights_N) for weights_N in weights])


def _plain_sums(sums_NO: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda weights: (weights.to(sums_NO.dtype) @ sums_NO).double().square().sum(1)


def _scalar_atoms(products_ZN: Tensor) -> _Atoms:
    """Return atoms of which only products with random directions are known."""
    return _Atoms(products_ZN.square().mean(0), lambda weights: (weights.double() @ products_ZN.T).square().mean(1))


def _fold(matrix: Tensor, side: int) -> Tensor:
    """Return ``[N, _FOLD]`` sums of features with random signs: squared norms are kept in expectation."""
    features = matrix.shape[1]
    if features <= _FOLD:
        return matrix
    generator = torch.Generator().manual_seed(_FOLD_SEED + side)
    signs = (2 * torch.randint(0, 2, (features,), generator=generator) - 1).to(matrix)
    padded = torch.nn.functional.pad(matrix * signs, (0, -features % _FOLD))
    return padded.view(matrix.shape[0], -1, _FOLD).sum(1)

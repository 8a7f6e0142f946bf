"""A trial inside a batch: half of the examples keep all their rows, and what the others' gradients gain is noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cheapgrad.sketch import AbstractDesign, Selection
from cheapgrad.sketch.budget import count_kept
from cheapgrad.sketch.designs._abstract import SquaredNormOfSum
from cheapgrad.sketch.water_filling import water_filling

#: Keep fractions at which the variance of a layer's draw is evaluated; in between it is interpolated.
KEEPS = (1, 0.97, 0.93, 0.88, 0.82, 0.75, 0.67, 0.59, 0.5, 0.42, 0.35, 0.29, 0.23, 0.18, 0.13, 0.09, 0.05, 0.03, 0.01)
#: Names of the numbers that a pass adds up, in the order of `Trial.totals`.
TOTALS = ("passes", "gain", "predicted_gain", "exact", "mean", "shared", "predicted_noise")
# Pairs of examples whose gradients are measured in a pass.
_MOST_PAIRS = 32
# Layers are weighed by their noise at their budget, or at this one: at a full budget there is none to be seen.
_LARGEST_KEEP = 0.9
_TINY = 1e-300


class Trial:
    """The measured backward passes between two optimizer steps.

    Args:
        seed: decides by fair coins which example of a pair keeps all rows.
        count_examples: returns B, the number of examples in the batch of the running pass, or None if unknown.
        layers: None to compare halves; or the layers whose curves are looked at, and nothing else.

    Attributes:
        totals: `TOTALS`, summed over the passes; see `Measurement`.
        curves: for each layer its draw's variance at `KEEPS` and the squared norm of its cotangent, summed.
        layers: for each layer the noise of its draw in its weights' gradients relative to all, and in its cotangent.
        obstacle: why a pass could not be measured, or an empty string.
    """

    def __init__(
        self, seed: int, count_examples: Callable[[], int | None], layers: frozenset[str] | None = None
    ) -> None:
        self.compares = layers is None
        self._layers = layers or frozenset()
        self._generator = torch.Generator().manual_seed(seed)
        self._count_examples = count_examples
        self._pass: _Pass | None = None
        self.totals = torch.zeros(len(TOTALS), dtype=torch.float64)
        self.curves: dict[str, Tensor] = {}
        self.layers: dict[str, Tensor] = {}
        self.obstacle = "no backward pass has drawn rows since the last step"

    def see_curve(self, layer: str, scores: Tensor) -> None:
        """Take in the scores of a draw in a pass without halves."""
        if layer in self._layers and scores.dim() == 1:
            self.curves[layer] = self.curves.get(layer, 0) + draw_curve(scores.double()).cpu()

    def join_pass(self, scores: Tensor) -> _Pass | None:
        """Return the backward pass that runs now, which ends by itself; None if it cannot be measured."""
        if self._pass is None:
            examples = self._count_examples()
            if examples is None or examples < 4 or scores.dim() != 1 or scores.shape[0] % examples:
                self.obstacle = (
                    f"a draw among {scores.shape[-1]} rows of {examples} examples; at least 4 examples of equally many "
                    "rows are needed"
                )
                return None
            self._pass = _Pass(scores.view(examples, -1), self._generator)
            # Autograd calls it when the pass that runs now is over.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)  # type: ignore[attr-defined] - private
        return None if scores.shape[0] % self._pass.examples else self._pass

    def _end_pass(self) -> None:
        if self._pass is not None:
            totals = self._pass.totals()
            if bool(totals.isfinite().all()):
                self.totals += totals
                for layer, curve in self._pass.curves.items():
                    self.curves[layer] = self.curves.get(layer, 0) + curve.cpu()
                for layer, pair in self._pass.relative_layers().items():
                    self.layers[layer] = self.layers.get(layer, 0) + pair
        self._pass = None


class _Pass:
    """One backward pass: which examples keep all rows, and what was seen of their gradients.

    Examples are paired with the one nearest in size, by the cotangent where it enters; a coin decides which of the two
    keeps all rows.
    """

    def __init__(self, scores_BN: Tensor, generator: torch.Generator) -> None:
        self.examples = scores_BN.shape[0]
        sizes_B = scores_BN.square().sum(1)
        pairs = self.examples // 2
        ordered = sizes_B.argsort(descending=True, stable=True)[: 2 * pairs].view(pairs, 2)
        coins = torch.randint(0, 2, (pairs, 1), generator=generator).to(ordered.device)
        exact, sampled = ordered.gather(1, coins).squeeze(1), ordered.gather(1, 1 - coins).squeeze(1)
        self.is_exact = torch.zeros(self.examples, dtype=torch.bool, device=ordered.device)
        self.is_exact[exact] = True
        chosen = torch.randperm(pairs, generator=generator)[:_MOST_PAIRS].to(ordered.device)
        self._measured = torch.cat([exact[chosen], sampled[chosen]])
        self._place = torch.full((self.examples,), -1, device=ordered.device)
        self._place[self._measured] = torch.arange(len(self._measured), device=ordered.device)
        self._sizes = sizes_B[self._measured].view(2, -1)
        self._squares = torch.zeros_like(self._sizes)
        self._noise = torch.zeros_like(self._sizes)
        self._gains: tuple[str, Tensor] | None = None
        #: For each layer the noise that its draw adds to its weights' gradients, and to the cotangent's rows, relative.
        self.layers: dict[str, Tensor] = {}
        self._sums = sizes_B.new_zeros(3)
        self._shared = sizes_B.new_zeros(())
        self.curves: dict[str, Tensor] = {}

    def see_draw(self, layer: str, scores_BN: Tensor, shares: tuple[float, float]) -> None:
        """Take in the scores of a draw, by example, and the shares of rows kept: in the trial, and at other steps."""
        # Where rows vanish that a draw above has left out, this one adds nothing of its own.
        is_zero = (scores_BN == 0).double().mean(1)
        vanished = is_zero[~self.is_exact].mean() - is_zero[self.is_exact].mean()
        if bool(vanished > 0.5 * (1 - shares[0])) and shares[0] < 1:
            return
        scores = scores_BN.flatten()
        self.curves[layer] = self.curves.get(layer, 0) + draw_curve(scores)
        # What the examples would have gained, had all of them been drawn from alike.
        usual = min(shares[1], _LARGEST_KEEP)
        gains_BN = torch.stack([_row_gains(scores, share).view_as(scores_BN) for share in (shares[0], usual)])
        self._gains = layer, gains_BN
        squares_BN = scores_BN.square()
        relative = (gains_BN[1] * squares_BN).sum() / squares_BN.sum().clamp_min(_TINY)
        self._note_layer(layer, relative.new_zeros(()), relative)
        self._shared = self._shared + _spared_share(scores, usual, self.examples)

    def see_product(self, index_K: Tensor, rows: int, grad_KO: Tensor, stored_KI: Tensor) -> None:
        """Take in the factors of a weight's gradient on the kept rows; an example has `rows` of them."""
        place_K = self._place[index_K // rows]
        chosen = (place_K >= 0).nonzero().squeeze(1)
        target = place_K[chosen] * rows + index_K[chosen] % rows
        count = len(self._measured)
        grad, stored = (
            _at_least_single(matrix).new_zeros(count * rows, matrix.shape[1]) for matrix in (grad_KO, stored_KI)
        )
        # A row that is drawn twice has its weight twice, and is stored once.
        grad.index_add_(0, target, _at_least_single(grad_KO[chosen]))
        stored.index_copy_(0, target, _at_least_single(stored_KI[chosen]))
        squares = _squared_norms(grad.view(count, rows, -1), stored.view(count, rows, -1))
        self._squares += squares.view(2, -1)
        if self._gains is not None:
            layer, gains_BN = self._gains
            half = count // 2
            rows_BN = (grad.square().sum(1) * stored.square().sum(1)).view(count, rows)[:half].double()
            noise = (gains_BN[:, self._measured[:half]] * rows_BN).sum(2)
            self._noise += noise
            self._note_layer(layer, noise[1].sum(), noise.new_zeros(()))
        mean = ((grad.mT @ stored).double().square().sum() - squares.sum()) / (count * (count - 1))
        self._sums += torch.stack([squares[: count // 2].mean(), mean, mean * self._shared])

    def _note_layer(self, layer: str, noise: Tensor, relative: Tensor) -> None:
        self.layers[layer] = self.layers.get(layer, 0) + torch.stack([noise, relative])

    def relative_layers(self) -> dict[str, Tensor]:
        """Return `layers`, the noise relative to the squared gradients of the exact half."""
        scale = self._squares[0].sum().clamp_min(_TINY)
        return {layer: torch.stack([pair[0] / scale, pair[1]]).cpu() for layer, pair in self.layers.items()}

    def totals(self) -> Tensor:
        """Return the pass's share of `TOTALS`."""
        relative = self._squares / self._sizes.clamp_min(_TINY)
        total = self._squares[0].sum().clamp_min(_TINY)
        noise = self._noise[0] / self._squares[0].clamp_min(_TINY)
        # Near the inverse of the variance of what is compared, which grows with the cube of 1 / p.
        weight = torch.where(self._sizes.amin(0) > 0, noise / (1 + noise) ** 3, 0.0)
        scale = (total / self._sizes[0].sum().clamp_min(_TINY)).clamp_min(_TINY)
        gain = (weight * (relative[1] - relative[0])).sum() / scale
        predicted = (weight * noise * relative[0]).sum() / scale
        one = torch.ones_like(gain)
        exact, mean, shared = self._sums
        exact = exact.clamp_min(_TINY)
        return torch.stack(
            [one, gain, predicted, one, mean / exact, shared / exact, self._noise[1].sum() / total]
        ).cpu()


def draw_curve(scores: Tensor) -> Tensor:
    """Return `cheapgrad.sketch.minimum_variance` for every fraction of `KEEPS`, and the scores' squared norm."""
    size = scores.numel()
    descending = scores.sort(descending=True).values
    tail_sums = torch.cat([descending.flip(0).cumsum(0).flip(0), descending.new_zeros(1)])
    tail_squares = torch.cat([descending.square().flip(0).cumsum(0).flip(0), descending.new_zeros(1)])
    counts = torch.tensor([count_kept(keep, size) for keep in KEEPS], device=scores.device).unsqueeze(1)
    remaining = counts - torch.arange(size, device=scores.device)
    certain = (remaining * descending > tail_sums[:-1]).sum(1, keepdim=True)
    left = (counts - certain).clamp(min=1)
    curve = (tail_sums[certain].square() / left - tail_squares[certain]).squeeze(1)
    curve = torch.where(counts.squeeze(1) >= size, 0.0, curve.clamp_min(0.0))
    return torch.cat([curve, scores.square().sum().view(1)])


def _row_gains(scores: Tensor, keep: float) -> Tensor:
    """Return ``1/p_n - 1`` for a draw of the share `keep`; 0 for rows that are never drawn, and are zero."""
    chances = water_filling(scores, count_kept(keep, scores.numel()))
    return torch.where(chances > 0, 1 / chances.clamp_min(_TINY) - 1, 0.0)


def _spared_share(scores: Tensor, keep: float, examples: int) -> Tensor:
    """Return by how much the fixed size of a draw lowers the variance of the batch's sum, over ``B ‖E a_b‖²``.

    ``Σ_nm cov(n, m) <a_n, a_m> / (p_n p_m) = -‖Σ (1 - p_n) a_n‖² / Σ p_n (1 - p_n)`` off the diagonal, with one mean p,
    weighted by the scores, taken out of the sum.
    """
    chances = water_filling(scores, count_kept(keep, scores.numel()))
    mean_chance = (chances * scores).sum() / scores.sum().clamp_min(_TINY)
    dispersion = (chances * (1 - chances)).sum()
    return torch.where(dispersion > 1e-6, (1 - mean_chance).square() * examples / dispersion.clamp_min(1e-6), 0.0)


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _squared_norms(grad_BNO: Tensor, stored_BNI: Tensor) -> Tensor:
    """Return ``‖G_b.T X_b‖²`` for every example b, through whichever matrices are smaller."""
    rows, outputs, inputs = *grad_BNO.shape[1:], stored_BNI.shape[2]
    if rows * (outputs + inputs) < outputs * inputs:
        return ((grad_BNO @ grad_BNO.mT) * (stored_BNI @ stored_BNI.mT)).double().sum((1, 2))
    return (grad_BNO.mT @ stored_BNI).double().square().sum((1, 2))


@dataclass(frozen=True, repr=False)
class TrialDesign(AbstractDesign):
    """Keep all rows of half of the examples, and draw among the others' as `base` does.

    Unbiased as `base` is: a row that is always kept has weight 1.

    Args:
        base: how the others' rows are drawn.
        trial: takes in what it shows.
        layer: whose rows they are.
        keep: the layer's budget outside of trials.
    """

    base: AbstractDesign
    trial: Trial = field(compare=False)
    layer: str = field(compare=False)
    keep: float = field(compare=False)

    def __repr__(self) -> str:
        """Show the design that a reader chose."""
        return repr(self.base)

    def draw(self, scores: Tensor, count: int, generator: torch.Generator | None = None) -> Selection:
        """Draw a share ``count / n`` of the sampled examples' atoms."""
        if torch.compiler.is_compiling():
            self.trial.obstacle = "the model is compiled, and a compiled pass shows nothing of itself"
            return self.base.draw(scores, count, generator)
        if not self.trial.compares:
            self.trial.see_curve(self.layer, scores)
            return self.base.draw(scores, count, generator)
        size, scores = scores.shape[-1], scores.double()
        current = self.trial.join_pass(scores)
        if current is None:
            return self.base.draw(scores, count, generator)
        rows = size // current.examples
        is_exact_N = current.is_exact.repeat_interleave(rows)
        exact_K, others = is_exact_N.nonzero().squeeze(1), (~is_exact_N).nonzero().squeeze(1)
        # As many as are expected of the others where all examples are drawn from alike.
        expected = float(water_filling(scores, count)[others].sum())
        drawn = self.base.draw(scores[others], max(1, round(expected)), generator)
        current.see_draw(self.layer, scores.view(-1, rows), (count / size, self.keep))
        index_K = torch.cat([exact_K, others[drawn.index_K]])
        weight_K = torch.cat([drawn.weight_K.new_ones(len(exact_K)), drawn.weight_K])

        def watch(grad_KO: Tensor, stored_KI: Tensor) -> None:
            current.see_product(index_K, rows, grad_KO, stored_KI)

        return Selection(index_K, weight_K, size, drawn.may_repeat, watch)

    def variance(
        self, squared_norms: Tensor, scores: Tensor, count: int, squared_norm_of_sum: SquaredNormOfSum
    ) -> Tensor:
        """Return the variance of `base`: a trial is nothing to plan with."""
        return self.base.variance(squared_norms, scores, count, squared_norm_of_sum)

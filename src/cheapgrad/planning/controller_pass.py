"""What one measured backward pass shows: of halves that are drawn from and are not, or of all examples alike."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from cheapgrad.planning.controller_curve import draw_curve
from cheapgrad.planning.controller_gradients import Factors, at_least_single
from cheapgrad.sketch.budget import count_kept
from cheapgrad.sketch.water_filling import minimum_variance, water_filling

#: Names of the numbers that passes add up, in the order of `AbstractPass.totals`; all but the first are of halves.
#: "gain", "mean" and "shared" are in the units in which noise is counted, "plain_gain" as gradients are, and
#: predictions are the mean of both.
TOTALS = ("passes", "gain", "predicted_gain", "exact", "mean", "shared", "predicted_noise", "plain_gain")
# Pairs of examples whose gradients are measured in a pass.
_MOST_PAIRS = 32
# Of the rows that are not zero, so many more than are drawn may be left without a draw being more than those above it:
# budgets of a few rows take turns between whole numbers.
_SAME_SHARE, _SAME_ROWS = 1.1, 2
# Layers are weighed by their noise at their budget, or at this one: at a full budget there is none to be seen.
_LARGEST_KEEP = 0.9
_TINY = 1e-300


@dataclass(frozen=True)
class Drawn:
    """A draw of rows.

    Attributes:
        index_K: of the kept rows.
        weight_K: 1 / p of the kept rows.
        rows: how many rows an example has.
        is_once: no row is there twice.
        factor: of the weight's gradient, in units in which noise is counted.
    """

    index_K: Tensor
    weight_K: Tensor
    rows: int
    is_once: bool
    factor: float = 1.0


class AbstractPass(abc.ABC):
    """One backward pass.

    Squared sizes of gradients, and noise in them, are counted twice, on a first axis: as they are, and in the units
    that `Drawn.factor` is for. What a draw adds meets its own layer's weight and those below, whose units may differ:
    where noise is predicted from draws it is the mean of both.

    Attributes:
        examples: B, how many examples the batch has.
        curves: for each layer its draw's variance by budget; see `draw_curve`.
        followers: layers that draw the rows that a draw above has left, all of them.
        unseen: layers whose draw is in no weight's gradient, as far as can be seen.
    """

    def __init__(self, examples: int, generator: torch.Generator) -> None:
        self.examples = examples
        self._generator = generator
        self.curves: dict[str, Tensor] = {}
        self.followers: set[str] = set()
        self.unseen: set[str] = set()
        self._noise: dict[str, Tensor] = {}
        self._variance_and_square: dict[str, Tensor] = {}

    @property
    @abc.abstractmethod
    def _sizes_in_units(self) -> Tensor:
        """Return the squared gradients that noise is relative to."""

    def layers(self) -> dict[str, Tensor]:
        """Return each layer's local noise relative to the squared gradients, both ways, and its draw's variance."""
        found = {}
        for layer, (variance, square) in self._variance_and_square.items():
            noise = self._noise.get(layer, torch.zeros_like(self._sizes_in_units))
            found[layer] = torch.cat([self._relate(noise), (variance / square.clamp_min(_TINY))[None]]).cpu()
        return found

    def totals(self) -> Tensor:
        """Return the pass's share of `TOTALS`."""
        totals = torch.zeros(len(TOTALS), dtype=torch.float64)
        totals[0] = 1.0
        return totals

    def _see_scores(self, layer: str, scores: Tensor) -> None:
        self.curves[layer] = self.curves.get(layer, 0) + draw_curve(scores)

    def _relate(self, noise: Tensor) -> Tensor:
        return noise / self._sizes_in_units.clamp_min(_TINY)

    def _note_variance(self, layer: str, variance: Tensor, square: Tensor) -> None:
        """Add a draw's variance and the squared norm of its cotangent: a layer may draw several times in a pass."""
        self._variance_and_square[layer] = self._variance_and_square.get(layer, 0) + torch.stack([variance, square])

    def _note_noise(self, layer: str, noise: Tensor) -> None:
        self._noise[layer] = self._noise.get(layer, 0) + noise


class AllPass(AbstractPass):
    """A pass in which all examples are drawn from as at any other step: how noisy each layer's draw is by itself."""

    def __init__(self, examples: int, generator: torch.Generator, device: torch.device) -> None:
        super().__init__(examples, generator)
        self._size = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def _sizes_in_units(self) -> Tensor:
        return self._size

    def see_draw(self, layer: str, scores: Tensor, count: int) -> None:
        """Take in the scores of a draw of `count` rows."""
        self._see_scores(layer, scores)
        self._note_variance(layer, minimum_variance(scores, count), scores.square().sum())

    def see_product(self, layer: str, factors: Factors, weight_K: Tensor, factor: float) -> None:
        """Take in the factors of a weight's gradient on the drawn rows, and the unit in which noise is counted."""
        # Horvitz and Thompson's estimate of Σ (1/p - 1) ‖g‖² ‖x‖²: the rows have the weight 1/p in them already.
        noise = ((1 - 1 / weight_K) * factors.row_squares()).sum()
        self._note_noise(layer, _in_units(noise, factor))
        self._size = self._size + _in_units(factors.example_squares(self._generator).sum(), factor)


class HalvesPass(AbstractPass):
    """A pass in which half of the examples keep all rows.

    Examples are paired with the one nearest in size, by the cotangent where it enters; a coin decides which of the two
    keeps all rows.
    """

    def __init__(self, scores_BN: Tensor, generator: torch.Generator) -> None:
        super().__init__(scores_BN.shape[0], generator)
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
        self._shares: Tensor | None = None
        self._squares = self._sizes.new_zeros(2, *self._sizes.shape)
        # Of the sampled half at the trial's budgets, from what was drawn; of the exact half at the usual ones.
        self._drawn_noise = torch.zeros_like(self._squares[:, 0])
        self._usual_noise = self._sizes.new_zeros(2)
        self._drawn: tuple[str, Tensor] | None = None
        self._mean = sizes_B.new_zeros(())
        self._shared = sizes_B.new_zeros(())

    @property
    def _sizes_in_units(self) -> Tensor:
        return self._squares[:, 0].sum(1)

    def round_count(self, expected: float) -> int:
        """Return one of the two whole numbers next to `expected`, right on average."""
        return max(1, int(expected + float(torch.rand((), generator=self._generator, dtype=torch.float64))))

    def see_draw(self, layer: str, scores_BN: Tensor, shares: tuple[float, float], drawn: int) -> None:
        """Take in a draw.

        Args:
            layer: that drew.
            scores_BN: of its rows, by example.
            shares: of rows kept: in the trial, and at other steps.
            drawn: how many rows of the sampled half it kept.
        """
        self._drawn = None
        is_zero = (scores_BN == 0).double().mean(1)
        vanished = is_zero[~self.is_exact].mean() - is_zero[self.is_exact].mean()
        if bool(vanished > 0.5 * (1 - shares[0])) and shares[0] < 1:
            # A draw above has left out whole rows, or whole examples, and at the trial's budget more than at others:
            # this one's own variance there cannot be told from it. Without a choice it adds none at all.
            if bool((scores_BN[~self.is_exact] != 0).sum() <= _SAME_SHARE * drawn + _SAME_ROWS):
                self.followers.add(layer)
            return
        scores = scores_BN.flatten()
        self._see_scores(layer, scores)
        # What the examples would have gained, had all of them been drawn from alike.
        usual = min(shares[1], _LARGEST_KEEP)
        chances_BN = water_filling(scores, count_kept(usual, scores.numel())).view_as(scores_BN)
        squares_BN = scores_BN.square()
        self._note_variance(layer, (_gains(chances_BN) * squares_BN).sum(), squares_BN.sum())
        self._drawn = layer, chances_BN
        self.unseen.add(layer)
        if self._shares is None:
            self._shares = self._weigh_pairs(water_filling(scores, count_kept(shares[0], scores.numel())), squares_BN)

    def _weigh_pairs(self, chances: Tensor, squares_BN: Tensor) -> Tensor:
        """Return weights of the pairs, near 0 where rows are so important that all are kept: there is no noise to see.

        They are alike for both of a pair: a weight that knew the exact gradient would favour small ones.
        """
        noise_B = (_gains(chances).view_as(squares_BN) * squares_BN).sum(1)
        noise = noise_B[self._measured].view(2, -1).sum(0) / self._sizes.sum(0).clamp_min(_TINY)
        usual = noise_B.sum() / squares_BN.sum().clamp_min(_TINY)
        return noise / (noise + usual).clamp_min(_TINY)

    def see_product(self, drawn: Drawn, grad_KO: Tensor, stored_KI: Tensor) -> None:
        """Take in the factors of a weight's gradient on the kept rows."""
        if self._drawn is not None:
            self.unseen.discard(self._drawn[0])
        index_K, rows = drawn.index_K, drawn.rows
        example_K = index_K // rows
        place_K = self._place[example_K]
        chosen = (place_K >= 0).nonzero().squeeze(1)
        example_K, row_K, place_K = example_K[chosen], index_K[chosen] % rows, place_K[chosen]
        grad_KO, stored_KI = at_least_single(grad_KO[chosen]), at_least_single(stored_KI[chosen])
        factors = Factors(grad_KO, stored_KI, place_K, row_K, len(self._measured), rows, drawn.is_once)
        squares = factors.example_squares(self._generator)
        unit, count = drawn.factor**2, len(self._measured)
        self._squares += _in_units(squares.view(2, -1), drawn.factor)
        self._mean += unit * (factors.square_of_sum(self._generator) - squares.sum()) / (count * (count - 1))
        half = count // 2
        row_squares_K, is_exact_K = factors.row_squares(), place_K < half
        drawn_K = torch.where(is_exact_K, 0.0, (1 - 1 / drawn.weight_K[chosen]) * row_squares_K)
        self._drawn_noise.index_add_(1, place_K % half, _in_units(drawn_K, drawn.factor))
        if self._drawn is None:
            return
        layer, chances_BN = self._drawn
        chances_K = chances_BN[example_K, row_K]
        noise = _in_units((_gains(chances_K) * is_exact_K * row_squares_K).sum(), drawn.factor)
        self._usual_noise += noise
        self._note_noise(layer, noise)
        self._shared += unit * self._estimate_shared(
            factors, torch.where(is_exact_K, 1 - chances_K, 0.0), chances_BN, half
        )

    def _estimate_shared(self, factors: Factors, missed_K: Tensor, chances_BN: Tensor, half: int) -> Tensor | float:
        """Return by how much the fixed size of a draw lowers the noise of the batch's sum, per example.

        ``Σ_nm cov(n, m) <a_n, a_m> / (p_n p_m) ≈ -‖Σ (1 - p_n) a_n‖² / Σ p_n (1 - p_n)`` off the diagonal; within an
        example it is in the gain already, between examples it is seen on pairs of the exact half.
        """
        dispersion = (chances_BN * (1 - chances_BN)).sum()
        if half < 2 or not bool(dispersion > 1e-6):
            return 0.0
        between = factors.square_of_sum(self._generator, missed_K)
        between = between - factors.example_squares(self._generator, missed_K).sum()
        return between * (self.examples - 1) / (half * (half - 1)) / dispersion

    def totals(self) -> Tensor:
        """Return the pass's share of `TOTALS`."""
        sizes = torch.where(self._sizes.amin(0) > 0, self._sizes.mean(0), 0.0)
        weight = sizes if self._shares is None else sizes * self._shares
        relative = self._squares / self._sizes.clamp_min(_TINY)
        gain = (weight * (relative[:, 1] - relative[:, 0])).sum(1) / self._sizes_in_units.clamp_min(_TINY)
        predicted = (weight * self._drawn_noise / self._sizes[1].clamp_min(_TINY)).sum(1)
        exact = (self._sizes_in_units[1] / self._sizes.shape[1]).clamp_min(_TINY)
        one = torch.ones_like(exact)
        return torch.stack(
            [
                one,
                gain[1],
                self._relate(predicted).mean(),
                one,
                self._mean / exact,
                self._shared / exact,
                self._relate(self._usual_noise).mean(),
                gain[0],
            ]
        ).cpu()


def _in_units(value: Tensor, factor: float) -> Tensor:
    """Return a squared size as it is and in units of a factor, on a new first axis."""
    return torch.stack([value, factor**2 * value])


def _gains(chances: Tensor) -> Tensor:
    """Return ``1/p - 1``; 0 for rows that are never drawn, and are zero."""
    return torch.where(chances > 0, 1 / chances.clamp_min(_TINY) - 1, 0.0)

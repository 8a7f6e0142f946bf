"""What a controller looks at inside the backward passes of one step, and the design that lets it look."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cheapgrad.planning.controller_curve import draw_curve
from cheapgrad.planning.controller_gradients import Factors, at_least_single
from cheapgrad.planning.controller_pass import TOTALS, AllPass, Drawn, HalvesPass
from cheapgrad.sketch import AbstractDesign, Selection
from cheapgrad.sketch.designs._abstract import SquaredNormOfSum
from cheapgrad.sketch.water_filling import water_filling

_NOTHING = "no backward pass has drawn rows since the last step"
_NOT_FINITE = "the gradient is not finite"
_COMPILED = "the model is compiled, and a compiled pass shows nothing of itself"


#: Returns the factor of a weight's gradient, from the layer that draws and the weight, if that is at hand.
FindFactor = Callable[[str, Tensor | None], float]


class Look(enum.Enum):
    """What is measured at a step, from dear to cheap."""

    HALVES = "how far noise grows on its way down: half of the examples keep all rows"
    LAYERS = "how noisy each layer's draw is by itself"
    CURVES = "how each draw's variance depends on its budget"


class Trial:
    """The measured backward passes between two optimizer steps.

    Args:
        seed: decides by fair coins which example of a pair keeps all rows.
        count_examples: returns B, the number of examples in the batch of the running pass, or None if unknown.
        look: what is measured.
        layers: whose draws are looked at; None for all.
        find_factor: of a weight's gradient, in units in which noise is counted: from the layer that draws, and the
            weight where it is at hand.

    Attributes:
        totals: `TOTALS`, summed over the passes whose layers were looked at.
        curves: for each layer its draw's variance at `KEEPS` and the squared norm of its cotangent, summed.
        layers: for each layer the noise of its draws in its weights' gradients relative to all, as they are and in
            units, and in its cotangent.
        followers: layers whose draws add no noise of their own; see `HalvesPass`.
        seen: layers whose draws are in the gradient of a weight.
        obstacle: why a pass, or all, could not be measured; an empty string if all were.
    """

    def __init__(
        self,
        seed: int,
        count_examples: Callable[[], int | None],
        look: Look = Look.HALVES,
        layers: frozenset[str] | None = None,
        find_factor: FindFactor = lambda *_: 1.0,
    ) -> None:
        self.look = look
        self._layers = layers
        self.find_factor = find_factor
        self._generator = torch.Generator().manual_seed(seed)
        self._count_examples = count_examples
        self._pass: HalvesPass | AllPass | None = None
        self.totals = torch.zeros(len(TOTALS), dtype=torch.float64)
        self.curves: dict[str, Tensor] = {}
        self.layers: dict[str, Tensor] = {}
        self.followers: set[str] = set()
        self.seen: set[str] = set()
        self.obstacle = _NOTHING

    def draw(
        self,
        layer: str,
        keep: float,
        base: AbstractDesign,
        scores: Tensor,
        count: int,
        generator: torch.Generator | None,
    ) -> Selection:
        """Draw a share ``count / n`` of the rows as `base` does, and take in what it shows; see `TrialDesign`."""
        if torch.compiler.is_compiling():
            self.obstacle = _COMPILED
        elif scores.dim() == 1 and (self._layers is None or layer in self._layers):
            if self.look is Look.CURVES:
                self._see_curve(layer, draw_curve(scores))
            else:
                current = self._join_pass(scores)
                drawing = _Drawing(layer, keep, self.find_factor)
                if isinstance(current, HalvesPass):
                    return _draw_half(current, drawing, base, scores.double(), count, generator)
                if current is not None:
                    return _draw_all(current, drawing, base, scores, count, generator)
        return base.draw(scores, count, generator)

    def _see_curve(self, layer: str, curve: Tensor) -> None:
        if bool(curve.isfinite().all()):
            self.curves[layer] = self.curves.get(layer, 0) + curve
            self._clear()
        else:
            self.obstacle = _NOT_FINITE

    def _clear(self) -> None:
        """Forget that nothing had been drawn yet."""
        if self.obstacle == _NOTHING:
            self.obstacle = ""

    def _join_pass(self, scores: Tensor) -> HalvesPass | AllPass | None:
        """Return the backward pass that runs now, which ends by itself; None if it cannot be measured."""
        if self._pass is None:
            examples = self._count_examples()
            if examples is None:
                # Sizes are noted by eager passes alone.
                self.obstacle = _COMPILED
                return None
            if examples < 4 or scores.shape[0] % examples:
                self.obstacle = (
                    f"a draw among {scores.shape[-1]} rows of {examples} examples; at least 4 examples of equally many "
                    "rows are needed"
                )
                return None
            if self.look is Look.HALVES:
                self._pass = HalvesPass(scores.double().view(examples, -1), self._generator)
            else:
                self._pass = AllPass(examples, self._generator, scores.device)
            # Autograd calls it when the pass that runs now is over.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)  # type: ignore[attr-defined] - private
        return None if scores.shape[0] % self._pass.examples else self._pass

    def _end_pass(self) -> None:
        current, self._pass = self._pass, None
        if current is None:
            return
        totals, layers = current.totals(), current.layers()
        seen = [totals, *current.curves.values(), *layers.values()]
        if not all(bool(part.isfinite().all()) for part in seen):
            self.obstacle = _NOT_FINITE
            return
        self._clear()
        self.totals += totals
        self.followers |= current.followers
        self.seen |= layers.keys() - current.unseen
        for layer, curve in current.curves.items():
            self.curves[layer] = self.curves.get(layer, 0) + curve
        for layer, pair in layers.items():
            self.layers[layer] = self.layers.get(layer, 0) + pair


@dataclass(frozen=True)
class _Drawing:
    """Whose rows are drawn, the layer's keep fraction outside of trials, and the factors of weights' gradients."""

    layer: str
    keep: float
    find_factor: FindFactor


def _draw_half(
    current: HalvesPass,
    drawing: _Drawing,
    base: AbstractDesign,
    scores: Tensor,
    count: int,
    generator: torch.Generator | None,
) -> Selection:
    size = scores.shape[0]
    rows = size // current.examples
    is_exact_N = current.is_exact.repeat_interleave(rows)
    exact_K, others = is_exact_N.nonzero().squeeze(1), (~is_exact_N).nonzero().squeeze(1)
    # As many as are expected of the others where all examples are drawn from alike.
    expected = float(water_filling(scores, count)[others].sum())
    drawn = base.draw(scores[others], current.round_count(expected), generator)
    current.see_draw(drawing.layer, scores.view(-1, rows), (count / size, drawing.keep), len(drawn.index_K))
    index_K = torch.cat([exact_K, others[drawn.index_K]])
    weight_K = torch.cat([drawn.weight_K.new_ones(len(exact_K)), drawn.weight_K])

    def watch(grad_KO: Tensor, stored_KI: Tensor, weight_OI: Tensor | None) -> None:
        factor = drawing.find_factor(drawing.layer, weight_OI)
        current.see_product(Drawn(index_K, weight_K, rows, not drawn.may_repeat, factor), grad_KO, stored_KI)

    return Selection(index_K, weight_K, size, drawn.may_repeat, watch)


def _draw_all(
    current: AllPass,
    drawing: _Drawing,
    base: AbstractDesign,
    scores: Tensor,
    count: int,
    generator: torch.Generator | None,
) -> Selection:
    size = scores.shape[0]
    rows = size // current.examples
    drawn = base.draw(scores, count, generator)
    current.see_draw(drawing.layer, scores.double(), count)

    def watch(grad_KO: Tensor, stored_KI: Tensor, weight_OI: Tensor | None) -> None:
        place_K, row_K = drawn.index_K // rows, drawn.index_K % rows
        grad_KO, stored_KI = at_least_single(grad_KO), at_least_single(stored_KI)
        factors = Factors(grad_KO, stored_KI, place_K, row_K, current.examples, rows, not drawn.may_repeat)
        factor = drawing.find_factor(drawing.layer, weight_OI)
        current.see_product(drawing.layer, factors, drawn.weight_K, factor)

    return Selection(drawn.index_K, drawn.weight_K, size, drawn.may_repeat, watch)


@dataclass(frozen=True, repr=False)
class TrialDesign(AbstractDesign):
    """Draw as `base` does, and show a trial what was drawn; where halves are compared, half of the examples keep all.

    Unbiased as `base` is: a row that is always kept has weight 1.

    Args:
        base: how rows are drawn.
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

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as the base alone: a trial looks at the passes of one model, and knows its controller."""
        return copy.copy, (self.base,)

    def draw(self, scores: Tensor, count: int, generator: torch.Generator | None = None) -> Selection:
        """Draw a share ``count / n`` of the atoms; of the sampled examples' alone, where halves are compared."""
        return self.trial.draw(self.layer, self.keep, self.base, scores, count, generator)

    def variance(
        self, squared_norms: Tensor, scores: Tensor, count: int, squared_norm_of_sum: SquaredNormOfSum
    ) -> Tensor:
        """Return the variance of `base`: a trial is nothing to plan with."""
        return self.base.variance(squared_norms, scores, count, squared_norm_of_sum)

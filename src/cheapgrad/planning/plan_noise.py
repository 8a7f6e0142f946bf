"""Noise of a chosen plan, all of its sketches together: from laws on drawn cotangents, and from drawn gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert import Rule, approximate
from cheapgrad.exactness import forced_exact
from cheapgrad.planning.batches import MiniBatchVariance, relative_error_of_ratio, spare_factor, squared_norm
from cheapgrad.planning.capture import Call, Capture
from cheapgrad.planning.noise import measure_cotangent_noise, measure_stored_noise
from cheapgrad.planning.parts import Choice, Group, Unit
from cheapgrad.planning.passed_down import Noise, PassedDown, row_norms
from cheapgrad.planning.passes import Step, names_of_dropouts
from cheapgrad.planning.row_noise import draw_weights
from cheapgrad.seeding import seed_torch
from cheapgrad.sketch import Moment

_DRAW_SEED = 20240701
# Relative standard error of the modelled noise: that of the laws' cross terms, and of the random directions.
_MODEL_ERROR = 0.1
# The same for blocks whose noise was drawn once, at another width.
_REGION_ERROR = 0.4
# Draws of codes for each observed batch: few say much, for they sum over many entries.
_CODE_DRAWS = 2


@dataclass
class Observed:
    """One batch with everything that was recorded of its exact pass.

    Attributes:
        number: its position among the batches.
        batch: the batch.
        capture: what the layers saw.
        below: tangents at their inputs.
        units: layers that draw their rows together.
        groups: layers that hold one input.
    """

    number: int
    batch: Any
    capture: Capture
    below: PassedDown
    units: list[Unit]
    groups: list[Group]


@dataclass(frozen=True)
class PlanNoise:
    """Noise of a whole plan, as absolute variance.

    Attributes:
        total: averaged over all batches.
        model_error: its relative standard error, as far as it comes from laws and draws.
        batch_error: the relative standard error of its ratio to the mini-batch variance that comes from looking at few
            batches; None where there are too few to know.
        batches: how many.
    """

    total: float
    model_error: float
    batch_error: float | None
    batches: int

    @property
    def relative_error(self) -> float:
        """Both together, as far as they are known."""
        return math.hypot(self.model_error, self.batch_error or 0.0)

    @property
    def bound(self) -> float:
        """A value that the mean noise of many batches stays below with a chance of nine in ten."""
        return self.total * spare_factor(self.relative_error, self.batches)


def expected_margin(choices: Sequence[Choice], variance: MiniBatchVariance) -> float:
    """Return how far the bound of a plan will lie above the sum of what its choices add, before anything is drawn.

    Args:
        choices: all that can be chosen.
        variance: of the mini-batch gradient.
    """
    batch_errors = [relative_error_of_ratio(one.by_batch, variance) for one in choices if one.noise.total]
    known = [error for error in batch_errors if error is not None]
    typical = sorted(known)[len(known) // 2] if known else 0.0
    return 1.1 * spare_factor(math.hypot(_MODEL_ERROR, typical), variance.batches)


def measure_plan_noise(
    step: Step,
    observed: Sequence[Observed],
    choices: Sequence[Choice],
    variance: MiniBatchVariance,
    skip_small: bool,
    draws: int,
) -> PlanNoise:
    r"""Return the noise of several choices together, where sketches meet the noise of those above them.

    With F_u what has been drawn above unit u, ``E‖ĝ − g‖² = Σ_u E[V_u(F_u)]``: the law of u, with the cotangent that
    really arrives. It is averaged over a few backward passes with the chosen sketches, in which every row's norm is
    noted; its direction is taken to be that of the exact row. The errors of these passes themselves give a second,
    independent figure, and both are averaged with weights by their standard errors. From the batches looked at it is
    carried over to all of them, choice by choice, as `Choice.by_batch` says.

    Args:
        step: the training step.
        observed: batches with their exact passes.
        choices: what is chosen.
        variance: of the gradients of all batches.
        skip_small: as in `cheapgrad.approximate`.
        draws: backward passes for each of the observed batches, where sketches meet the noise of others.
    """
    cotangent = [choice for choice in choices if choice.moment is Moment.COTANGENT]
    stored = [choice for choice in choices if choice.moment is Moment.STORED]
    # Codes below one draw meet rows whose expected squares are known.
    meets = len(cotangent) > 1
    rules = [Rule(_exactly(name), cotangent=choice.strategy) for choice in cotangent for name in choice.layers]
    modelled: list[list[float]] = []
    errors: list[float] = []
    for one in observed:
        chains = _chains_of(cotangent, one.units)
        count = draws if meets else 0
        scales = _draw_scales(step, one, chains, rules, skip_small, count, errors)
        modelled += [_evaluate(choices, one, chains, scale) for scale in (scales if meets else [{}])]
    means = [math.fsum(values) / len(modelled) for values in zip(*modelled, strict=True)]
    of_cotangent = math.fsum(mean for choice, mean in zip(choices, means, strict=True) if choice in cotangent)
    # Where something is stored, biases are summed over the rows that are kept, and these passes do not store anything.
    joined, error = _join(of_cotangent, [] if stored else errors)
    if stored:
        of_stored = math.fsum(means) - of_cotangent
        of_regions = math.fsum(mean for choice, mean in zip(choices, means, strict=True) if choice.is_region)
        model_error = _MODEL_ERROR + (_REGION_ERROR - _MODEL_ERROR) * of_regions / (joined + of_stored or 1.0)
        drawn = _draw_whole_errors(step, observed, choices, skip_small, _CODE_DRAWS)
        joined, error = _join(joined + of_stored, drawn, model_error)
    factor = joined / (math.fsum(means) or 1.0)
    noises = _carry_over(choices, means, factor, observed, variance.batches)
    total = math.fsum(noises) / len(noises)
    batch_error = relative_error_of_ratio(noises, variance)
    return PlanNoise(total, error / joined if joined else 0.0, batch_error, variance.batches)


def _carry_over(
    choices: Sequence[Choice], means: Sequence[float], factor: float, observed: Sequence[Observed], batches: int
) -> list[float]:
    """Return the noise of every batch."""
    noises = [0.0] * batches
    for choice, mean in zip(choices, means, strict=True):
        of_observed = math.fsum(choice.by_batch[one.number] for one in observed) / len(observed)
        # Without any noise in the observed batches, all that is known is that of the law without cross terms.
        typical = factor * mean / of_observed if of_observed else choice.noise.total
        noises = [noise + typical * share for noise, share in zip(noises, choice.by_batch, strict=True)]
    return noises


def _draw_whole_errors(
    step: Step, observed: Sequence[Observed], choices: Sequence[Choice], skip_small: bool, draws: int
) -> list[float]:
    """Return squared errors of gradients drawn with everything but masks of dropout in one bit."""
    handle = approximate(step.model, rules_of(choices, names_of_dropouts(step.model)), skip_small=skip_small)
    seed, errors = step.seed, []
    try:
        with step.undisturbed():
            for one in observed:
                for draw in range(draws):
                    step.seed = _DRAW_SEED + draw
                    errors.append(draw_squared_error(step, one.batch, one.capture))
    finally:
        step.seed = seed
        handle.revert()
    return errors


def draw_squared_error(step: Step, batch: Any, capture: Capture) -> float:
    """Return the squared error of one drawn gradient of a converted model.

    Args:
        step: of the converted model.
        batch: the batch.
        capture: the exact pass of the batch.
    """
    gradient, exact = step.gradient(batch)[0], capture.gradient
    if not math.isclose(step.last_loss, capture.loss, rel_tol=1e-5):
        # Codes take seeds, so that dropout behind them has other masks: those of an exact pass that takes them too.
        with forced_exact(in_step=True):
            exact = step.gradient(batch)[0]
    return _squared_distance(gradient, exact)


def rules_of(choices: Sequence[Choice], left_alone: Collection[str] = ()) -> list[Rule]:
    """Return one rule for each layer.

    Args:
        choices: at most one for each layer and moment.
        left_alone: names of layers without one.
    """
    by_layer: dict[str, dict[str, Any]] = {}
    for choice in choices:
        for name in choice.layers:
            by_layer.setdefault(name, {})[choice.moment.value] = choice.strategy
            if choice.is_region:
                by_layer[name]["recompute"] = True
    return [Rule(_exactly(name), **strategies) for name, strategies in by_layer.items() if name not in left_alone]


def _exactly(name: str) -> Callable[[str, nn.Module], bool]:
    return lambda other, module: other == name


def _squared_distance(drawn: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return squared_norm(torch._foreach_sub(list(drawn), list(exact)))


def _join(modelled: float, errors: Sequence[float], relative_error: float = _MODEL_ERROR) -> tuple[float, float]:
    """Return the mean of two independent figures, weighted by their standard errors, and its standard error."""
    if not modelled:
        return 0.0, 0.0
    model_error = relative_error * modelled
    if len(errors) < 2:
        return modelled, model_error
    drawn = torch.tensor(errors, dtype=torch.float64)
    mean, error = float(drawn.mean()), float(drawn.std()) / math.sqrt(len(errors))
    # A few draws may show too small a spread.
    error = max(error, 0.1 * mean / math.sqrt(len(errors)))
    weights = 1 / max(model_error, 1e-300) ** 2, 1 / max(error, 1e-300) ** 2
    total = sum(weights)
    return (weights[0] * modelled + weights[1] * mean) / total, 1 / math.sqrt(total)


_Chains = Sequence[tuple[Choice, list[list[Call]]]]


def _chains_of(cotangent: Sequence[Choice], units: Sequence[Unit]) -> _Chains:
    by_layers = {unit.layers: unit for unit in units}
    return [(choice, by_layers[choice.layers].chains) for choice in cotangent]


def _draw_scales(
    step: Step,
    observed: Observed,
    chains: _Chains,
    rules: Sequence[Rule],
    skip_small: bool,
    draws: int,
    errors: list[float],
) -> list[dict[int, Tensor]]:
    """Draw backward passes; return the factors of the rows of every chain's last cotangent, by the call's id."""
    if not rules or not draws:
        return [{}]
    tops = {(chain[-1].layer, chain[-1].order): chain[-1] for _, group in chains for chain in group}
    handle = approximate(step.model, rules, skip_small=skip_small)
    scales = []
    try:
        with step.undisturbed():
            for draw in range(draws):
                seen: dict[int, Tensor] = {}
                gradient = _draw_gradient(step, observed.batch, tops, seen, _DRAW_SEED + draw)
                errors.append(_squared_distance(gradient, observed.capture.gradient))
                scales.append(seen)
    finally:
        handle.revert()
    return scales


def _draw_gradient(
    step: Step, batch: Any, tops: Mapping[tuple[str, int], Call], seen: dict[int, Tensor], seed: int
) -> list[Tensor]:
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Tensor) -> None:
            call = tops.get((name, counts.get(name, 0)))
            counts[name] = counts.get(name, 0) + 1
            if call is not None and output.requires_grad:
                output.register_hook(lambda grad: seen.__setitem__(id(call), _ratio(call, grad)))

        return leave

    handles = [call.module.register_forward_hook(watch(name)) for (name, order), call in tops.items() if order == 0]

    def reseed() -> list[Tensor]:
        # The forward pass is the exact one, dropout included; rows are drawn in the backward pass.
        seed_torch(seed)
        return []

    try:
        return step.gradient(batch, reseed)[0]
    finally:
        for handle in handles:
            handle.remove()


def _ratio(call: Call, cotangent: Tensor) -> Tensor:
    exact, drawn = row_norms(call, call.use.cotangent), row_norms(call, cotangent)
    return torch.where(exact > 0, drawn / exact, 1.0)


def _evaluate(
    choices: Sequence[Choice], observed: Observed, chains: _Chains, scales: Mapping[int, Tensor]
) -> list[float]:
    """Return the noise of every choice for one draw of the cotangents."""
    stored = {name for choice in choices if choice.moment is Moment.STORED for name in choice.layers}
    of_call: dict[int, Tensor] = {}
    found: dict[int, Noise] = {}
    for choice, group in chains:
        noise = Noise()
        for chain in group:
            scale = scales.get(id(chain[-1]))
            samples_bias = chain[0].layer in stored
            noise = noise + measure_cotangent_noise(chain, [choice.strategy], observed.below, scale, samples_bias)[0]
            drawn = draw_weights(chain, choice.strategy, scale) if stored else None
            for call in chain:
                if drawn is not None:
                    of_call[id(call)] = drawn if scale is None else drawn * scale
        found[choices.index(choice)] = noise
    for position, choice in enumerate(choices):
        if choice.is_region:
            # It was drawn, and no law says what the rows that are drawn above do to it.
            found[position] = choice.noise.scaled(choice.by_batch[observed.number])
        elif choice.moment is Moment.STORED:
            noise = Noise()
            for call in observed.capture.calls:
                if call.layer in choice.layers:
                    scale = of_call.get(id(call))
                    noise = noise + measure_stored_noise(call, choice.strategy, observed.below, choice.layers, scale)
            found[position] = noise
    return [found[position].total for position in range(len(choices))]

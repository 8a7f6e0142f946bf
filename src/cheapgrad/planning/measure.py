"""What is measured before a plan is made, and of the plan itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.convert import Rule, approximate
from cheapgrad.cost import CostReport, scan
from cheapgrad.planning.capture import Call, Capture
from cheapgrad.planning.noise import (
    Noise,
    PassedDown,
    draw_weights,
    measure_cotangent_noise,
    measure_stored_noise,
    row_norms,
)
from cheapgrad.planning.parts import Choice, Unit
from cheapgrad.planning.passes import LossFunction, Step

_DRAW_SEED = 20240701
# Relative standard error of the modelled noise: that of the laws' cross terms, and of the random directions.
_MODEL_ERROR = 0.1


class _Whole(nn.Module):
    """A model and its loss as one module, so that the loss is in the books too."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        """Return the loss."""
        return self._loss_fn(self.model, batch)


def count_costs(step: Step, batch: Any) -> CostReport:
    """Return the ledger of one step of the model as it is.

    Args:
        step: the training step.
        batch: the batch.
    """
    with torch.random.fork_rng():
        torch.manual_seed(step.seed)
        return scan(_Whole(step.model, step.loss_fn), batch)


def count_planned_costs(step: Step, batch: Any, rules: Sequence[Rule], skip_small: bool) -> CostReport:
    """Return the ledger of one step with rules; the model is as before when this returns.

    Args:
        step: the training step.
        batch: the batch.
        rules: what to convert.
        skip_small: as in `cheapgrad.approximate`.
    """
    handle = approximate(step.model, rules, skip_small=skip_small)
    try:
        return count_costs(step, batch)
    finally:
        handle.revert()


class MiniBatchVariance:
    """Variance of the mini-batch gradient, from the gradients of several batches."""

    def __init__(self) -> None:
        self.batches = 0
        self._squares = 0.0
        self._sum: list[Tensor] = []

    def add(self, gradient: Sequence[Tensor]) -> None:
        """Take in the gradient of one batch."""
        self.batches += 1
        self._squares += squared_norm(gradient)
        if self._sum:
            for total, value in zip(self._sum, gradient, strict=True):
                total += value
        else:
            self._sum = [value.detach().clone() for value in gradient]

    @property
    def value(self) -> float:
        """``Σ‖g_i − ḡ‖² / (m − 1)``."""
        return max(0.0, self._squares - squared_norm(self._sum) / self.batches) / (self.batches - 1)


def squared_norm(gradient: Sequence[Tensor]) -> float:
    """Return the squared norm of a gradient.

    Args:
        gradient: its tensors.
    """
    return math.fsum(float(value.double().square().sum()) for value in gradient)


class BatchFactors:
    """How much noisier the average of all batches is than those that the laws were evaluated on, layer by layer."""

    def __init__(self) -> None:
        self._all: list[dict[str, float]] = []
        self._of_laws: list[dict[str, float]] = []

    def add(self, energies: dict[str, float], is_law: bool) -> None:
        """Take in the energies of one batch's layers."""
        self._all.append(energies)
        if is_law:
            self._of_laws.append(energies)

    def of(self, layers: Sequence[str]) -> float:
        """Return the factor of the noise of sketches of these layers."""
        means = [
            math.fsum(batch.get(layer, 0.0) for batch in batches for layer in layers) / len(batches)
            for batches in (self._all, self._of_laws)
        ]
        return means[0] / means[1] if means[1] else 1.0


@dataclass
class Observed:
    """One batch with everything that was recorded of its exact pass.

    Attributes:
        batch: the batch.
        capture: what the layers saw.
        below: tangents at their inputs.
    """

    batch: Any
    capture: Capture
    below: PassedDown


@dataclass(frozen=True)
class PlanNoise:
    """Noise of a whole plan, as absolute variance.

    Attributes:
        total: modelled from the laws on drawn cotangents, joined with what the draws themselves showed.
        standard_error: of it.
        by_choice: what each choice adds, by its position, in the presence of the others.
    """

    total: float
    standard_error: float
    by_choice: dict[int, Noise]


def measure_plan_noise(
    step: Step,
    observed: Sequence[Observed],
    choices: Sequence[Choice],
    units: Sequence[Sequence[Unit]],
    factors: BatchFactors,
    skip_small: bool,
    draws: int,
) -> PlanNoise:
    r"""Return the noise of several choices together, where sketches meet the noise of those above them.

    With F_u what has been drawn above unit u, ``E‖ĝ − g‖² = Σ_u E[V_u(F_u)]``: the law of u, with the cotangent that
    really arrives. It is averaged over a few backward passes with the chosen sketches, in which every row's norm is
    noted; its direction is taken to be that of the exact row. The errors of these passes themselves give a second,
    independent figure, and both are averaged with weights by their standard errors.

    Args:
        step: the training step.
        observed: batches with their exact passes.
        choices: what is chosen.
        units: for each batch, the units of all layers, with their chains.
        factors: from these batches to all of them.
        skip_small: as in `cheapgrad.approximate`.
        draws: backward passes, over all batches.
    """
    cotangent = [choice for choice in choices if choice.moment.value == "cotangent"]
    rules = [Rule(_exactly(name), cotangent=choice.strategy) for choice in cotangent for name in choice.layers]
    by_choice: dict[int, list[Noise]] = {position: [] for position in range(len(choices))}
    errors: list[float] = []
    of_cotangent: list[float] = []
    plain: list[float] = []
    for number, one in enumerate(observed):
        chains = _chains_of(cotangent, units[number])
        scales = _draw_scales(step, one, chains, rules, skip_small, max(1, draws // len(observed)), errors)
        for scale in scales:
            modelled = _evaluate(choices, one, chains, scale)
            plain.append(math.fsum(modelled[choices.index(choice)].total for choice in cotangent))
            for position, noise in modelled.items():
                modelled[position] = noise.scaled(factors.of(choices[position].layers))
                by_choice[position].append(modelled[position])
            of_cotangent.append(math.fsum(modelled[choices.index(choice)].total for choice in cotangent))
    means = {position: _mean(noises) for position, noises in by_choice.items()}
    of_stored = math.fsum(
        means[position].total for position, choice in enumerate(choices) if choice.moment.value == "stored"
    )
    factor = math.fsum(of_cotangent) / (math.fsum(plain) or 1.0)
    total, error = _join(of_cotangent, [value * factor for value in errors])
    if of_stored:
        # Few draws of codes say much: their errors are many and small.
        whole = _draw_whole_errors(step, observed, choices, skip_small, max(1, draws // len(observed)))
        of_all = [factors.of(choice.layers) for choice in choices if choice.moment.value == "stored"]
        weights = [means[position].total for position, choice in enumerate(choices) if choice.moment.value == "stored"]
        carried = math.fsum(one * weight for one, weight in zip(of_all, weights, strict=True)) / of_stored
        shares = (total * factor + of_stored * carried) / (total + of_stored)
        joined = _join([total + of_stored], [value * shares for value in whole])
        return PlanNoise(*joined, means)
    return PlanNoise(total, error, means)


def _draw_whole_errors(
    step: Step, observed: Sequence[Observed], choices: Sequence[Choice], skip_small: bool, draws: int
) -> list[float]:
    """Return squared errors of gradients drawn with everything; none where dropout sees other random numbers then."""
    strategies: dict[str, dict[str, Any]] = {}
    for choice in choices:
        for name in choice.layers:
            strategies.setdefault(name, {})[choice.moment.value] = choice.strategy
    rules = [Rule(_exactly(name), **found) for name, found in strategies.items()]
    errors = []
    for one in observed:
        with step.undisturbed(), torch.no_grad():
            exact_loss = step.loss(one.batch)
        handle = approximate(step.model, rules, skip_small=skip_small)
        seed = step.seed
        try:
            with step.undisturbed():
                for draw in range(draws):
                    step.seed = _DRAW_SEED + draw
                    if not torch.isclose(step.loss(one.batch).detach(), exact_loss, rtol=1e-5):
                        return []
                    pairs = zip(step.gradient(one.batch)[0], one.capture.gradient, strict=True)
                    errors.append(squared_norm([drawn - exact for drawn, exact in pairs]))
        finally:
            step.seed = seed
            handle.revert()
    return errors


def _exactly(name: str) -> Callable[[str, nn.Module], bool]:
    return lambda other, module: other == name


def _mean(noises: Sequence[Noise]) -> Noise:
    total = Noise()
    for noise in noises:
        total = total + noise
    return total.scaled(1 / max(1, len(noises)))


def _join(modelled: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Return the mean of two independent figures, weighted by their standard errors, and its standard error."""
    if not modelled or not any(modelled):
        return 0.0, 0.0
    model = math.fsum(modelled) / len(modelled)
    model_error = _MODEL_ERROR * model
    if len(errors) < 2:
        return model, model_error
    drawn = torch.tensor(errors, dtype=torch.float64)
    mean, error = float(drawn.mean()), float(drawn.std()) / math.sqrt(len(errors))
    # A few draws may show too small a spread.
    error = max(error, 0.1 * mean / math.sqrt(len(errors)))
    weights = 1 / max(model_error, 1e-300) ** 2, 1 / max(error, 1e-300) ** 2
    total = sum(weights)
    return (weights[0] * model + weights[1] * mean) / total, 1 / math.sqrt(total)


Chains = Mapping[int, list[list[Call]]]


def _chains_of(cotangent: Sequence[Choice], units: Sequence[Unit]) -> list[tuple[Choice, list[list[Call]]]]:
    by_layers = {unit.layers: unit for unit in units}
    return [(choice, by_layers[choice.layers].chains) for choice in cotangent]


def _draw_scales(
    step: Step,
    observed: Observed,
    chains: Sequence[tuple[Choice, list[list[Call]]]],
    rules: Sequence[Rule],
    skip_small: bool,
    draws: int,
    errors: list[float],
) -> list[dict[int, Tensor]]:
    """Draw backward passes; return the factors of the rows of every chain's last cotangent, by the call's id."""
    if not rules:
        return [{}]
    tops = {(chain[-1].layer, chain[-1].order): chain[-1] for _, group in chains for chain in group}
    handle = approximate(step.model, rules, skip_small=skip_small)
    scales = []
    try:
        with step.undisturbed():
            for draw in range(draws):
                seen: dict[int, Tensor] = {}
                gradient = _draw_gradient(step, observed.batch, tops, seen, _DRAW_SEED + draw)
                pairs = zip(gradient, observed.capture.gradient, strict=True)
                errors.append(squared_norm([one - exact for one, exact in pairs]))
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
        torch.manual_seed(seed)
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
    choices: Sequence[Choice],
    observed: Observed,
    chains: Sequence[tuple[Choice, list[list[Call]]]],
    scales: Mapping[int, Tensor],
) -> dict[int, Noise]:
    """Return the noise of every choice for one draw of the cotangents."""
    stored = {name for choice in choices if choice.moment.value == "stored" for name in choice.layers}
    of_call: dict[int, Tensor] = {}
    found: dict[int, Noise] = {}
    for choice, group in chains:
        noise = Noise()
        for chain in group:
            scale = scales.get(id(chain[-1]))
            samples_bias = chain[0].layer in stored
            noise = noise + measure_cotangent_noise(chain, choice.strategy, observed.below, scale, samples_bias)
            drawn = draw_weights(chain, choice.strategy, scale)
            for call in chain:
                if drawn is not None:
                    of_call[id(call)] = drawn if scale is None else drawn * scale
        found[choices.index(choice)] = noise
    for position, choice in enumerate(choices):
        if choice.moment.value == "stored":
            calls = [call for call in observed.capture.calls if call.layer in choice.layers]
            noise = Noise()
            for call in calls:
                scale = of_call.get(id(call))
                noise = noise + measure_stored_noise(call, choice.strategy, observed.below, choice.layers, scale)
            found[position] = noise
    return found

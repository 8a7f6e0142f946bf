"""An exact pass of every batch: the noisiest are kept whole, of the others what says how noisy they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cheapgrad.errors import BatchError, check_finite_loss
from cheapgrad.planning.batches import MiniBatchVariance
from cheapgrad.planning.candidates import LayerCandidates
from cheapgrad.planning.capture import Capture, capture_pass
from cheapgrad.planning.parts import Group, Unit, find_groups, find_units
from cheapgrad.planning.passed_down import PassedDown
from cheapgrad.planning.passes import Step
from cheapgrad.planning.plan_noise import Observed
from cheapgrad.planning.tangents import push_forward

# Batches that laws are evaluated on: most of the noise comes from the noisiest ones, and they may be few.
_KEPT = 2

_Sizes = list[list[tuple[float, float]]]


@dataclass
class _Seen:
    """What is kept of one batch."""

    number: int
    batch: Any
    capture: Capture
    units: list[Unit]
    energy: float


class Survey:
    """Takes in batch after batch.

    Args:
        step: the training step.
        candidates: what the layers can take.
    """

    def __init__(self, step: Step, candidates: Mapping[str, LayerCandidates]) -> None:
        self.variance = MiniBatchVariance()
        self._step = step
        self._candidates = candidates
        self._layers = {name: layer.module for name, layer in candidates.items()}
        self._groups: list[Group] = []
        self._holders: dict[tuple[str, int], Any] = {}
        self._kept: list[_Seen] = []
        self._sizes: list[_Sizes] = []

    def add(self, batch: Any) -> None:
        """Run the exact pass of a batch.

        Raises:
            LossError: if the loss is not finite.
            BatchError: if the gradient is not.
        """
        number = self.variance.batches
        capture = capture_pass(self._step, self._layers, batch, finds_holders=not number)
        check_finite_loss(capture.loss, f"batches[{number}]", "plan")
        _check_finite_gradient(self._step, capture, number)
        self.variance.add(capture.gradient)
        if not number:
            self._groups = find_groups(capture.calls, self._candidates)
            self._holders = {(call.layer, call.order): (call.held, call.bypassed) for call in capture.calls}
        units = find_units(capture.calls, self._candidates)
        energies: dict[str, float] = {}
        for call in capture.calls:
            energies[call.layer] = energies.get(call.layer, 0.0) + call.energy
        self._sizes.append(_measure_sizes(units, self._groups, energies))
        self._kept.append(_Seen(number, batch, capture, units, math.fsum(energies.values())))
        if len(self._kept) > _KEPT:
            self._kept.remove(min(self._kept, key=lambda seen: seen.energy))

    def observe(self, probes: int) -> list[Observed]:
        """Return the noisiest batches, with what becomes of noise below their layers.

        Args:
            probes: random directions for each.
        """
        observed = []
        for seen in self._kept:
            for call in seen.capture.calls:
                # Who holds what is the same for every batch, and was found out for the first.
                call.held, call.bypassed = self._holders.get((call.layer, call.order), ({}, {}))
            below = PassedDown()
            self._push_forward(seen, below, probes)
            groups = [self._regroup(group, seen.capture) for group in self._groups]
            observed.append(Observed(seen.number, seen.batch, seen.capture, below, seen.units, groups))
        return observed

    def _regroup(self, group: Group, capture: Capture) -> Group:
        return Group(group.layers, [call for call in capture.calls if call.layer in group.layers], group.strategies)

    def _push_forward(self, seen: _Seen, below: PassedDown, probes: int) -> None:
        """Learn what becomes of noise below units, and below activations whose slopes may be coded."""
        calls = [chain[0] for unit in seen.units for chain in unit.chains]
        for call in seen.capture.calls:
            if call.before is not None and call.activated and self._candidates[call.layer].stored:
                calls.append(call.before)
        distinct = list({id(call): call for call in calls}.values())
        push_forward(self._step, seen.batch, distinct, below.take, probes, seed=seen.number)

    def sizes(self, observed: Sequence[Observed]) -> list[list[list[float]]]:
        """Return, for every batch, unit or group, and choice, what its noise is near proportional to.

        Args:
            observed: what `observe` returned.
        """
        factors = _amplifications(observed) + [0.0] * len(self._groups)
        return [
            [
                [own + factor * below for own, below in of_item]
                for of_item, factor in zip(of_batch, factors, strict=False)
            ]
            for of_batch in self._sizes
        ]


def _check_finite_gradient(step: Step, capture: Capture, number: int) -> None:
    for (name, _), value in zip(step.named_parameters, capture.gradient, strict=True):
        if not bool(value.isfinite().all()):
            raise BatchError(
                f"the gradient of {name!r} is not finite in batches[{number}], though its loss is {capture.loss:.3g}; "
                "noise is a fraction of the gradient's variance, so plan with batches where all of it is finite"
            )


def _amplifications(observed: Sequence[Observed]) -> list[float]:
    """Return, for every unit, the squared norm below of a unit of its first layers' input gradients."""
    found = []
    for position in range(min(len(one.units) for one in observed)):
        pairs = [(one.below, chain[0]) for one in observed for chain in one.units[position].chains]
        found.append(math.fsum(below.amplification(call) for below, call in pairs) / len(pairs))
    return found


def _measure_sizes(units: Sequence[Unit], groups: Sequence[Group], energies: Mapping[str, float]) -> _Sizes:
    sizes = [unit.sizes() for unit in units]
    for group in groups:
        energy = math.fsum(energies.get(layer, 0.0) for layer in group.layers)
        sizes.append([(energy, 0.0)] * len(group.strategies))
    return sizes

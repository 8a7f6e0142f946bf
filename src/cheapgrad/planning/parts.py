"""The parts of a model that are decided on: units that draw rows together, and groups that hold one input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cheapgrad.convert.kinds import LayerKind
from cheapgrad.cost._saved_tensors import StorageKey
from cheapgrad.ops.chains.joining import is_row_wise
from cheapgrad.ops.plan import Plan as LayerPlan
from cheapgrad.ops.stored_derivative import derivative_saved_bytes
from cheapgrad.planning.candidates import LayerCandidates
from cheapgrad.planning.capture import Call
from cheapgrad.planning.noise import joins_codes, measure_cotangent_noise, measure_stored_noise
from cheapgrad.planning.passed_down import Noise, PassedDown
from cheapgrad.planning.row_noise import row_noise_sizes, samples_rows
from cheapgrad.sketch import AbstractStrategy, Moment, StochasticRounding


@dataclass(frozen=True)
class Choice:
    """One strategy for some layers, with what it changes.

    Attributes:
        layers: their names.
        moment: where the strategy acts.
        strategy: the strategy.
        bytes_change: of what the whole step holds.
        flops_change: of the whole backward pass.
        noise: added variance, averaged over all batches.
        freed: storages that are let go, with their bytes.
        by_batch: the noise of each batch, as a multiple of the average.
        is_region: whether norms, activations and attention between the layers take codes too; its noise is measured.
    """

    layers: tuple[str, ...]
    moment: Moment
    strategy: AbstractStrategy
    bytes_change: float
    flops_change: float
    noise: Noise
    freed: Mapping[StorageKey, int] = field(default_factory=dict)
    by_batch: tuple[float, ...] = ()
    is_region: bool = False


@dataclass
class Unit:
    """Layers that draw their rows together, because they follow each other row by row.

    Attributes:
        layers: their names, in forward order.
        chains: their calls: one chain for each time the unit runs.
        strategies: what all of them can take.
    """

    layers: tuple[str, ...]
    chains: list[list[Call]]
    strategies: list[AbstractStrategy]

    def choices(self, below: PassedDown) -> list[Choice]:
        """Return every strategy with what it changes."""
        # A chain computes the outputs of its activations again, so that nobody holds them.
        freed = {
            key: size
            for chain in self.chains
            for call in chain[1:]
            if call.activated
            for key, size in call.held.items()
        }
        noises = [Noise()] * len(self.strategies)
        for chain in self.chains:
            measured = measure_cotangent_noise(chain, self.strategies, below, is_folded=True)
            noises = [noise + one for noise, one in zip(noises, measured, strict=True)]
        found = []
        for strategy, noise in zip(self.strategies, noises, strict=True):
            flops = sum(_flops_change(call, strategy, Moment.COTANGENT) for chain in self.chains for call in chain)
            less = -float(sum(freed.values()))
            found.append(Choice(self.layers, Moment.COTANGENT, strategy, less, flops, noise, freed))
        return found

    def sizes(self) -> list[tuple[float, float]]:
        """Return what the noise of every strategy is near proportional to, from batch to batch.

        The second of each pair is still to be multiplied by the amplification of the first layers' input gradients.
        """
        found = [(0.0, 0.0)] * len(self.strategies)
        for chain in self.chains:
            rows = [strategy for strategy in self.strategies if samples_rows(strategy, chain)]
            of_rows = iter(row_noise_sizes(chain, rows) if rows else ())
            energy = sum(call.energy for call in chain) if len(rows) < len(self.strategies) else 0.0
            for position, strategy in enumerate(self.strategies):
                own, below = next(of_rows) if strategy in rows else (energy, 0.0)
                found[position] = (found[position][0] + own, found[position][1] + below)
        return found


@dataclass
class Group:
    """Layers that read the same input: it is let go only if all of them keep something else.

    Attributes:
        layers: their names.
        calls: their calls.
        strategies: what all of them can take.
    """

    layers: tuple[str, ...]
    calls: list[Call]
    strategies: list[AbstractStrategy]

    def choices(self, below: PassedDown) -> list[Choice]:
        """Return every strategy with what it changes."""
        found = []
        for strategy in self.strategies:
            freed: dict[StorageKey, int] = {}
            kept, flops, noise = 0.0, 0.0, Noise()
            for call in self.calls:
                freed.update(call.held)
                kept += call.kind.saved_bytes(strategy, Moment.STORED, call.shape)
                flops += _flops_change(call, strategy, Moment.STORED)
                noise = noise + measure_stored_noise(call, strategy, below, self.layers)
                if joins_codes(call, strategy, self.layers) and call.activation is not None:
                    freed.update(call.bypassed)
                    stage, held = call.activation
                    rows, features = held.numel() // held.shape[-1], held.shape[-1]
                    if isinstance(strategy, StochasticRounding):
                        kept += derivative_saved_bytes(stage.activation, strategy, rows, features)
            change = kept - sum(freed.values())
            found.append(Choice(self.layers, Moment.STORED, strategy, change, flops, noise, freed))
        return found


def find_units(calls: Sequence[Call], candidates: Mapping[str, LayerCandidates]) -> list[Unit]:
    """Join layers whose calls follow each other row by row, as converted layers with equal strategies do.

    Args:
        calls: of an exact pass.
        candidates: what the layers can take.
    """
    drawing = [call for call in calls if candidates[call.layer].cotangent and _has_products(call)]
    partner = {id(call): call for call in drawing}
    joined: dict[str, str] = {call.layer: call.layer for call in drawing}
    followers: dict[int, Call] = {}
    for call in drawing:
        before = call.before
        if before is None or id(before) not in partner or id(before) in followers:
            continue
        if not (before.is_matrix and call.is_matrix) or not _shared(candidates, (before.layer, call.layer)):
            continue
        followers[id(before)] = call
        _join(joined, before.layer, call.layer)
    chains = _walk_chains(drawing, followers)
    units = []
    for root in dict.fromkeys(_find(joined, call.layer) for call in drawing):
        layers = tuple(name for name in candidates if name in joined and _find(joined, name) == root)
        own = [chain for chain in chains if chain[0].layer in layers]
        strategies = candidates[layers[0]].cotangent if len(layers) == 1 else _shared(candidates, layers)
        units.append(Unit(layers, own, list(strategies)))
    return units


def _walk_chains(drawing: Sequence[Call], followers: Mapping[int, Call]) -> list[list[Call]]:
    inner = {id(call) for call in followers.values()}
    chains = []
    for call in drawing:
        if id(call) in inner:
            continue
        chain = [call]
        while id(chain[-1]) in followers:
            chain.append(followers[id(chain[-1])])
        chains.append(chain)
    return chains


def find_groups(calls: Sequence[Call], candidates: Mapping[str, LayerCandidates]) -> list[Group]:
    """Join layers that read the same input, or follow each other row by row, as layers with equal codecs do.

    Layers are left out whose input somebody else holds anyway.

    Args:
        calls: of an exact pass.
        candidates: what the layers can take.
    """
    storing = [call for call in calls if candidates[call.layer].stored]
    holders: dict[StorageKey, list[str]] = {}
    for call in calls:
        for key in call.held:
            holders.setdefault(key, []).append(call.layer)
    joined = {call.layer: call.layer for call in storing}
    blocked = {call.layer for call in storing if not call.held and not call.bypassed}
    for layers in holders.values():
        if any(layer not in joined for layer in layers):
            blocked.update(layers)
        for layer in layers[1:]:
            if layer in joined and layers[0] in joined:
                _join(joined, layers[0], layer)
    for call in storing:
        before = call.before
        if before is None or before.layer not in joined or {before.layer, call.layer} & blocked:
            continue
        if call.is_matrix and before.is_matrix:
            _join(joined, before.layer, call.layer)
    spoiled = {_find(joined, layer) for layer in blocked if layer in joined}
    groups = []
    for root in dict.fromkeys(_find(joined, call.layer) for call in storing):
        if root in spoiled:
            continue
        layers = tuple(name for name in candidates if name in joined and _find(joined, name) == root)
        strategies = [one for one in candidates[layers[0]].stored if all(one in candidates[n].stored for n in layers)]
        groups.append(Group(layers, [call for call in storing if call.layer in layers], strategies))
    return groups


def _shared(candidates: Mapping[str, LayerCandidates], layers: Sequence[str]) -> list[AbstractStrategy]:
    """Return the strategies that layers can take together, on one draw of rows."""
    first, *others = (candidates[layer].cotangent for layer in layers)
    common = [strategy for strategy in first if all(strategy in other for other in others)]
    return [strategy for strategy in common if is_row_wise(LayerPlan(cotangent=strategy))]


def _has_products(call: Call) -> bool:
    return call.wants_input or _wants_weight(call)


def _wants_weight(call: Call) -> bool:
    weight = getattr(call.module, "weight", None)
    return weight is not None and weight.requires_grad


def exact_flops(call: Call) -> float:
    """Return the FLOPs of the products that the exact backward pass forms.

    Args:
        call: of a layer.
    """
    return call.kind.flops(None, Moment.COTANGENT, call.shape) * (call.wants_input + _wants_weight(call)) / 2


def _flops_change(call: Call, strategy: AbstractStrategy, moment: Moment) -> float:
    kind: LayerKind = call.kind
    sketched, both = kind.flops(strategy, moment, call.shape), kind.flops(None, moment, call.shape)
    if moment is Moment.STORED:
        # Only dW is sketched.
        return sketched - both
    return (sketched - both) * (call.wants_input + _wants_weight(call)) / 2


def _find(joined: dict[str, str], name: str) -> str:
    while joined[name] != name:
        name = joined[name]
    return name


def _join(joined: dict[str, str], first: str, second: str) -> None:
    joined[_find(joined, second)] = _find(joined, first)

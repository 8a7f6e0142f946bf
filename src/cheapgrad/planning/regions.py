"""Regions: blocks whose norms, activations and attention take one code together with their linear layers.

What such a block holds cannot be told layer by layer: a norm's code serves the layer that follows, a slope the layers
on both sides of it, and what attention needs is computed again from a code of the norm before. So a block is one
choice: its bytes are counted with and without codes, and its noise is measured by drawing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from cheapgrad.convert import Rule, approximate
from cheapgrad.convert.approximate import Preview
from cheapgrad.convert.kinds import kind_of
from cheapgrad.convert.wrappers import unwrap
from cheapgrad.cost import CostReport
from cheapgrad.errors import NoMatchError
from cheapgrad.planning.candidates import is_planned
from cheapgrad.planning.capture import MATRICES, Capture
from cheapgrad.planning.costs import count_planned_costs
from cheapgrad.planning.parts import Choice, Group
from cheapgrad.planning.passed_down import Noise
from cheapgrad.planning.passes import Step, names_of_dropouts
from cheapgrad.planning.plan_noise import draw_squared_error
from cheapgrad.sketch import Moment, StochasticRounding

_BITS = (8, 4, 2)
# Bytes are counted at two widths: they are linear in the width.
_COUNTED_BITS = (8, 4)
# Noise is drawn where it is largest; it falls with the squared number of steps, but for that of norms over images,
# whose second code is of two bits whatever the first one is: what is left of their regions' noise at this width.
_DRAWN_BITS, _FIXED_BITS = 2, 8
_FIXED_CODES = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
# More regions than these share draws, and their noise is shared out by the bytes that they save.
_MOST_DRAWS = 8


@dataclass(frozen=True)
class Region:
    """Modules that are coded together.

    Attributes:
        path: of the module that holds them; what else runs inside it is counted with them, unless `is_rest`.
        layers: names of those that can be coded.
        is_rest: whether these are what is left beside blocks of their own.
    """

    path: str
    layers: tuple[str, ...]
    is_rest: bool = False

    def holds(self, name: str) -> bool:
        """Tell whether a module's bytes are counted with the region."""
        if self.is_rest:
            return name in self.layers
        return not self.path or name == self.path or name.startswith(f"{self.path}.")


def find_regions(model: nn.Module, groups: Sequence[Group], skip_small: bool) -> list[Region]:
    """Return the blocks of a model, none where codes of linear layers and convolutions are all there is.

    A block is a child of a list or sequence of modules, such as a transformer's layer; what stands beside blocks makes
    a region of its own.

    Args:
        model: the model.
        groups: layers that hold one input; blocks that share one are joined.
        skip_small: as in `cheapgrad.approximate`.
    """
    try:
        records = Preview(model, skip_small).records([Rule("*", stored=StochasticRounding(4), recompute=True)])
    except NoMatchError:
        return []
    names = [record.name for record in records if record.status == "converted"]
    if not _holds_more(model, names):
        return []
    regions = _split("", model, names)
    for group in groups:
        touched = [region for region in regions if set(region.layers) & set(group.layers)]
        if len(touched) > 1:
            layers = tuple(name for region in touched for name in region.layers)
            regions = [region for region in regions if region not in touched] + [Region("", layers, is_rest=True)]
    return regions


def _holds_more(model: nn.Module, names: Sequence[str]) -> bool:
    """Tell whether something but linear layers, convolutions and what stands between linear layers holds bytes."""
    modules = {name: model.get_submodule(name) for name in names}
    planned = [module for name, module in modules.items() if is_planned(name, module)]
    only_matrices = all(_kind_name(module) in MATRICES for module in planned)
    others = [module for name, module in modules.items() if not is_planned(name, module)]
    return any(not (only_matrices and _is_activation(module)) for module in others)


def _kind_name(module: nn.Module) -> str:
    kind = kind_of(type(module))
    return "" if kind is None else kind.name


def _is_activation(module: nn.Module) -> bool:
    kind = kind_of(type(module))
    return (
        kind is not None and kind.row_wise and not any(True for _ in module.parameters()) and "Dropout" not in kind.name
    )


def _split(path: str, module: nn.Module, names: Sequence[str]) -> list[Region]:
    if not _has_blocks(path, module, names):
        return [Region(path, tuple(names))]
    regions, rest = [], list(names)
    for child_name, child in module.named_children():
        child_path = f"{path}.{child_name}" if path else child_name
        inside = _inside(child_path, names)
        if len(inside) > 1:
            regions += _split(child_path, child, inside)
            rest = [name for name in rest if name not in set(inside)]
    return regions + ([Region(path, tuple(rest), is_rest=True)] if rest else [])


def _inside(path: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name == path or name.startswith(f"{path}.")] if path else list(names)


def _has_blocks(path: str, module: nn.Module, names: Sequence[str]) -> bool:
    for inner, container in module.named_modules(prefix=path):
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        children = [f"{inner}.{child}" if inner else child for child, _ in container.named_children()]
        if sum(len(_inside(child, names)) > 1 for child in children) > 1:
            return True
    return False


def measure_regions(
    step: Step,
    batch: Any,
    capture: Capture,
    regions: Sequence[Region],
    exact: CostReport,
    skip_small: bool,
) -> list[list[Choice]]:
    """Return, for every region, one choice for each width of codes.

    Args:
        step: the training step.
        batch: the batch of the exact pass.
        capture: the exact pass.
        regions: disjoint.
        exact: ledger of the exact step.
        skip_small: as in `cheapgrad.approximate`.
    """
    counted = {}
    for bits in _COUNTED_BITS:
        rules = [rule for region in regions for rule in _rules(region, bits)]
        counted[bits] = count_planned_costs(step, batch, rules, skip_small)
    changes = [_changes(region, exact, counted) for region in regions]
    saved = [one[_DRAWN_BITS][0] for one in changes]
    noises = _draw_noises(step, batch, capture, regions, saved, skip_small, _DRAWN_BITS)
    kept = [region for region in regions if _has_fixed_codes(step.model, region)]
    places = [regions.index(region) for region in kept]
    fixed = [0.0] * len(regions)
    drawn = _draw_noises(step, batch, capture, kept, [saved[at] for at in places], skip_small, _FIXED_BITS)
    for at, noise in zip(places, drawn, strict=True):
        fixed[at] = min(noise.total, noises[at].total)
    return [
        [
            Choice(
                region.layers,
                Moment.STORED,
                StochasticRounding(bits),
                *changes[position][bits],
                _noise_at(bits, noises[position].total, fixed[position]),
                is_region=True,
            )
            for bits in _BITS
        ]
        for position, region in enumerate(regions)
    ]


def _noise_at(bits: int, drawn: float, fixed: float) -> Noise:
    """Return the noise of a region at a width, from that at 2 bits and the part of it that no width changes."""
    return Noise(own=fixed + (drawn - fixed) * ((2**_DRAWN_BITS - 1) / (2**bits - 1)) ** 2)


def _has_fixed_codes(model: nn.Module, region: Region) -> bool:
    return any(isinstance(unwrap(model).get_submodule(name), _FIXED_CODES) for name in region.layers)


def _rules(region: Region, bits: int) -> list[Rule]:
    return [_rule(name, bits) for name in region.layers]


def _rule(name: str, bits: int) -> Rule:
    return Rule(lambda other, module: other == name, stored=StochasticRounding(bits), recompute=True)


def _changes(region: Region, exact: CostReport, counted: dict[int, CostReport]) -> dict[int, tuple[float, float]]:
    """Return the changes of bytes and backward FLOPs by the width of the codes."""
    before = _sums(region, exact)
    of_bits = {}
    for bits, report in counted.items():
        after = _sums(region, report)
        of_bits[bits] = (after[0] - before[0], after[1] - before[1])
    wide, narrow = _COUNTED_BITS
    slope = (of_bits[wide][0] - of_bits[narrow][0]) / (wide - narrow)
    of_bits[2] = (of_bits[narrow][0] - (narrow - 2) * slope, of_bits[narrow][1])
    return of_bits


def _sums(region: Region, report: CostReport) -> tuple[float, float]:
    held, flops = 0.0, 0.0
    for row in report.rows:
        # The model is called "model" in the module that also computes the loss.
        if row.name.partition(".")[0] == "model" and region.holds(row.name.partition(".")[2]):
            held += row.saved_bytes
            flops += row.backward_flops + row.recompute_flops
    return held, flops


def _draw_noises(
    step: Step,
    batch: Any,
    capture: Capture,
    regions: Sequence[Region],
    bytes_changes: Sequence[float],
    skip_small: bool,
    bits: int,
) -> list[Noise]:
    """Return squared errors of the gradient when one region after the other is coded at a width."""
    noises = [Noise()] * len(regions)
    count = max(1, -(-len(regions) // _MOST_DRAWS))
    for start in range(0, len(regions), count):
        members = range(start, min(start + count, len(regions)))
        error = _draw_error(step, batch, capture, [regions[position] for position in members], skip_small, bits)
        saved = [max(-bytes_changes[position], 1.0) for position in members]
        for position, share in zip(members, saved, strict=True):
            noises[position] = Noise(own=error * share / sum(saved))
    return noises


def _draw_error(
    step: Step, batch: Any, capture: Capture, regions: Sequence[Region], skip_small: bool, bits: int
) -> float:
    """Return the squared error of one draw, dropout left alone."""
    dropouts = names_of_dropouts(step.model)
    rules = [_rule(name, bits) for region in regions for name in region.layers if name not in dropouts]
    if not rules:
        return 0.0
    handle = approximate(step.model, rules, skip_small=skip_small)
    try:
        with step.undisturbed():
            return draw_squared_error(step, batch, capture)
    finally:
        handle.revert()

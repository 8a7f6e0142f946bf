"""Which strategies each layer of a model can take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cheapgrad.convert import Rule
from cheapgrad.convert.approximate import Preview
from cheapgrad.convert.kinds import KINDS, kind_of
from cheapgrad.errors import NoMatchError, RuleError
from cheapgrad.planning.capture import MATRICES
from cheapgrad.sketch import AbstractStrategy, ExampleSample, Moment, RowSample, StochasticRounding

_KEEPS = (0.75, 0.6, 0.5, 0.4, 0.3, 0.2)
_BITS = (8, 4, 2)
_IMAGE_KEEPS = (0.75, 0.5, 0.25)


@dataclass
class LayerCandidates:
    """What one layer can take.

    Attributes:
        name: of the layer.
        module: the layer.
        stored: strategies for what is kept of its input.
        cotangent: strategies for its cotangent.
    """

    name: str
    module: nn.Module
    stored: list[AbstractStrategy] = field(default_factory=list)
    cotangent: list[AbstractStrategy] = field(default_factory=list)


def default_rules() -> list[Rule]:
    """Return the strategies that a plan chooses from: rows or examples for time, stochastic rounding for memory."""
    rules = [Rule(is_planned, stored=StochasticRounding(bits)) for bits in _BITS]
    rules += [Rule(_is_matrix, cotangent=RowSample(keep)) for keep in _KEEPS]
    return rules + [Rule(_is_convolution, cotangent=ExampleSample(keep)) for keep in _IMAGE_KEEPS]


def is_planned(name: str, module: nn.Module) -> bool:
    """Tell whether a module is of a kind that is planned for: linear maps and convolutions."""
    return _is_matrix(name, module) or _is_convolution(name, module)


# Of these a plan knows what noise and costs depend on.
_CONVOLUTIONS = tuple(kind.name for kind in KINDS if kind.name.startswith("Conv") and kind.name not in MATRICES)


def _is_matrix(name: str, module: nn.Module) -> bool:
    kind = kind_of(type(module))
    return kind is not None and kind.name in MATRICES


def _is_convolution(name: str, module: nn.Module) -> bool:
    kind = kind_of(type(module))
    return kind is not None and kind.name in _CONVOLUTIONS


def find_candidates(
    model: nn.Module, strategies: Rule | Iterable[Rule] | None, skip_small: bool
) -> tuple[dict[str, LayerCandidates], list[str]]:
    """Return what each layer can take, by what `cheapgrad.approximate` would do with each rule.

    Args:
        model: as it is when this returns.
        strategies: a rule or rules whose strategies are to be chosen from; None for `default_rules`.
        skip_small: leave layers alone that are too small to pay.

    Returns:
        Candidates by the name of the layer, in the model's order, and remarks on layers that were left out.

    Raises:
        RuleError: if `strategies` are no rules, none at all, or ask for recomputation.
        NoMatchError: if one of `strategies` matches nothing, or nothing can be planned for.
    """
    rules = default_rules() if strategies is None else _list_rules(strategies)
    found: dict[str, LayerCandidates] = {}
    left_out: dict[str, None] = {}
    preview = Preview(model, skip_small)
    for rule in rules:
        for single in _single_moments(rule):
            try:
                _take_in(model, preview, single, found, left_out)
            except NoMatchError:
                if strategies is not None:
                    raise
    if not any(layer.stored or layer.cotangent for layer in found.values()):
        raise NoMatchError(
            f"no layer of {type(model).__name__} takes any of the strategies to choose from; plans are made for linear "
            "maps and convolutions that are large enough to pay (skip_small=False plans for small ones too)"
        )
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    names = sorted((name for name in found), key=lambda name: order.get(name, 0))
    return {name: found[name] for name in names}, list(left_out)


def _list_rules(strategies: Rule | Iterable[Rule]) -> list[Rule]:
    """Return the rules of a user; a single one needs no list, as in `cheapgrad.approximate`."""
    rules: list[Any] = list(strategies) if isinstance(strategies, Iterable) else [strategies]
    if not rules:
        raise RuleError("strategies is empty; give rules to choose from, or None for the usual ones")
    for rule in rules:
        if not isinstance(rule, Rule):
            what = f"{rule!r} of type {type(rule).__name__}"
            raise RuleError(f"strategies must be cheapgrad.Rule objects, but got {what}")
    return rules


def _single_moments(rule: Rule) -> list[Rule]:
    if rule.recompute:
        raise RuleError(f"{rule!r} asks for recomputation, which is not planned for; convert with it after the plan")
    stored = [] if rule.stored is None else [Rule(rule.pattern, stored=rule.stored)]
    return stored + ([] if rule.cotangent is None else [Rule(rule.pattern, cotangent=rule.cotangent)])


def _take_in(
    model: nn.Module, preview: Preview, rule: Rule, found: dict[str, LayerCandidates], left_out: dict[str, None]
) -> None:
    strategy = rule.stored or rule.cotangent
    moment = Moment.STORED if rule.stored is not None else Moment.COTANGENT
    for row in preview.records([rule]):
        module = model.get_submodule(row.name)
        if not is_planned(row.name, module):
            left_out[f"{row.name}: plans leave a {row.kind} alone"] = None
            continue
        layer = found.setdefault(row.name, LayerCandidates(row.name, module))
        if row.status == "converted" and strategy is not None:
            getattr(layer, moment.value).append(strategy)
        elif row.remark:
            left_out[f"{row.name}: {row.remark}"] = None

"""`approximate`: rules to modules of a live model, in place, all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from cheapgrad.convert.handle import Handle
from cheapgrad.convert.kinds import LayerKind, kind_of
from cheapgrad.convert.layer_record import LayerRecord
from cheapgrad.convert.obstacles import find_obstacle
from cheapgrad.convert.rule import Rule
from cheapgrad.convert.scopes import open_scopes
from cheapgrad.convert.sketched_layer import Conversion, SketchedLayer, Switch, sketched_class
from cheapgrad.convert.uncovered import is_listed, why_uncovered
from cheapgrad.convert.wrappers import unwrap
from cheapgrad.errors import (
    BudgetError,
    ConversionError,
    FusingWarning,
    ModelTypeError,
    NoEffectWarning,
    NoMatchError,
    PlanWarning,
    RuleError,
    nearest_match,
)
from cheapgrad.ops.compiled import plan_text
from cheapgrad.ops.plan import Plan, RootUse
from cheapgrad.sketch import AbstractStrategy, ExampleSample, Moment, StochasticRounding
from cheapgrad.sketch.fusing import note_obstacle


@dataclass
class _Layer:
    """A module with an operation of its own, and every name it is registered under."""

    module: nn.Module
    names: list[str]

    def is_matched(self, rule: Rule) -> bool:
        """Tell whether the rule applies to the module under any of its names."""
        return any(rule.matches(name, self.module) for name in self.names)


@dataclass
class _Decision:
    """What is to happen to one module, before anything happens."""

    layer: _Layer
    rule: Rule | None
    stored: AbstractStrategy | None = None
    cotangent: AbstractStrategy | None = None
    remark: str = ""

    @property
    def name(self) -> str:
        """The module's first name."""
        return self.layer.names[0]

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.layer.module


@runtime_checkable
class HoldsRules(Protocol):
    """What a plan shows of itself here: its rules, for which model, and whether it leaves small layers alone."""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """One rule for each layer."""
        ...

    @property
    def skip_small(self) -> bool:
        """Whether it was made for layers that are large enough to pay only."""
        ...

    def find_differences(self, model: nn.Module) -> list[str]:
        """Return how layers of a model differ from those it was made for."""
        ...


def approximate(model: nn.Module, *rules: Rule | Iterable[Rule] | HoldsRules, skip_small: bool = True) -> Handle:
    """Make the backward pass of a model cheaper, in place.

    Matched layers get a class whose forward is the stock one, bit for bit, and whose backward multiplies unbiased
    random sketches. Parameters, their names and the state_dict do not change. Gradients stay exact in ``eval()``, under
    ``no_grad`` and inside ``handle.exact()``. Convert first, then wrap (DDP, FSDP) or compile.

    Args:
        model: any module; converted in place.
        rules: at least one, or sequences of them such as `cheapgrad.recipes.memory` returns, or a plan that
            `cheapgrad.plan` made; for each module the last one that matches wins.
        skip_small: leave layers alone whose draw would cost more than it saves, and list them; a plan that was made for
            small layers too converts them.

    Returns:
        A `Handle`: ``print(handle)`` lists what happened to every layer; ``handle.revert()`` undoes it.

    Raises:
        ModelTypeError: if `model` is not a module.
        RuleError: if there is no rule, or something else than a `Rule`.
        NoMatchError: if a rule matches no layer that can be converted.
        BudgetError: if a budget does not fit a layer (a rank larger than its matrix).
        ConversionError: if a matched layer is converted already.
        WrapperOrderError: if the model is compiled or sharded already.

    Warns (`NoEffectWarning`, `FusingWarning`) where rules, or ``fused=True``, have no effect, and (`PlanWarning`) where
    a plan was made for layers of another type or size.

    >>> import torch, cheapgrad
    >>> from cheapgrad.sketch import RowSample
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    >>> handle = cheapgrad.approximate(model, cheapgrad.Rule(cotangent=RowSample(keep=0.5)))
    >>> print(*(f"{row.name}: {row.status}" for row in handle.rows), sep=", ")
    0: converted, 1: converted, 2: skipped
    >>> handle.revert()
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"model must be a torch.nn.Module, but got {model!r} of type {type(model).__name__}")
    if rules and all(isinstance(rule, HoldsRules) and not rule.rules for rule in rules):
        warnings.warn("the plan leaves every layer exact: nothing was converted", NoEffectWarning, stacklevel=2)
        return Handle(unwrap(model), (), Switch())
    chosen = _list_rules(rules)
    skip_small = skip_small and all(rule.skip_small for rule in rules if isinstance(rule, HoldsRules))
    target = unwrap(model)
    decisions = _decide_all(_layers(target), chosen, skip_small)
    records = _record_all(decisions, _tied_names(target))
    differences = [text for plan in rules if isinstance(plan, HoldsRules) for text in plan.find_differences(target)]
    switch = Switch()
    _swap_all(decisions, switch)
    if any(rule.recompute for rule in chosen):
        open_scopes(target, switch)
    for rule in _rules_without_effect(chosen, decisions):
        warnings.warn(
            f"the rule for {rule.pattern!r} has no effect: later rules win on every layer it matches",
            NoEffectWarning,
            stacklevel=2,
        )
    if differences:
        more = f", and {len(differences) - 3} more layers" if len(differences) > 3 else ""
        warnings.warn(
            f"the plan was made for another model: {'; '.join(differences[:3])}{more}. Its budgets and predictions may "
            "not hold here; plan again with this model",
            PlanWarning,
            stacklevel=2,
        )
    if not any(record.status == "converted" for record in records):
        reasons = "; ".join(f"{record.name or '(model)'}: {record.remark}" for record in records[:5])
        warnings.warn(f"cheapgrad.approximate converted nothing: {reasons}", NoEffectWarning, stacklevel=2)
    for message in _why_unfused(target, decisions):
        warnings.warn(message, FusingWarning, stacklevel=2)
    return Handle(target, tuple(records), switch)


class Preview:
    """What `approximate` would do with a model, without doing it.

    Args:
        model: any module that is not converted.
        skip_small: as in `approximate`.
    """

    def __init__(self, model: nn.Module, skip_small: bool = True) -> None:
        self._layers = _layers(model)
        self._tied = _tied_names(model)
        self._skip_small = skip_small

    def records(self, rules: Sequence[Rule]) -> list[LayerRecord]:
        """Return what would happen to every layer that a rule matches.

        Args:
            rules: as for `approximate`.

        Raises:
            NoMatchError: as `approximate` does.
            BudgetError: as `approximate` does.
        """
        return _record_all(_decide_all(self._layers, tuple(rules), self._skip_small), self._tied)


def _decide_all(layers: list[_Layer], rules: tuple[Rule, ...], skip_small: bool) -> list[_Decision]:
    decisions = [_decide(layer, rules, skip_small) for layer in layers]
    _drop_rows_nobody_draws(decisions)
    _check_matches(rules, decisions)
    return decisions


def _record_all(decisions: list[_Decision], tied: dict[int, list[str]]) -> list[LayerRecord]:
    return [_record(decision, tied) for decision in decisions if decision.rule is not None]


def _list_rules(rules: tuple[Any, ...]) -> tuple[Rule, ...]:
    """Return rules and sequences of rules as one sequence."""
    listed: list[Any] = []
    for rule in rules:
        rule = rule.rules if isinstance(rule, HoldsRules) else rule
        listed.extend(rule if isinstance(rule, (list, tuple)) else [rule])
    if not listed:
        raise RuleError("no rule was given; pass e.g. cheapgrad.Rule(cotangent=RowSample(keep=0.5))")
    for rule in listed:
        if not isinstance(rule, Rule):
            raise RuleError(f"rules must be cheapgrad.Rule objects, but got {rule!r} of type {type(rule).__name__}")
    return tuple(listed)


def _layers(model: nn.Module) -> list[_Layer]:
    """Return every module that has parameters of its own, is of a convertible kind or holds something, once."""
    layers: dict[int, _Layer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        is_layer = any(True for _ in module.parameters(recurse=False)) or kind_of(type(module)) is not None
        if is_layer or is_listed(module):
            layers.setdefault(id(module), _Layer(module, [])).names.append(name)
    return list(layers.values())


def _decide(layer: _Layer, rules: tuple[Rule, ...], skip_small: bool) -> _Decision:
    rule = next((rule for rule in reversed(rules) if layer.is_matched(rule)), None)
    decision, module = _Decision(layer, rule), layer.module
    if rule is None:
        return decision
    if isinstance(module, SketchedLayer):
        raise ConversionError(
            f"layer {decision.name or '(model)'!r} is converted already; "
            "call handle.revert() first, or use patterns that do not overlap"
        )
    kind = kind_of(type(module))
    decision.remark = why_uncovered(module) if kind is None else find_obstacle(module)
    if kind is None or decision.remark:
        return decision
    remarks = []
    for moment, strategy in ((Moment.STORED, rule.stored), (Moment.COTANGENT, rule.cotangent)):
        if strategy is None:
            continue
        _check_budget(decision, kind, strategy, moment)
        reason = _why_not(module, kind, strategy, moment, skip_small)
        if reason:
            remarks.append(reason)
        else:
            setattr(decision, moment.value, strategy)
    decision.remark = "; ".join(dict.fromkeys(remarks))
    return decision


def _drop_rows_nobody_draws(decisions: list[_Decision]) -> None:
    """Leave norms and activations alone that would share rows with a linear layer where there is none."""
    converted = [decision for decision in decisions if decision.cotangent is not None]
    drawing = [decision for decision in converted if not _is_row_wise(decision)]
    if drawing:
        return
    for decision in converted:
        decision.cotangent = None
        reason = "cotangent: no layer that draws rows is converted, so there are none to share"
        decision.remark = "; ".join(filter(None, [decision.remark, reason]))


def _is_row_wise(decision: _Decision) -> bool:
    kind = kind_of(type(decision.module))
    return kind is not None and kind.row_wise


def _check_budget(decision: _Decision, kind: LayerKind, strategy: AbstractStrategy, moment: Moment) -> None:
    if kind.sizes is None:
        return
    try:
        strategy.check_layer(*kind.sizes(decision.module), moment)
    except BudgetError as error:
        raise BudgetError(f"layer {decision.name or '(model)'!r}: {error}") from None


def _why_not(module: nn.Module, kind: LayerKind, strategy: AbstractStrategy, moment: Moment, skip_small: bool) -> str:
    """Return why a strategy is left out for a layer, or an empty string."""
    if strategy.is_exact:
        return f"{moment.value}: full budget, stock code runs"
    reason = kind.why_not(module, strategy, moment)
    if reason or not skip_small:
        return reason
    if moment is Moment.COTANGENT and isinstance(strategy, kind.slow_cotangents):
        instead = "" if ExampleSample in kind.slow_cotangents else "; use ExampleSample or ColumnSample"
        return (
            f"no time saved: {type(strategy).__name__} of the cotangent is no faster than a native {kind.name}"
            f"{instead} (skip_small=False converts it)"
        )
    least = kind.least_weights[moment]
    weight = getattr(module, "weight", None)
    count = kind.weights(module) if kind.weights is not None else None if weight is None else weight.numel()
    if least and count is not None and count < least:
        return f"too small to pay: {count} weights, under {least} (skip_small=False converts it)"
    return ""


def _rules_without_effect(rules: tuple[Rule, ...], decisions: list[_Decision]) -> list[Rule]:
    winners = {id(decision.rule) for decision in decisions}
    return [rule for rule in rules if id(rule) not in winners]


def _why_unfused(model: nn.Module, decisions: list[_Decision]) -> list[str]:
    """Return why codecs that are to be fused will not be, for each kind of device that the model is on."""
    if not any(isinstance(decision.stored, StochasticRounding) and decision.stored.fused for decision in decisions):
        return []
    # Where a model on the meta device will run is not known yet; what runs there says so itself.
    devices = dict.fromkeys(parameter.device.type for parameter in model.parameters()) or {"cpu": None}
    return list(filter(None, (note_obstacle(device) for device in devices if device != "meta")))


def _check_matches(rules: tuple[Rule, ...], decisions: list[_Decision]) -> None:
    for rule in rules:
        matched = [decision for decision in decisions if decision.layer.is_matched(rule)]
        if any(kind_of(type(decision.module)) is not None for decision in matched):
            continue
        if matched:
            kinds = ", ".join(sorted({type(decision.module).__name__ for decision in matched}))
            reasons = "; ".join(sorted({why_uncovered(decision.module) for decision in matched})[:5])
            raise NoMatchError(
                f"the rule for {rule.pattern!r} matches only layers that cannot be converted: {kinds} ({reasons})"
            )
        layers = [decision.layer for decision in decisions if kind_of(type(decision.module)) is not None]
        names = [name for layer in layers for name in layer.names]
        hint = nearest_match(rule.pattern, names) if isinstance(rule.pattern, str) else ""
        known = ", ".join(repr(name) for name in names[:8]) + (", ..." if len(names) > 8 else "")
        known = known or "none in this model"
        raise NoMatchError(f"the rule for {rule.pattern!r} matches no layer{hint} (convertible layers: {known})")


def _tied_names(model: nn.Module) -> dict[int, list[str]]:
    """Return, for weights used by several modules, the names of those modules."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in users.items() if len(names) > 1}


def _record(decision: _Decision, tied: dict[int, list[str]]) -> LayerRecord:
    converted = decision.stored is not None or decision.cotangent is not None
    remark = decision.remark
    weight = getattr(decision.module, "weight", None)
    others = [name for name in tied.get(id(weight), []) if name != decision.name]
    if others:
        note = f"tied with {', '.join(others)}: independent draws, the sum stays unbiased"
        remark = f"{remark}; {note}" if remark else note
    return LayerRecord(
        name=decision.name,
        kind=type(decision.module).__name__,
        status="converted" if converted else "skipped",
        remark=remark,
        stored=repr(decision.stored) if decision.stored else None,
        cotangent=repr(decision.cotangent) if decision.cotangent else None,
    )


def _swap_all(decisions: list[_Decision], switch: Switch) -> None:
    """Swap the classes of all layers, or of none."""
    chosen = [decision for decision in decisions if decision.stored is not None or decision.cotangent is not None]
    # Made first: a class may refuse to be subclassed.
    try:
        classes = [sketched_class(type(decision.module)) for decision in chosen]
    except Exception as error:
        raise ConversionError(f"a layer's class refuses to be subclassed ({error}); the model is unchanged") from error
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for decision, cls in zip(chosen, classes, strict=True):
            original = type(decision.module)
            object.__setattr__(decision.module, "__class__", cls)
            swapped.append((decision.module, original))
            decision.module.__dict__["_cheapgrad"] = Conversion(original, _plan_for(decision), switch)
    except Exception as error:
        for module, original in swapped:
            object.__setattr__(module, "__class__", original)
            module.__dict__.pop("_cheapgrad", None)
        raise ConversionError(f"a layer's class cannot be swapped ({error}); the model is unchanged") from error


def _plan_for(decision: _Decision) -> Plan:
    recompute = decision.rule is not None and decision.rule.recompute
    return Plan(
        decision.stored,
        decision.cotangent,
        decision.stored.new_memory() if decision.stored else None,
        decision.cotangent.new_memory() if decision.cotangent else None,
        recompute=recompute,
        root_use=RootUse() if recompute else None,
        text=plan_text(decision.stored, decision.cotangent, recompute),
    )

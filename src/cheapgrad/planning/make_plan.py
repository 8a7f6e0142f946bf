"""`plan`: from a budget for the whole step to a strategy for every layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from cheapgrad.auditing.preconditioned_noise import read_second_moments
from cheapgrad.convert import Rule
from cheapgrad.convert.layer_record import describe_layer
from cheapgrad.convert.sketched_layer import SketchedLayer
from cheapgrad.convert.wrappers import unwrap
from cheapgrad.cost import CostReport
from cheapgrad.errors import (
    BatchError,
    BudgetError,
    ConversionError,
    ModelTypeError,
    NoMatchError,
    OptimizerStateError,
    UnreachableBudgetError,
    describe_value,
)
from cheapgrad.planning.batches import FEWEST_FOR_ERRORS, MiniBatchVariance, check_shapes
from cheapgrad.planning.budget import Budget, read_limit
from cheapgrad.planning.candidates import LayerCandidates, find_candidates
from cheapgrad.planning.choosing import Menu
from cheapgrad.planning.costs import count_costs
from cheapgrad.planning.held import compare_held
from cheapgrad.planning.parts import Choice
from cheapgrad.planning.passed_down import Noise
from cheapgrad.planning.passes import LossFunction, Step, check_loss
from cheapgrad.planning.plan_noise import Observed, PlanNoise
from cheapgrad.planning.record import Plan, PlanFigures, PlannedLayer
from cheapgrad.planning.regions import find_regions, measure_regions
from cheapgrad.planning.rounding import find_rounding
from cheapgrad.planning.search import Found, Search
from cheapgrad.planning.survey import Survey
from cheapgrad.planning.units import optimizer_units
from cheapgrad.sketch import Moment

# Batches that are looked at.
_MOST_BATCHES = 8
# Random directions for each batch that laws are evaluated on.
_PROBES = 5
# Above this relative standard error of the noise the plan says so.
_LARGE_ERROR = 0.25


def plan(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    *,
    memory: Budget | None = None,
    flops: Budget | None = None,
    noise: Budget | None = None,
    strategies: Rule | Sequence[Rule] | None = None,
    skip_small: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
) -> Plan:
    r"""Choose a strategy and its budget for every layer, from a budget for the whole step.

    Minimises ``Σ_u V_u(s_u)`` over the strategies s_u of all units u, subject to the budgets; V_u is the variance that
    the sketch of unit u adds to the gradient of *all* parameters, its own and those below it. Combinations are compared
    exactly (`Frontier`). The noise of the chosen plan is then predicted with all its sketches together.

    Args:
        model: in training mode; it is as before when this returns, gradients, buffers and random states included.
        loss_fn: ``(model, batch) -> scalar``.
        batches: training batches with tensors of equal shapes, at least 2; of more than 8 the first 8 are used, and the
            2 noisiest of them for the laws.
        memory: bytes held for backward by the whole step: ``"60 %"`` or a fraction of the exact step's, ``"4 GiB"``, or
            a number of bytes.
        flops: FLOPs of the whole backward pass, in the same manner: ``"60 %"``, ``"3 GFLOP"``.
        noise: most added variance, as a fraction of that of the mini-batch gradient (``0.05``, ``"5 %"``). With another
            budget it is a ceiling. Alone, as much as it allows is saved: the sum of the shares of bytes and of FLOPs is
            made small.
        strategies: a rule or rules to choose from, their patterns saying for which layers. By default rows of the
            cotangent (examples for convolutions) for `flops`, stochastic rounding for `memory`.
        skip_small: leave layers alone that are too small to pay, as `cheapgrad.approximate` does.
        optimizer: one that divides gradients by the root of their running mean square, such as Adam, after some steps
            on this loss: noise is then counted in units of its steps, every parameter by the root of its mean second
            moment, in the budget, in the choice and in the prediction. Nothing about it is changed.

    Returns:
        A `Plan`; ``cheapgrad.approximate(model, plan)`` carries it out.

    Law:
        Bytes and FLOPs of the returned plan are counted in a step with it and never above the budget. Each unit's
        noise is that of its law; rows sampled at unit u pass ``Σ_nm (p_nm/(p_n p_m) − 1) ⟨Jᵀdx_n, Jᵀdx_m⟩`` down,
        measured along random directions of parameter space (`push_forward`). In `Plan.predicted` the laws see the
        cotangents that sketches above have drawn; in the choice they do not. It holds at these parameters and for
        batches like these; noise is to be planned again, or controlled, as training goes on.

    Raises:
        BudgetError: if there is no budget, or it cannot be read.
        UnreachableBudgetError: if no plan keeps it, or two budgets contradict each other; names the nearest one.
        LossError: if the loss is no real scalar, or not finite.
        ForwardError: if the loss function raises; the cause is the original. `BackwardError` if the backward pass does.
        NondeterministicLossError: if the loss of a batch differs from pass to pass from the same random state.
        BatchOrderError: if the order of a batch's examples changes its loss.
        BatchError: if `batches` are none, or fewer than two, or their tensors are of different shapes, or have a
            gradient that is not finite.
        ConversionError: if the model is converted already, or not in training mode.
        NoMatchError: if no layer can take any of the strategies.
        ModelTypeError: if `model` is not a module.
        OptimizerStateError: if the optimizer keeps no second moments, has stepped none of the parameters yet, or does
            not hold the weight of a layer that would be planned for.

    >>> import torch, cheapgrad
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 128))
    >>> batches = [torch.randn(64, 128) for _ in range(4)]
    >>> found = plan(model, lambda model, x: (model(x) - x).square().mean(), batches, flops="60 %")
    >>> found.backward_flops_fraction <= 0.6
    True
    >>> handle = cheapgrad.approximate(model, found)
    """
    given = {
        name: value for name, value in (("memory", memory), ("flops", flops), ("noise", noise)) if value is not None
    }
    if not given:
        raise BudgetError("plan needs a budget: memory='60 %', flops='60 %' or noise=0.05, or several of them")
    _check_model(model)
    used = _take_batches(batches)
    check_shapes(used)
    # Texts are read before anything runs; what they are shares of is not known yet.
    for name, value in given.items():
        read_limit(name, value, 1.0, 1.0)
    step = Step(model, loss_fn)
    names = [name for name, _ in step.named_parameters]
    if optimizer is not None:
        # What is wrong with it is said before anything runs.
        read_second_moments(optimizer, names, step.parameters)
    # To look at a parametrised weight may be to change it.
    with step.undisturbed():
        candidates, left_out = find_candidates(unwrap(model), strategies, skip_small)
    _keep_asked_moments(candidates, set(given))
    remarks = check_loss(step, used[0])
    dropped: list[str] = []
    if optimizer is not None:
        dropped = _drop_without_units(candidates, step, optimizer)
        rounding, untold = find_rounding(step, used[0])
        step.units = optimizer_units(optimizer, names, step.parameters, rounding)
        remarks += untold
    left_out = [*remarks, *step.units.remarks, *left_out, *dropped]
    # Rules of the user's own say for which modules; so does a budget that no code serves.
    has_regions = strategies is None and ("memory" in given or "flops" not in given)
    try:
        return _Planner(step, used, candidates, given, skip_small, left_out, has_regions).make()
    except UnreachableBudgetError as error:
        if not dropped:
            raise
        raise UnreachableBudgetError(f"{error}; left out: {'; '.join(dropped)}") from None


def _take_batches(batches: Iterable[Any]) -> list[Any]:
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise BatchError(
            f"batches must be a list or another iterable of training batches, but got {describe_value(batches)}; give "
            "at least 4, better 8"
        )
    used = list(islice(batches, _MOST_BATCHES))
    if len(used) < 2:
        raise BatchError(f"plan needs at least 2 batches to measure their variance, but got {len(used)}")
    return used


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"model must be a torch.nn.Module, but got {model!r} of type {type(model).__name__}")
    converted = [name for name, module in model.named_modules() if isinstance(module, SketchedLayer)]
    if converted:
        raise ConversionError(
            f"the model is converted already (layer {converted[0]!r}); call handle.revert(), then plan"
        )
    if not model.training:
        raise ConversionError("the model is in evaluation mode, where nothing is drawn; call model.train(), then plan")


def _keep_asked_moments(candidates: dict[str, LayerCandidates], budgets: set[str]) -> None:
    """Drop strategies that serve no budget: nothing is sketched for its own sake."""
    for layer in candidates.values():
        if budgets <= {"memory", "noise"} and "memory" in budgets:
            layer.cotangent = []
        if budgets <= {"flops", "noise"} and "flops" in budgets:
            layer.stored = []


def _drop_without_units(
    candidates: dict[str, LayerCandidates], step: Step, optimizer: torch.optim.Optimizer
) -> list[str]:
    """Drop layers whose weight is computed from parameters, and return remarks on them; refuse those of others."""
    trained = {id(parameter) for parameter in step.parameters}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    remarks = []
    for name, layer in list(candidates.items()):
        if parametrize.is_parametrized(layer.module):
            # It is left out anyway, and to look at its weight may be to change it.
            continue
        weight: Any = layer.module.weight
        if not weight.requires_grad or id(weight) in held:
            continue
        if id(weight) in trained:
            raise OptimizerStateError(
                f"the {type(optimizer).__name__} does not hold the weight of layer {name!r}, whose noise would count "
                "for nothing; pass the optimizer that steps it, or strategies= whose patterns match its own layers only"
            )
        del candidates[name]
        remarks.append(f"{name}: its weight is computed from other parameters, whose units are not its own")
    if not candidates:
        raise NoMatchError(f"no layer is left to plan for in units of the optimizer's steps: {'; '.join(remarks)}")
    return remarks


@dataclass
class _Planner:
    """One planning, from the first exact pass to the plan."""

    step: Step
    batches: list[Any]
    candidates: dict[str, LayerCandidates]
    given: dict[str, Budget]
    skip_small: bool
    left_out: list[str]
    has_regions: bool = False

    def make(self) -> Plan:
        """Return the plan."""
        report = count_costs(self.step, self.batches[0])
        exact = _figures(report, 0.0)
        limits = {
            name: read_limit(name, value, exact.saved_bytes, exact.backward_flops) for name, value in self.given.items()
        }
        variance, observed, menu = self._observe(report)
        scale = variance.value
        if not scale:
            what = "the batches have equal gradients"
            if not any(bool(value.any()) for gradient in variance.gradients for value in gradient):
                # Checkpoints of the old kind hide parameters from everything but backward().
                what = "no gradient reaches any parameter (checkpoint with use_reentrant=False, if at all)"
            raise BatchError(f"{what}, so there is no variance to compare noise with")
        search = Search(self.step, self.batches[0], menu, report, observed, variance, self.skip_small)
        return self._write(report, search.find(limits), variance)

    def _observe(self, report: CostReport) -> tuple[MiniBatchVariance, list[Observed], Menu]:
        """Run an exact pass of every batch; the noisiest are kept for the laws, of the others sizes of noise."""
        survey = Survey(self.step, self.candidates)
        with self.step.undisturbed():
            for batch in self.batches:
                survey.add(batch)
            observed = survey.observe(_PROBES)
        return survey.variance, observed, self._make_menu(observed, survey.sizes(observed), report)

    def _measure_regions(self, observed: Observed, report: CostReport) -> list[list[Choice]]:
        """Return the choices of blocks that can be coded with their norms and attention."""
        if not self.has_regions:
            return []
        model = unwrap(self.step.model)
        regions = find_regions(model, observed.groups, self.skip_small)
        if not regions:
            return []
        return measure_regions(self.step, observed.batch, observed.capture, regions, report, self.skip_small)

    def _make_menu(self, observed: list[Observed], sizes: list[list[list[float]]], report: CostReport) -> Menu:
        if len({tuple(map(len, one)) for one in sizes}) != 1 or len({_names(one) for one in observed}) != 1:
            raise BatchError("different layers run for different batches; plan with batches that take the same way")
        items = [[part.choices(one.below) for part in (*one.units, *one.groups)] for one in observed]
        numbers = [one.number for one in observed]
        choices = [
            self._average([of_batch[position] for of_batch in items], [one[position] for one in sizes], numbers)
            for position in range(len(items[0]))
        ]
        units = len(observed[0].units)
        regions = [
            [_like_its_groups(choice, choices[units:], len(sizes), numbers[0]) for choice in region]
            for region in self._measure_regions(observed[0], report)
        ]
        total = report.total
        return Menu(choices[:units], choices[units:], total.saved_bytes, total.backward_flops, regions=regions)

    def _average(
        self, choices: Sequence[Sequence[Choice]], sizes: Sequence[Sequence[float]], numbers: Sequence[int]
    ) -> list[Choice]:
        """Return the choices of the first batch, with the mean noise of the law, carried over to all batches."""
        averaged = []
        for each, of_choice in zip(zip(*choices, strict=True), zip(*sizes, strict=True), strict=True):
            noise = Noise()
            for choice in each:
                noise = noise + choice.noise
            mean, seen = math.fsum(of_choice) / len(of_choice), math.fsum(of_choice[number] for number in numbers)
            # Without any noise in the batches looked at, all that is known is that without cross terms.
            carried = noise.scaled(mean / seen) if seen else Noise(own=mean)
            shares = tuple(size / mean if mean else 1.0 for size in of_choice)
            averaged.append(dataclasses.replace(each[0], noise=carried, by_batch=shares))
        return averaged

    def _write(self, report: CostReport, found: Found, variance: MiniBatchVariance) -> Plan:
        scale, noise, choices = variance.value, found.noise, found.choices
        exact = _figures(report, 0.0)
        return Plan(
            budgets=dict(self.given),
            exact=exact,
            # The forward pass of a converted model is that of the exact one.
            predicted=dataclasses.replace(
                _figures(found.report, noise.total / scale), forward_flops=exact.forward_flops
            ),
            layers=self._layers(choices, scale),
            noise_standard_error=noise.relative_error * noise.total / scale,
            separate_noise_fraction=sum(choice.noise.total for choice in choices) / scale,
            batches=variance.batches,
            skip_small=self.skip_small,
            remarks=(*found.remarks, *self._judge(noise, variance), *self.left_out),
            held=compare_held(report, found.report),
            in_optimizer_units=self.step.units.of_optimizer,
        )

    def _judge(self, noise: PlanNoise, variance: MiniBatchVariance) -> list[str]:
        """Say it where there are too few batches."""
        if not noise.total:
            return []
        if noise.batch_error is None:
            return [
                f"from {variance.batches} batches nobody can tell how the noise differs from batch to batch, so that "
                f"the error of its estimate is not all in ±; give at least {FEWEST_FOR_ERRORS}, better 8"
            ]
        if noise.relative_error <= _LARGE_ERROR:
            return []
        return [f"the noise is known to ±{noise.relative_error:.0%} only: give more batches, or larger ones"]

    def _layers(self, choices: Sequence[Choice], scale: float) -> tuple[PlannedLayer, ...]:
        by_layer: dict[str, dict[Moment, Choice]] = {}
        for choice in choices:
            for name in choice.layers:
                by_layer.setdefault(name, {})[choice.moment] = choice
        layers = []
        modules = dict(unwrap(self.step.model).named_modules())
        order = {name: position for position, name in enumerate(modules)}
        for name in sorted(by_layer, key=lambda name: order.get(name, 0)):
            stored, cotangent = (by_layer[name].get(moment) for moment in (Moment.STORED, Moment.COTANGENT))
            noise = Noise() if stored is None else stored.noise.scaled(1 / len(stored.layers))
            if cotangent is not None and cotangent.layers[-1] == name:
                noise = noise + cotangent.noise
            layers.append(
                PlannedLayer(
                    name=name,
                    stored=None if stored is None else stored.strategy,
                    cotangent=None if cotangent is None else cotangent.strategy,
                    drawn_at=None if cotangent is None else cotangent.layers[-1],
                    recompute=stored is not None and stored.is_region,
                    noise_fraction=noise.total / scale,
                    passed_down_share=noise.passed_down / noise.total if noise.total else 0.0,
                    module=describe_layer(modules[name]),
                )
            )
        return tuple(layers)


def _figures(report: CostReport, noise: float) -> PlanFigures:
    total = report.total
    return PlanFigures(total.saved_bytes, total.forward_flops, total.backward_flops, noise)


def _like_its_groups(choice: Choice, groups: Sequence[Sequence[Choice]], batches: int, number: int) -> Choice:
    """Return the choice of a region, drawn in one batch, carried over to all as its noisiest group is."""
    inside = [group[0] for group in groups if group and set(group[0].layers) & set(choice.layers)]
    shares = max(inside, key=lambda one: one.noise.total).by_batch if inside else (1.0,) * batches
    noise = choice.noise.scaled(1 / shares[number]) if shares[number] else choice.noise
    return dataclasses.replace(choice, noise=noise, by_batch=shares)


def _names(observed: Observed) -> tuple[tuple[str, ...], ...]:
    return tuple(part.layers for part in (*observed.units, *observed.groups))

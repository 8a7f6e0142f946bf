"""From a menu to the choices of the plan: costs counted in a step, noise measured with all choices together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cheapgrad.cost import CostReport
from cheapgrad.errors import UnreachableBudgetError
from cheapgrad.planning.batches import MiniBatchVariance
from cheapgrad.planning.budget import Limit, describe_limit, read_limit
from cheapgrad.planning.choosing import Menu
from cheapgrad.planning.costs import count_planned_costs
from cheapgrad.planning.parts import Choice
from cheapgrad.planning.passes import Step
from cheapgrad.planning.plan_noise import Observed, PlanNoise, expected_margin, measure_plan_noise, rules_of
from cheapgrad.planning.units import name_units

# Draws of the plan for each batch that laws are evaluated on.
_DRAWS = 3
_ROUNDS = 4
# A budget that no plan keeps is widened by these factors until one is found; the exact step keeps the last.
_WIDER = (1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, math.inf)
# How often the way between two budgets asked for and those found so far is halved.
_BISECTIONS = 5
# By how much the model of the costs may be too high.
_SLACKS = (1.0, 1.03, 1.06, 1.1)
# A ceiling that was read off a plan is not missed by the rounding of a quotient.
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Found:
    """Choices that keep the budgets.

    Attributes:
        choices: at most one for each layer and moment.
        report: the step with them, counted.
        noise: of all of them together.
        remarks: what a reader has to know of the search.
    """

    choices: tuple[Choice, ...]
    report: CostReport
    noise: PlanNoise
    remarks: tuple[str, ...] = ()

    @property
    def factor(self) -> float:
        """How far the bound of the noise lies above the sum of what the choices add alone."""
        separate = math.fsum(choice.noise.total for choice in self.choices)
        return self.noise.bound / separate if separate else 1.0


@dataclass
class Search:
    """A search among the combinations of a menu.

    Attributes:
        step: the training step.
        batch: costs are counted in a step on this one.
        menu: what can be chosen from.
        report: the exact step, counted.
        observed: batches with their exact passes.
        variance: of the mini-batch gradient.
        skip_small: as in `cheapgrad.approximate`.
    """

    step: Step
    batch: Any
    menu: Menu
    report: CostReport
    observed: Sequence[Observed]
    variance: MiniBatchVariance
    skip_small: bool

    def find(self, limits: Mapping[str, Limit]) -> Found:
        """Return the choices that keep all limits.

        Args:
            limits: by the name of the budget.

        Raises:
            UnreachableBudgetError: if none were found; names a budget that can be kept.
        """
        costs = {name: limit for name, limit in limits.items() if name != "noise"}
        if not costs:
            return self._save(limits["noise"])
        try:
            counted = self._count_within(costs)
        except UnreachableBudgetError as error:
            nearest = self._widen(costs, limits.get("noise"))
            raise UnreachableBudgetError(f"{error}; the nearest budget is {nearest}") from None
        found = self._measure(*counted)
        if "noise" in limits and not self._keeps(found, limits["noise"]):
            raise self._contradiction(costs, limits["noise"], found)
        return found

    def _save(self, ceiling: Limit) -> Found:
        """Return choices that save as much as a ceiling of noise allows."""
        factor = expected_margin(self.menu.all_choices(), self.variance)
        for _ in range(_ROUNDS):
            choices = self.menu.within_noise(self._most(ceiling) / factor)
            found = self._measure(choices, self._count(choices))
            if self._keeps(found, ceiling):
                return found
            factor = max(1.02 * found.factor, 1.05 * factor)
        text = (
            f"every layer is left exact: of the {_ROUNDS} plans tried for noise={ceiling.given!r} the last needs "
            f"noise={_round_up(found.noise.bound / self.variance.value)}{name_units(self.step.units.of_optimizer)}"
        )
        return dataclasses.replace(self._measure((), self.report), remarks=(text,))

    def _count_within(self, costs: Mapping[str, Limit]) -> tuple[tuple[Choice, ...], CostReport]:
        """Return the choices of least noise whose counted costs keep the limits, and the step with them.

        Where rows and codes meet, the model of the costs is above what is counted: with two limits that it holds to be
        out of reach, choices for somewhat wider ones are counted too.
        """
        obstacle: UnreachableBudgetError | None = None
        for slack in _SLACKS if len(costs) > 1 else _SLACKS[:1]:
            menu = dataclasses.replace(self.menu)
            wider = {name: dataclasses.replace(limit, value=slack * limit.value) for name, limit in costs.items()}
            try:
                for _ in range(_ROUNDS):
                    choices = menu.within_costs(wider)
                    report = self._count(choices)
                    if _correct_costs(menu, costs, choices, report):
                        return choices, report
            except UnreachableBudgetError as error:
                obstacle = obstacle or error
        if obstacle is not None:
            raise obstacle
        asked = " and ".join(f"{limit.name}={limit.given!r} ({describe_limit(limit)})" for limit in costs.values())
        raise UnreachableBudgetError(f"of {_ROUNDS} plans tried for {asked} none kept it when its step was counted")

    def _is_reachable(self, costs: Mapping[str, Limit], ceiling: Limit | None = None) -> bool:
        try:
            counted = self._count_within(costs)
        except UnreachableBudgetError:
            return False
        return ceiling is None or self._keeps(self._measure(*counted), ceiling)

    def _count(self, choices: Sequence[Choice]) -> CostReport:
        rules = rules_of(choices)
        return count_planned_costs(self.step, self.batch, rules, self.skip_small) if rules else self.report

    def _measure(self, choices: tuple[Choice, ...], report: CostReport) -> Found:
        noise = PlanNoise(0.0, 0.0, 0.0, self.variance.batches)
        if choices:
            noise = measure_plan_noise(self.step, self.observed, choices, self.variance, self.skip_small, _DRAWS)
        return Found(choices, report, noise)

    def _most(self, ceiling: Limit) -> float:
        return ceiling.value * self.variance.value

    def _keeps(self, found: Found, ceiling: Limit) -> bool:
        return found.noise.bound <= self._most(ceiling) * _ROUNDING

    def _limit(self, name: str, share: float) -> Limit:
        """Return the limit that a share rounded up to a text is understood as."""
        total = self.report.total
        return read_limit(name, f"{_round_up_percent(share)} %", total.saved_bytes, total.backward_flops)

    def _exact_cost(self, name: str) -> float:
        return float(self.report.total.saved_bytes if name == "memory" else self.report.total.backward_flops) or 1.0

    def _widen(self, costs: Mapping[str, Limit], ceiling: Limit | None) -> str:
        """Return wider budgets that a plan keeps, counted: the first of several, and then each as narrow as it can be.

        The exact step keeps the widest.
        """
        exact = {name: self._exact_cost(name) for name in costs}
        least = {name: self.menu.least_cost(name, math.inf) / exact[name] for name in costs}
        wider = dict(costs)
        for factor in _WIDER:
            for name, limit in costs.items():
                share = factor * max(limit.value / exact[name], least[name])
                wider[name] = limit if share <= limit.value / exact[name] else self._limit(name, min(share, 1.0))
            if self._is_reachable(wider, ceiling):
                break
        for name in costs if len(costs) > 1 else ():
            wider[name] = self._narrow(name, costs[name], wider, ceiling)
        return " and ".join(f"{limit.name}={limit.given!r}" for limit in wider.values())

    def _narrow(self, name: str, asked: Limit, wider: Mapping[str, Limit], ceiling: Limit | None) -> Limit:
        """Return a budget between what was asked and what is kept, near the least that is kept beside the others."""
        if asked.value >= wider[name].value:
            return wider[name]
        if self._is_reachable({**wider, name: asked}, ceiling):
            return asked
        kept, exact = wider[name], self._exact_cost(name)
        refused = asked.value / exact
        for _ in range(_BISECTIONS):
            limit = self._limit(name, (refused + kept.value / exact) / 2)
            if limit.value < kept.value and self._is_reachable({**wider, name: limit}, ceiling):
                kept = limit
            else:
                refused = limit.value / exact
        return kept

    def _contradiction(self, costs: Mapping[str, Limit], ceiling: Limit, found: Found) -> UnreachableBudgetError:
        """Say which ceiling the plan keeps, and which costs the ceiling allows."""
        others = " and ".join(f"{name}={limit.given!r}" for name, limit in costs.items())
        text = (
            f"{others} and noise={ceiling.given!r} contradict each other: {others} needs noise="
            f"{_round_up(found.noise.bound / self.variance.value)}{name_units(self.step.units.of_optimizer)}, measured"
        )
        if len(costs) > 1:
            return UnreachableBudgetError(
                f"{text}; with noise={ceiling.given!r} the nearest budget is {self._widen(costs, ceiling)}"
            )
        nearest = self._nearest(next(iter(costs)), ceiling, found)
        return UnreachableBudgetError(
            f"{text}; with noise={ceiling.given!r} the nearest budget is {nearest.name}={nearest.given!r}"
        )

    def _nearest(self, name: str, ceiling: Limit, found: Found) -> Limit:
        """Return a budget of bytes or FLOPs whose plan was found to keep the ceiling; the exact step does."""
        factor = found.factor
        for _ in range(_ROUNDS):
            share = self.menu.least_cost(name, self._most(ceiling) / factor) / self._exact_cost(name)
            limit = self._limit(name, share)
            if self._is_reachable({name: limit}):
                trial = self._measure(*self._count_within({name: limit}))
                if self._keeps(trial, ceiling):
                    return limit
                factor = max(factor, 1.02 * trial.factor)
            factor *= 1.05
        return self._limit(name, 1.0)


def _correct_costs(menu: Menu, limits: Mapping[str, Limit], choices: Sequence[Choice], report: CostReport) -> bool:
    """Tell whether counted costs keep the limits; if not, correct the model by what it left out."""
    kept = True
    for name, counted, exact, change in (
        ("memory", report.total.saved_bytes, menu.exact_bytes, "bytes_change"),
        ("flops", report.total.backward_flops, menu.exact_flops, "flops_change"),
    ):
        if name not in limits or counted <= limits[name].value:
            continue
        kept = False
        modelled = exact + sum(getattr(choice, change) for choice in choices)
        offset = counted - modelled
        attribute = "bytes_offset" if name == "memory" else "flops_offset"
        setattr(menu, attribute, max(offset, getattr(menu, attribute) + 1e-3 * exact))
    return kept


def _round_up(noise: float) -> str:
    """Return three digits of a number, rounded up, so that a ceiling of as much is kept."""
    if not noise:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(noise)) - 2)
    return f"{math.ceil(noise / unit * _ROUNDING) * unit:.3g}"


def _round_up_percent(share: float) -> str:
    """Return a share in percent, rounded up, and a tenth on top; 100 at most."""
    return f"{min(100.0, -(-share * 1000 // 1) / 10 + 0.1):.1f}"

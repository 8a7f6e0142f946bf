"""The ways of training that experiments compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

import cheapgrad
from benchmarks.experiments.biased import LargestWithoutWeights
from cheapgrad import recipes
from cheapgrad.sketch import (
    ColumnSample,
    ElementMask,
    ExampleSample,
    FeatureSample,
    Gaussian,
    Hadamard,
    LowRank,
    Poisson,
    PredictedNorm,
    RowProjection,
    RowSample,
    StochasticRounding,
    Uniform,
    WinnerTakeAll,
    WithReplacement,
)

KEEPS = (0.5, 0.3, 0.1)
PLANNED_FLOPS = (0.8, 0.6, 0.45)
# The second one is for the vision transformer: its mean step, those before the plan included, is to take 1 / 1.4.
PLANNED_FLOPS_IN_STEPS = (0.6, 0.4)
# Planning sees the model after this share of the steps, which are exact.
PLANNED_AFTER = 0.1
IN_STEPS = "in units of AdamW's steps"
# Published and biased methods are trained at this one on every task; uniform rows at all, as the recipe's rows are.
MAIN_KEEP = 0.3
CONTROLLED_NOISE = 0.05
# A target that moves, from noise that costs little while the loss still falls fast to hardly any.
SCHEDULED_NOISE = (0.4, 0.02)
# Where exact gradients might matter most: while the weights settle, or while they find their way.
REMEDIES = {"last 20 % exact": (0.8, 1.0), "first 20 % exact": (0.0, 0.2)}
SMALL_TOO = "recipes.memory(4), small layers too"
FIRST_EXACT = f"{SMALL_TOO}, first layer exact"
# Of the steps, in exact trainings that others are measured with: which of them ends as well?
RULER, RULER_BY = (0.7, 0.4), "steps, "
# Of the batch, in exact trainings of as many steps: what noise of a known size costs, 1 / share - 1 of the usual noise.
SMALLER, SMALLER_BY = (0.5, 0.25), "batch, "
# Where the refreshed basis of rank-constrained sketches is found anew.
_REFRESH_STEPS = 10


@dataclass(frozen=True)
class Match:
    """What an exact method is made equal to.

    Attributes:
        label: of the method it is compared with.
        by: ``"time, batch"``, ``"time, steps"``, ``"bytes, batch"``, ``"bytes, parts"`` or ``"bytes, larger batch"``;
            ``"steps, SHARE"`` is a share of the steps, and ``"batch, SHARE"`` of the batch in as many steps.
    """

    label: str
    by: str


@dataclass(frozen=True)
class Method:
    """One way of training.

    Attributes:
        label: what tables call it; methods of a family differ by a budget.
        family: methods whose costs are measured together.
        rules: what `cheapgrad.approximate` is given.
        make_rules: makes rules that depend on the model, such as ranks.
        planned_flops: budget of the backward pass for `cheapgrad.plan`, as a share.
        counts_in_steps: whether the noise of plan or controller is in units of the optimizer's steps.
        controlled_noise: target of `cheapgrad.Controller`, at the first step and at the last.
        exact_between: shares of the training between which gradients are exact.
        checkpoints: whether every block is checkpointed.
        converts_small: whether layers are converted that `cheapgrad.approximate` leaves alone by default.
        memory_budget: share for the compiler's activation memory budget; None does not compile.
        match: what an exact method is made equal to, if anything.
        published: the published method that it corresponds to, and how it differs.
        budget: what is kept, as a share; None where that has no meaning.
        is_biased: whether its gradient is wrong on average.
        is_quick: whether the quick mode has it.
        is_swept: whether it is a further budget of a published or a biased method, trained where that is cheap: see
            `Task.sweeps`.
        is_tuned: whether the quick mode chooses a learning rate of its own for it (the full mode does so for all).
    """

    label: str
    family: str
    rules: tuple[cheapgrad.Rule, ...] = ()
    make_rules: Callable[[nn.Module], tuple[cheapgrad.Rule, ...]] | None = field(default=None, compare=False)
    planned_flops: float | None = None
    counts_in_steps: bool = False
    controlled_noise: tuple[float, float] | None = None
    exact_between: tuple[float, float] | None = None
    checkpoints: bool = False
    converts_small: bool = False
    memory_budget: float | None = None
    match: Match | None = None
    published: str = ""
    budget: float | None = None
    is_biased: bool = False
    is_quick: bool = False
    is_swept: bool = False
    is_tuned: bool = False

    @property
    def words(self) -> str:
        """What it does, in words that tell any two apart; batch size and number of steps are not in it."""
        if self.exact_between is None:
            return self.step_words
        return self.step_words + " exact between {:g} and {:g} of the steps".format(*self.exact_between)

    @property
    def step_words(self) -> str:
        """What it does in a step that is not exact: methods that share it have steps of equal cost."""
        if self.controlled_noise is not None:
            first, last = self.controlled_noise
            words = f"{' '.join(map(repr, self.rules))} controlled {first:g}" + f" to {last:g}" * (first != last)
            return words + f", {IN_STEPS}" * self.counts_in_steps
        if self.rules:
            return " ".join(map(repr, self.rules)) + " on small layers too" * self.converts_small
        if self.make_rules is not None:
            return self.label
        if self.planned_flops is not None:
            return f"plan(flops={self.planned_flops})" + f", {IN_STEPS}" * self.counts_in_steps
        if self.checkpoints:
            return "checkpoint each block"
        return "exact" if self.memory_budget is None else f"compiled, budget {self.memory_budget}"

    @property
    def exact_share(self) -> float:
        """Share of the steps that are exact although the others are not."""
        if self.planned_flops is not None:
            return PLANNED_AFTER
        return 0.0 if self.exact_between is None else self.exact_between[1] - self.exact_between[0]

    @property
    def is_adaptive(self) -> bool:
        """Whether what a step costs depends on the state of the training."""
        return self.controlled_noise is not None

    @property
    def is_ruler(self) -> bool:
        """Whether it is exact training of fewer steps or on smaller batches, made to measure others with."""
        return self.match is not None and self.match.by.startswith((RULER_BY, SMALLER_BY))

    @property
    def is_converted(self) -> bool:
        """Whether sketches are drawn."""
        return bool(self.rules) or self.make_rules is not None or self.planned_flops is not None


EXACT = Method("exact", "exact", is_quick=True)


def list_methods() -> tuple[Method, ...]:
    """Return everything that is compared, the exact method first."""
    return (
        EXACT,
        *_recipes(),
        *_strategies(),
        *map(_sweep, _published()),
        *_budgeted(),
        *_remedies(),
        *_fair_baselines(),
        *map(_sweep, _biased()),
    )


def _sweep(method: Method) -> Method:
    is_further = method.budget not in (None, MAIN_KEEP) and method.family != "uniform rows"
    return dataclasses.replace(method, is_swept=is_further)


def list_published() -> list[tuple[str, str]]:
    """Return methods that correspond to a published one, and which; of those that differ by a budget, the first."""
    first: dict[str, str] = {}
    for method in list_methods():
        if method.published:
            first.setdefault(method.published, method.label.replace(str(method.budget), "…"))
    return [(label, published) for published, label in first.items()]


def _cotangent(strategy: cheapgrad.sketch.AbstractStrategy) -> tuple[cheapgrad.Rule, ...]:
    return (cheapgrad.Rule("*", cotangent=strategy),)


def _stored(strategy: cheapgrad.sketch.AbstractStrategy) -> tuple[cheapgrad.Rule, ...]:
    return (cheapgrad.Rule("*", stored=strategy),)


def _recipes() -> list[Method]:
    speed = [
        Method(f"recipes.speed({keep})", "speed", recipes.speed(keep), is_quick=True, is_tuned=keep == 0.3, budget=keep)
        for keep in KEEPS
    ]
    memory = [
        Method("recipes.memory(4)", "memory", recipes.memory(4), is_quick=True),
        Method("recipes.memory(2)", "memory", recipes.memory(2)),
        # A head of ten classes is small, and holds as much of its input as any layer does.
        Method(SMALL_TOO, "memory, small layers too", recipes.memory(4), converts_small=True),
        # What the first layer holds is the batch, which the training loop has anyway: codes of it come on top.
        Method(FIRST_EXACT, "memory, first layer exact", make_rules=_leave_first_layer, converts_small=True),
    ]
    both = [Method(f"recipes.both(4, {keep})", "both", recipes.both(4, keep), budget=keep) for keep in KEEPS]
    return [*speed, *memory, *both]


def _strategies() -> list[Method]:
    methods = []
    for keep in KEEPS:
        methods += [
            Method(f"cotangent examples {keep}", "cotangent examples", _cotangent(ExampleSample(keep)), budget=keep),
            Method(f"cotangent entries {keep}", "cotangent entries", _cotangent(ElementMask(keep)), budget=keep),
            Method(f"stored rows {keep}", "stored rows", _stored(RowSample(keep)), budget=keep),
            Method(f"stored features {keep}", "stored features", _stored(FeatureSample(keep)), budget=keep),
        ]
    return methods


def _published() -> list[Method]:
    methods = []
    for keep in KEEPS:
        rows_uniform = _cotangent(RowSample(keep, scores=Uniform()))
        methods += [
            Method(
                f"uniform masks, rows {keep}",
                "uniform rows",
                rows_uniform,
                budget=keep,
                published="uniform masks (arXiv:2602.14701), on our axis: rows; fixed size",
                is_quick=keep == MAIN_KEEP,
            ),
            Method(
                f"uniform masks, columns {keep}",
                "uniform columns",
                _cotangent(ColumnSample(keep, scores=Uniform())),
                budget=keep,
                published="uniform masks (arXiv:2602.14701), columns; fixed size",
            ),
            Method(
                f"cotangent columns {keep} (data-dependent diagonal)",
                "data-dependent diagonal",
                _cotangent(ColumnSample(keep)),
                budget=keep,
                published="data-dependent diagonal sketches (arXiv:2602.14701; its scores are not known to us)",
            ),
            Method(
                f"rank-constrained {keep}",
                "rank-constrained",
                make_rules=lambda model, keep=keep: _rank_rules(model, keep),
                budget=keep,
                published="rank-constrained sketches (arXiv:2602.14701, 2505.09647); basis renewed every 10 steps",
            ),
            Method(
                f"Gaussian row projection {keep}",
                "row projection",
                _stored(RowProjection(keep, Gaussian())),
                budget=keep,
                published="randomized matrix multiplication, Gaussian (arXiv:2201.13195)",
            ),
            Method(
                f"Hadamard row projection {keep}",
                "row projection",
                _stored(RowProjection(keep, Hadamard())),
                budget=keep,
                published="randomized matrix multiplication, DCT (arXiv:2201.13195), with Hadamard for the cosines",
            ),
            Method(
                f"column-row sampling {keep}",
                "column-row sampling",
                _stored(RowSample(keep, design=WithReplacement())),
                budget=keep,
                published="column-row sampling (SIAM J. Comput. 36, 2006), at forward time: blind to the cotangent",
            ),
            Method(
                f"winner-take-all {keep}",
                "winner-take-all",
                _stored(RowSample(keep, scores=PredictedNorm(), design=WinnerTakeAll())),
                budget=keep,
                published="WTA-CRS (arXiv:2305.15265), norms remembered by position, every branch weighted",
            ),
            Method(
                f"variance-controlled sampling's unit {keep}",
                "whole examples, Poisson",
                _cotangent(ExampleSample(keep, design=Poisson())),
                budget=keep,
                published="SampleA of variance-controlled sampling (arXiv:2402.17227), its share fixed",
            ),
            Method(
                f"per-example feature sampling {keep}",
                "per-example features",
                _stored(FeatureSample(keep, rows_per_mask=1)),
                budget=keep,
                published="randomized automatic differentiation, one mask for each row (arXiv:2007.10412)",
            ),
        ]
    rounding = Method(
        "stored 2 bits, linear layers alone",
        "stored bits",
        (cheapgrad.Rule(nn.Linear, stored=StochasticRounding(2)),),
        published="activation compressed training (arXiv:2104.14129), 2 bits, linear layers",
    )
    return [*methods, rounding]


def _leave_first_layer(model: nn.Module) -> tuple[cheapgrad.Rule, ...]:
    """Return the memory recipe for all modules but the first layer: parameters of a whole network are no layer."""
    first = next(module for module in model.modules() if not list(module.children()) and list(module.parameters()))
    (rule,) = recipes.memory(4)
    return (dataclasses.replace(rule, pattern=lambda name, module: module is not first),)


def _rank_rules(model: nn.Module, keep: float) -> tuple[cheapgrad.Rule, ...]:
    """Return a rule for each linear layer, its rank a share of the smaller side."""
    rules = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and min(module.in_features, module.out_features) >= 32:
            rank = max(2, round(keep * min(module.in_features, module.out_features)))
            rules.append(cheapgrad.Rule(name, cotangent=LowRank(rank, refresh=_REFRESH_STEPS)))
    return tuple(rules)


def _budgeted() -> list[Method]:
    planned = [
        Method(f"plan(flops={share})", f"plan {share}", planned_flops=share, is_quick=share == 0.6)
        for share in PLANNED_FLOPS
    ]
    in_steps = [
        Method(
            f"plan(flops={share}), {IN_STEPS}", f"plan {share}, optimizer", planned_flops=share, counts_in_steps=True
        )
        for share in PLANNED_FLOPS_IN_STEPS
    ]
    constant, moving = (CONTROLLED_NOISE, CONTROLLED_NOISE), SCHEDULED_NOISE
    controlled = [
        Method(
            f"Controller(noise={CONTROLLED_NOISE})",
            "controller",
            recipes.speed(0.5),
            controlled_noise=constant,
            is_quick=True,
        ),
        Method(
            f"Controller(noise={CONTROLLED_NOISE}), {IN_STEPS}",
            "controller, optimizer",
            recipes.speed(0.5),
            controlled_noise=constant,
            counts_in_steps=True,
        ),
        Method(
            "Controller(noise={:g} to {:g})".format(*moving), "controller", recipes.speed(0.3), controlled_noise=moving
        ),
    ]
    return [*planned, *in_steps, *controlled]


def _remedies() -> list[Method]:
    """Return what might help where a constant share of rows falls short: exact gradients for a part of the steps."""
    return [
        Method(f"recipes.speed({keep}), {name}", "speed", recipes.speed(keep), exact_between=between)
        for keep in (0.3, 0.1)
        for name, between in REMEDIES.items()
    ]


def _fair_baselines() -> list[Method]:
    matched = []
    for keep in KEEPS:
        label = f"recipes.speed({keep})"
        by_batch, by_steps = Match(label, "time, batch"), Match(label, "time, steps")
        matched += [
            Method(
                f"smaller batch, time of {label}", "batch", match=by_batch, is_quick=keep > 0.1, is_tuned=keep == 0.3
            ),
            Method(f"fewer steps, time of {label}", "steps", match=by_steps, is_quick=keep == 0.3),
        ]
    by_batch = {each.label: Match(each.label, "time, batch") for each in _remedies()}
    matched += [
        Method(f"smaller batch, time of {label}", "batch", match=by_time) for label, by_time in by_batch.items()
    ]
    ruler = [
        Method(f"exact, {100 * share:.0f} % of the steps", "steps", match=Match(EXACT.label, f"{RULER_BY}{share}"))
        for share in RULER
    ]
    ruler += [
        Method(f"exact, {100 * share:.0f} % of the batch", "batch", match=Match(EXACT.label, f"{SMALLER_BY}{share}"))
        for share in SMALLER
    ]
    memory = "recipes.memory(4)"
    return [
        *matched,
        *ruler,
        Method(f"smaller batch, bytes of {memory}", "batch", match=Match(memory, "bytes, batch"), is_quick=True),
        Method(f"micro-batches, bytes of {memory}", "parts", match=Match(memory, "bytes, parts")),
        Method(
            f"{memory}, larger batch, bytes of exact",
            "larger batch",
            recipes.memory(4),
            match=Match(memory, "bytes, larger batch"),
        ),
        Method("checkpoint each block", "checkpoints", checkpoints=True, is_quick=True),
        Method("compiled", "compiled", memory_budget=1.0),
        Method("compiled, activation memory budget 0.5", "compiled", memory_budget=0.5),
        Method("compiled, activation memory budget 0.25", "compiled", memory_budget=0.25),
    ]


def _biased() -> list[Method]:
    design = LargestWithoutWeights()
    return [
        Method(
            f"largest columns without weights {keep} (biased)",
            "biased columns",
            _cotangent(ColumnSample(keep, design=design)),
            budget=keep,
            published="meProp, unified (ICML 2017)",
            is_biased=True,
        )
        for keep in KEEPS
    ] + [
        Method(
            f"largest rows without weights {keep} (biased)",
            "biased rows",
            _cotangent(RowSample(keep, design=design)),
            budget=keep,
            is_biased=True,
            is_quick=keep == 0.3,
        )
        for keep in KEEPS
    ]

"""Is a gradient what it should be, on average, and how noisy is it?"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cheapgrad.auditing._costs import StepCosts, measure_costs
from cheapgrad.auditing._derivative_check import DerivativeCheck, check_derivative, check_exact_step
from cheapgrad.auditing._errors_drawn import DrawnErrors, ErrorCollector
from cheapgrad.auditing._forward_noise import find_noise
from cheapgrad.auditing._judgement import Judgement, check_alpha, judge
from cheapgrad.auditing._mini_batch import MiniBatchNoise, measure_mini_batch_noise
from cheapgrad.auditing._pooling import Pool, pool_errors
from cheapgrad.auditing._progress import show_progress
from cheapgrad.auditing._series import Series
from cheapgrad.auditing._step import DrawnGradient, LossFunction, Reference, Step
from cheapgrad.auditing._surroundings import make_seed, undisturbed
from cheapgrad.auditing._writing import Findings, write_report
from cheapgrad.auditing.preconditioned_noise import precondition_noise, read_second_moments
from cheapgrad.auditing.report import AuditReport
from cheapgrad.errors import AccumulationError, BudgetError, check_count, describe_value


@dataclass(frozen=True)
class _Settings:
    """How an audit is made; see `audit`."""

    draws: int
    alpha: float
    seed: int | None
    tolerance: float
    split: bool
    group: Any
    optimizer: torch.optim.Optimizer | None

    def __post_init__(self) -> None:
        check_count("draws", self.draws, minimum=8)
        check_alpha(self.alpha)
        if self.seed is not None:
            check_count("seed", self.seed, minimum=0)
        is_number = isinstance(self.tolerance, numbers.Real) and not isinstance(self.tolerance, bool)
        if not is_number or not 0 <= self.tolerance < 1:
            raise BudgetError(f"tolerance must be a number in [0, 1), but got {self.tolerance!r}; use e.g. 1e-3")


def audit(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    draws: int = 64,
    reference: Reference | None = None,
    alpha: float = 0.01,
    seed: int | None = None,
    tolerance: float = 0.0,
    split: bool = True,
    group: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    progress: bool | None = None,
) -> AuditReport:
    """Draw the gradient of one batch a fixed number of times and compare it with the exact one.

    The batch and the parameters stay the same; only random numbers change. With ``d_i = ĝ_i − g_i`` the error of draw i
    and n draws, the mean of ``⟨u, d_i⟩`` over its standard error is compared with Student's two-sided band at
    ``alpha / tests``, for the directions u of `measure_gradient_moments`. An alarm has to be confirmed by as many draws
    again. A draw and its exact gradient start from the same seed, another one in every draw, so that dropout has the
    same mask in both; a sketch may draw from the same generators: whether or not the masks agree, the mean of d is zero
    if and only if the gradient is unbiased over all random numbers together.

    Args:
        model: any module, in the mode it is in: converted, compiled, wrapped, with layers of your own.
        loss_fn: called with `model` and a batch; returns the scalar that training differentiates.
        batch: what `loss_fn` takes: a tensor, or tuples, lists and dictionaries of tensors.
        draws: how many gradients to draw, at least 8. There is no early stop; an alarm doubles the number.
        reference: what is right. By default the gradient of the same step with the stock code of all converted layers,
            eagerly, which is in turn checked against central differences of the loss. Else a function of model and
            batch that returns a loss to differentiate, or the gradient, by name or in the model's order.
        alpha: probability that an unbiased gradient is called biased, over all tests together, in (0, 1).
        seed: of all random numbers; has to be given where the model itself draws, as dropout does.
        tolerance: accept a bias up to this fraction of the gradient, e.g. of lower precision, in [0, 1).
        split: estimate the mini-batch's variance from micro-batches, cut along the first axis.
        group: a process group whose processes all make this call; their draws are pooled.
        optimizer: one that divides gradients by the root of their running mean square, such as Adam, after some steps
            on this loss: noise is then also given in units of its steps. Nothing about it is changed.
        progress: show a progress bar; by default if standard error is a terminal.

    Returns:
        The report. Parameters, gradients, buffers, modes and random states are as before.

    Law:
        False alarms stay below `alpha` as far as the means of the projections are near normal. Variance is unbiased. An
        error of scale of `detectable_relative_bias` is found 99 times in 100; smaller ones may hide. Deterministic
        errors are found at any size above rounding; where the model itself draws nothing, that holds beside sketches of
        cheapgrad, too, because the step is also run once with their stock code. One draw costs one step of training,
        and one exact step where the model draws.

    Raises:
        BudgetError: a setting is out of its range.
        ModelTypeError: `model` is no module, or has nothing to train.
        LossError: the loss is no real scalar that requires grad, or not finite, or its function changed parameters.
        ForwardError: the loss function raised; the cause is the original.
        BackwardError: the backward pass raised.
        NondeterministicForwardError: the model draws and `seed` is not given, or no seed governs what it draws.
        ReferenceGradientError: the exact gradient is random, or `reference` raised or returned no gradient.
        BatchOrderError: the first axis of the batch does not count examples, and `split` is set.
        GradientDrawError: a gradient is not finite.
        OptimizerStateError: the optimizer keeps no second moments, or has stepped none of the parameters yet.

    Example:
        >>> import torch, cheapgrad
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> _ = cheapgrad.approximate(model, cheapgrad.Rule("*", stored=cheapgrad.sketch.StochasticRounding(bits=4)))
        >>> batch = torch.randn(32, 8), torch.randint(4, (32,))
        >>> report = audit(
        ...     model, lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]), batch
        ... )
        >>> report.unbiased
        True
    """
    settings = _Settings(draws, alpha, seed, tolerance, split, group, optimizer)
    step = Step(model, loss_fn, reference)
    with undisturbed(model):
        return _run(step, batch, settings, progress)


def audit_step(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    accumulate: Callable[[], object],
    *,
    draws: int = 64,
    reference: Reference | None = None,
    alpha: float = 0.01,
    seed: int | None = None,
    tolerance: float = 0.0,
    split: bool = True,
    group: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    progress: bool | None = None,
) -> AuditReport:
    """Compare what a training loop leaves in ``.grad`` with the gradient of the concatenated batch.

    Finds loops that average means over unequal numbers of tokens, that forget to divide by the number of micro-batches,
    that divide twice, that lose the last micro-batch, or that sum over processes where they should average.

    Args:
        model: as for `audit`.
        loss_fn: the loss of the whole batch, as it is meant.
        batch: the whole batch: all micro-batches together.
        accumulate: runs without arguments the loop as it stands in training, up to the optimizer's step and without it:
            calls ``backward`` as often as it likes, and leaves gradients in ``.grad``, scaled as the optimizer gets
            them. Gradients are None when it starts.
        draws: as for `audit`; for a loop that draws nothing, 8 are as good.
        reference: as for `audit`.
        alpha: as for `audit`.
        seed: as for `audit`.
        tolerance: as for `audit`.
        split: as for `audit`.
        group: as for `audit`.
        optimizer: as for `audit`.
        progress: as for `audit`.

    Returns:
        The report, without bytes and FLOPs. Everything is left as for `audit`.

    Law:
        That of `audit`.

    Raises:
        AccumulationError: the loop is no function, raised, left no gradient, or changed parameters; these are put back.

    Example:
        >>> import torch
        >>> model, x, y = torch.nn.Linear(4, 1), torch.randn(6, 4), torch.randn(6, 1)
        >>> def loss_fn(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().mean()
        >>> def mean_of_means():
        ...     for part in (slice(0, 2), slice(2, 6)):
        ...         (loss_fn(model, (x[part], y[part])) / 2).backward()
        >>> audit_step(model, loss_fn, (x, y), mean_of_means, draws=8).unbiased
        False
    """
    settings = _Settings(draws, alpha, seed, tolerance, split, group, optimizer)
    if not callable(accumulate):
        raise AccumulationError(
            f"accumulate must be the loop, a function without arguments that calls backward, but is "
            f"{describe_value(accumulate)}"
        )
    step = Step(model, loss_fn, reference, accumulate)
    with undisturbed(model):
        return _run(step, batch, settings, progress)


def _run(step: Step, batch: Any, settings: _Settings, progress: bool | None) -> AuditReport:
    moments = None
    if settings.optimizer is not None:
        moments = read_second_moments(settings.optimizer, step.names, step.parameters)
    pool = Pool(settings.group)
    seed_of = functools.partial(make_seed, settings.seed or 0, pool.rank)
    draws_noise = find_noise(step, batch, seed_of, seed_given=settings.seed is not None)
    exact = step.draw_exact(batch, seed_of("first"))
    collector = ErrorCollector(
        exact.tensors, step.names, settings.tolerance, keeps_entries=moments is not None and settings.split
    )
    check = _check_exact(step, batch, exact, seed_of("first"), draws_noise)
    # Every process reports what any of them found.
    wrong = {name: error for found in pool.gather(check.wrong) for name, error in found if error > settings.tolerance}
    check = dataclasses.replace(check, wrong=tuple(wrong.items()))
    mini_batch = MiniBatchNoise(None, ("mini-batch variance unknown: split=False",))
    if settings.split:
        mini_batch = measure_mini_batch_noise(
            step, batch, seed_of, draws_noise=draws_noise, keeps_entries=moments is not None
        )
    series = Series(step, batch, collector, seed_of, draws_noise)
    errors, judgement, processes, confirmed = _draw(series, collector, pool, settings, progress)
    forward_noise = series.forward_noise()
    # Where they share no random numbers, errors of single entries hold the model's own noise.
    added = [] if forward_noise == "not shared" else collector.entry_variances()
    squared_norms, *variances = pool.mean(
        [collector.squared_norms, *([] if mini_batch.variances is None else [mini_batch.variances])]
    )
    return write_report(
        Findings(
            step=step,
            settings={"seed": settings.seed or 0, "alpha": settings.alpha, "tolerance": settings.tolerance},
            sizes=collector.sizes,
            errors=errors,
            judgement=judgement,
            squared_norms=squared_norms,
            processes=processes,
            confirmed=confirmed,
            check=check,
            mini_batch=MiniBatchNoise(variances[0] if variances else None, mini_batch.remarks),
            forward_noise=forward_noise,
            costs=StepCosts() if step.accumulates else measure_costs(step.model, step.loss_fn, batch),
            preconditioned=precondition_noise(moments, added, mini_batch.entries, pool, step.names),
        )
    )


def _check_exact(step: Step, batch: Any, exact: DrawnGradient, seed: int, draws_noise: bool) -> DerivativeCheck:
    """Return what is wrong without any sketch."""
    check = DerivativeCheck(False)
    if step.reference is None:
        check = check_derivative(step, batch, exact, seed, draws_noise=draws_noise)
    if not draws_noise and step.is_converted and (step.accumulates or step.reference is not None):
        check = dataclasses.replace(check, wrong=(*check.wrong, *check_exact_step(step, batch, exact, seed)))
    return check


def _draw(
    series: Series, collector: ErrorCollector, pool: Pool, settings: _Settings, progress: bool | None
) -> tuple[DrawnErrors, Judgement, int, bool]:
    """Return the errors of all draws, the judgement, whose draws they are, and whether an alarm was put to the test."""
    resolutions = pool.mean(collector.resolutions)
    with show_progress(settings.draws, progress) as advance:
        series.draw(settings.draws, advance)
        errors, processes = pool_errors(pool, collector.collected(), collector.names)
        judgement = judge(errors, resolutions, settings.alpha)
        if not judgement.alarm:
            return errors, judgement, processes, False
        series.draw(settings.draws, advance)
    errors, processes = pool_errors(pool, collector.collected(), collector.names)
    of_process = torch.arange(errors.draws) % (2 * settings.draws)
    return errors, judge(errors, resolutions, settings.alpha, of_process < settings.draws), processes, True

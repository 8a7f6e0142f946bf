"""Added noise as an optimizer meets it: in units of each parameter's own step, and as it stands."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experiments.declaration import NoiseRun
from benchmarks.experiments.methods import EXACT, Method
from benchmarks.experiments.preparing import Prepared, prepare
from benchmarks.experiments.tasks import Task
from benchmarks.experiments.training import draw_batches, make_optimizer, rate_share, take_exact_step
from cheapgrad.auditing.preconditioned_noise import read_second_moments, weigh_by_steps

_BATCH_SEED, _DRAW_SEED = 5000, 3000


@dataclass(frozen=True)
class WeighedNoise:
    """Added variance ÷ mini-batch variance over all parameters, and mini-batch variance ÷ squared expected gradient.

    Attributes:
        omega: every entry alike, as `cheapgrad.audit` has it.
        omega_adamw: every entry in units of AdamW's step.
        noise_to_signal: ν, every entry alike; infinite where no signal stands out of the noise.
        noise_to_signal_adamw: the same in units of AdamW's step.
        largest: place of the tensor with most of the mini-batch variance.
        its_share: of the mini-batch variance.
        omega_of_others: omega over all other tensors.
    """

    omega: float
    omega_adamw: float
    noise_to_signal: float
    noise_to_signal_adamw: float
    largest: int
    its_share: float
    omega_of_others: float


def weigh_noise(
    exact: Sequence[Sequence[Tensor]], added: Sequence[Tensor], moments: Sequence[Tensor], epsilon: float
) -> WeighedNoise:
    """Weigh variances by entry as AdamW weighs gradients, see `weigh_by_steps`, and as they stand.

    Args:
        exact: gradient of each of K ≥ 2 batches, by parameter tensor.
        added: sᵢ, variance that the method adds, in the same shapes.
        moments: vᵢ, second moments that the optimizer has, corrected for their start at zero.
        epsilon: ε of the optimizer.
    """
    totals: list[float] = []
    extras: list[float] = []
    sums = {"batch": 0.0, "added": 0.0, "signal": 0.0}
    plain_signal = 0.0
    for parts, more, moment in zip(zip(*exact, strict=True), added, moments, strict=True):
        gradients, extra = torch.stack(parts).double(), more.double()
        variance, mean = gradients.var(0), gradients.mean(0)
        # The square of a mean of K gradients has a K-th of their variance in it.
        signal = mean.square() - variance / len(exact)
        totals.append(float(variance.sum()))
        extras.append(float(extra.sum()))
        plain_signal += float(signal.sum())
        for name, value in zip(sums, weigh_by_steps([variance, extra, signal], extra, moment, epsilon), strict=True):
            sums[name] += value
    total, extra_total = math.fsum(totals), math.fsum(extras)
    largest = max(range(len(totals)), key=totals.__getitem__)
    return WeighedNoise(
        omega=extra_total / total,
        omega_adamw=sums["added"] / sums["batch"],
        noise_to_signal=_divide(total, plain_signal),
        noise_to_signal_adamw=_divide(sums["batch"], sums["signal"]),
        largest=largest,
        its_share=totals[largest] / total,
        omega_of_others=_divide(extra_total - extras[largest], total - totals[largest]),
    )


def _divide(above: float, below: float) -> float:
    return above / below if below > 0 else math.inf


def measure_weighed_noise(task: Task, methods: Sequence[Method], run: NoiseRun) -> dict[str, Any]:
    """Train exactly, and return the noise of every method at each point of the training.

    Args:
        task: the task.
        methods: those of the run; what a method does depends on no earlier step.
        run: what is declared.
    """
    model = task.build_seeded(run.seed)
    optimizer = make_optimizer(model, run.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, run.steps))
    batches = draw_batches(task, run.batch_size, run.seed)
    marks = sorted({max(1, round(share * run.steps)) for share in run.points})
    points = []
    for step in range(1, marks[-1] + 1):
        take_exact_step(task, model, optimizer, next(batches))
        schedule.step()
        if step in marks:
            points.append({"step": step, **_measure_point(task, model, methods, run, step, optimizer)})
    return {"points": points}


def _measure_point(
    task: Task, model: nn.Module, methods: Sequence[Method], run: NoiseRun, step: int, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    moments = read_second_moments(optimizer, names, parameters)
    batches = list(itertools.islice(draw_batches(task, run.batch_size, _BATCH_SEED + step), run.batches))
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_DRAW_SEED)
        plain = prepare(task, EXACT, model, batches)
        exact = [plain.draw_gradient(batch) for batch in batches]
        for method in methods:
            prepared = prepare(task, method, model, batches)
            added = _measure_added(prepared, batches, exact, run.draws)
            weighed = weigh_noise(exact, added, [one.read() for one in moments.known], optimizer.defaults["eps"])
            if prepared.handle is not None:
                prepared.handle.revert()
            found[method.step_words] = _make_plain(weighed, names)
    return {"methods": found}


def _measure_added(
    prepared: Prepared, batches: Sequence[Any], exact: Sequence[Sequence[Tensor]], draws: int
) -> list[Tensor]:
    """Return the mean squared difference to the exact gradient, by parameter tensor; zeros for the exact method."""
    added = [torch.zeros_like(gradient) for gradient in exact[0]]
    if prepared.handle is None:
        return added
    for batch, gradients in zip(batches, exact, strict=True):
        for _ in range(draws):
            for total, drawn, true in zip(added, prepared.draw_gradient(batch), gradients, strict=True):
                total += (drawn - true).square() / (len(batches) * draws)
    return added


def _make_plain(weighed: WeighedNoise, names: Sequence[str]) -> dict[str, Any]:
    """Return data for JSON, which has no infinity."""
    data = {name: value if math.isfinite(value) else None for name, value in asdict(weighed).items()}
    return {**data, "largest": names[weighed.largest]}

"""Noise in units of an optimizer's steps: every entry counts by what the optimizer divides its gradient by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.auditing._pooling import Pool
from cheapgrad.auditing._relative import relative
from cheapgrad.auditing._step import as_dense
from cheapgrad.errors import OptimizerStateError, describe_value

# Where optimizers keep the running mean of squared gradients, and the setting that says how fast it forgets.
_DECAYS: Mapping[str, Callable[[Mapping[str, Any]], float | None]] = {
    "max_exp_avg_sq": lambda group: group["betas"][1] if "betas" in group else None,
    "exp_avg_sq": lambda group: group["betas"][1] if "betas" in group else None,
    "square_avg": lambda group: group.get("alpha"),
}
_KNOWN = "Adam, AdamW, NAdam, RAdam or RMSprop"


@dataclass(frozen=True)
class SecondMoments:
    """What an optimizer divides gradients by.

    Attributes:
        positions: of the parameters that it has stepped, among those that were asked about.
        moments: v of each of these: running mean of its squared gradient, corrected for its start at zero.
        epsilons: ε of each, added to the root.
        remark: what a reader has to know, if anything.
    """

    positions: tuple[int, ...]
    moments: tuple[Tensor, ...]
    epsilons: tuple[float, ...]
    remark: str = ""


@dataclass(frozen=True)
class PreconditionedNoise:
    """Added variance ÷ mini-batch variance, in units of an optimizer's steps.

    Attributes:
        fraction: that ratio; None without an optimizer, or if it is unknown.
        remarks: what a reader has to know.
    """

    fraction: float | None = None
    remarks: tuple[str, ...] = ()


def precondition_noise(
    moments: SecondMoments | None, added: Sequence[Tensor], mini_batch: Sequence[Tensor], pool: Pool
) -> PreconditionedNoise:
    """Return noise in units of the steps of an optimizer.

    Args:
        moments: of the optimizer, if there is one.
        added: variance that was added to every entry of each tensor; none if unknown.
        mini_batch: variance of the mini-batch's gradient, likewise.
        pool: the processes over which both are averaged.
    """
    if moments is None:
        return PreconditionedNoise()
    sums = torch.full((2,), math.nan, dtype=torch.float64)
    if added and mini_batch:
        sums.zero_()
        for position, moment, epsilon in zip(moments.positions, moments.moments, moments.epsilons, strict=True):
            values = [added[position], mini_batch[position]]
            sums += torch.tensor(weigh_by_steps(values, added[position], moment, epsilon), dtype=torch.float64)
    above, below = pool.mean([sums])[0].tolist()
    if math.isnan(above):
        return PreconditionedNoise(None, ("noise in units of the optimizer's steps unknown",))
    return PreconditionedNoise(relative(above, below), (moments.remark,) if moments.remark else ())


def read_second_moments(
    optimizer: torch.optim.Optimizer, names: Sequence[str], parameters: Sequence[nn.Parameter]
) -> SecondMoments:
    """Return the second moments that an optimizer keeps of these parameters.

    Args:
        optimizer: Adam, AdamW, NAdam, RAdam, RMSprop, or another that keeps its moments under the same names.
        names: of the parameters.
        parameters: those that are asked about.

    Raises:
        OptimizerStateError: it is no optimizer, keeps no such moments, or has stepped none of the parameters.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerStateError(f"optimizer must be a torch.optim.Optimizer, but is {describe_value(optimizer)}")
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    positions, moments, epsilons = [], [], []
    left_out = []
    for position, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        state, group = optimizer.state.get(parameter, {}), groups.get(parameter)
        if group is None or not state or _count_steps(state, group) == 0:
            left_out.append(name)
            continue
        positions.append(position)
        moments.append(_read_moment(optimizer, state, group))
        epsilons.append(float(group.get("eps", 0.0)))
    if not positions:
        kind = type(optimizer).__name__
        raise OptimizerStateError(
            f"the {kind} has no state for any of the {len(names)} trainable parameters: either it has taken no step "
            f"yet, or it keeps none, as SGD without momentum does; pass {_KNOWN} over this model's parameters, after "
            "some steps of training. For an optimizer that takes gradients as they are, noise_fraction is the figure"
        )
    remark = ""
    if left_out:
        remark = (
            f"the optimizer has not stepped {len(left_out)} of {len(names)} parameters, the first one is "
            f"{left_out[0]}; the noise in units of its steps is that of all others"
        )
    return SecondMoments(tuple(positions), tuple(moments), tuple(epsilons), remark)


def _count_steps(state: Mapping[str, Any], group: Mapping[str, Any]) -> float:
    """Return how often a parameter was stepped; infinity where the optimizer does not count."""
    return float(state.get("step", group.get("step", math.inf)))


def _read_moment(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    for key, find_decay in _DECAYS.items():
        decay = find_decay(group)
        if key not in state or decay is None:
            continue
        share_seen = 1 - decay ** _count_steps(state, group)
        moment = as_dense(state[key].detach()).double() / share_seen
        if "grad_avg" in state:
            # A centred optimizer divides by the deviation.
            moment -= (as_dense(state["grad_avg"].detach()).double() / share_seen).square()
        return moment.clamp_min_(0)
    raise OptimizerStateError(
        f"the {type(optimizer).__name__} keeps no running mean of squared gradients, entry by entry, that is known "
        f"here, but {', '.join(map(str, state))}; pass {_KNOWN}, or leave optimizer out: noise_fraction is for "
        "gradients as they are"
    )


def weigh_by_steps(values: Sequence[Tensor], added: Tensor, moment: Tensor, epsilon: float) -> list[float]:
    r"""Return sums over a tensor's entries, each divided by the square of what the optimizer divides its gradient by.

    An adaptive step moves entry i by its gradient over ``d_i = √(v_i + s_i) + ε``, v_i being the running mean of its
    squared exact gradient and s_i the variance that a method adds, which gets into that mean in a training with the
    method: an entry whose exact gradient is zero, such as the bias of attention's keys, would otherwise count as
    infinitely noisy. With σ_i² the variance of the mini-batch's gradient, noise in units of the steps is
    ``Σ s_i / d_i² ÷ Σ σ_i² / d_i²``.

    Args:
        values: what is summed, of the tensor's shape.
        added: s_i, of that shape; negative values count as 0 in d_i.
        moment: v_i, of that shape.
        epsilon: ε.
    """
    moment = moment.to(added.device)
    divisor = (moment.double() + added.double().clamp_min(0)).sqrt_().add_(epsilon).square_()
    # Where neither has ever been anything, nothing is moved.
    weight = torch.where(divisor > 0, divisor.reciprocal(), 0.0)
    return [float((value.double() * weight).sum()) for value in values]

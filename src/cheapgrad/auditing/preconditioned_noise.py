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
# What stands beside it: anything else may mean that it is not of the gradient's own entries.
_COMPANIONS = {"step", "exp_avg", "momentum_buffer", "grad_avg", "mu_product"}
# Added variance below this share of the mini-batch's is the rounding of sums in another order.
_ROUNDING = 1e-8
_KNOWN = "Adam, AdamW, NAdam, RAdam or RMSprop"


@dataclass(frozen=True)
class SecondMoment:
    """What an optimizer divides the gradient of one parameter by.

    Attributes:
        position: of the parameter, among those that were asked about.
        epsilon: ε, added to the root.
        mean: of v over all entries.
        state: what the optimizer keeps of the parameter.
        key: under which the running mean of the squared gradient stands there.
        share_seen: how much of that mean is not its start at zero.
    """

    position: int
    epsilon: float
    mean: float
    state: Mapping[str, Any]
    key: str
    share_seen: float

    def read(self) -> Tensor:
        """Return v, the running mean of the squared gradient, corrected for its start at zero: whole, in float64."""
        return _read_moment(self.state, self.key, self.share_seen)


@dataclass(frozen=True)
class SecondMoments:
    """What an optimizer divides gradients by.

    Attributes:
        known: of the parameters that it has stepped, in their order.
        remarks: what a reader has to know.
    """

    known: tuple[SecondMoment, ...]
    remarks: tuple[str, ...] = ()

    def sum_by_steps(self, added: Sequence[Tensor], *values: Sequence[Tensor]) -> list[float]:
        """Return the sums of values over all entries of all parameters, in units of the steps; see `weigh_by_steps`.

        Args:
            added: variance that a method adds to every entry, by parameter.
            values: what is summed, each by parameter.
        """
        sums = [0.0] * len(values)
        for moment in self.known:
            at = moment.position
            own = weigh_by_steps([one[at] for one in values], added[at], moment.read(), moment.epsilon)
            sums = [total + value for total, value in zip(sums, own, strict=True)]
        return sums


@dataclass(frozen=True)
class PreconditionedNoise:
    """Added variance ÷ mini-batch variance, in units of an optimizer's steps.

    Attributes:
        fraction: that ratio; None without an optimizer, or if it is unknown.
        remarks: what a reader has to know.
        is_asked: whether there is an optimizer.
    """

    fraction: float | None = None
    remarks: tuple[str, ...] = ()
    is_asked: bool = False


def precondition_noise(
    moments: SecondMoments | None,
    added: Sequence[Tensor],
    mini_batch: Sequence[Tensor],
    pool: Pool,
    names: Sequence[str],
) -> PreconditionedNoise:
    """Return noise in units of the steps of an optimizer.

    Args:
        moments: of the optimizer, if there is one.
        added: variance that was added to every entry of each tensor; none if unknown.
        mini_batch: variance of the mini-batch's gradient, likewise.
        pool: the processes over which both are averaged.
        names: of the tensors.
    """
    if moments is None:
        return PreconditionedNoise()
    known = {moment.position for moment in moments.known}
    reason, noisy = "", []
    if added and mini_batch:
        others = [at for at in range(len(names)) if at not in known]
        noisy = [names[at] for at in others if float(added[at].sum()) > _ROUNDING * float(mini_batch[at].sum())]
    if not mini_batch:
        reason = "the mini-batch's variance is"
    elif not added:
        reason = "the step and its reference draw different random numbers, and so is the noise of single entries"
    elif noisy:
        reason = f"noise is added to {len(noisy)} parameters that it does not step, the first one is {noisy[0]}"
    sums = [math.nan, math.nan] if reason else moments.sum_by_steps(added, added, mini_batch)
    above, below = pool.mean([torch.tensor(sums, dtype=torch.float64)])[0].tolist()
    if math.isnan(above):
        reason = reason or "it is on another process"
        text = f"noise in units of the optimizer's steps unknown, because {reason}"
        return PreconditionedNoise(None, (*moments.remarks, text), is_asked=True)
    return PreconditionedNoise(relative(above, below), moments.remarks, is_asked=True)


def read_second_moments(
    optimizer: torch.optim.Optimizer, names: Sequence[str], parameters: Sequence[nn.Parameter]
) -> SecondMoments:
    """Return the second moments that an optimizer keeps of these parameters.

    Args:
        optimizer: Adam, AdamW, NAdam, RAdam, RMSprop, or another that keeps its moments under the same names.
        names: of the parameters.
        parameters: those that are asked about.

    Raises:
        OptimizerStateError: it is no optimizer, holds none of the parameters, has stepped none of them, keeps no such
            moments, or some that are not finite.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerStateError(
            f"optimizer must be a torch.optim.Optimizer, but is {describe_value(optimizer)}; pass the one that steps "
            "the parameters, of a scheduler its .optimizer"
        )
    kind = type(optimizer).__name__
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    strange = [name for name, parameter in zip(names, parameters, strict=True) if parameter not in groups]
    waiting, known = [], []
    for position, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        if parameter not in groups:
            continue
        state, group = optimizer.state.get(parameter, {}), groups[parameter]
        if not state or _count_steps(state, group) == 0:
            waiting.append(name)
        elif parameter.numel():
            known.append(_find_moment(kind, name, position, state, group, parameter.shape))
    if len(strange) == len(names):
        raise OptimizerStateError(
            f"the {kind} holds none of this model's {len(names)} trainable parameters; pass the optimizer that steps "
            "them, made for this very model and not for a copy of it"
        )
    if not known:
        raise OptimizerStateError(
            f"the {kind} has no state for any of the {len(names)} trainable parameters: either it has taken no step "
            f"yet, or it keeps none, as SGD without momentum does; pass {_KNOWN} after some steps of training. For an "
            "optimizer that takes gradients as they are, noise_fraction is the figure"
        )
    if not any(moment.mean for moment in known):
        raise OptimizerStateError(
            f"the {kind} has seen no gradient but zeros, so that its steps have no unit; pass it after some steps of "
            "training"
        )
    remarks = [
        f"the optimizer {what} {len(left)} of {len(names)} parameters, the first one is {left[0]}; noise in units of "
        "its steps is that of the others"
        for what, left in (("does not hold", strange), ("has not stepped", waiting))
        if left
    ]
    return SecondMoments(tuple(known), tuple(remarks))


def has_stepped(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    """Tell whether an optimizer has stepped a parameter that it holds."""
    state = optimizer.state.get(parameter, {})
    group = next(group for group in optimizer.param_groups if any(parameter is each for each in group["params"]))
    return bool(state) and _count_steps(state, group) > 0


def keeps_second_moments(group: Mapping[str, Any]) -> bool:
    """Tell whether the settings of a group of parameters have what a running mean of squared gradients needs."""
    return any(find_decay(group) is not None for find_decay in _DECAYS.values())


def _read_moment(state: Mapping[str, Any], key: str, share_seen: float) -> Tensor:
    moment = as_dense(state[key].detach()).double() / share_seen
    if "grad_avg" in state:
        # A centred optimizer divides by the deviation.
        moment -= (as_dense(state["grad_avg"].detach()).double() / share_seen).square()
    return moment.clamp_min_(0)


def _mean_moment(state: Mapping[str, Any], key: str, share_seen: float) -> tuple[torch.Size, float]:
    """Return the shape of v and its mean, NaN or infinite if an entry is, without a copy where that will do."""
    if "grad_avg" in state:
        moment = _read_moment(state, key, share_seen)
        return moment.shape, float(moment.mean())
    moment = as_dense(state[key].detach())
    total = float(moment.sum(dtype=torch.promote_types(moment.dtype, torch.float32)))
    if not math.isfinite(total):
        total = float(moment.double().sum())
    return moment.shape, max(0.0, total / moment.numel() / share_seen) if math.isfinite(total) else total


def _count_steps(state: Mapping[str, Any], group: Mapping[str, Any]) -> float:
    """Return how often a parameter was stepped; infinity where the optimizer does not count."""
    return float(state.get("step", group.get("step", math.inf)))


def _find_moment(
    kind: str, name: str, position: int, state: Mapping[str, Any], group: Mapping[str, Any], shape: torch.Size
) -> SecondMoment:
    for key, find_decay in _DECAYS.items():
        decay = find_decay(group)
        if key not in state or decay is None or not set(state) <= {*_DECAYS, *_COMPANIONS}:
            continue
        share_seen = 1 - float(decay) ** _count_steps(state, group)
        found_shape, mean = _mean_moment(state, key, share_seen)
        if found_shape != shape:
            raise OptimizerStateError(
                f"the second moments of {name!r} that the {kind} keeps have shape {tuple(found_shape)}, and the "
                f"parameter has {tuple(shape)}; load its state with the parameters in the order in which it was saved"
            )
        if not math.isfinite(mean):
            raise OptimizerStateError(
                f"the second moments of {name!r} that the {kind} keeps are not finite, so that its steps have no unit; "
                "go on from a state that was saved before"
            )
        return SecondMoment(position, float(group.get("eps", 0.0)), mean, state, key, share_seen)
    raise OptimizerStateError(
        f"the {kind} keeps no running mean of squared gradients, entry by entry, that is known here, but "
        f"{', '.join(map(str, state))}; pass {_KNOWN}, or leave optimizer out: noise is then that of gradients as they "
        "are"
    )


def weigh_by_steps(values: Sequence[Tensor], added: Tensor, moment: Tensor, epsilon: float) -> list[float]:
    r"""Return sums over a tensor's entries, each divided by the square of what the optimizer divides its gradient by.

    An adaptive step moves entry i by its gradient over ``d_i = √(v_i + s_i) + ε``, v_i being the running mean of its
    squared exact gradient and s_i the variance that a method adds, which gets into that mean in a training with the
    method: an entry whose exact gradient is zero, such as the bias of attention's keys, would otherwise count as
    infinitely noisy. With σ_i² the variance of the mini-batch's gradient, noise in units of the steps is
    ``Σ s_i / d_i² ÷ Σ σ_i² / d_i²``. The start of RMSprop and RAdam, whose divisors are not corrected, or not used, is
    taken to be over.

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

"""How often the choice at a kink changes the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.errors import ArgumentError, BudgetError, ForwardResultError, TrialError, check_count, describe_value
from cheapgrad.kinks._binomial import clopper_pearson
from cheapgrad.kinks.conventions import Conventions, apply_conventions, check_conventions


@dataclass(frozen=True)
class Bifurcation:
    """How often two conventions gave different gradients; see `bifurcation`.

    Attributes:
        trials: how many times both gradients were computed.
        differing: in how many of them they differed by more than `tolerance`.
        unrepeatable: in how many of them the first convention, used twice, gave two different gradients by the same
            measure. If this is not 0, the difference is not the kinks' alone.
        low: lower end of the confidence interval of the probability of a differing trial.
        high: its upper end.
        confidence: of the interval.
        tolerance: largest relative difference that counts as none.
        largest_difference: largest ``‖g − g'‖ / max(‖g‖, ‖g'‖)`` over the trials.
        unused: places of the parameters that no trial's loss depended on: their gradient is zero under all conventions.
    """

    trials: int
    differing: int
    unrepeatable: int
    low: float
    high: float
    confidence: float
    tolerance: float
    largest_difference: float
    unused: tuple[int, ...] = ()

    @property
    def fraction(self) -> float:
        """Share of the trials in which the gradients differed."""
        return self.differing / self.trials

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Bifurcation:
        """Return the record that `to_dict` wrote."""
        return cls(**{**data, "unused": tuple(data.get("unused", ()))})


def bifurcation(
    loss: Callable[[int], Tensor],
    parameters: Tensor | Iterable[Tensor],
    *,
    trials: int,
    conventions: tuple[Conventions, Conventions] = (Conventions(), Conventions(relu=1.0)),
    confidence: float = 0.95,
    tolerance: float = 0.0,
) -> Bifurcation:
    """Estimate how often two conventions at kinks lead to different gradients.

    A trial runs ``loss(trial)`` and its gradient g under the first convention, again under the first, and as g' under
    the second. It counts if ``‖g − g'‖ > tolerance · max(‖g‖, ‖g'‖)``; with tolerance 0, if any bit differs.

    Args:
        loss: takes the number of the trial, returns a scalar. What a trial draws, parameters or a batch, it must draw
            from that number or from torch's default generator, which is set back before each run.
        parameters: what the gradient is taken of: a tensor, a list of them, or ``model.parameters()``. A list is read
            after the loss has run, so it may fill it.
        trials: how many, at least 1, fixed beforehand.
        conventions: the two to compare; by default torch's own and ReLU'(0) = 1.
        confidence: of the interval, in (0, 1).
        tolerance: relative difference that counts as none; at least 0.

    Returns:
        Counts, the Clopper–Pearson interval of the probability, and the largest difference.

    Law:
        The interval contains the probability with at least the stated confidence if trials are independent. What that
        is a probability *of* is decided by what `loss` draws: of parameters, the volume of the set on which autodiff's
        gradient depends on the convention; of batches, the share of training steps. Three forward and backward passes a
        trial. Only kinks that `apply_conventions` reaches.

    Raises:
        BudgetError: `trials`, `confidence` or `tolerance` out of range.
        TrialError: the runs of a trial returned different losses, so they were not runs of one thing.
        ArgumentError: `parameters` are no tensors, or none at all, or `loss` is no function.
        ConventionError: `conventions` are not two.
        ForwardResultError: the loss is not a scalar tensor with a graph, or depends on none of the parameters.

    Example:
        A sum that is exactly 0 half of the time:

        >>> weight = torch.ones(1, requires_grad=True)
        >>> found = bifurcation(lambda trial: torch.relu(weight - trial % 2).sum(), [weight], trials=100)
        >>> found.differing, round(found.low, 2), round(found.high, 2)
        (50, 0.4, 0.6)

    References:
        Bertoin, Bolte, Gerchinovitz, Pauwels, "Numerical influence of ReLU'(0) on backpropagation", NeurIPS 2021, count
        an epoch as one trial; here a trial is whatever `loss` makes of it.
    """
    check_count("trials", trials)
    if not tolerance >= 0:
        raise BudgetError(f"tolerance must be at least 0, but got {tolerance!r}")
    clopper_pearson(0, 1, confidence)
    first, second = check_conventions(conventions)
    if not callable(loss):
        raise ArgumentError(
            f"loss must be a function of the number of the trial, but got {describe_value(loss)}; use e.g. "
            "lambda trial: loss_function(model(x), y)"
        )
    tensors = _as_sequence(parameters)
    differing = unrepeatable = 0
    largest = 0.0
    used: set[int] = set()
    for trial in range(trials):
        set_back = _remember_draws()
        value, gradient = _differentiate(loss, trial, tensors, first, used)
        runs = []
        for convention in (first, second):
            set_back()
            runs.append(_differentiate(loss, trial, tensors, convention, used))
        for other, _ in runs:
            if not (other == value or (other != other and value != value)):
                raise TrialError(
                    f"trial {trial} returned the loss {value!r} once and {other!r} another time; draw all that is "
                    "random from its number or torch's default generator, and use deterministic operations"
                )
        unrepeatable += _difference(gradient, runs[0][1]) > tolerance
        difference = _difference(gradient, runs[1][1])
        differing += difference > tolerance
        largest = max(largest, difference)
    unused = tuple(place for place in range(len(tensors)) if place not in used)
    if not used:
        raise ForwardResultError(
            f"the loss depended on none of the {len(tensors)} parameter(s) in any of {trials} trial(s), so that there "
            "is no gradient to compare; pass the tensors themselves that the loss uses, not copies or views of them"
        )
    low, high = clopper_pearson(differing, trials, confidence)
    return Bifurcation(trials, differing, unrepeatable, low, high, confidence, float(tolerance), largest, unused)


def _as_sequence(parameters: object) -> Sequence[Tensor]:
    """Return the parameters as a sequence; a list stays the same list, because the loss may fill it."""
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, nn.Module):
        raise ArgumentError(
            f"parameters must be tensors, but got the module {type(parameters).__name__}; pass list(model.parameters())"
        )
    if isinstance(parameters, (Mapping, str)) or not isinstance(parameters, Iterable):
        raise ArgumentError(
            f"parameters must be tensors, but got {describe_value(parameters)}; pass a list of tensors, of a "
            "dictionary its list(values())"
        )
    # A generator such as model.parameters() can be read only once.
    return parameters if isinstance(parameters, list) else list(parameters)


def _check_parameters(parameters: Sequence[object]) -> list[Tensor]:
    """Return the parameters if there are any and all have gradients."""
    if not parameters:
        raise ArgumentError("parameters must be at least one tensor, but got none; pass e.g. list(model.parameters())")
    tensors = []
    for place, tensor in enumerate(parameters):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(
                f"parameters must be tensors, but number {place} is {describe_value(tensor)}; pass e.g. "
                "list(model.parameters())"
            )
        if not tensor.requires_grad:
            raise ArgumentError(
                f"parameter {place}, of shape {tuple(tensor.shape)}, does not require a gradient; leave it out, or "
                "call .requires_grad_() on it before the loss runs"
            )
        tensors.append(tensor)
    return tensors


def _differentiate(
    loss: Callable[[int], Tensor], trial: int, parameters: Sequence[Tensor], conventions: Conventions, used: set[int]
) -> tuple[float, list[Tensor]]:
    """Return the loss and its gradient, and add the places of the parameters that it depends on to `used`."""
    with apply_conventions(conventions):
        value = loss(trial)
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ForwardResultError(f"trial {trial} returned {found}; let the loss return a scalar tensor with its graph")
    tensors = _check_parameters(parameters)
    gradient = torch.autograd.grad(value, tensors, allow_unused=True)
    used.update(place for place, part in enumerate(gradient) if part is not None)
    return float(value.detach()), [
        torch.zeros_like(tensor) if part is None else part for part, tensor in zip(gradient, tensors, strict=True)
    ]


def _difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return ``‖g − g'‖ / max(‖g‖, ‖g'‖)``, positive wherever a bit differs; NaN counts as equal to NaN."""
    pairs = list(zip(one, other, strict=True))
    if all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs):
        return 0.0
    squares = [
        sum(float(part.double().square().sum()) for part in parts)
        for parts in ([a.double() - b.double() for a, b in pairs], one, other)
    ]
    largest = max(squares[1:]) ** 0.5
    # Underflow and infinities must not turn a difference into none.
    relative = squares[0] ** 0.5 / largest if largest else torch.inf
    return relative if relative > 0 else torch.inf


def _remember_draws() -> Callable[[], None]:
    """Return a function that sets torch's default generators back to what they are now."""
    state = torch.get_rng_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    states = [torch.cuda.get_rng_state(device) for device in devices]

    def set_back() -> None:
        torch.set_rng_state(state)
        for device, device_state in zip(devices, states, strict=True):
            torch.cuda.set_rng_state(device_state, device)

    return set_back

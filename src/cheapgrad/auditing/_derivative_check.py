"""Is the gradient that an audit compares with the derivative of the loss? Central differences tell."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapgrad.auditing._examples import map_tensors
from cheapgrad.auditing._precision import find_lowest_precision
from cheapgrad.auditing._step import DrawnGradient, LossFunction, Step, exact_step
from cheapgrad.auditing._surroundings import seed_all

# Step of the differences, relative to the parameters: in double precision, far from rounding and from curvature.
_STEP = 1e-5
_DIRECTIONS = 2
# A derivative that is off by more than this fraction is wrong; what the two steps disagree by is added.
_WRONG = 1e-4
_DISAGREEMENT = 10
# The model's gradient may differ from that of its double by this fraction, and by so many units in the last place of
# the lowest precision that the forward pass holds tensors in.
_OTHER = 1e-3
_OTHER_ULPS = 16
_SAME_LOSS = 0.01
_SEED = 20240301


@dataclass(frozen=True)
class DerivativeCheck:
    """What central differences say about the exact gradient.

    Attributes:
        done: whether it could be checked.
        remark: why not.
        wrong: names of parameters whose gradient is no derivative of the loss, with the relative error.
    """

    done: bool
    remark: str = ""
    wrong: tuple[tuple[str, float], ...] = ()


def check_derivative(step: Step, batch: Any, exact: DrawnGradient, seed: int, *, draws_noise: bool) -> DerivativeCheck:
    """Compare the exact gradient with central differences of the loss, in double precision on a copy.

    First along two random directions of all parameters together, at two step sizes; only where these disagree with the
    gradient, along one direction of each parameter. The copy has no hooks, so its gradient is then compared with that
    of the model itself.

    Args:
        step: its model is copied; its loss function must use the model that it is given.
        batch: the batch.
        exact: the exact gradient of the model itself.
        seed: that it was drawn with.
        draws_noise: whether the forward pass draws; masks of dropout are others in double precision.
    """
    try:
        problem = _Problem(step.model, step.loss_fn, batch, seed)
        if not problem.depends_on_copy():
            return DerivativeCheck(False, "the loss function does not use the model that it is given")
        suspects = any(problem.is_wrong(problem.directions(number)) for number in range(_DIRECTIONS))
        wrong = problem.list_wrong() if suspects else ()
        if not wrong and not draws_noise and not _is_distributed():
            wrong = problem.list_other(exact, _lowest_precision(step, batch, seed))
    except Exception as error:
        # Models that have no copy or no double precision are audited without this check.
        text = " ".join(str(error).split())
        return DerivativeCheck(False, f"{type(error).__name__}: {text[:120]}")
    return DerivativeCheck(True, wrong=wrong)


class _Problem:
    def __init__(self, model: nn.Module, loss_fn: LossFunction, batch: Any, seed: int) -> None:
        self._model = copy.deepcopy(model).double()
        self._batch = map_tensors(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        self._loss_fn, self._seed = loss_fn, seed
        named = [(name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad]
        self._names = [name for name, _ in named]
        self._parameters = [parameter for _, parameter in named]
        self._home = [parameter.detach().clone() for parameter in self._parameters]
        loss = self._loss()
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        self._gradients = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self._parameters, gradients, strict=True)
        ]
        self._loss_value = float(loss.detach())

    def _loss(self) -> Tensor:
        seed_all(self._seed)
        with exact_step():
            return self._loss_fn(self._model, self._batch)

    def depends_on_copy(self) -> bool:
        return any(bool(gradient.any()) for gradient in self._gradients)

    def directions(self, number: int) -> list[Tensor]:
        """Return random directions, as long for each parameter as the parameter is large."""
        generator = torch.Generator().manual_seed(_SEED + number)
        return [
            torch.randn(home.shape, generator=generator, dtype=home.dtype).to(home.device) * _typical_size(home)
            for home in self._home
        ]

    def is_wrong(self, directions: Sequence[Tensor | None]) -> bool:
        return self._error(directions) is not None

    def _error(self, directions: Sequence[Tensor | None]) -> float | None:
        """Return the relative error of the gradient along the directions, None where it is right."""
        slopes = [
            float((direction * gradient).sum())
            for direction, gradient in zip(directions, self._gradients, strict=True)
            if direction is not None
        ]
        coarse, fine = (self._difference(directions, step) for step in (_STEP, _STEP / 10))
        # The rounding of the loss counts, too.
        slack = _DISAGREEMENT * abs(coarse - fine) + 1e-14 * abs(self._loss_value) / _STEP
        error, size = abs(math.fsum(slopes) - coarse), math.hypot(*slopes)
        if error <= _WRONG * size + slack:
            return None
        return error / max(abs(coarse), 1e-300)

    def _difference(self, directions: Sequence[Tensor | None], step: float) -> float:
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                self._move(directions, sign * step)
                losses.append(float(self._loss()))
            self._move(directions, 0.0)
        return (losses[0] - losses[1]) / (2 * step)

    def _move(self, directions: Sequence[Tensor | None], step: float) -> None:
        for parameter, home, direction in zip(self._parameters, self._home, directions, strict=True):
            parameter.copy_(home if direction is None else home + step * direction)

    def list_wrong(self) -> tuple[tuple[str, float], ...]:
        everything = self.directions(0)
        wrong = []
        for position, name in enumerate(self._names):
            only = [direction if number == position else None for number, direction in enumerate(everything)]
            error = self._error(only)
            if error is not None:
                wrong.append((name, error))
        return tuple(wrong)

    def list_other(self, exact: DrawnGradient, precision: torch.dtype) -> tuple[tuple[str, float], ...]:
        """Return the parameters whose exact gradient is not that of the copy, with the relative error."""
        if exact.loss is None or not math.isclose(exact.loss, self._loss_value, rel_tol=_SAME_LOSS):
            return ()
        return list_apart(self._names, exact.tensors, self._gradients, precision)


def list_apart(
    names: Sequence[str], gradients: Sequence[Tensor], truths: Sequence[Tensor], precision: torch.dtype
) -> tuple[tuple[str, float], ...]:
    """Return the tensors of a gradient that are wrong, with the relative error.

    What lower precision explains is no error, nor what is small beside the whole gradient: it may be rounding alone.

    Args:
        names: of the tensors.
        gradients: to look at.
        truths: what they should be.
        precision: the coarsest that was computed in.
    """
    allowed = _OTHER + _OTHER_ULPS * torch.finfo(precision).eps
    lengths = [float(truth.double().norm()) for truth in truths]
    size = math.hypot(*lengths)
    apart = []
    for name, gradient, truth, length in zip(names, gradients, truths, lengths, strict=True):
        error = float((gradient.double() - truth.double()).norm())
        if error > allowed * length and error > _OTHER * allowed * size:
            apart.append((name, error / max(length, 1e-300)))
    return tuple(apart)


def check_exact_step(step: Step, batch: Any, exact: DrawnGradient, seed: int) -> tuple[tuple[str, float], ...]:
    """Return where the step goes wrong even with the stock code of all converted layers, with the relative error.

    Without the noise of sketches, what a loop or code around them does wrong shows at any size.

    Args:
        step: run once.
        batch: the batch.
        exact: what its gradient should be.
        seed: that it was drawn with.
    """
    precision = _lowest_precision(step, batch, seed)
    with exact_step():
        drawn = step.draw(batch, seed)
    return list_apart(step.names, drawn.tensors, exact.tensors, precision)


def _is_distributed() -> bool:
    """Tell whether gradients may be averaged with those of other processes, which the copy's are not."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _lowest_precision(step: Step, batch: Any, seed: int) -> torch.dtype:
    seed_all(seed)
    with exact_step():
        return find_lowest_precision(lambda: step.loss_fn(step.model, batch))


def _typical_size(tensor: Tensor) -> float:
    size = float(tensor.norm()) / max(tensor.numel(), 1) ** 0.5
    return size if size > 0 else 1.0

"""Passes over a model that leave it, its gradients and torch's random state as they were."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from cheapgrad.auditing._example_order import (
    is_same_loss,
    is_same_order,
    measure_distance,
    say_unchecked,
)
from cheapgrad.auditing._precision import find_lowest_precision
from cheapgrad.auditing._surroundings import evaluating
from cheapgrad.convert.wrappers import unwrap
from cheapgrad.cost._preparation import undisturbed
from cheapgrad.errors import (
    BackwardError,
    BatchOrderError,
    CheapgradError,
    ForwardError,
    LossError,
    NondeterministicLossError,
    check_finite_loss,
)
from cheapgrad.planning.units import plain_units
from cheapgrad.seeding import seed_torch, torch_states_kept

LossFunction = Callable[[Any, Any], Tensor]

_ORDER_SEED = 20240401


class Step:
    """One training step of a model, without the update.

    Args:
        model: the model.
        loss_fn: ``(model, batch) -> scalar``.
        seed: torch's random state is set to it before every forward pass, so that dropout and the like do not differ.

    Attributes:
        units: in which gradients are returned; as they are, until others are set.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, seed: int = 0) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.seed = seed
        self._last = torch.tensor(math.nan)
        self.named_parameters = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        self.parameters = [value for _, value in self.named_parameters]
        self.units = plain_units(self.parameters)

    @property
    def last_loss(self) -> float:
        """The loss that the last gradient is of; NaN before the first."""
        return float(self._last)

    def factor_of(self, parameter: Tensor | None) -> float:
        """Return what a parameter's gradient is multiplied by; 1 where it is none of those that are trained."""
        pairs = zip(self.parameters, self.units.factors, strict=True)
        return next((factor for own, factor in pairs if own is parameter), 1.0)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Put gradients, buffers and the random states of all devices back afterwards."""
        with torch_states_kept(), undisturbed(self.model, ()):
            yield

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch, from the same random state every time.

        Raises:
            LossError: if it is no real scalar that requires grad.
            ForwardError: if the loss function raises; the cause is the original.
        """
        seed_torch(self.seed)
        try:
            loss = self.loss_fn(self.model, batch)
        except CheapgradError:
            raise
        except Exception as error:
            raise ForwardError(f"the loss function raised {type(error).__name__}: {error}") from error
        if not _is_loss(loss):
            raise LossError(
                "loss_fn(model, batch) must return a real scalar loss that requires grad, but returned "
                f"{_describe(loss)}; return e.g. cross_entropy(model(batch[0]), batch[1])"
            )
        return loss.sum()

    def gradient(self, batch: Any, also: Callable[[], list[Tensor]] = list) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the gradient of all parameters in `units`, zeros where there is none, and that of other tensors.

        Args:
            batch: the batch.
            also: returns the other tensors, once the forward pass is over.

        Raises:
            BackwardError: if the backward pass raises; the cause is the original.
        """
        loss = self.loss(batch)
        others = also()
        try:
            found = torch.autograd.grad(loss, [*self.parameters, *others], allow_unused=True)
        except CheapgradError:
            raise
        except Exception as error:
            raise BackwardError(f"the backward pass raised {type(error).__name__}: {error}") from error
        self._last = loss.detach()
        count = len(self.parameters)
        pairs = zip(self.parameters, found[:count], strict=True)
        own = [torch.zeros_like(parameter) if value is None else value for parameter, value in pairs]
        return self.units.scale(own), list(found[count:])


def names_of_dropouts(model: nn.Module) -> set[str]:
    """Return the names of dropout modules: converted ones add no noise, but draw their masks in another way.

    Args:
        model: the model.
    """
    dropout = nn.modules.dropout._DropoutNd
    return {name for name, module in unwrap(model).named_modules() if isinstance(module, dropout)}


def check_loss(step: Step, batch: Any) -> list[str]:
    """Refuse a loss that cannot be planned for; return remarks on what could not be checked.

    Args:
        step: the step.
        batch: the first batch.

    Raises:
        LossError: if it is no scalar, or not finite.
        NondeterministicLossError: if it differs although torch's random state does not.
        BatchOrderError: if it depends on the order of the examples.
    """
    with step.undisturbed():
        first = step.loss(batch).detach()
    check_finite_loss(float(first), "batches[0]", "plan")
    with step.undisturbed(), torch.no_grad():
        again = step.loss(batch)
    if _differ(first, again):
        raise NondeterministicLossError(
            f"the same batch gave the losses {float(first):.8g} and {float(again):.8g} from the same random state of "
            "torch; draw with torch's default generator only, or seed the other generators inside loss_fn"
        )
    return _check_order(step, batch)


def _check_order(step: Step, batch: Any) -> list[str]:
    """Compare loss and gradient in evaluation mode, where dropout does not tell examples apart, with another order's.

    The loss alone would not do: that of a network that has learned nothing hardly depends on its input.
    """
    tensors = [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.dim()]
    sizes = {tensor.shape[0] for tensor in tensors}
    if len(sizes) != 1 or max(sizes) < 2:
        found = " and ".join(map(str, sorted(sizes))) or "no tensors"
        reason = f"the first axes of its tensors should be as long as there are examples, two or more, but are {found}"
        return [say_unchecked(reason)]
    size = sizes.pop()
    order = torch.randperm(size, generator=torch.Generator().manual_seed(_ORDER_SEED))

    def reorder(tensor: Tensor) -> Tensor:
        return tensor[order.to(tensor.device)] if tensor.dim() else tensor

    with evaluating(step.model), step.undisturbed():
        try:
            first, other = _evaluate(step, batch), _evaluate(step, tree_map_only(Tensor, reorder, batch))
            if first.gradient and not first.is_same(other):
                # What a pass is computed in may be coarser than its parameters are.
                first = dataclasses.replace(first, dtype=find_lowest_precision(lambda: step.loss(batch)))
            is_settled = not math.isfinite(float(first.loss)) or first.is_same(other)
            again = first if is_settled else _evaluate(Step(step.model, step.loss_fn, step.seed + 1), batch)
        except CheapgradError as error:
            # Some models return something else in evaluation mode, and are trained all the same.
            return [say_unchecked(f"in evaluation mode, {error}")]
    if not math.isfinite(float(first.loss)):
        return [say_unchecked(f"in evaluation mode the loss is {float(first.loss):.8g}")]
    if _differ(first.loss, again.loss):
        return [say_unchecked("it draws random numbers in evaluation mode too")]
    if first.why_unknown or not first.is_same(again):
        # A backward pass that is missing, draws by itself or is not finite: its gradient tells nothing.
        why = first.why_unknown or "its backward pass is not the same twice"
        first = _Evaluated(first.loss, [], first.dtype)
        if first.is_same(other):
            return [f"whether the order of the batch's examples changes its gradient was not checked: {why}"]
    elif first.is_same(other):
        return []
    raise BatchOrderError(
        f"the loss is {float(first.loss):.8g}, but {float(other.loss):.8g} for the same {size} examples in another "
        f"order, and the gradient differs by {first.measure_distance(other):.2g} of its length: entries along the "
        "first axis are not examples of their own; put the examples first, or let loss_fn arrange the batch"
    )


@dataclass(frozen=True)
class _Evaluated:
    """Loss and gradient in evaluation mode.

    Attributes:
        loss: a scalar.
        gradient: of all parameters; empty where it is unknown.
        dtype: what the gradient was computed in.
        why_unknown: the reason why the gradient is unknown.
    """

    loss: Tensor
    gradient: list[Tensor]
    dtype: torch.dtype
    why_unknown: str = ""

    def measure_distance(self, other: _Evaluated) -> float:
        """Return the relative distance of both gradients; 0 where one is unknown."""
        return measure_distance(self.gradient, other.gradient) if self.gradient and other.gradient else 0.0

    def is_same(self, other: _Evaluated) -> bool:
        """Tell whether losses and gradients differ by rounding only."""
        return not _differ(self.loss, other.loss) and is_same_order(self.measure_distance(other), self.dtype)


def _evaluate(step: Step, batch: Any) -> _Evaluated:
    try:
        gradient, _ = step.gradient(batch)
    except (BackwardError, LossError) as error:
        # Some operations have no backward pass outside training mode; the loss alone is compared then.
        with torch.no_grad():
            loss = step.loss(batch)
            return _Evaluated(loss, [], loss.dtype, f"in evaluation mode, {error}")
    return _Evaluated(step._last, gradient, gradient[0].dtype)


def _differ(first: Tensor, second: Tensor) -> bool:
    if bool((first == second) | (first.isnan() & second.isnan())):
        return False
    return not is_same_loss(float(first.detach()), float(second.detach()), first.dtype)


def _is_loss(value: object) -> bool:
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        return False
    return value.requires_grad or not torch.is_grad_enabled()


def _describe(value: object) -> str:
    if isinstance(value, Tensor) and value.is_complex():
        return f"a tensor of {value.dtype}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" + ("" if value.requires_grad else " that does not")
    return f"{value!r} of type {type(value).__name__}"

"""What directional derivatives cost in forward mode, and when reverse mode is cheaper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from cheapgrad.cost._saved_tensors import describe_tensors
from cheapgrad.cost.cheap_gradient import cheap_gradient
from cheapgrad.cost.formulas import count_flops, find_formula
from cheapgrad.cost.report import CostReport
from cheapgrad.errors import (
    CheapgradError,
    ForwardError,
    ForwardModeError,
    ForwardResultError,
    ModelTypeError,
    check_count,
)
from cheapgrad.plain_data import read_record


@dataclass(frozen=True)
class ForwardModeCost:
    """What forward mode costs by the ledger; see `predict_forward_mode`.

    Attributes:
        directions: how many directional derivatives, p.
        forward_flops: of the function itself.
        tangent: what each direction adds, in units of the function: 2 for products of two operands that both vary.
        factor: function and p directional derivatives together, in units of the function: ``1 + tangent p``.
        reverse_factor: function and gradient in reverse mode, measured.
        crossover_directions: p at which forward mode costs as much as the whole gradient in reverse mode.
        full_gradient_factor: what the whole gradient would cost in forward mode, one direction for each parameter.
    """

    directions: int
    forward_flops: int
    tangent: float | None
    factor: float | None
    reverse_factor: float | None
    crossover_directions: float | None
    full_gradient_factor: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ForwardModeCost:
        """Return the record that `to_dict` wrote; `RecordError` if it is none."""
        return read_record(cls, data)


@dataclass(frozen=True)
class ForwardModeMeasurement:
    """What forward mode really computed; see `measure_forward_mode`.

    Attributes:
        directions: how many directional derivatives, p.
        forward_flops: of the function alone.
        flops: of the function and its p directional derivatives.
    """

    directions: int
    forward_flops: int
    flops: int

    @property
    def factor(self) -> float:
        """Function and directional derivatives together, in units of the function."""
        return self.flops / self.forward_flops if self.forward_flops else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain numbers, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ForwardModeMeasurement:
        """Return the record that `to_dict` wrote; `RecordError` if it is none."""
        return read_record(cls, data)


def predict_forward_mode(report: CostReport, directions: int = 1) -> ForwardModeCost:
    """Predict what p directional derivatives cost in forward mode, from the ledger of one step.

    A product ``Y = A B`` has the tangent ``Y' = A' B + A B'``: each direction costs two products. So p directions cost
    ``1 + 2p`` times the function on a chain of products, where reverse mode gives *all* partial derivatives of a scalar
    for 3 at most. Forward mode holds nothing for a backward pass, and that is its point.

    Args:
        report: what `cheapgrad.scan` returned.
        directions: p, at least 1.

    Returns:
        The factor, the number of directions at which reverse mode is as cheap, and the cost of a whole gradient. None
        where an operation has no stated factor, or nothing was counted.

    Law:
        An upper bound of the FLOPs of dense operations, attained where both operands of every product vary. The first
        layer's input usually does not; torch then saves half of that layer's tangents for all directions but one.

    Raises:
        BudgetError: `directions` is not a whole number of at least 1.

    Example:
        >>> from cheapgrad.cost import scan
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> cost = predict_forward_mode(scan(model, torch.ones(4, 8)), directions=16)
        >>> cost.factor, cost.reverse_factor, cost.crossover_directions
        (33.0, 2.5, 0.75)

    References:
        Bolte, Boustany, Pauwels, Pesquet-Popescu, "On the complexity of nonsmooth automatic differentiation", ICLR
        2023, tie the cost of p directions to that of matrix products: p directional derivatives of ``x ↦ A x`` along
        the columns of B are A B.
    """
    check_count("directions", directions)
    principle = cheap_gradient(report)
    forward = report.total.forward_flops
    tangent = None
    if forward and not principle.unstated:
        tangent = sum((row.tangent or 0.0) * row.forward_flops for row in principle.rows) / forward
    reverse = principle.measured
    return ForwardModeCost(
        directions=directions,
        forward_flops=forward,
        tangent=tangent,
        factor=None if tangent is None else 1 + tangent * directions,
        reverse_factor=reverse,
        crossover_directions=report.total.backward_flops / (tangent * forward) if tangent else None,
        full_gradient_factor=None if tangent is None else 1 + tangent * report.total.parameters,
    )


def measure_forward_mode(
    model: nn.Module,
    *inputs: Any,
    directions: int,
    loss: Callable[[Any], Tensor] | None = None,
    along_inputs: bool = False,
    **kwargs: Any,
) -> ForwardModeMeasurement:
    """Run p directional derivatives of a model in forward mode, and count the FLOPs that really run.

    The directions are random, one of each for all parameters, and go through the model together (`torch.func.jvp` under
    `torch.func.vmap`), so that the function itself is computed once.

    Args:
        model: any module, in the mode it is in; its buffers and torch's random state are left as they are.
        *inputs: of its forward.
        directions: p, at least 1.
        loss: called with the model's output; by default the output itself is differentiated, a tensor.
        along_inputs: whether floating-point inputs vary, too.
        **kwargs: of its forward; these do not vary.

    Returns:
        FLOPs of the function, and with its directional derivatives.

    Law:
        Counts what `scan` counts: products, not the steps for each element. Attention runs unfused, because fused
        kernels have no forward mode.

    Raises:
        ModelTypeError: `model` is not a module.
        BudgetError: `directions` is not a whole number of at least 1.
        ForwardError: the forward pass or the loss raised; the cause is the original.
        ForwardResultError: the model, or the loss, returns no tensor.
        ForwardModeError: an operation of the model has no forward mode (an LSTM on the CPU, say).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> measure_forward_mode(model, torch.ones(4, 8), directions=16, along_inputs=True).factor
        33.0
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"a torch.nn.Module is needed, but got {type(model).__name__}")
    check_count("directions", directions)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    varying = [place for place, value in enumerate(inputs) if along_inputs and _is_floating(value)]

    def function(parameters: dict[str, Tensor], chosen: list[Tensor]) -> Tensor:
        values = list(inputs)
        for place, value in zip(varying, chosen, strict=True):
            values[place] = value
        # Copied inside the transformation, where layers may write to them.
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        output = torch.func.functional_call(model, {**parameters, **buffers}, tuple(values), kwargs)
        result = output if loss is None else loss(output)
        if not isinstance(result, Tensor):
            raise ForwardResultError(
                f"the {'model' if loss is None else 'loss'} returned {type(result).__name__}; let it return a tensor, "
                "or give a loss that does"
            )
        return result

    primals = (parameters, [inputs[place] for place in varying])
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        alone = _FlopCount()
        with alone:
            _run_alone(function, primals, (inputs, kwargs))
        tangents = tree_map(
            lambda tensor: torch.randn(directions, *tensor.shape, dtype=tensor.dtype, device=tensor.device), primals
        )
        together = _FlopCount()
        with together:
            _push_forward(function, primals, tangents)
    return ForwardModeMeasurement(directions, alone.flops, together.flops)


def _run_alone(function: Callable[..., Tensor], primals: Any, given: object) -> None:
    """Run the function itself, so that what fails here is not laid at the door of forward mode."""
    try:
        function(*primals)
    except (CheapgradError, MemoryError):
        raise
    except Exception as error:
        raise ForwardError(
            f"the forward pass or the loss raised {type(error).__name__}: {error}; the inputs were "
            f"{describe_tensors(given)}"
        ) from error


def _push_forward(function: Callable[..., Tensor], primals: Any, tangents: Any) -> None:
    """Compute all directional derivatives at once."""
    try:
        torch.func.vmap(lambda along: torch.func.jvp(function, primals, along)[1], randomness="same")(tangents)
    except (NotImplementedError, RuntimeError) as error:
        raise ForwardModeError(
            f"the model cannot be differentiated in forward mode: {type(error).__name__}: {error}"
        ) from error


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _FlopCount(TorchDispatchMode):
    """Add up the FLOPs of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = find_formula(func)
        if formula is not None:
            self.flops += count_flops(func, formula, args, kwargs, out)
        return out

"""The registry of FLOP formulas, one for each operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import HigherOrderOperator

from cheapgrad.cost._aten_formulas import aten_formulas
from cheapgrad.errors import FormulaError

Formula = Callable[..., int]

# The one cost registry: the only module-level state of this package that calls change.
_registered: dict[Any, Formula] = {}


def register_formula(operation: Any, formula: Formula, *, replace: bool = False) -> None:
    """State how many FLOPs an operation takes, so that `scan` counts it instead of listing it as uncounted.

    Only what reaches PyTorch's dispatcher as one operation needs a formula: custom operators, and kernels behind them.
    An `autograd.Function` written in terms of PyTorch's operations does not: those that really run are counted. The
    backward pass of a custom operator is an operation of its own, with a formula of its own.

    Args:
        operation: such as ``torch.ops.mylib.fused``, with or without an overload; a formula serves all overloads.
        formula: called with the operation's arguments, tensors and all, and with its result as ``out``; returns the
            FLOPs as an int, two for each multiply-add. It must not look at values, only at shapes: the tensors may be
            fake.
        replace: allow to replace a formula, our own and PyTorch's included.

    Raises:
        FormulaError: `operation` is no operation, `formula` cannot be called, or there is a formula already.

    >>> import torch
    >>> @torch.library.custom_op("cheapgrad_example::rotate", mutates_args=())
    ... def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    ...     return x * angles.cos() + x.flip(-1) * angles.sin()
    >>> register_formula(torch.ops.cheapgrad_example.rotate, lambda x, angles, out: 4 * x.numel(), replace=True)
    """
    packet = _as_packet(operation)
    if not callable(formula):
        raise FormulaError(
            f"the formula of {operation_name(packet)} must be a function of its arguments that returns FLOPs, but is "
            f"{formula!r}; use e.g. lambda x, weight, out: 2 * x.numel() * weight.shape[0]"
        )
    if not replace and find_formula(packet) is not None:
        raise FormulaError(
            f"{operation_name(packet)} has a formula already; pass replace=True to put yours in its place"
        )
    _registered[packet] = formula


def find_formula(operation: Any) -> Formula | None:
    """Return the formula of an operation, or None: what was registered here, else ours, else PyTorch's.

    Args:
        operation: such as ``torch.ops.aten.mm``, with or without an overload.

    Raises:
        FormulaError: `operation` is no operation.

    >>> import torch
    >>> find_formula(torch.ops.aten.mm)(torch.empty(2, 3), torch.empty(3, 5), out=None)
    60
    >>> find_formula(torch.ops.aten.relu) is None
    True
    """
    # Imported here, because it imports the compiler's side of attention.
    from torch.utils.flop_counter import flop_registry

    packet = _as_packet(operation)
    found = _registered.get(packet) or aten_formulas().get(packet)
    if found is not None or packet not in flop_registry:
        return found
    theirs = flop_registry[packet]
    return lambda *args, out, **kwargs: theirs(*args, **kwargs, out_val=out)


def operation_name(operation: Any) -> str:
    """Return the name of an operation without its overload.

    >>> import torch
    >>> operation_name(torch.ops.aten.mm.default)
    'aten::mm'
    """
    if isinstance(operation, HigherOrderOperator):
        return f"higher_order::{operation.name()}"
    return _as_packet(operation)._qualified_op_name


def count_flops(operation: Any, formula: Formula, args: Any, kwargs: Any, out: Any) -> int:
    """Evaluate a formula on one call of its operation."""
    try:
        flops = formula(*args, **kwargs, out=out)
    except Exception as error:
        raise FormulaError(
            f"the formula of {operation_name(operation)} raised {type(error).__name__}: {error}; it is called with the "
            "operation's arguments and with its result as out="
        ) from error
    # SymInts of traced shapes are ints as well.
    if isinstance(flops, bool) or not isinstance(flops, (int, torch.SymInt)) or flops < 0:
        raise FormulaError(
            f"the formula of {operation_name(operation)} must return a whole number of at least 0, but returned "
            f"{flops!r}"
        )
    return int(flops)


def _as_packet(operation: Any) -> Any:
    if isinstance(operation, torch._ops.OpOverload):
        return operation._overloadpacket
    if isinstance(operation, (torch._ops.OpOverloadPacket, HigherOrderOperator)):
        return operation
    raise FormulaError(
        f"an operation of PyTorch's dispatcher is needed, such as torch.ops.mylib.fused, but got {operation!r} of type "
        f"{type(operation).__name__}"
    )

"""How often a model meets its kinks and ties."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from cheapgrad.errors import ModelTypeError
from cheapgrad.kinks._aten_kinks import find_kinks, is_not_counted, plain_name
from cheapgrad.kinks.kink_report import OUTSIDE, KinkReport, KinkRow


class KinkWatch:
    """Counts that grow while a watch is on; see `watch`."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, str, str], _Tally] = {}
        self._not_counted: dict[str, None] = {}

    def report(self) -> KinkReport:
        """Return what was seen so far; counts that live on a GPU are fetched only here."""
        rows = tuple(
            KinkRow(*key, tally.calls, tally.places, int(tally.kinks), int(tally.zero_kinks))
            for key, tally in self._tallies.items()
        )
        return KinkReport(rows, tuple(self._not_counted))

    def _add(self, layer: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        operation = plain_name(func)
        if is_not_counted(func, args, kwargs):
            self._not_counted[f"{layer or '(the model itself)'}: {operation}"] = None
            return
        found = find_kinks(operation, args, kwargs)
        if found is None:
            return
        key = (layer, operation, str(args[0].dtype).removeprefix("torch."))
        tally = self._tallies.setdefault(key, _Tally())
        tally.calls += 1
        tally.places += found.at_kink.numel()
        tally.kinks = found.at_kink.sum() + tally.kinks
        tally.zero_kinks = (found.at_kink & (found.value == 0)).sum() + tally.zero_kinks


class _Tally:
    """The counts of one row; numbers until the first call, then tensors on the device of the model."""

    def __init__(self) -> None:
        self.calls = 0
        self.places = 0
        self.kinks: Tensor | int = 0
        self.zero_kinks: Tensor | int = 0


@contextmanager
def watch(model: nn.Module) -> Iterator[KinkWatch]:
    """Count, layer by layer, how often what runs in the context stands exactly on a kink or a tie.

    A kink of an operation that acts entry by entry is an entry at a breakpoint (ReLU at 0, clamp at its bounds); a tie
    is a window or slice whose largest entry is not alone. There, and only there, a derivative is a convention.

    Args:
        model: its modules give the rows their names; what runs outside of them is counted as `OUTSIDE`, as long as
            gradients are enabled (so a loss is counted and an optimizer is not).

    Yields:
        The counts; ask for ``.report()`` at any time.

    Law:
        Exact counts of what ran in forward passes, in the dtype it ran in; a forward pass that is run again by a
        checkpoint during backward is counted once. Values and gradients are not touched. Comparisons that steer
        `torch.where` or Python's `if` are not seen, nor are the kinks of custom operators. What is under
        `torch.compile`, whichever model it belongs to, runs as if it were not.
        Hooks and modes are gone when the context is left, also after an exception.

    Raises:
        ModelTypeError: `model` is not a module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU())
        >>> with watch(model) as counts:
        ...     _ = model(torch.zeros(4, 2))
        >>> row = counts.report().rows[0]
        >>> row.layer, row.operation, row.dtype, row.kinks, row.places
        ('1', 'relu', 'float32', 12, 12)
    """
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"a torch.nn.Module is needed, but got {type(model).__name__}")
    counts = KinkWatch()
    stack: list[str] = []
    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(_enter(stack, name)))
            # Called after an exception too, so that the stack is right where it is caught inside the model.
            handles.append(module.register_forward_hook(_leave(stack), always_call=True))
        with torch.compiler.set_stance("force_eager"), _WatchMode(counts, stack):
            yield counts
    finally:
        for handle in handles:
            handle.remove()


class _WatchMode(TorchDispatchMode):
    """Look at the arguments of every operation before it runs."""

    supports_higher_order_operators = True

    def __init__(self, counts: KinkWatch, stack: list[str]) -> None:
        super().__init__()
        self.counts = counts
        self.stack = stack

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, HigherOrderOperator) and func._can_decompose():
            # In inference mode operations come whole that are made of others; the counters know the others.
            with self:
                return func.decompose(*args, **kwargs)
        inside = bool(self.stack)
        if (inside or torch.is_grad_enabled()) and not _in_backward():
            self.counts._add(self.stack[-1] if inside else OUTSIDE, func, args, kwargs)
        return func(*args, **kwargs)


def _in_backward() -> bool:
    # Private, and what torch.utils.checkpoint itself asks; a test pins what it means.
    return torch._C._current_graph_task_id() != -1


def _enter(stack: list[str], name: str) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        stack.append(name)

    return hook


def _leave(stack: list[str]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if stack:
            stack.pop()

    return hook

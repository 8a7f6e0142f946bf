"""From the ledger to its report."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from cheapgrad.cost._ledger import Ledger
from cheapgrad.cost._module_tracker import ModuleTracker, Path
from cheapgrad.cost._saved_tensors import list_tensors
from cheapgrad.cost.report import OUTSIDE, CostReport, Figures, ModuleCost, OperationCost

_COUNTED = ("forward_flops", "backward_flops", "recompute_flops", "saved_bytes")


class OutputNotes:
    """Bytes and dtypes of what every module returned."""

    def __init__(self, modules: int) -> None:
        self.output_bytes = [0] * modules
        self.dtypes: list[set[torch.dtype]] = [set() for _ in range(modules)]
        # The modules that returned a tensor with a graph.
        self.with_graph: set[int] = set()

    def add(self, number: int, output: Any) -> None:
        """Take in the output of one call."""
        for tensor in list_tensors(output):
            self.output_bytes[number] += tensor.numel() * tensor.element_size()
            self.dtypes[number].add(tensor.dtype)
            if tensor.requires_grad:
                self.with_graph.add(number)


class _Sums:
    """Figures of every module, own and inclusive, and of every operation in it; the outside has number -1."""

    def __init__(self) -> None:
        self.own: defaultdict[int, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_COUNTED, 0))
        self.inclusive: defaultdict[int, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_COUNTED, 0))
        self.operations: defaultdict[tuple[int, str], dict[str, int]] = defaultdict(
            lambda: dict.fromkeys(("calls", *_COUNTED), 0)
        )

    def add(self, path: Path, operation: str, figure: str, amount: int, calls: int = 0) -> None:
        owner = path[-1] if path else -1
        self.own[owner][figure] += amount
        self.operations[owner, operation][figure] += amount
        self.operations[owner, operation]["calls"] += calls
        for number in set(path) or {-1}:
            self.inclusive[number][figure] += amount


def write_report(
    ledger: Ledger,
    outputs: OutputNotes,
    savings: Iterable[tuple[Path, str, int]],
    *,
    remarks: tuple[str, ...],
    fake: bool,
) -> CostReport:
    """Return the report of a ledger that is complete."""
    tracker, label = ledger.tracker, ledger.labels()
    sums = _Sums()
    for entry in ledger.entries():
        calls = entry.calls if entry.phase == "forward" else 0
        sums.add(entry.path, entry.operation, f"{entry.phase}_flops", entry.flops, calls)
    for path, node_name, count in savings:
        sums.add(path, label(node_name), "saved_bytes", count)
    rows = _write_rows(tracker, outputs, sums)
    if -1 in sums.own and any(sums.own[-1].values()):
        outside: dict[str, Any] = sums.own[-1]
        rows.append(ModuleCost(**outside, name=OUTSIDE, inclusive=Figures(**outside)))
    names = [*tracker.names, OUTSIDE]
    operations = [
        OperationCost(module=names[number], operation=operation, **figures)
        for (number, operation), figures in sums.operations.items()
        if any(figures.values())
    ]
    operations.sort(key=lambda cost: (-cost.saved_bytes, -cost.forward_flops - cost.backward_flops, cost.operation))
    uncounted = sorted(ledger.uncounted.items(), key=lambda item: (item[1], item[0]))
    return CostReport(
        rows=tuple(rows),
        total=Figures(**{name: sum(getattr(row, name) for row in rows) for name in ("parameters", *_COUNTED)}),
        operations=tuple(operations),
        uncounted=tuple(name for name, _ in uncounted),
        unknown=sum(not per_element for _, per_element in uncounted),
        remarks=remarks,
        fake=fake,
    )


def _write_rows(tracker: ModuleTracker, outputs: OutputNotes, sums: _Sums) -> list[ModuleCost]:
    rows = []
    # Parameters stand as numbers here, because tensors are slow to hash.
    counted: set[int] = set()
    sizes: dict[int, int] = {}
    inside: dict[nn.Module, set[int]] = {}
    for number, module in enumerate(tracker.modules):
        within = _list_parameters(module, sizes, inside)
        # A parameter that several modules share is the first one's.
        new = {id(parameter) for parameter in module._parameters.values() if parameter is not None} - counted
        counted |= new
        own: dict[str, Any] = sums.own[number]
        rows.append(
            ModuleCost(
                parameters=sum(map(sizes.__getitem__, new)),
                **own,
                name=tracker.names[number],
                kind=type(module).__name__,
                calls=tracker.calls[number],
                output_bytes=outputs.output_bytes[number],
                dtypes=tuple(sorted(map(_dtype_name, outputs.dtypes[number]))),
                inclusive=Figures(parameters=sum(map(sizes.__getitem__, within)), **sums.inclusive[number]),
            )
        )
    return rows


def _list_parameters(module: nn.Module, sizes: dict[int, int], inside: dict[nn.Module, set[int]]) -> set[int]:
    """Return the parameters of a module and of those in it, and note their sizes; what is known stands in `inside`."""
    known = inside.get(module)
    if known is None:
        known = set()
        for parameter in module._parameters.values():
            if parameter is not None:
                known.add(id(parameter))
                # Some wait for their first input.
                sizes[id(parameter)] = 0 if is_lazy(parameter) else parameter.numel()
        for child in module._modules.values():
            if child is not None:
                known |= _list_parameters(child, sizes, inside)
        inside[module] = known
    return known


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

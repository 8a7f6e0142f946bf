"""Curvature products: as multiples of one gradient, and against curvlinops where it is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.interleaved import time_interleaved
from cheapgrad.curvature import AbstractDataOperator, GaussNewton, Hessian

TARGET = 1.0
COLUMNS = 8


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.embed, self.body = nn.Linear(48, 64), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)).mean(1))


def _make_cases() -> dict[str, tuple[nn.Module, Tensor]]:
    mlp = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 10))
    cnn = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return {
        "MLP": (mlp, torch.randn(128, 784)),
        "CNN": (cnn, torch.randn(32, 3, 32, 32)),
        "transformer": (_Transformer(), torch.randn(32, 32, 48)),
    }


def measure_curvature(*, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one record per network and way to a product: its time, as a multiple of one gradient and of curvlinops'.

    ``multiple_of_peer`` is the median over interleaved rounds of our time divided by that of curvlinops' operator of
    the same name, made without its checks; ``error`` is the largest difference from our product in double precision,
    relative to its largest entry. Where curvlinops is not installed, the records say so and hold our times alone.
    """
    for network, (model, x) in _make_cases().items():
        model.eval()
        targets = torch.randint(10, (len(x),))
        for kind in (Hessian, GaussNewton):
            yield from _measure(network, model, (x, targets), kind, rounds)


def _measure(
    network: str, model: nn.Module, data: tuple[Tensor, Tensor], kind: type[AbstractDataOperator], rounds: int
) -> Iterator[dict[str, Any]]:
    operator = kind(model, nn.CrossEntropyLoss(), data)
    held = operator.linearized()
    column, columns = torch.randn(operator.shape[0]), torch.randn(operator.shape[0], COLUMNS)
    functions: dict[str, Callable[[], Tensor]] = {
        "gradient": operator.gradient,
        "product": lambda: operator @ column,
        "held graph": lambda: held @ column,
        f"{COLUMNS} columns": lambda: operator @ columns,
    }
    peer = _make_peer(model, data, kind)
    if peer is not None:
        functions["curvlinops"] = lambda: _run_peer(peer, column)
        functions[f"curvlinops, {COLUMNS} columns"] = lambda: _run_peer(peer, columns)
    timings = time_interleaved(functions, reference="gradient", rounds=rounds, label=f"{kind.__name__} {network}")
    ratios = _compare_with_peer(functions, rounds, f"{kind.__name__} {network}") if peer is not None else {}
    truth = kind(model.double(), nn.CrossEntropyLoss(), (data[0].double(), data[1])) @ column.double()
    model.float()
    for name, timing in timings.items():
        count = COLUMNS if "columns" in name else 1
        result = None if name == "gradient" or count > 1 else functions[name]()
        yield {
            "benchmark": "curvature",
            "network": network,
            "matrix": kind.__name__,
            "method": name,
            "milliseconds_each": 1e3 * timing.seconds / count,
            "multiple_of_gradient": timing.ratio / count,
            "spread": timing.spread / count,
            "multiple_of_peer": ratios.get(name),
            "error": None if result is None else float((result - truth).abs().max() / truth.abs().max()),
            "peer": _describe_peer(),
            "target_multiple_of_peer": TARGET if name == "product" else None,
        }


def _compare_with_peer(functions: dict[str, Callable[[], Tensor]], rounds: int, label: str) -> dict[str, float]:
    ratios = {}
    for ours, theirs in (("product", "curvlinops"), (f"{COLUMNS} columns", f"curvlinops, {COLUMNS} columns")):
        pair = {name: functions[name] for name in (ours, theirs)}
        timings = time_interleaved(pair, reference=theirs, rounds=rounds, label=f"{label} against curvlinops")
        ratios[ours] = timings[ours].ratio
    return ratios


def _make_peer(model: nn.Module, data: tuple[Tensor, Tensor], kind: type[AbstractDataOperator]) -> Any:
    if importlib.util.find_spec("curvlinops") is None:
        return None
    import curvlinops  # pyright: ignore[reportMissingImports]

    theirs = curvlinops.HessianLinearOperator if kind is Hessian else curvlinops.GGNLinearOperator
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return theirs(model, nn.CrossEntropyLoss(), parameters, [data], check_deterministic=False)


def _run_peer(peer: Any, operand: Tensor) -> Tensor:
    # Without these it refuses attention; ours sets them itself.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return peer @ operand
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _describe_peer() -> str:
    try:
        return f"curvlinops {importlib.metadata.version('curvlinops-for-pytorch')}"
    except importlib.metadata.PackageNotFoundError:
        return "curvlinops is not installed"

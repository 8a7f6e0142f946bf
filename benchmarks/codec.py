"""Time of storing and rebuilding, per entry: stochastic rounding of a matrix, and activations against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.interleaved import Timing, time_interleaved
from cheapgrad.ops.activations import Activation, sketched_activation
from cheapgrad.sketch import DenseMatrix, Moment, Operands, StochasticRounding

SHAPE = (1024, 1536)


def measure_codecs(*, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one record per codec and direction, against a copy, and one per activation and storage, against torch."""
    functions: dict[str, Callable[[], object]] = {"copy": torch.randn(SHAPE).clone}
    for bits in (2, 4, 8):
        functions |= _codec_functions(StochasticRounding(bits))
    for method, timing in time_interleaved(functions, reference="copy", rounds=rounds, label="codec").items():
        yield _record(method, timing)
    for name in ("gelu", "silu", "tanh", "relu"):
        yield from _measure_activation(Activation(name), rounds)


def _codec_functions(codec: StochasticRounding) -> dict[str, Callable[[], object]]:
    operands = Operands(Moment.STORED, DenseMatrix(torch.randn(SHAPE)))
    kept = codec.store(operands)

    def encode() -> object:
        return codec.store(operands)

    def decode() -> object:
        return codec.restore(kept, *SHAPE, torch.float32).dense()

    return {f"encode {codec.bits}": encode, f"decode {codec.bits}": decode}


def _measure_activation(activation: Activation, rounds: int) -> Iterator[dict[str, Any]]:
    x, grad = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)

    def step(bits: int | None) -> None:
        y = activation.forward(x) if bits is None else sketched_activation(x, activation, StochasticRounding(bits))
        torch.autograd.grad(y, x, grad)

    functions = {"torch": lambda: step(None), "4 bits": lambda: step(4), "8 bits": lambda: step(8)}
    timings = time_interleaved(functions, reference="torch", rounds=rounds, label=activation.name)
    for method, timing in timings.items():
        yield _record(f"{activation.name}, {method}", timing)


def _record(method: str, timing: Timing) -> dict[str, Any]:
    nanoseconds = timing.seconds / (SHAPE[0] * SHAPE[1]) * 1e9
    record = {"benchmark": "codec", "method": method, "nanoseconds_per_entry": nanoseconds}
    return record | {"share_of_reference": timing.ratio, "spread": timing.spread}

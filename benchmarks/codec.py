"""Time of storing and rebuilding, per entry: stochastic rounding, activations, norms and masks against PyTorch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.interleaved import Timing, time_interleaved
from cheapgrad import Rule, approximate
from cheapgrad.ops.activation import Activation
from cheapgrad.ops.activations import sketched_activation
from cheapgrad.sketch import DenseMatrix, Moment, Operands, StochasticRounding

SHAPE = (1024, 1536)
IMAGES = (32, 64, 32, 32)


def measure_codecs(*, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one record per codec and direction, against a copy, and one per activation and storage, against torch."""
    functions: dict[str, Callable[[], object]] = {"copy": torch.randn(SHAPE).clone}
    for bits in (2, 4, 8):
        functions |= _codec_functions(StochasticRounding(bits))
    for method, timing in time_interleaved(functions, reference="copy", rounds=rounds, label="codec").items():
        yield _record(method, timing)
    for name in ("gelu", "silu", "tanh", "relu"):
        yield from _measure_activation(Activation(name), rounds)
    rows, images = torch.randn(SHAPE), torch.randn(IMAGES)
    norms: list[tuple[nn.Module, Tensor]] = [(nn.BatchNorm2d(IMAGES[1]), images), (nn.GroupNorm(8, IMAGES[1]), images)]
    norms += [(nn.LayerNorm(SHAPE[1]), rows), (nn.RMSNorm(SHAPE[1]), rows), (nn.PReLU(), rows)]
    for module, x in [*norms, (nn.Dropout(0.1), rows), (nn.MaxPool2d(2), images), (nn.MaxPool2d(3, 2, 1), images)]:
        yield from _measure_module(module, x, rounds)


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

    def step(codec: StochasticRounding | None) -> None:
        y = activation.forward(x) if codec is None else sketched_activation(x, activation, codec)
        torch.autograd.grad(y, x, grad)

    codecs = {
        f"{bits} bits{', fused' * fused}": StochasticRounding(bits, fused=fused)
        for fused in (False, True)
        for bits in (4, 8)
    }
    functions: dict[str, Callable[[], object]] = {"torch": functools.partial(step, None)}
    functions |= {name: functools.partial(step, codec) for name, codec in codecs.items()}
    timings = time_interleaved(functions, reference="torch", rounds=rounds, label=activation.name)
    for method, timing in timings.items():
        yield _record(f"{activation.name}, {method}", timing)


def _measure_module(module: nn.Module, x: Tensor, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield records of forward and backward by PyTorch and with codes of four bits (or masks and offsets)."""
    converted = copy.deepcopy(module)
    approximate(converted, Rule(stored=StochasticRounding(4)))
    leaf, grad = x.requires_grad_(), torch.randn_like(module(x))

    def step(layer: nn.Module) -> None:
        torch.autograd.grad(layer(leaf), [leaf, *layer.parameters()], grad)

    functions = {"torch": lambda: step(module), "4 bits": lambda: step(converted)}
    timings = time_interleaved(functions, reference="torch", rounds=rounds, label=type(module).__name__)
    for method, timing in timings.items():
        yield _record(f"{module}, {method}", timing, x.numel())


def _record(method: str, timing: Timing, entries: int = SHAPE[0] * SHAPE[1]) -> dict[str, Any]:
    nanoseconds = timing.seconds / entries * 1e9
    record = {"benchmark": "codec", "method": method, "nanoseconds_per_entry": nanoseconds}
    return record | {"share_of_reference": timing.ratio, "spread": timing.spread}

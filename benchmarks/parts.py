"""Parts of a transformer by themselves: the output layer with its loss, attention, and an embedding's gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import cheapgrad
from benchmarks.interleaved import time_interleaved
from cheapgrad.cost import measure_held_bytes
from cheapgrad.sketch import RowSample

# tokens, features, classes.
LOSSES = ((1024, 384, 8192), (1024, 768, 32000))
# examples, tokens; six heads of 64.
ATTENTIONS = ((16, 64), (2, 512), (1, 2048))
HEADS, HEAD_WIDTH = 6, 64
# entries of the table, features, tokens.
EMBEDDING = (8192, 384, 1024)


def measure_parts(*, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one record per part and method, forward and backward."""
    for tokens, features, classes in LOSSES:
        yield from _measure_losses(tokens, features, classes, rounds)
    for examples, tokens in ATTENTIONS:
        yield from _measure_attention(examples, tokens, rounds)
    yield from _measure_embedding(rounds)


def _measure_losses(tokens: int, features: int, classes: int, rounds: int) -> Iterator[dict[str, Any]]:
    x = torch.randn(tokens, features, requires_grad=True)
    weight = (torch.randn(classes, features) / features**0.5).requires_grad_()
    labels = torch.randint(0, classes, (tokens,))
    losses: dict[str, Callable[[], Tensor]] = {
        "cross_entropy(linear(x, W))": lambda: functional.cross_entropy(functional.linear(x, weight), labels),
        "torch's linear_cross_entropy": lambda: functional.linear_cross_entropy(x, weight, labels),
        "ours": lambda: cheapgrad.linear_cross_entropy(x, weight, labels),
        "ours, recompute=True": lambda: cheapgrad.linear_cross_entropy(x, weight, labels, recompute=True),
        "ours, keep=0.5": lambda: cheapgrad.linear_cross_entropy(x, weight, labels, keep=0.5),
    }
    functions = {name: _step(loss, [x, weight]) for name, loss in losses.items()}
    label = f"loss, {tokens} x {features}, {classes} classes"
    timings = time_interleaved(functions, reference=next(iter(functions)), rounds=rounds, label=label)
    for name, timing in timings.items():
        held = measure_held_bytes(losses[name], exclude=[x, weight, labels]).total_bytes
        yield _record(label, name, timing.seconds, timing.ratio) | {"held_bytes": held}


def _measure_attention(examples: int, tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    parts = [torch.randn(examples, HEADS, tokens, HEAD_WIDTH, requires_grad=True) for _ in range(3)]
    query, key, value = parts

    def attend(value: Tensor) -> Tensor:
        return (query @ key.mT / HEAD_WIDTH**0.5).softmax(-1) @ value

    functions = {
        "fused": _step(lambda: functional.scaled_dot_product_attention(query, key, value).sum(), parts),
        "step by step": _step(lambda: attend(value).sum(), parts),
        "step by step, no gradient of the values": _step(lambda: attend(value.detach()).sum(), parts[:2]),
    }
    label = f"attention, {examples} x {tokens}"
    for name, timing in time_interleaved(functions, reference="fused", rounds=rounds, label=label).items():
        yield _record(label, name, timing.seconds, timing.ratio)


def _measure_embedding(rounds: int) -> Iterator[dict[str, Any]]:
    entries, features, tokens = EMBEDDING
    exact, numbers = nn.Embedding(entries, features), torch.randint(0, entries, (tokens,))
    cotangent = torch.randn(tokens, features)
    sampled = copy.deepcopy(exact)
    cheapgrad.approximate(sampled, cheapgrad.Rule(cotangent=RowSample(0.5)), skip_small=False)
    functions = {
        "exact": _step(lambda: (exact(numbers) * cotangent).sum(), [exact.weight]),
        "half of the tokens": _step(lambda: (sampled(numbers) * cotangent).sum(), [sampled.weight]),
    }
    label = f"embedding, {entries} x {features}, {tokens} tokens"
    for name, timing in time_interleaved(functions, reference="exact", rounds=rounds, label=label).items():
        yield _record(label, name, timing.seconds, timing.ratio)


def _step(loss: Callable[[], Tensor], tensors: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(), tensors)


def _record(part: str, method: str, seconds: float, ratio: float) -> dict[str, Any]:
    return {"benchmark": "parts", "part": part, "method": method, "seconds": seconds, "relative_cost": ratio}

"""Multiply-adds of layers, counted one by one or by the textbook's formula; two FLOPs each."""

from __future__ import annotations

import itertools


def convolution_flops(batch, inputs, outputs, groups, kernel, output_sizes):
    """FLOPs of one pass: every output pixel of every channel meets every weight of its group."""
    count = 0
    for _ in itertools.product(range(batch), range(outputs), *map(range, output_sizes)):
        for _ in itertools.product(range(inputs // groups), *map(range, kernel)):
            count += 2
    return count


def transposed_convolution_flops(batch, inputs, outputs, groups, kernel, input_sizes):
    """FLOPs of one pass: every input pixel of every channel is spread by every weight of its group."""
    count = 0
    for _ in itertools.product(range(batch), range(inputs), *map(range, input_sizes)):
        for _ in itertools.product(range(outputs // groups), *map(range, kernel)):
            count += 2
    return count


def attention_flops(batch, heads, queries, keys, width, value_width):
    """FLOPs of scores and weighted values, and of the five products of a fused backward pass."""
    scores = 2 * batch * heads * queries * keys * width
    values = 2 * batch * heads * queries * keys * value_width
    # Scores again, dQ and dK; dV and the cotangent of the scores.
    return scores + values, 3 * scores + 2 * values


def recurrent_flops(gates, batch, steps, inputs, hidden, *, layers=1, directions=1):
    """FLOPs of the forward pass of an LSTM (four gates) or a GRU (three)."""
    total = 0
    for layer in range(layers):
        width = inputs if layer == 0 else hidden * directions
        total += directions * 2 * batch * steps * gates * hidden * (width + hidden)
    return total

"""Average pooling and padding as dense matrices, written from their definitions with loops."""

from __future__ import annotations

import itertools
import math

import numpy as np


def output_size(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Return how many windows there are: with `ceil_mode` also one that begins inside and ends beyond the padding."""
    room = size + 2 * padding - kernel
    windows = (math.ceil(room / stride) if ceil_mode else room // stride) + 1
    return windows - 1 if ceil_mode and (windows - 1) * stride >= size + padding else windows


def average_pooling(sizes, kernel, stride, padding, ceil_mode, count_include_pad, divisor) -> np.ndarray:
    """Return the matrix ``[outputs, inputs]`` of an average pooling, both flattened."""
    axes = range(len(sizes))
    outputs = [output_size(sizes[a], kernel[a], stride[a], padding[a], ceil_mode) for a in axes]
    matrix = np.zeros((math.prod(outputs), math.prod(sizes)))
    for row, place in enumerate(itertools.product(*map(range, outputs))):
        first = [place[a] * stride[a] - padding[a] for a in axes]
        # A window that reaches beyond the padding is cut there.
        last = [min(first[a] + kernel[a], sizes[a] + padding[a]) for a in axes]
        inside = [range(max(first[a], 0), min(last[a], sizes[a])) for a in axes]
        padded = math.prod(last[a] - first[a] for a in axes)
        count = divisor or (padded if count_include_pad else math.prod(map(len, inside)))
        for cell in itertools.product(*inside):
            matrix[row, np.ravel_multi_index(cell, sizes)] += 1 / count
    return matrix


def adaptive_pooling(sizes, outputs) -> np.ndarray:
    """Return the matrix of an average pooling to o outputs: window i goes from floor(i n/o) to ceil((i + 1) n/o)."""
    matrix = np.zeros((math.prod(outputs), math.prod(sizes)))
    for row, place in enumerate(itertools.product(*map(range, outputs))):
        inside = [
            range(i * size // output, -(-(i + 1) * size // output))
            for i, size, output in zip(place, sizes, outputs, strict=True)
        ]
        for cell in itertools.product(*inside):
            matrix[row, np.ravel_multi_index(cell, sizes)] += 1 / math.prod(map(len, inside))
    return matrix


def padding(sizes, before, after, kind) -> np.ndarray:
    """Return the matrix of a padding by reflection at the border's pixel, or by its replication."""
    outputs = [size + b + a for size, b, a in zip(sizes, before, after, strict=True)]
    matrix = np.zeros((math.prod(outputs), math.prod(sizes)))
    for row, place in enumerate(itertools.product(*map(range, outputs))):
        cell = []
        for i, size, b in zip(place, sizes, before, strict=True):
            source = i - b
            if kind == "replication":
                source = min(max(source, 0), size - 1)
            elif source < 0:
                source = -source
            elif source >= size:
                source = 2 * (size - 1) - source
            cell.append(source)
        matrix[row, np.ravel_multi_index(cell, sizes)] = 1
    return matrix

"""Exact methods made equal to a strategy in time or in bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """How a run is cut.

    Attributes:
        batch_size: examples in a step.
        steps: of the optimizer.
        parts: micro-batches in a step.
    """

    batch_size: int
    steps: int
    parts: int = 1


def match(by: str, usual: Size, *, ratio: float, ladder: Sequence[Sequence[float]], bytes_share: float) -> Size:
    """Return the size at which an exact step, or a whole training, costs what the other method's does.

    Args:
        by: ``"time, batch"``: as many steps, each on a batch whose measured step time is that of the method; ``"time,
            steps"``: fewer steps on the usual batch, which take as long in total; ``"bytes, batch"``: a batch that
            holds as many bytes, as many examples in total; ``"bytes, parts"``: the usual batch in micro-batches that
            hold as many bytes; ``"bytes, larger batch"``: the method on a batch that holds what the exact method does
            on the usual one, as many examples in total; ``"steps, 0.7"``: that share of the steps; ``"batch, 0.5"``:
            that share of the batch, in as many steps.
        usual: the size of the exact run.
        ratio: measured step time of the method, divided by that of the exact step.
        ladder: pairs of batch size and measured step time of exact steps, divided by that of the usual one.
        bytes_share: bytes held by the method, divided by those of the exact step.

    >>> match("time, batch", Size(64, 100), ratio=0.5, ladder=[(16, 0.25), (64, 1.0)], bytes_share=0.2)
    Size(batch_size=32, steps=100, parts=1)
    >>> match("steps, 0.7", Size(64, 100), ratio=1.0, ladder=[], bytes_share=1.0)
    Size(batch_size=64, steps=70, parts=1)
    >>> match("bytes, batch", Size(64, 100), ratio=0.5, ladder=[], bytes_share=0.25)
    Size(batch_size=16, steps=400, parts=1)
    """
    size, steps = usual.batch_size, usual.steps
    if by == "time, batch":
        return Size(min(find_batch_size(ratio, ladder), size), steps)
    if by == "time, steps":
        return Size(size, min(steps, max(1, round(steps * ratio))))
    if by.startswith("steps, "):
        return Size(size, max(1, round(steps * float(by.removeprefix("steps, ")))))
    if by.startswith("batch, "):
        return Size(max(2, round(size * float(by.removeprefix("batch, ")))), steps)
    if by == "bytes, parts":
        return Size(size, steps, parts=min(size, max(1, round(1 / bytes_share))))
    share = bytes_share if by == "bytes, batch" else 1 / bytes_share
    batch_size = max(2, round(size * share))
    return Size(batch_size, max(1, round(steps * size / batch_size)))


def find_batch_size(ratio: float, ladder: Sequence[Sequence[float]]) -> int:
    """Return the batch size whose step takes that long, by interpolation; the ends of the ladder bound it.

    Args:
        ratio: of step times.
        ladder: pairs of batch size and ratio, at least 2, the usual batch last; noise may leave them out of order.

    >>> find_batch_size(1.0, [(32, 0.6), (64, 1.2)]), find_batch_size(0.75, [(32, 0.6), (64, 1.2)])
    (64, 48)
    """
    points = _normalise(ladder)
    if ratio >= 1:
        return points[-1][0]
    # A larger batch takes no less time: what measured so is noise.
    highest = 0.0
    rising = []
    for size, value in points:
        highest = max(highest, value)
        rising.append((size, highest))
    if ratio <= rising[0][1]:
        return rising[0][0]
    for (size, value), (next_size, next_value) in itertools.pairwise(rising):
        if ratio <= next_value:
            share = (ratio - value) / (next_value - value) if next_value > value else 0.0
            return max(1, round(size + share * (next_size - size)))
    return rising[-1][0]


def _normalise(ladder: Sequence[Sequence[float]]) -> list[tuple[int, float]]:
    """Return the ladder in units of its own last step: the exact step, timed twice, differs from itself by noise."""
    points = sorted((int(size), value) for size, value in ladder)
    return [(size, value / points[-1][1]) for size, value in points]


def find_time(batch_size: int, ladder: Sequence[Sequence[float]]) -> float | None:
    """Return the time of an exact step on that many examples, divided by that on the usual batch; None off the ladder.

    >>> find_time(24, [(16, 0.25), (32, 0.5), (64, 1.0)])
    0.375
    """
    points = _normalise(ladder)
    for (size, value), (next_size, next_value) in itertools.pairwise(points):
        if size <= batch_size <= next_size:
            return value + (next_value - value) * (batch_size - size) / (next_size - size)
    return None

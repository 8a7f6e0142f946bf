"""Who receives the gradient where several entries are the largest."""

from __future__ import annotations

import enum


class Ties(enum.Enum):
    """Who receives the cotangent of a maximum that several entries attain.

    All three are elements of the convex hull of the limiting gradients of the maximum itself; `FIRST` is what torch
    does in max-pooling, `EVEN` has the smallest norm and is what torch does in `amax` and in `max` without a dimension.

    >>> Ties.EVEN.value
    'even'
    """

    FIRST = "first"
    LAST = "last"
    EVEN = "even"

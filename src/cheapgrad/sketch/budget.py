"""From a share to a number of atoms, stated once."""

from __future__ import annotations


def count_kept(keep: float, size: int) -> int:
    """Return how many of `size` atoms a share `keep` in (0, 1] keeps: the nearest whole number, at least one.

    >>> count_kept(0.25, 2048), count_kept(0.1, 3)
    (512, 1)
    """
    return min(int(size), max(1, int(keep * size + 0.5)))

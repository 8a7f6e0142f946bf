"""Memory that stays with the process, so that fetching it again is in nobody's time."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory, and return whether it does.

    By default it hands pages back to the kernel after some calls and not after others, and the next call pays for
    fetching them: up to half of a short backward pass, whichever method comes next. A training process reaches the same
    state by itself once its heap has grown. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    kept = mallopt(_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return bool(kept)

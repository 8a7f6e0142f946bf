"""How far a step raises the memory of the process that runs it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

# What the kernel says of this process, and where it forgets the peak so far; on Linux.
_STATUS = Path("/proc/self/status")
_FORGET = Path("/proc/self/clear_refs")
_PEAK = "5"


def measure_process_peak(step: Callable[[], object]) -> int:
    """Return by how many bytes a step raises the peak of this process.

    The step runs twice before: what libraries and compilers allocate once, and running estimates, are there then. Freed
    memory is handed back to the kernel first, where the C library can. Elsewhere than on Linux the peak so far is what
    the step is compared with, so that less is found than it takes.

    Args:
        step: a training step; it clears the gradients of the step before.
    """
    for _ in range(2):
        step()
    gc.collect()
    _hand_back()
    before = _forget_peak()
    step()
    return _peak_so_far() - before


def _hand_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_peak() -> int:
    """Let the peak be what the process has now, where that can be done, and return the peak."""
    if _FORGET.exists():
        _FORGET.write_text(_PEAK)
    return _peak_so_far()


def _peak_so_far() -> int:
    """Return the most memory this process has had at once, in bytes."""
    if _STATUS.exists():
        # Not from getrusage, whose peak a process inherits from the one that started it.
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

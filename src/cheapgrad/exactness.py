"""Exact mode for a whole block of code, whatever models run in it.

`handle.exact()` switches one converted model. Code that must differentiate a model it knows nothing about, such as a
curvature product, opens `forced_exact` instead: every sketched layer that runs inside takes its stock path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class _Depth:
    """How many `forced_exact` contexts are open.

    One number for the process, not one per thread: a checkpoint runs forward again in the threads of autograd, which
    must find what the thread that asked for the derivative has said.
    """

    def __init__(self) -> None:
        self.open_contexts = 0
        self.open_in_step = 0


DEPTH = _Depth()


@contextlib.contextmanager
def forced_exact(*, in_step: bool = False) -> Iterator[None]:
    """Run the stock code of every converted layer of every model inside the context.

    Hold it open for the backward pass too: a checkpointed layer runs its forward again there.

    Args:
        in_step: take from the default generator the seeds that sketched layers would take, so that after the same
            `torch.manual_seed` the dropout behind them has the same mask as in a step that is not exact.

    Example:
        >>> with forced_exact():
        ...     is_forced_exact()
        True
        >>> is_forced_exact()
        False
    """
    DEPTH.open_contexts += 1
    DEPTH.open_in_step += in_step
    try:
        yield
    finally:
        DEPTH.open_contexts -= 1
        DEPTH.open_in_step -= in_step


def is_forced_exact() -> bool:
    """Tell whether a `forced_exact` context is open."""
    return DEPTH.open_contexts > 0


def is_in_step() -> bool:
    """Tell whether exact layers should take the seeds that sketched ones would take."""
    return DEPTH.open_in_step > 0

"""A bar on the terminal while gradients are drawn."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def show_progress(draws: int, wanted: bool | None) -> Iterator[Callable[[], None]]:
    """Yield what is to be called after every draw.

    Args:
        draws: how many are planned; more make the bar longer.
        wanted: None shows the bar where standard error is a terminal.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True, force_terminal=wanted), transient=True) as bar:
        task = bar.add_task("drawing gradients", total=draws)

        def advance() -> None:
            bar.advance(task)
            done = bar.tasks[0]
            if done.completed > (done.total or 0):
                bar.update(task, total=2 * draws, description="confirming an alarm")

        yield advance

"""Processes that share out independent pieces of work, each on one thread.

Layers as small as the demo's gain little from a second thread, and two threads that wait for each other suffer badly on
a machine that has other work to do. Two processes of one thread each do not.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Workers:
    """Where tasks are run: in processes of their own, or here if there is but one worker.

    Args:
        pool: the processes, or None to run tasks here.
    """

    def __init__(self, pool: ProcessPoolExecutor | None) -> None:
        self._pool = pool

    def run(self, tasks: Sequence[Callable[[], Result]], on_done: Callable[[], object]) -> list[Result]:
        """Run all tasks and return their results in the order of the tasks.

        Args:
            tasks: functions of no arguments that can be pickled; each seeds its own randomness.
            on_done: called after each task.
        """
        if self._pool is None:
            return [_run_here(task, on_done) for task in tasks]
        futures = [self._pool.submit(task) for task in tasks]
        for future in futures:
            future.add_done_callback(lambda _: on_done())
        return [future.result() for future in futures]


@contextlib.contextmanager
def open_workers(count: int) -> Iterator[Workers]:
    """Give that many workers and end them with the context: at once, in the middle of their work, if it is an error."""
    if count == 1:
        yield Workers(None)
        return
    # Never fork: a copy of a process that has used threads can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_prepare_worker)
    others = multiprocessing.active_children()
    try:
        yield Workers(pool)
    except BaseException:
        for child in multiprocessing.active_children():
            if child not in others:
                child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    # An interruption from the keyboard reaches all processes; the first one ends the others in good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_here(task: Callable[[], Any], on_done: Callable[[], object]) -> Any:
    result = task()
    on_done()
    return result

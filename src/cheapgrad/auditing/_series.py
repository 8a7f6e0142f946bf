"""The draws of an audit, one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from cheapgrad.auditing._errors_drawn import ErrorCollector
from cheapgrad.auditing._step import Step

# Losses of a step and of its exact twin that differ by less than this fraction of what the losses differ by from seed
# to seed come from the same random numbers; lower precision moves them by less.
_SHARED = 0.1


class Series:
    """Draws gradients and hands their errors to a collector.

    Args:
        step: what is drawn.
        batch: of every draw.
        collector: takes in the errors.
        seed_of: a seed for each text.
        draws_noise: whether the model draws, so that every draw needs an exact gradient of its own.
    """

    def __init__(
        self, step: Step, batch: Any, collector: ErrorCollector, seed_of: Callable[[str], int], draws_noise: bool
    ) -> None:
        self._step, self._batch, self._collector = step, batch, collector
        self._seed_of, self._draws_noise = seed_of, draws_noise
        self._done = 0
        self._losses: list[tuple[float | None, float | None]] = []

    def draw(self, draws: int, advance: Callable[[], None]) -> None:
        """Draw that many gradients more."""
        for _ in range(draws):
            self._done += 1
            where = f"draw {self._done}"
            seed = self._seed_of(where)
            exact = self._step.draw_exact(self._batch, seed) if self._draws_noise else None
            drawn = self._step.draw(self._batch, seed)
            self._collector.add(drawn.tensors, where, None if exact is None else exact.tensors)
            if exact is not None:
                self._losses.append((drawn.loss, exact.loss))
            advance()

    def forward_noise(self) -> str:
        """Return ``"none"``, ``"shared"`` or ``"not shared"``: what the model itself draws."""
        if not self._draws_noise:
            return "none"
        pairs = [(drawn, exact) for drawn, exact in self._losses if drawn is not None and exact is not None]
        if not pairs:
            return "not shared"
        spread = statistics.pstdev(exact for _, exact in pairs)
        apart = statistics.pstdev(drawn - exact for drawn, exact in pairs)
        return "shared" if apart <= _SHARED * spread else "not shared"

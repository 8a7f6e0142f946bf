"""Measurements on a controlled model that its controller does not see: they are no steps of the training."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import cheapgrad
from cheapgrad.planning.controller_trial import Look, Trial, TrialDesign


@contextlib.contextmanager
def at_usual_keeps(handle: cheapgrad.Handle, controller: cheapgrad.Controller) -> Iterator[None]:
    """Draw at the controller's keep fractions and outside of trials inside the context; then go on as before.

    Args:
        handle: of the model.
        controller: of the handle.
    """
    in_force = {name: handle.strategies()[name] for name in controller.keeps}
    plain = {name: _leave_trial(in_force[name], keep=keep) for name, keep in controller.keeps.items()}
    handle.replace_strategies(plain)
    try:
        yield
    finally:
        handle.replace_strategies(in_force)


def give_own_trial(strategies: Mapping[str, Any], examples: int, seed: int) -> dict[str, Any]:
    """Return the strategies in force, budgets and halves included, with a trial that no controller reads.

    Args:
        strategies: of a controlled handle.
        examples: in a batch.
        seed: of the coins.
    """
    trial = Trial(seed, lambda: examples)
    return {name: _move_trial(value, trial) for name, value in strategies.items()}


def _move_trial(strategy: Any, trial: Trial) -> Any:
    design = strategy.design
    if isinstance(design, TrialDesign) and design.trial.look is Look.HALVES:
        return dataclasses.replace(strategy, design=dataclasses.replace(design, trial=trial))
    return _leave_trial(strategy)


def _leave_trial(strategy: Any, **changes: Any) -> Any:
    design = strategy.design
    return dataclasses.replace(strategy, design=design.base if isinstance(design, TrialDesign) else design, **changes)

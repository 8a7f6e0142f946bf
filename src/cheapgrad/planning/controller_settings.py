"""What a controller was told: part of its state, since the next steps depend on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cheapgrad.errors import ControlError
from cheapgrad.planning.controller_law import NoiseSchedule


def describe_settings(
    noise: float | NoiseSchedule, every: int, least_keep: float, seed: int, has_optimizer: bool
) -> dict[str, Any]:
    """Return the arguments of a controller as plain data."""
    target = dataclasses.asdict(noise) if isinstance(noise, NoiseSchedule) else noise
    return {"noise": target, "every": every, "least_keep": least_keep, "seed": seed, "has_optimizer": has_optimizer}


def check_settings(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise `ControlError` if a state was saved with other arguments; name both values of each.

    Args:
        saved: the state's.
        present: this controller's.
    """
    differing = [name for name, value in present.items() if name not in saved or saved[name] != value]
    if differing:
        was = ", ".join(f"{name}={saved.get(name)!r}" for name in differing)
        now = ", ".join(f"{name}={present[name]!r}" for name in differing)
        raise ControlError(
            f"the state is of a controller with {was}, but this one has {now}; make it with the arguments that it was "
            "saved with, or start without the state"
        )


def check_keeps(saved: Mapping[str, float], present: Mapping[str, float]) -> None:
    """Raise `ControlError` if a state is of a model that was converted otherwise.

    Args:
        saved: keep fractions of the layers, as converted, in the state.
        present: those of this controller's handle.
    """
    if saved != present:
        raise ControlError(
            f"the state is of keep fractions {_few(saved)} as converted, but this handle's are {_few(present)}; "
            "convert the model by the rules it was trained with"
        )


def _few(keeps: Mapping[str, float]) -> str:
    listed = [f"{layer!r}: {keep:.3g}" for layer, keep in list(keeps.items())[:4]]
    return "{" + ", ".join(listed) + (", ..." if len(keeps) > 4 else "") + "}"

"""Activations by name: values, slopes and branches, bit for bit PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cheapgrad.errors import UnknownNameError, nearest_match
from cheapgrad.ops._activation_table import PIECEWISE_LINEAR, SMOOTH, PiecewiseLinear, Smooth
from cheapgrad.sketch.fixed_range import FixedRange, Grid


@dataclass(frozen=True)
class Activation:
    """An element-wise function ``y = f(x)``, by name.

    Args:
        name: one of `activation_names()`.
        options: further arguments as pairs, such as ``(("approximate", "tanh"),)``; those left out have PyTorch's
            defaults.

    Raises:
        UnknownNameError: if the name, or an option, is not known.

    >>> Activation("leaky_relu").slope_kind
    'piecewise linear'
    >>> float(Activation("gelu").derivative(torch.zeros(1), torch.zeros(1)))
    0.5
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_options(cls, numbers: Sequence[float], name: str, options: Sequence[tuple[str, Any]]) -> Activation:
        """Return the activation that `numbers` and `texts` describe."""
        left = iter(numbers)
        return cls(name, tuple((option, next(left) if value is None else value) for option, value in options))

    def texts(self) -> tuple[Any, ...]:
        """Return name and options as plain data, with None for every number."""
        return self.name, tuple((option, value if isinstance(value, str) else None) for option, value in self.options)

    def numbers(self) -> tuple[float, ...]:
        """Return the options that are numbers, which compiled graphs may hold as symbols."""
        return tuple(value for _, value in self.options if not isinstance(value, str))

    def __post_init__(self) -> None:
        names = activation_names()
        if self.name not in names:
            raise UnknownNameError(
                f"unknown activation {self.name!r}{nearest_match(self.name, names)} (known: {', '.join(names)})"
            )
        defaults = self._entry.defaults or {}
        for option, _ in self.options:
            if option not in defaults:
                raise UnknownNameError(
                    f"{self.name} has no option {option!r}{nearest_match(option, defaults)} "
                    f"(options: {', '.join(defaults) or 'none'})"
                )

    @property
    def _entry(self) -> Smooth | PiecewiseLinear:
        return SMOOTH[self.name] if self.name in SMOOTH else PIECEWISE_LINEAR[self.name]

    @property
    def _arguments(self) -> dict[str, Any]:
        return {**(self._entry.defaults or {}), **dict(self.options)}

    @property
    def slope_kind(self) -> str:
        """``"smooth"`` or ``"piecewise linear"``."""
        return "smooth" if self.name in SMOOTH else "piecewise linear"

    @property
    def reads_output(self) -> bool:
        """Whether the slope is computed from the output instead of the input."""
        return self.name in SMOOTH and SMOOTH[self.name].reads_output

    def stock_tensors(self, device_type: str) -> int:
        """Return how many tensors of the input's size PyTorch holds for its own backward pass.

        Args:
            device_type: where, e.g. ``"cpu"``.
        """
        entry = self._entry
        on_cpu, elsewhere = entry.stock_tensors if isinstance(entry, Smooth) else (1, 1)
        return on_cpu if device_type == "cpu" else elsewhere

    def forward(self, x: Tensor) -> Tensor:
        """Return ``f(x)``, bit for bit as PyTorch does."""
        return self._entry.forward(x, self._arguments)

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``f'(x)``, bit for bit what PyTorch's backward pass multiplies a cotangent by.

        Args:
            x: the input.
            y: the output.
        """
        return self.backward(_ones_like(x), x, y)

    def backward(self, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return ``grad * f'(x)`` by PyTorch's own kernel."""
        entry = self._entry
        if isinstance(entry, Smooth):
            return entry.backward(grad, y if entry.reads_output else x, self._arguments)
        return entry.backward(grad, self.branch(x), self._arguments)

    def branch(self, x: Tensor) -> Tensor:
        """Return 1.0 or 0.0 per entry: which of its two slopes a piecewise linear activation has there."""
        return PIECEWISE_LINEAR[self.name].branch(_ones_like(x), x, self._arguments)

    def pull_back_branch(self, grad: Tensor, branch: Tensor) -> Tensor:
        """Return ``grad * f'(x)`` given what `branch` returned."""
        return PIECEWISE_LINEAR[self.name].backward(grad, branch, self._arguments)

    def codec(self, bits: int) -> FixedRange:
        """Return the codec for the slope of a smooth activation."""
        return FixedRange(Grid.covering(*SMOOTH[self.name].interval(self._arguments), bits))


def activation_names() -> tuple[str, ...]:
    """Return the names of all activations that are covered.

    >>> "gelu" in activation_names()
    True
    """
    return tuple(sorted({**SMOOTH, **PIECEWISE_LINEAR}))


def _ones_like(x: Tensor) -> Tensor:
    return torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape)

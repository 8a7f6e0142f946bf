"""Immutable values that print short and serialise to plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from cheapgrad.errors import UnknownNameError, nearest_match

_REGISTRY: dict[str, type[Value]] = {}


class Value:
    """Base of strategies, scores, designs and projection kinds, all of them frozen dataclasses."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("Abstract"):
            _REGISTRY[cls.__name__] = cls

    def __repr__(self) -> str:
        """Name the class and the fields that differ from their defaults."""
        parts = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type] - every subclass is a dataclass
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """Return the value as JSON-able data; `from_dict` turns it back.

        >>> from cheapgrad.sketch import RowSample
        >>> RowSample(keep=0.5).to_dict()["type"]
        'RowSample'
        """
        data: dict[str, Any] = {"type": type(self).__name__}
        for field in dataclasses.fields(self):  # type: ignore[arg-type] - every subclass is a dataclass
            value = getattr(self, field.name)
            data[field.name] = value.to_dict() if isinstance(value, Value) else value
        return data


def from_dict(data: dict[str, Any]) -> Any:
    """Return the strategy, score, design or kind that `Value.to_dict` described.

    Raises:
        UnknownNameError: if its type is not known.

    >>> from cheapgrad.sketch import RowSample
    >>> from_dict(RowSample(keep=0.5).to_dict()) == RowSample(keep=0.5)
    True
    """
    name = data.get("type", "")
    if name not in _REGISTRY:
        raise UnknownNameError(
            f"unknown type {name!r}{nearest_match(str(name), _REGISTRY)} (known: {', '.join(sorted(_REGISTRY))})"
        )
    arguments = {
        key: from_dict(value) if isinstance(value, dict) else value for key, value in data.items() if key != "type"
    }
    return _REGISTRY[name](**arguments)

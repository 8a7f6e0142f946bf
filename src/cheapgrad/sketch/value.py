"""Immutable values that print short and serialise to plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from cheapgrad.errors import UnknownNameError, nearest_match


class Value:
    """Base of strategies, scores, designs and projection kinds, all of them frozen dataclasses."""

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
        UnknownNameError: if its type, or one of its fields, is not known.

    >>> from cheapgrad.sketch import RowSample
    >>> from_dict(RowSample(keep=0.5).to_dict()) == RowSample(keep=0.5)
    True
    """
    known = _final_classes(Value)
    name = data.get("type", "")
    if name not in known:
        names = ", ".join(sorted(known))
        raise UnknownNameError(f"unknown type {name!r}{nearest_match(str(name), known)} (known: {names})")
    allowed = [field.name for field in dataclasses.fields(known[name])]  # type: ignore[arg-type] - all are dataclasses
    for key in data:
        if key != "type" and key not in allowed:
            raise UnknownNameError(
                f"{name} has no field {key!r}{nearest_match(key, allowed)} (fields: {', '.join(allowed)})"
            )
    arguments = {
        key: from_dict(value) if isinstance(value, dict) else value for key, value in data.items() if key != "type"
    }
    return known[name](**arguments)


def _final_classes(base: type) -> dict[str, type]:
    """Return the classes that can be built, by name; a shipped one keeps its name whatever a user defines.

    What other rooms of this package make for their own use is not among them: no data describe it.
    """
    classes: dict[str, type] = {}
    for cls in base.__subclasses__():
        is_internal = cls.__module__.startswith("cheapgrad.") and not cls.__module__.startswith("cheapgrad.sketch.")
        is_final = not cls.__name__.startswith("Abstract") and not is_internal
        found = _final_classes(cls) | ({cls.__name__: cls} if is_final else {})
        for name, value in found.items():
            if name not in classes or value.__module__.startswith("cheapgrad."):
                classes[name] = value
    return classes

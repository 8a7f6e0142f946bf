"""Do the fields of a record hold what their annotations say? Files come from anywhere."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any


def find_misfit(value: Any, annotation: Any, where: str = "") -> str | None:
    """Return what is wrong with a value, or None if it is what its annotation says.

    Args:
        value: a number, text, tuple, mapping, None or dataclass.
        annotation: its type, as dataclasses in this library state them.
        where: name of the value, for the answer.

    Returns:
        A text such as ``"rows[2].calls is 'many', not int"``.

    >>> find_misfit((1, "2"), tuple[int, ...], "seeds")
    "seeds[1] is '2', not int"
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return None
    if origin in {typing.Union, types.UnionType}:
        misfits = [find_misfit(value, argument, where) for argument in arguments]
        return None if None in misfits else misfits[0]
    if dataclasses.is_dataclass(annotation):
        return _find_in_fields(value, annotation, where)
    if origin is tuple:
        return _find_in_tuple(value, arguments, where)
    if isinstance(value, Mapping) and origin in {dict, Mapping}:
        return _find_in_mapping(value, arguments, where)
    expected = origin or annotation
    # A whole number is a number; a truth value is none, though Python thinks so.
    accepted = (int, float) if expected is float else expected
    fits = isinstance(value, accepted) and (expected is bool or not isinstance(value, bool))
    return None if fits else f"{where or 'it'} is {_shorten(value)}, not {getattr(expected, '__name__', expected)}"


def _find_in_fields(value: Any, annotation: Any, where: str) -> str | None:
    if not isinstance(value, annotation):
        return f"{where or 'it'} is {_shorten(value)}, not {annotation.__name__}"
    hints = typing.get_type_hints(annotation, localns={"Mapping": Mapping})
    for field in dataclasses.fields(annotation):
        inner = f"{where}.{field.name}" if where else field.name
        misfit = find_misfit(getattr(value, field.name), hints[field.name], inner)
        if misfit is not None:
            return misfit
    return None


def _find_in_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> str | None:
    if not isinstance(value, tuple):
        return f"{where or 'it'} is {_shorten(value)}, not a list"
    wanted = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(wanted) != len(value):
        return f"{where or 'it'} has {len(value)} entries, not {len(wanted)}"
    for position, (item, argument) in enumerate(zip(value, wanted, strict=True)):
        misfit = find_misfit(item, argument, f"{where}[{position}]")
        if misfit is not None:
            return misfit
    return None


def _find_in_mapping(value: Mapping[Any, Any], arguments: tuple[Any, ...], where: str) -> str | None:
    for key, item in value.items():
        misfit = find_misfit(key, arguments[0], f"a key of {where or 'it'}")
        misfit = find_misfit(item, arguments[1], f"{where}[{key!r}]") if misfit is None else misfit
        if misfit is not None:
            return misfit
    return None


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Records as strict JSON can hold them, and read from data that came from anywhere: every field is checked."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from cheapgrad.errors import RecordError, describe_value

T = TypeVar("T")

_WORDS = {"inf", "-inf", "nan"}


def plain(value: Any) -> Any:
    """Return plain lists, dictionaries and numbers; infinities become ``"inf"``, what is undefined ``"nan"``."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_record(record_type: type[T], data: object, *, kind: str | None = None, version: int = 1) -> T:
    """Return the record that its `to_dict` wrote, also after a journey through JSON.

    Args:
        record_type: a dataclass of numbers, texts, tuples and such dataclasses; whole numbers count something, and are
            at least 0. Numbers that strict JSON cannot hold are texts: ``"inf"``, ``"-inf"``, ``"nan"``.
        data: of the record; what else stands beside its fields is left alone.
        kind: what stands under ``kind`` in it, if anything does.
        version: what stands under ``version`` then.

    Raises:
        RecordError: the data are no mapping, of another kind or a newer version, or a field is missing or is not what
            it should be; the message names it.
    """
    name = kind or record_type.__name__
    if not isinstance(data, Mapping):
        raise RecordError(f"a {name} is read from the dictionary that to_dict returned, but got {describe_value(data)}")
    if kind is not None and data.get("kind", kind) != kind:
        raise RecordError(
            f"the data are of kind {data['kind']!r}, not {kind!r}; read them by the class that wrote them"
        )
    found = data.get("version", version) if kind is not None else version
    if isinstance(found, bool) or found != version:
        raise RecordError(
            f"the data are a {name} of version {found!r}, and this cheapgrad reads version {version}; update it"
        )
    fields = {field.name for field in dataclasses.fields(record_type)}  # type: ignore[arg-type] - T is a dataclass
    return _read_fields(record_type, {key: value for key, value in data.items() if key in fields}, "")


def _read_fields(record_type: type[T], data: object, where: str) -> T:
    if not isinstance(data, Mapping):
        raise RecordError(f"{where} must be a dictionary, but is {describe_value(data)}")
    hints = _hints(record_type)
    missing = [name for name in hints if name not in data]
    strange = [str(name) for name in data if name not in hints]
    if missing or strange:
        what = f"lacks {missing[0]!r}" if missing else f"has {strange[0]!r}, which is none of {', '.join(hints)}"
        raise RecordError(f"{where or f'the {record_type.__name__}'} {what}; write the record again")
    prefix = f"{where}." if where else ""
    return record_type(**{name: _read(hint, data[name], f"{prefix}{name}") for name, hint in hints.items()})


@functools.cache
def _hints(record_type: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(record_type)
    return {field.name: hints[field.name] for field in dataclasses.fields(record_type)}


def _read(hint: Any, value: Any, where: str) -> Any:
    """Return a value as its annotation wants it."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        [inner] = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _read(inner, value, where)
    if dataclasses.is_dataclass(hint):
        return _read_fields(hint, value, where)  # type: ignore[arg-type] - a class, not an instance
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            raise RecordError(f"{where} must be a list, but is {describe_value(value)}")
        return tuple(_read(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            raise RecordError(f"{where} is a whole number of {len(str(value))} digits, which no float can hold")
        return value
    if hint is float and isinstance(value, str) and value in _WORDS:
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecordError(f"{where} must be of type {hint.__name__}, but is {describe_value(value)}")
    if hint is int and int(value) < 0:
        raise RecordError(f"{where} must be at least 0, but is {value}")
    return value

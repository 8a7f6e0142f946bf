"""What Python a compiled graph was made from, in a word.

The compiler keeps graphs on disk, and finds them by what the graph calls and with which texts. It does not see the
Python that runs inside an operator while the graph is traced: with another version of this package, or of a user's
strategy, it would hand out the graph of the old one. So the texts name the code.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from cheapgrad._version import __version__
from cheapgrad.sketch.value import Value

_PACKAGE = Path(__file__).resolve().parents[2]


def name_code(values: Iterable[Value | None]) -> str:
    """Return a word that is another one if the code of this package, or of the values' classes, is.

    Args:
        values: strategies; what they are made of counts too.
    """
    foreign = {name for value in values for name in _modules(value) if not name.startswith("cheapgrad.")}
    return "-".join([hash_files(_PACKAGE), *map(_hash_module, sorted(foreign))])


def _modules(value: object) -> Iterator[str]:
    if isinstance(value, Value):
        yield from (cls.__module__ for cls in type(value).__mro__ if issubclass(cls, Value))
        for field in dataclasses.fields(value):  # type: ignore[arg-type] - every subclass is a dataclass
            yield from _modules(getattr(value, field.name))


@functools.cache
def hash_files(folder: Path) -> str:
    """Return a hash of the Python files of a folder, or the version where there are none to read, as in an archive."""
    found = hashlib.sha256()
    paths = sorted(folder.rglob("*.py"))
    for path in paths:
        found.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16] if paths else __version__


@functools.cache
def _hash_module(name: str) -> str:
    try:
        return hashlib.sha256(inspect.getsource(sys.modules[name]).encode()).hexdigest()[:16]
    except (OSError, TypeError, KeyError):
        # Typed at a prompt: another one for every process.
        return uuid.uuid4().hex[:16]

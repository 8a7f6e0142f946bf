"""What Python a compiled graph was made from, in a word.

The compiler keeps graphs on disk, and finds them by what the graph calls and with which texts. It does not see the
Python that runs inside an operator while the graph is traced: with another version of this package it would hand out
the graph of the old one. So the texts name the code.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

from cheapgrad._version import __version__
from cheapgrad.sketch.value import Value

_PACKAGE = Path(__file__).resolve().parents[2]


def name_code() -> str:
    """Return a word that is another one if the code of this package is."""
    return hash_files(_PACKAGE)


@functools.cache
def hash_files(folder: Path) -> str:
    """Return a hash of the Python files of a folder, or the version where there are none to read, as in an archive."""
    found = hashlib.sha256()
    paths = sorted(folder.rglob("*.py"))
    for path in paths:
        found.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16] if paths else __version__


def is_ours(value: object) -> bool:
    """Tell whether a strategy, and all that it is made of, is of this package, whose code has a name."""
    if not isinstance(value, Value):
        return True
    fields = dataclasses.fields(value)  # type: ignore[arg-type] - every subclass is a dataclass
    return type(value).__module__.startswith("cheapgrad.") and all(
        is_ours(getattr(value, field.name)) for field in fields
    )

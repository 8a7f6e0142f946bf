"""Functions of the user's, named on the command line as PACKAGE.MODULE:FACTORY."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from cheapgrad.errors import FactoryError, describe_value, nearest_match


def import_factory(text: str) -> Callable[[], Any]:
    """Return the function that a text such as ``mypackage.models:make_model`` names.

    Raises:
        FactoryError: if there is none, or importing it fails.
    """
    module_name, separator, name = text.partition(":")
    if not (separator and module_name and name):
        raise FactoryError(f"{text!r} names no factory; write PACKAGE.MODULE:FACTORY, e.g. mypackage.models:make_model")
    if "/" in module_name or "\\" in module_name or module_name.startswith(".") or module_name.endswith(".py"):
        raise FactoryError(
            f"{module_name!r} is the path of a file; name the module as an import does, "
            f"{_guess_module(module_name)}:{name}, and run the command where that import works"
        )
    try:
        with _current_directory_importable():
            module = importlib.import_module(module_name)
    except Exception as error:
        raise FactoryError(f"cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [public for public in vars(module) if not public.startswith("_")]
            raise FactoryError(f"{module_name!r} has no {name!r}{nearest_match(name, names)}")
        found = getattr(found, part)
    if not callable(found):
        raise FactoryError(f"{text!r} is {describe_value(found)}, not a function")
    return found


def _guess_module(path: str) -> str:
    """Return the name under which a file may be imported."""
    parts = path.replace("\\", "/").removesuffix(".py").split("/")
    return ".".join(part for part in parts if part.strip(".")).lstrip(".") or "PACKAGE.MODULE"


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    """Let imports see the current directory, as ``python -m`` does and a console script does not."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove("")


def call_factory(factory: Callable[[], Any], text: str) -> Any:
    """Return what a factory makes.

    Raises:
        FactoryError: if it raises anything; the message names what.
    """
    try:
        with _current_directory_importable():
            return factory()
    except MemoryError:
        raise
    except Exception as error:
        raise FactoryError(f"{text} raised {type(error).__name__}: {error}") from error

"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from cheapgrad.errors import OutputError


def prepare_directory(directory: Path, option: str) -> None:
    """Make the directory if need be, and try to write there: before an hour of work, not after it.

    Args:
        directory: where files are to go.
        option: of the command line that names it, for the error.

    Raises:
        OutputError: it is no directory, or cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to the output directory {str(directory)!r}: {error.strerror or error}; "
            f"name another one with {option}"
        ) from error


def prepare_file(path: Path, option: str) -> None:
    """Make the directory of a file if need be, and try to write there; of links, the directory of their target.

    Args:
        path: what `write_whole` is to write. A pipe or a device is left for then: who tries it has used it.
        option: of the command line that names it, for the error.

    Raises:
        OutputError: it is a directory, or cannot be written.
    """
    try:
        mode = _find_mode(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {str(path)!r}: {error.strerror or error}; name another file with {option}"
        ) from error
    if mode is not None and stat.S_ISDIR(mode):
        raise OutputError(f"cannot write {str(path)!r}: it is a directory; name a file with {option}")
    if mode is None or stat.S_ISREG(mode):
        prepare_directory(Path(os.path.realpath(path)).parent, option)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and give it its own name when it is complete.

    Links are followed and stay. A pipe or a device is no file that could be replaced: it is written to, as shells do.

    Raises:
        OutputError: it cannot be written; then nothing is left behind, and an older file of that name is untouched.
    """
    try:
        mode = _find_mode(path)
        if mode is None or stat.S_ISREG(mode):
            _replace(Path(os.path.realpath(path)), content, mode)
        else:
            path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def _find_mode(path: Path) -> int | None:
    """Return the mode of what is there, behind links; None if nothing is."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _replace(path: Path, content: bytes, mode: int | None) -> None:
    """Write a file that is new, or replaces one of that mode."""
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, _new_mode() if mode is None else stat.S_IMODE(mode))
        os.replace(temporary, path)
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _new_mode() -> int:
    """Return who may read and write a new file: temporary ones are private, this is for all that the user lets."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask

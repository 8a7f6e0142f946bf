"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from cheapgrad.errors import OutputError


def prepare_directory(directory: Path) -> None:
    """Make the directory if need be, and try to write there: before an hour of work, not after it.

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
            "name another one with --out"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and give it its own name when it is complete.

    Raises:
        OutputError: it cannot be written; then nothing is left behind, and an older file of that name is untouched.
    """
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        # Temporary files are private; this one is for everybody that the user lets read their files.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

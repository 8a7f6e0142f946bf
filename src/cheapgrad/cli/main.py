"""The command ``cheapgrad``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cheapgrad._version import __version__
from cheapgrad.cli import (
    audit_command,
    curvature_command,
    demo_command,
    doctor_command,
    report_command,
    scan_command,
)
from cheapgrad.errors import CheapgradError

_ERROR, _INTERRUPTED = 2, 130
# What a shell reports of a program that a closed pipe ends.
_PIPE_CLOSED = 141


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others of the command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"cheapgrad: error: {message}; see '{self.prog} --help'\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; by default those of the process.

    Returns:
        The exit status: 0 if all went well, 1 if a gradient was found to be biased or the environment broken, 2 after
        an error, which is printed on one line, 130 if interrupted, 141 if nobody reads what is printed any more.
    """
    parser = _Parser(
        prog="cheapgrad",
        description="Cheaper derivatives for PyTorch: unbiased random estimates, each with the truth about it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cheapgrad {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo_command.add_parser(commands)
    scan_command.add_parser(commands)
    audit_command.add_parser(commands)
    curvature_command.add_parser(commands)
    report_command.add_parser(commands)
    doctor_command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status = options.run(options)
        # Here rather than when the process ends, where an error can no longer be told.
        sys.stdout.flush()
        return status
    except CheapgradError as error:
        return _fail(str(error))
    except BrokenPipeError:
        _forget_output()
        return _PIPE_CLOSED
    except OSError as error:
        _forget_output()
        return _fail(f"cannot read or write {error.filename or 'the output'}: {error.strerror or error}")
    except MemoryError as error:
        return _fail(f"out of memory{': ' * bool(str(error))}{error}")
    except KeyboardInterrupt:
        print("cheapgrad: interrupted, nothing was written", file=sys.stderr)
        return _INTERRUPTED


def _fail(message: str) -> int:
    """Print a message on one line, and return the exit status."""
    print(f"cheapgrad: error: {' '.join(message.split())}", file=sys.stderr)
    return _ERROR


def _forget_output() -> None:
    """Let what could not be printed go nowhere, so that Python does not try it again when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""The command ``cheapgrad``."""

from __future__ import annotations

import argparse
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

_INTERRUPTED = 130


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
        an error, which is printed on one line, 130 if interrupted.
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
        return options.run(options)
    except CheapgradError as error:
        message = " ".join(str(error).split())
        print(f"cheapgrad: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cheapgrad: interrupted, nothing was written", file=sys.stderr)
        return _INTERRUPTED

"""The command line: parse, call, print."""

from cheapgrad.cli.main import main

__all__ = ["main"]

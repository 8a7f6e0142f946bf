"""``cheapgrad doctor``."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cheapgrad.environment import Finding

_DESCRIPTION = """\
Checks what cheapgrad builds on: Python and torch, companions of torch that were built for another version, numpy,
threads against processors, GPUs, random generators, sketched layers in a checkpoint and under autocast,
torch.compile, and codecs that are to be fused. The exit status is 1 if something is broken."""


def add_parser(commands: Any) -> None:
    """Add the command's options to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="check the environment; exit status 1 if something is broken",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile, which takes longest")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Examine the environment, print what was found, and return 1 if something is broken."""
    from cheapgrad.cli.doctor import examine

    examination = examine(
        compile_too=not options.no_compile, on_finding=(lambda finding: None) if options.json else _print
    )
    if options.json:
        print(json.dumps(examination.to_dict(), indent=2, allow_nan=False))
    else:
        broken = sum(finding.status == "broken" for finding in examination.findings)
        print(f"\n{broken} broken" if broken else "\nnothing is broken")
    return 0 if examination.healthy else 1


def _print(finding: Finding) -> None:
    print(f"{finding.status:8} {finding.name:22} {finding.found}", flush=True)
    if finding.advice:
        print(f"{'':31} -> {finding.advice}", flush=True)

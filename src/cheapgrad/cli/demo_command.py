"""``cheapgrad demo``."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from cheapgrad.reporting import DemoRecord

_DESCRIPTION = """\
Trains a small vision transformer and a perceptron on the digits of scikit-learn: exactly, with checkpointing, with
another batch size of equal step time, and with sketches in the backward pass. Prints tables of accuracy, time, memory,
variance and bias; leaves demo.json, demo.png and report.html. Takes a few minutes on two cores that have nothing else
to do."""

_STRATEGY_HELP = """\
compare this strategy instead of the usual ones, e.g. 'RowSample(keep=0.25)@cotangent', or for both moments
'StochasticRounding(bits=4)@stored + RowSample(keep=0.5)@cotangent'; may be given several times"""

# A table with fewer columns of text than this would break its numbers.
_LEAST_WIDTH = 118
# The draws of a quick run see large biases only.
_QUICK_DRAWS, _QUICK_ROUNDS = 32, 5


def add_parser(commands: Any) -> None:
    """Add the command's options to the parser."""
    parser = commands.add_parser(
        "demo",
        help="train two small networks exactly and cheaply, and compare",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where the files go (default: here)")
    parser.add_argument("--seeds", type=int, metavar="N", help="trainings of every method (default: 3, quick: 1)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that everything works")
    parser.add_argument("--strategy", action="append", default=[], metavar="TEXT", help=_STRATEGY_HELP)
    parser.add_argument("--json", action="store_true", help="print demo.json on standard output, the rest on the other")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo; return 1 if a gradient was found to be biased, else 0."""
    # Imported here, so that `cheapgrad --version` and a mistyped option do not wait for it.
    from rich.console import Console

    from cheapgrad.cli.strategies import parse_strategies
    from cheapgrad.demo import DemoSettings, run_demo

    strategies = parse_strategies(options.strategy)
    command = _write_command(options)
    if options.quick:
        seeds = 1 if options.seeds is None else options.seeds
        settings = DemoSettings(
            seeds=seeds,
            draws=_QUICK_DRAWS,
            rounds=_QUICK_ROUNDS,
            quick=True,
            strategies=strategies,
            command=command,
        )
    else:
        seeds = 3 if options.seeds is None else options.seeds
        settings = DemoSettings(seeds=seeds, strategies=strategies, command=command)
    console = Console(stderr=options.json)
    if console.width < _LEAST_WIDTH:
        console = Console(stderr=options.json, width=_LEAST_WIDTH)
    record = run_demo(options.out, settings, console)
    _print(record, options, console)
    if options.json:
        print(json.dumps(record.to_dict(), indent=2, allow_nan=False))
    return 0 if record.unbiased else 1


def _write_command(options: argparse.Namespace) -> str:
    """Return the command that does the same again; where files go is nobody's business."""
    words = ["cheapgrad", "demo"]
    words += ["--quick"] if options.quick else []
    words += [] if options.seeds is None else ["--seeds", str(options.seeds)]
    for text in options.strategy:
        words += ["--strategy", text]
    return shlex.join(words)


def _print(record: DemoRecord, options: argparse.Namespace, console: Console) -> None:
    from cheapgrad.reporting import print_tables, write_verdict

    console.print()
    print_tables(record, console)
    console.print()
    if options.quick:
        console.print("A quick run: the networks are hardly trained, so its accuracies mean nothing.", style="bold")
    directory = options.out.resolve()
    console.print(f"{directory / 'demo.json'}: every number, with its source", highlight=False, soft_wrap=True)
    console.print(f"{directory / 'demo.png'}: accuracy against time and memory", highlight=False, soft_wrap=True)
    console.print(f"{directory / 'report.html'}: all of it on one page", highlight=False, soft_wrap=True)
    processes = record.environment["workers"]
    console.print(
        f"{record.seconds:.0f} s, {processes} process{'es' * (processes > 1)} of one thread\n", highlight=False
    )
    for sentence in write_verdict(record):
        console.print(f"- {sentence}", highlight=False, markup=False)

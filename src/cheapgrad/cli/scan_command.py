"""``cheapgrad scan``."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from cheapgrad.cli.factories import call_factory, import_factory
from cheapgrad.cli.origin import describe_origin
from cheapgrad.errors import FactoryError, describe_value

_DESCRIPTION = """\
Runs one forward and one backward pass of a model and prints, for every module, the FLOPs of both passes and of
recomputation, and the bytes that it holds for backward; those that hold most come first."""

_FACTORY_HELP = """\
a function without arguments, found in the current directory or in what is installed, that returns the model and its
inputs: (model, inputs) or (model, inputs, loss). The inputs are a tensor, a tuple of positional inputs or a dictionary
of keywords; the loss is a function of the model's output"""

_EXAMPLE = "return e.g. (model, torch.randn(8, 3, 32, 32))"


def add_parser(commands: Any) -> None:
    """Add the command's options to the parser."""
    parser = commands.add_parser(
        "scan",
        help="print what a model computes and holds, module by module",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("factory", metavar="PACKAGE.MODULE:FACTORY", help=_FACTORY_HELP)
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument(
        "--fake", action="store_true", help="without data or memory: the factory runs on the meta device"
    )
    parser.add_argument(
        "--top", type=_read_count, default=20, metavar="N", help="lines of the table (default: 20; 0: all)"
    )
    parser.set_defaults(run=run)


def _read_count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, but got {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Scan what the factory returns, and print the report."""
    # Imported here, so that `cheapgrad --version` and a mistyped option do not wait for it.
    import torch

    from cheapgrad.cost import scan

    factory = import_factory(options.factory)
    with torch.device("meta") if options.fake else contextlib.nullcontext():
        model, args, kwargs, loss = _call_factory(factory, options.factory)
    report = scan(model, *args, loss=loss, fake=options.fake, **kwargs)
    if options.json:
        origin = describe_origin(["scan", options.factory, "--fake" if options.fake else None])
        print(json.dumps({**report.to_dict(), **origin}, indent=2, allow_nan=False))
    else:
        print(report.table(options.top or None))
    return 0


def _call_factory(factory: Callable[[], Any], text: str) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any]:
    """Return the model, its positional inputs, its keywords and the loss or None."""
    made = call_factory(factory, text)
    if not isinstance(made, tuple) or len(made) not in {2, 3}:
        what = describe_value(made)
        raise FactoryError(
            f"{text} must return (model, inputs) or (model, inputs, loss), but returned {what}; {_EXAMPLE}"
        )
    model, inputs, *rest = made
    loss = rest[0] if rest else None
    if isinstance(inputs, Mapping):
        return model, (), dict(inputs), loss
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}, loss

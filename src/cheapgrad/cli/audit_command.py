"""``cheapgrad audit``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cheapgrad.cli.factories import call_factory, import_factory
from cheapgrad.cli.origin import describe_origin
from cheapgrad.errors import FactoryError, describe_value

_DESCRIPTION = """\
Draws the gradient of one batch many times and compares it with the exact one: bias with the band that chance explains
and the bias that would have been seen, added variance, bytes and FLOPs, parameter by parameter. The exit status is 0 if
the gradient is unbiased, 1 if it is biased and 2 after an error, so that it can gate a merge."""

_FACTORY_HELP = """\
a function without arguments, found in the current directory or in what is installed, that returns (model, loss_fn,
batch), where loss_fn(model, batch) is the scalar that training differentiates; or a dictionary with these names and any
other argument of cheapgrad.audit, or with 'accumulate', of cheapgrad.audit_step"""

_EXAMPLE = "return e.g. (model, lambda model, batch: cross_entropy(model(batch[0]), batch[1]), (x, y))"
_NEEDED = ("model", "loss_fn", "batch")
_ALLOWED = (*_NEEDED, "accumulate", "reference", "tolerance", "split", "optimizer")


def add_parser(commands: Any) -> None:
    """Add the command's options to the parser."""
    parser = commands.add_parser(
        "audit",
        help="compare a gradient with the exact one; exit status 1 if it is biased",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("factory", metavar="PACKAGE.MODULE:FACTORY", help=_FACTORY_HELP)
    parser.add_argument("--draws", type=int, default=64, metavar="N", help="gradients to draw (default: 64)")
    parser.add_argument(
        "--alpha", type=float, default=0.01, metavar="A", help="probability of a false alarm, at most (default: 0.01)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="needed where the model itself draws, as dropout does")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the whole report there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Audit what the factory returns, print the report, and return 1 if it is biased."""
    # Imported here, so that `cheapgrad --version` and a mistyped option do not wait for it.
    from cheapgrad.auditing import audit, audit_step
    from cheapgrad.files import prepare_file, write_whole

    if options.json is not None:
        prepare_file(options.json, "--json")
    arguments = _read_arguments(call_factory(import_factory(options.factory), options.factory), options.factory)
    model, loss_fn, batch = (arguments.pop(name) for name in _NEEDED)
    settings = {"draws": options.draws, "alpha": options.alpha, "seed": options.seed}
    if "accumulate" in arguments:
        report = audit_step(model, loss_fn, batch, arguments.pop("accumulate"), **settings, **arguments)
    else:
        report = audit(model, loss_fn, batch, **settings, **arguments)
    if options.json is not None:
        words = ["audit", options.factory, "--draws", options.draws, "--alpha", options.alpha]
        words += [] if options.seed is None else ["--seed", options.seed]
        data = {**report.to_dict(), **describe_origin(words)}
        write_whole(options.json, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())
    print(report)
    return 0 if report.unbiased else 1


def _read_arguments(made: Any, text: str) -> dict[str, Any]:
    """Return the arguments of the audit by name."""
    if isinstance(made, Mapping):
        strange = [name for name in made if name not in _ALLOWED]
        missing = [name for name in _NEEDED if name not in made]
        if strange or missing:
            what = f"with {strange[0]!r}" if strange else f"without {missing[0]!r}"
            raise FactoryError(f"{text} returned a dictionary {what}; it may hold {', '.join(_ALLOWED)}; {_EXAMPLE}")
        return dict(made)
    if isinstance(made, tuple) and len(made) == len(_NEEDED):
        return dict(zip(_NEEDED, made, strict=True))
    what = describe_value(made)
    raise FactoryError(f"{text} must return (model, loss_fn, batch), but returned {what}; {_EXAMPLE}")

"""``cheapgrad curvature``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cheapgrad.cli.factories import call_factory, import_factory
from cheapgrad.errors import CheapgradError, FactoryError, ForwardError, describe_value

if TYPE_CHECKING:
    from cheapgrad.curvature.bias_report import BiasReport

_DESCRIPTION = """\
Takes the leading curvature directions of one batch and measures the curvature along them on another: how much does a
mini-batch over-state its own curvature? Prints a table with confidence intervals; leaves curvature.json and
curvature.png."""

_FACTORY_HELP = """\
a function without arguments, found in the current directory or in what is installed, that returns two operators
(operator_a, operator_b), anything with a shape and @; or a model and its data (model, loss, batches_a, batches_b),
whose Gauss-Newton matrices are then taken. Batches are pairs (inputs, targets) or a list of them; several in batches_b
give intervals"""

_POPULATION_HELP = "examples in the data set, if both batches were drawn from it without replacement and are disjoint"

_EXAMPLE = "return e.g. (model, loss, (x[:64], y[:64]), list(zip(x[64:].split(64), y[64:].split(64))))"


def add_parser(commands: Any) -> None:
    """Add the command's options to the parser."""
    parser = commands.add_parser(
        "curvature",
        help="measure how much a mini-batch over-states its own curvature",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("factory", metavar="PACKAGE.MODULE:FACTORY", help=_FACTORY_HELP)
    parser.add_argument("--count", type=int, default=20, metavar="N", help="leading directions (default: 20)")
    parser.add_argument("--smallest", action="store_true", help="the directions of smallest curvature instead")
    parser.add_argument(
        "--level", type=float, default=0.95, metavar="P", help="of confidence intervals (default: 0.95)"
    )
    parser.add_argument("--population", type=int, metavar="N", help=_POPULATION_HELP)
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where the files go (default: here)")
    parser.add_argument("--json", action="store_true", help="print curvature.json on standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Report the bias of what the factory returns."""
    # Imported here, so that `cheapgrad --version` and a mistyped option do not wait for it.
    from cheapgrad.curvature.bias_report import bias_report, check_drawing
    from cheapgrad.files import prepare_directory, write_whole

    check_drawing()
    prepare_directory(options.out, "--out")
    made = call_factory(import_factory(options.factory), options.factory)
    try:
        operator_a, operator_b = _make_operators(made, options.factory)
        report = bias_report(
            operator_a,
            operator_b,
            options.count,
            level=options.level,
            population_size=options.population,
            largest=not options.smallest,
        )
    except ForwardError as error:
        raise _locate(made, error) from error
    except (CheapgradError, MemoryError):
        raise
    except Exception as error:
        raise FactoryError(f"what {options.factory} returned raised {type(error).__name__}: {error}") from error
    text = json.dumps(report.to_dict(), indent=2, allow_nan=False)
    picture = report.draw()
    write_whole(options.out / "curvature.json", (text + "\n").encode())
    write_whole(options.out / "curvature.png", picture)
    if options.json:
        print(text)
    _print(report, options.out.resolve(), sys.stderr if options.json else sys.stdout)
    return 0


def _print(report: BiasReport, directory: Path, stream: Any) -> None:
    print(f"{report}\n", file=stream)
    print(f"{directory / 'curvature.json'}: every number", file=stream)
    print(f"{directory / 'curvature.png'}: both curvatures and their ratio, index by index", file=stream)


def _make_operators(made: Any, text: str) -> tuple[Any, Any]:
    if isinstance(made, tuple) and len(made) == 2:
        return made
    if isinstance(made, tuple) and len(made) == 4:
        from cheapgrad.curvature import GaussNewton

        model, loss, batches_a, batches_b = made
        return GaussNewton(model, loss, batches_a), GaussNewton(model, loss, batches_b)
    what = describe_value(made)
    raise FactoryError(
        f"{text} must return (operator_a, operator_b) or (model, loss, batches_a, batches_b), but returned {what}; "
        f"{_EXAMPLE}"
    )


def _locate(made: tuple[Any, ...], error: ForwardError) -> ForwardError:
    """Return an error that says which batch does not fit which module, if running the model on each of them tells."""
    from cheapgrad.cost import scan
    from cheapgrad.curvature.operators.batches import Batches, BatchReader

    if len(made) != 4:
        return error
    model, _, *sides = made
    device = next(model.parameters()).device
    for side, given in zip(("batches_a", "batches_b"), sides, strict=True):
        for batch in Batches(given, BatchReader(), device):
            inputs = batch.inputs
            try:
                if isinstance(inputs, Mapping):
                    scan(model, **inputs)
                else:
                    scan(model, *(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
            except ForwardError as found:
                return ForwardError(f"batch {batch.index} of {side}: {found}")
    return error

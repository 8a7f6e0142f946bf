"""``cheapgrad report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Makes one page of HTML from the records in a directory: what 'cheapgrad demo' leaves, and what 'cheapgrad scan --json'
and the to_dict of reports, audits and plans write there. The page loads nothing and runs nothing; it can be read in
the dark, in the light and in print. Files that are no records are named."""


def add_parser(commands: Any) -> None:
    """Add the command's options to the parser."""
    parser = commands.add_parser(
        "report",
        help="make one page of HTML from the records in a directory",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the records are: files that end in .json")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page (default: report.html)"
    )
    parser.add_argument("--title", default="cheapgrad report", metavar="TEXT", help="of the page")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the page; files that are no records are named on standard error."""
    # Imported here, so that `cheapgrad --version` and a mistyped option do not wait for it.
    from cheapgrad.files import prepare_file, write_whole
    from cheapgrad.reporting import read_directory, render_page

    directory = read_directory(options.directory)
    page = render_page(directory, options.title)
    prepare_file(options.out, "--out")
    write_whole(options.out, page.encode())
    for file in directory.refused:
        print(f"cheapgrad: not understood: {file.name}: {file.reason}", file=sys.stderr)
    count = len(directory.files)
    print(f"{options.out.resolve()}: {count} record{'s' * (count != 1)} of {options.directory}")
    return 0

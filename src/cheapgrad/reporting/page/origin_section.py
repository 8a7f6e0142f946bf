"""Where the numbers come from: files, commands, seeds, versions and hardware."""

from __future__ import annotations

from cheapgrad.environment import BROKEN, Examination
from cheapgrad.reporting.figures import UNKNOWN
from cheapgrad.reporting.markup import Html, element
from cheapgrad.reporting.page.tables import Column, head_cell, make_table, text_cell
from cheapgrad.reporting.record_files import RecordDirectory, RecordFile

_NOT_RECORDED = "not recorded"


def write_origin_section(directory: RecordDirectory) -> Html:
    """Return the section on where the numbers come from; files that were not understood are in it."""
    parts = [_write_files(directory), _write_commands(directory), _write_environments(directory)]
    examined = [file for file in directory.files if isinstance(file.record, Examination)]
    parts += [_write_examination(file, number) for number, file in enumerate(examined)]
    return element("section", element("h2", "Where this comes from"), *parts, id="origin")


def _write_files(directory: RecordDirectory) -> Html:
    rows = [
        [head_cell(file.name), text_cell(file.kind), text_cell(_write_seeds(file)), text_cell(file.remark or UNKNOWN)]
        for file in directory.files
    ]
    rows += [
        [head_cell(file.name), text_cell("not understood", class_="alarm"), text_cell(UNKNOWN), text_cell(file.reason)]
        for file in directory.refused
    ]
    columns = (Column("file"), Column("what it is"), Column("seeds"), Column("remark"))
    return make_table("files", "Files", columns, rows)


def _write_seeds(file: RecordFile) -> str:
    return ", ".join(map(str, file.seeds)) if file.seeds else _NOT_RECORDED


def _write_commands(directory: RecordDirectory) -> Html:
    lines = [
        element(
            "li",
            f"{file.name}: ",
            element("code", file.command) if file.command else f"the command is {_NOT_RECORDED}",
        )
        for file in directory.files
    ]
    return element("div", element("h3", "How to do it again"), element("ul", *lines, class_="commands"))


def _write_environments(directory: RecordDirectory) -> Html:
    files = [file for file in directory.files if file.environment]
    silent = [file.name for file in directory.files if not file.environment]
    parts = [element("h3", "Versions and hardware")]
    if files:
        keys = list(dict.fromkeys(str(key) for file in files for key in file.environment))
        rows = [
            [head_cell(key), *(text_cell(_write_entry(file.environment.get(key))) for file in files)] for key in keys
        ]
        columns = [Column(""), *(Column(file.name) for file in files)]
        parts.append(make_table("environment", "Versions and hardware", columns, rows))
    if silent:
        parts.append(element("p", f"Not recorded in {', '.join(silent)}."))
    return element("div", *parts)


def _write_examination(file: RecordFile, number: int) -> Html:
    rows = [
        [
            head_cell(finding.name),
            text_cell(finding.status, class_="alarm" if finding.status == BROKEN else None),
            text_cell(finding.found),
            text_cell(finding.advice or UNKNOWN),
        ]
        for finding in file.record.findings
    ]
    columns = (Column("check"), Column("status"), Column("found"), Column("advice"))
    return make_table(f"doctor-{number}", f"What cheapgrad doctor found ({file.name})", columns, rows)


def _write_entry(value: object) -> str:
    return UNKNOWN if value is None else str(value)

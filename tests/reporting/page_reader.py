"""Reads a report back, as strictly as XML is read."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from cheapgrad.reporting import RecordDirectory, RecordFile, RefusedFile, render_page

KINDS = {
    "DemoRecord": "cheapgrad.demo",
    "CostReport": "cheapgrad.scan",
    "CostComparison": "cheapgrad.comparison",
    "AuditReport": "cheapgrad.audit",
}


def make_file(record, label="run", **changes) -> RecordFile:
    values = {
        "name": f"{label}.json",
        "kind": KINDS.get(type(record).__name__, "cheapgrad.other"),
        "label": label,
        "record": record,
        "environment": getattr(record, "environment", {}),
        "seeds": getattr(record, "seeds", ()),
        "command": None,
    }
    return RecordFile(**{**values, **changes})


def render(*files: RecordFile, refused: tuple[RefusedFile, ...] = ()) -> ElementTree.Element:
    return read(render_page(RecordDirectory(files, refused)))


def read(page: str) -> ElementTree.Element:
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page)


def text_of(element: ElementTree.Element | None) -> str:
    assert element is not None
    return " ".join("".join(element.itertext()).split())


def find(page: ElementTree.Element, name: str) -> ElementTree.Element | None:
    """Return the element of that id."""
    return next((element for element in page.iter() if element.get("id") == name), None)


def read_table(page: ElementTree.Element, name: str) -> tuple[list[str], dict[str, list[str | None]]]:
    """Return a table's headings, and by row the numbers in full, or the texts of cells without number."""
    caption = find(page, f"{name}-caption")
    assert caption is not None, f"there is no table {name}"
    table = next(table for table in page.iter("table") if caption in list(table))
    headings = [text_of(heading) for heading in table.findall("thead/tr/th")]
    rows = {}
    for row in table.findall("tbody/tr"):
        head, *cells = list(row)
        rows[text_of(head)] = [cell.get("data-value") or text_of(cell) for cell in cells]
    return headings, rows

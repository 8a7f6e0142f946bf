"""The first thing that is read: is the gradient right, and what does it cost?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cheapgrad.reporting.figures import format_bytes, format_figure, format_percent, format_z
from cheapgrad.reporting.markup import Html, element
from cheapgrad.reporting.page.views import HeldGroup, Views

_MOST_NAMED = 3


@dataclass(frozen=True)
class Verdict:
    """What the records say in one line.

    Attributes:
        state: ``"unbiased"``, ``"biased"`` or ``"unknown"``.
        line: the verdict.
    """

    state: str
    line: str


def find_verdict(views: Views) -> Verdict:
    """Return the verdict line: a bias that was found, else none, else that nobody has looked.

    Args:
        views: everything that the page shows.
    """
    audited = [(group.title, column) for group in views.noise for column in group.columns if column.is_audited()]
    biased = [(title, column) for title, column in audited if not column.unbiased]
    if biased:
        named = ", ".join(
            f"{title}, {column.label} (z = {format_figure(column.total.max_abs_z, format_z)})"
            for title, column in biased[:_MOST_NAMED]
        )
        more = f" and {len(biased) - _MOST_NAMED} more" if len(biased) > _MOST_NAMED else ""
        return Verdict("biased", f"BIAS FOUND in {named}{more}: on average these gradients are wrong.")
    if not audited:
        return Verdict("unknown", "Not audited: no record here says whether a gradient is biased.")
    _, closest = max(audited, key=lambda pair: (pair[1].total.max_abs_z or 0.0) / (pair[1].band or 1.0))
    largest = format_figure(closest.total.max_abs_z, format_z)
    seen = [column.total.detectable_relative_bias for _, column in audited]
    known = [figure for figure in seen if figure is not None]
    power = (
        f"; an error of scale of {format_figure(max(known), format_percent)} would have been seen in each"
        if known
        else ""
    )
    return Verdict(
        "unbiased",
        f"No bias found in {len(audited)} gradient{'s' * (len(audited) != 1)}: nearest to the edge of what chance "
        f"explains is {closest.label}, |z| = {largest} of {format_figure(closest.band, format_z)}{power}.",
    )


def write_verdict_section(views: Views) -> Html:
    """Return the section with the verdict line and what else there is to say in words."""
    verdict = find_verdict(views)
    sentences = [*(_on_bytes(group) for group in views.held if len(group.columns) > 1), *views.sentences]
    listed = element("ul", *(element("li", sentence) for sentence in sentences)) if sentences else None
    return element(
        "section",
        element("p", verdict.line, class_=f"verdict {verdict.state}", id="verdict"),
        listed,
        _write_key(),
        id="summary",
    )


def _on_bytes(group: HeldGroup) -> str:
    first, *others = group.columns
    least = min(others, key=lambda column: column.total_bytes)
    share = f", {least.total_bytes / first.total_bytes:.2f} of it" if first.total_bytes else ""
    return (
        f"{group.title}: {first.label} holds {format_bytes(first.total_bytes)} for backward, {least.label} holds "
        f"{format_bytes(least.total_bytes)}{share}."
    )


def _write_key() -> Html:
    """Return the key that tells measured numbers from modelled ones."""
    return element(
        "p",
        "Upright numbers and filled marks were ",
        element("small", "measured", class_="source measured"),
        "; ",
        element("span", "slanted, dotted numbers", class_="modelled"),
        " and hollow marks are ",
        element("small", "modelled", class_="source modelled"),
        ": a law or a plan says so. What is ",
        element("small", "computed", class_="source computed"),
        " follows from measured ones by the formula in the heading.",
        class_="key-to-sources",
    )


def list_sections(sections: Sequence[tuple[str, str, Html]]) -> Html | None:
    """Return links to the sections that are there.

    Args:
        sections: name, title and content of each.
    """
    links = [element("li", element("a", title, href=f"#{name}")) for name, title, content in sections if content]
    return element("nav", element("ul", *links), aria_label="Sections") if links else None

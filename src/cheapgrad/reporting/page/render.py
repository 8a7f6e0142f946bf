"""The page around the sections."""

from __future__ import annotations

from importlib import resources

from cheapgrad._version import __version__
from cheapgrad.planning.record import Plan
from cheapgrad.reporting.markup import Html, element
from cheapgrad.reporting.page.collect import collect_views
from cheapgrad.reporting.page.frontier_section import write_frontier_section
from cheapgrad.reporting.page.held_section import write_held_section
from cheapgrad.reporting.page.noise_section import write_bias_section, write_variance_section
from cheapgrad.reporting.page.origin_section import write_origin_section
from cheapgrad.reporting.page.plan_section import write_plan_section
from cheapgrad.reporting.page.verdict_section import list_sections, write_verdict_section
from cheapgrad.reporting.record_files import RecordDirectory

# Nothing may be loaded from anywhere, whatever stands in a record.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render_page(directory: RecordDirectory, title: str = "cheapgrad report") -> str:
    """Return records as one page of HTML that loads nothing and runs nothing.

    Args:
        directory: the records; see `read_directory`.
        title: of the page.

    Returns:
        The page, well-formed as HTML and as XML. The same records make the same page, byte for byte.
    """
    views = collect_views(directory.files)
    plans = [file for file in directory.files if isinstance(file.record, Plan)]
    sections = [
        ("held", "Bytes", write_held_section(views.held)),
        ("variance", "Variance", write_variance_section(views.noise)),
        ("bias", "Bias", write_bias_section(views.noise)),
        ("plan", "Plans", write_plan_section(plans)),
        ("frontier", "Time, bytes and accuracy", write_frontier_section(views.frontiers)),
        ("origin", "Where this comes from", write_origin_section(directory)),
    ]
    body = element(
        "body",
        element("header", element("h1", title), list_sections(sections)),
        element("main", write_verdict_section(views), *(content for _, _, content in sections)),
        element("footer", element("p", f"cheapgrad {__version__}")),
    )
    return f"<!DOCTYPE html>\n{element('html', _write_head(title), body, lang='en')}\n"


def _write_head(title: str) -> Html:
    style = resources.files("cheapgrad.reporting.page").joinpath("page.css").read_text(encoding="utf-8")
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style)),
    )

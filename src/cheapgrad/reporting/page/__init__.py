"""One page of HTML made from records: every section is a file of its own."""

from cheapgrad.reporting.page.render import render_page

__all__ = ["render_page"]

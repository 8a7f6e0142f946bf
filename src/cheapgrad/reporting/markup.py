"""HTML and SVG elements, in which every text is escaped unless it is HTML already."""

from __future__ import annotations

import html
import re

# What neither HTML nor XML can hold: control characters, halves of surrogate pairs, two non-characters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"meta", "wbr"})


class Html(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def escape(text: object) -> Html:
    """Return a text as HTML; what is HTML already stays as it is.

    Args:
        text: anything; what is no text is written by `str`.

    Returns:
        HTML in which the text stands for itself, also within quotes; what HTML cannot hold becomes a question mark in
        a diamond.

    >>> escape("<script> & 'x'")
    '&lt;script&gt; &amp; &#x27;x&#x27;'
    """
    if isinstance(text, Html):
        return text
    return Html(html.escape(_FORBIDDEN.sub("�", str(text))))


def element(tag: str, *children: object, **attributes: object) -> Html:
    """Return an element.

    Args:
        tag: its name.
        children: what is in it: texts, which are escaped, and elements, which are not; None is left out.
        attributes: an underscore at the end is dropped (``class_``), others become hyphens; None is left out.

    Returns:
        The element, closed as HTML and as XML.

    >>> element("p", "a < b", class_="note", data_value=1.5)
    '<p class="note" data-value="1.5">a &lt; b</p>'
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{written}/>")
    return Html(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: object) -> Html:
    """Return texts and elements one after the other; None is left out."""
    return Html("".join(escape(child) for child in children if child is not None))

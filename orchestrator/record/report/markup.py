"""HTML from Python. What is not markup already is escaped, so no name, reason or sample can become any. Pure."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_VOID = frozenset({"meta", "br", "hr", "path", "line", "rect", "wbr"})
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """Markup. Everything in it was escaped, or written by us."""

    __slots__ = ()


Child = str | Html | None


def plain(text: str) -> str:
    """Text without what no document may hold, such as NUL and halves of surrogate pairs, which become U+FFFD."""
    return _CONTROLS.sub("�", text.replace("\r\n", "\n"))


def escaped(text: str) -> Html:
    return text if isinstance(text, Html) else Html(html.escape(plain(text)))


def join(children: Iterable[Child], separator: str = "") -> Html:
    """Markup in a row. None stands for nothing."""
    return Html(separator.join(escaped(child) for child in children if child is not None))


def tag(element: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """One element.

    Args:
        attributes: ``class_`` is ``class``, ``aria_label`` is ``aria-label``; None leaves one out.
    """
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    opening = "".join(f' {key}="{escaped(str(value))}"' for key, value in pairs)
    if element in _VOID:
        return Html(f"<{element}{opening}>" if element in ("meta", "br", "hr", "wbr") else f"<{element}{opening}/>")
    return Html(f"<{element}{opening}>{join(children)}</{element}>")


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], *, caption: str, class_: str = "figures") -> Html:
    """A table whose first column names the rows.

    Args:
        class_: ``figures`` are to the right.
    """
    names = list(head)
    lines = [
        tag("tr", *(tag("th", cell, scope="row") if i == 0 else tag("td", cell) for i, cell in enumerate(row)))
        for row in rows
    ]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption, class_="unseen"),
            tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names))),
            tag("tbody", *lines),
            class_=class_,
        ),
        class_="wide",
        tabindex="0",
        role="region",
        aria_label=caption,
    )

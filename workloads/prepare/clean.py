"""Cleaning of texts: what editors and other systems leave in them that no model should learn."""

from __future__ import annotations

import re

_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f]")  # C0 but for tab, line feed, form feed; carriage returns went before
_BYTE_ORDER_MARK = "\ufeff"


def clean(text: str) -> str:
    """The text without a byte order mark at its start and without control characters, its lines ended by ``\\n``.

    Cleaning it again changes nothing but for a second byte order mark behind the first.
    """
    text = text.removeprefix(_BYTE_ORDER_MARK)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROLS.sub("", text)


def is_empty(text: str) -> bool:
    """Whether there is nothing in it but white space."""
    return not text or text.isspace()

"""Numbers as people read them: each with its unit. Pure."""

from __future__ import annotations

import math
from datetime import UTC, datetime

MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86400.0
_PREFIXES = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k"))


def duration(seconds: float) -> str:
    """``0.4 s``, ``47 s``, ``3 min 20 s``, ``2 h 05 min``, ``3 d 4 h``."""
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < MINUTE_S:
        return f"{whole} s"
    if whole < HOUR_S:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / MINUTE_S)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / HOUR_S)
    return f"{hours // 24} d {hours % 24} h"


def share(part: float, digits: int = 1) -> str:
    """``0.913`` as ``91.3 %``. What is there but rounds to nothing is ``< 0.1 %``."""
    least = 10.0**-digits
    return f"< {least:g} %" if 0 < 100 * part < least / 2 else f"{100 * part:.{digits}f} %"


def count(value: float) -> str:
    """``1,234``, ``12.3 k``, ``4.56 M``."""
    for size, prefix in _PREFIXES:
        if abs(value) >= size * 0.99995:
            scaled = value / (1e3 if size == 1e4 else size)
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:,.{digits}f}{prefix}"
    return f"{value:,.0f}"


def figure(value: float) -> str:
    """Any number to a sensible number of digits: ``3.2174``, ``59.13``, ``0.00123``, ``12,345``."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.001:
        return f"{value:.{4 if size < 10 else 2}f}"
    return f"{value:.3g}"


def signed(value: float) -> str:
    """With its sign: ``+0.0412``, ``−0.0412``."""
    return f"{'−' if value < 0 else '+' if value > 0 else ''}{figure(abs(value))}"


def hours(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def money(value: float) -> str:
    return f"{value:,.2f}" if value < 1e5 else f"{value:,.0f}"


def moment(time_s: float) -> str:
    """``2026-03-01 14:05 UTC``."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def times(number: int, what: str) -> str:
    """``1 step``, ``3 steps``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"

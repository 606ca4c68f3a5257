"""Facts as text for people: tables, and nested facts one a line. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Any

Rows = list[dict[str, Any]]
_EARLIEST_S = 1e9  # a figure above this is a time in seconds since 1970


def table(rows: Rows) -> str:
    """Rows of one shape, in columns."""
    names = list(rows[0])
    cells = [[cell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [names, *cells]
    )


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < _EARLIEST_S else datetime.fromtimestamp(value).isoformat(" ", "seconds")
    return f"{value:,}" if isinstance(value, int) else str(value)


def lines(facts: dict[str, Any], indent: int = 0) -> str:
    """Nested facts, one a line."""
    found = []
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            found += [" " * indent + f"{name}:", lines(value, indent + 2)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            found.append(" " * indent + f"{name}:")
            found += [" " * (indent + 2) + "; ".join(f"{k} {cell(v)}" for k, v in item.items()) for item in value]
        elif isinstance(value, list):
            found.append(" " * indent + f"{name}: {', '.join(map(cell, value)) or '-'}")
        else:
            found.append(" " * indent + f"{name}: {cell(value)}")
    return "\n".join(found)

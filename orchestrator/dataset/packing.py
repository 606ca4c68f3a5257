"""Which conversations share a row: best fit over a bounded window of open rows. Pure, and the same at every call."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

WINDOW = 256
"""Rows open at once. On lengths of real conversations more of them save less than one row in a hundred."""


def pack(lengths: Iterable[int], row_tokens: int, *, window: int = WINDOW) -> list[list[int]]:
    """Rows, each the numbers of its items in their order; the rows are in the order in which each got its first.

    An item goes to the open row that it fills best, the older one where two are alike. Where it fits none, a row is
    opened for it, and where too many are open then, the fullest is closed. (Best-fit bin packing with a bound on the
    open bins: Csirik & Johnson 2001, "Bounded Space On-Line Bin Packing: Best Is Better than First".)

    Args:
        lengths: of the items, each in ``1 … row_tokens``.
    """
    rows: list[list[int]] = []
    is_open: list[tuple[int, int]] = []  # (room left, row), in order
    for item, length in enumerate(lengths):
        if not 1 <= length <= row_tokens:
            raise ValueError(f"item {item} of {length} tokens does not fit a row of {row_tokens}")
        best = bisect_left(is_open, (length, 0))
        if best < len(is_open):
            room, row = is_open.pop(best)
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(item)
        if room > length:
            insort(is_open, (room - length, row))
        if len(is_open) > window:
            is_open.pop(0)
    return rows

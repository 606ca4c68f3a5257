"""Sizes as people write them: ``200GiB``, ``64M``."""

from __future__ import annotations

import os
import re

from orchestrator.errors import UsageError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)


def size_of_environment(variable: str) -> int | None:
    """The bytes that a variable names, in powers of 1024; None where it is not set.

    Raises:
        UsageError: it holds no size.
    """
    told = os.environ.get(variable, "").strip()
    if not told:
        return None
    found = _SIZE.fullmatch(told)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise UsageError(f"{variable}: {told!r} is no size.", next_step="Write it as 200GiB, say.")
    return size

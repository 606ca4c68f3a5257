"""What processes cost, from Linux's ``/proc``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of its reaped children: fields 14 to 17 of proc(5)'s stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[-1].split()
    return sum(int(field) for field in fields[11:15]) / _TICKS_PER_S


def child_pids(pid: int) -> list[int]:
    """Living children of all of a process's threads."""
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found += [int(word) for word in tasks.read_text().split()]
    return found

"""The control groups that hold the cluster's containers, in version 1 (a tree per controller) and 2."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.errors import EnvironmentUnusable

_ROOT = Path("/sys/fs/cgroup")
_POLL_S = 0.02


def end_cgroups(names: Sequence[str], *, timeout_s: float = 20.0) -> int:
    """Kill every process in them and take them away; how many there were.

    Raises:
        EnvironmentUnusable: some are still there after ``timeout_s``.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + timeout_s
    while left := _members(names):
        if time.monotonic() > deadline:
            raise EnvironmentUnusable(f"These processes of the cluster's containers do not end: {sorted(left)}.")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= left
        time.sleep(_POLL_S)
    _remove(names)
    return len(killed)


def _remove(names: Sequence[str]) -> None:
    for top in _trees(names):
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _members(names: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for top in _trees(names):
        for folder, _, _ in os.walk(top):
            with contextlib.suppress(OSError):
                found.update(int(line) for line in (Path(folder) / "cgroup.procs").read_text().split())
    return found


def _trees(names: Sequence[str]) -> Iterator[Path]:
    for name in names:
        for tree in (_ROOT, *_ROOT.iterdir()):
            if (tree / name).is_dir():
                yield tree / name

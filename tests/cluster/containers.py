"""The processes of the cluster's containers. They are known by their root, an overlay in the cluster's directory, which
holds whatever control group they are in and whether their containerd is there to be asked."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from orchestrator.errors import EnvironmentUnusable

_CGROUPS = Path("/sys/fs/cgroup")
_POLL_S = 0.02


def end_containers(directory: Path, *, timeout_s: float = 20.0) -> int:
    """Kill every process in a container under ``directory``, and take their control groups away; how many there were.

    Raises:
        EnvironmentUnusable: some are still there after ``timeout_s``.
    """
    killed: set[int] = set()
    cgroups: set[Path] = set()
    deadline = time.monotonic() + timeout_s
    while left := in_containers(directory):
        if time.monotonic() > deadline:
            raise EnvironmentUnusable(f"These processes of the cluster's containers do not end: {sorted(left)}.")
        for pid in left:
            cgroups |= _cgroups_of(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= left
        time.sleep(_POLL_S)
    for cgroup in cgroups:
        with contextlib.suppress(OSError):
            cgroup.rmdir()
    return len(killed)


def in_containers(directory: Path) -> set[int]:
    """The ids of the processes that have their root in a container under ``directory``."""
    overlay = f"upperdir={directory}/"
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            mounts = (line for line in (process / "mountinfo").read_text().splitlines() if overlay in line)
            if any(line.split(" ", 5)[4] == "/" for line in mounts):
                found.add(int(process.name))
    return found


def _cgroups_of(pid: int) -> set[Path]:
    """In version 1, a tree per controller, and in 2."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if path != "/":
                found.add(_CGROUPS / controllers.removeprefix("name=") / path.lstrip("/"))
    return found

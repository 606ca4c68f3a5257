"""TCP ports on this machine: which are free, and who holds one that is not. Linux only (``/proc``)."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from orchestrator.errors import EnvironmentUnusable
from orchestrator.targets import processes

# Below Linux's ephemeral range (32768 up), so that no outgoing connection takes a port between two starts of a stack.
POOL = range(20000, 22700)
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


@dataclass(frozen=True, kw_only=True)
class Holder:
    pid: int
    command: str


def is_free(port: int) -> bool:
    """Whether a server could listen there, on any address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Without it, connections of a server that has just ended (TIME_WAIT) would count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def holder(port: int) -> Holder | None:
    """The process that listens on a port, where this user may see it."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not inodes:
        return None
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            for descriptor in os.scandir(f"/proc/{entry}/fd"):
                if os.readlink(descriptor.path) in inodes:
                    return Holder(pid=int(entry), command=processes.command_line(int(entry))[:80])
        except OSError:  # gone meanwhile, or another user's
            continue
    return None


def require_free(port: int, *, what: str, flag: str) -> None:
    """
    Raises:
        EnvironmentUnusable: something listens there; says who, and which flag chooses another port.
    """
    if is_free(port):
        return
    who = holder(port)
    by = f" by process {who.pid} ({who.command})" if who else ""
    raise EnvironmentUnusable(
        f"Port {port}, for {what}, is taken{by}.",
        next_step=f"End that process, or choose another port with {flag}.",
    )


def choose(
    preferred: Iterable[int], *, taken: Collection[int], seed: int, fits: Callable[[int], bool] = is_free
) -> int:
    """The first of ``preferred``, then of the pool from a place that ``seed`` decides, which ``fits``.

    Raises:
        EnvironmentUnusable: none does.
    """
    start = seed % len(POOL)
    for port in chain(preferred, POOL[start:], POOL[:start]):
        if port not in taken and fits(port):
            return port
    raise EnvironmentUnusable(
        f"No port from {POOL.start} to {POOL.stop - 1} is free on this machine.",
        next_step="See what listens there: ss -ltnp",
    )


def _listening_inodes(port: int) -> Iterable[str]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        try:
            rows = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if fields[3] == _LISTEN and int(fields[1].rsplit(":", 1)[-1], 16) == port:
                yield fields[9]

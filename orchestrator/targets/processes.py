"""Child processes that outlive their parent: starting, recognising and ending them. Linux only (``/proc``).

Everything that a stack starts inherits ``HEADWAY_STACK=<id>`` in its environment, also workers that Ray starts
long after. That marker, and nothing else, says what may be ended: a process without it is never touched.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MARKER_VARIABLE = "HEADWAY_STACK"
POLL_S = 0.05
_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A process, told apart from a later one with the same pid by when it started."""

    pid: int
    start_ticks: int
    """Clock ticks from boot to the process's start: field 22 of ``/proc/<pid>/stat`` (proc(5))."""

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Identity:
        return Identity(pid=int(value["pid"]), start_ticks=int(value["start_ticks"]))


def spawn(
    command: list[str], *, environment: Mapping[str, str], log: Path, directory: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, so that a Ctrl-C in this terminal does not reach it.

    Its output is appended to ``log``. ``environment`` is the whole of its environment.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=dict(environment),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def identity(pid: int) -> Identity | None:
    """Who has this pid now; None where nobody does, or only a zombie that waits to be reaped."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The command's name, in parentheses, may itself hold spaces and parentheses.
    state, *fields = stat.rsplit(")", 1)[-1].split()
    if state in ("Z", "X"):
        return None
    return Identity(pid=pid, start_ticks=int(fields[18]))


def alive(process: Identity) -> bool:
    return identity(process.pid) == process


def command_line(pid: int) -> str:
    """The command as it was typed, or an empty string where it cannot be read."""
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    return " ".join(word.decode(errors="replace") for word in words if word)


def marked(marker: str) -> list[Identity]:
    """Every live process of this user, but for the caller's own, whose environment carries the marker."""
    entry = f"{MARKER_VARIABLE}={marker}".encode()
    found = []
    for pid in _pids():
        if pid == os.getpid():
            continue
        try:
            carries = entry in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or another user's
            continue
        if carries and (process := identity(pid)) is not None:
            found.append(process)
    return found


def end(marker: str, *, grace_s: float, but_for: frozenset[Identity] = frozenset()) -> int:
    """End everything that carries the marker: SIGTERM, up to ``grace_s`` to go, then SIGKILL.

    Looks again until none is left, since what is ended may start another process while it goes.

    Returns:
        How many had to be killed.
    """
    deadline = time.monotonic() + grace_s
    asked: set[Identity] = set()
    killed: set[Identity] = set()
    while left := set(marked(marker)) - but_for:
        late = time.monotonic() >= deadline
        for process in left - (killed if late else asked):
            _signal(process, signal.SIGKILL if late else signal.SIGTERM)
            (killed if late else asked).add(process)
        time.sleep(POLL_S)
    return len(killed)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM meanwhile, so that cleaning up is never left half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_until(ready: Callable[[], bool], *, timeout_s: float, ended: Callable[[], bool]) -> bool:
    """Poll ``ready``; False once ``ended`` is true or the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if ready():
            return True
        if ended():
            return False
        time.sleep(POLL_S)
    return False


def log_tail(log: Path, *, num_lines: int = 5) -> str:
    """The last lines of a log file, for an error message."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n  ".join([line for line in lines if line.strip()][-num_lines:])


def _pids() -> Iterator[int]:
    for entry in os.listdir(_PROC):
        if entry.isdigit():
            yield int(entry)


def _signal(process: Identity, number: signal.Signals) -> None:
    if alive(process):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, number)

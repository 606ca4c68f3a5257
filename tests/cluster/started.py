"""Starting the cluster's processes and waiting for them. All carry the cluster's mark, by which they are ended."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

from orchestrator.errors import EnvironmentUnusable, Interrupted
from orchestrator.targets import processes
from orchestrator.targets.processes import Identity
from tests.cluster.layout import Layout
from tests.cluster.network import inside


@dataclass(kw_only=True)
class Started:
    """The processes of one start, from several threads."""

    layout: Layout
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set once the start is given up: every wait ends."""
    _identities: dict[str, Identity] = field(default_factory=dict)
    _logs: dict[str, Path] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, name: str, command: list[str], *, namespace: str) -> Popen[bytes]:
        """Start a program in a network namespace."""
        self.layout.logs.mkdir(parents=True, exist_ok=True)
        log = self.layout.logs / f"{name}.log"
        with self._lock:
            if self.stopping.is_set():
                raise Interrupted("The start was given up.")
            process = processes.spawn(
                inside(namespace, command), environment=self._environment(), log=log, directory=self.layout.run
            )
            self._logs[name] = log
            if (who := processes.identity(process.pid)) is not None:
                self._identities[name] = who
        return process

    def wait(self, name: str, process: Popen[bytes], ready: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
        """
        Raises:
            EnvironmentUnusable: it ended, or was not ready in time; shows its last words.
            Interrupted: the start was given up.
        """
        ended = lambda: process.poll() is not None or self.stopping.is_set()  # noqa: E731
        if processes.wait_until(ready, timeout_s=timeout_s, ended=ended):
            return
        if self.stopping.is_set():
            raise Interrupted("The start was given up.")
        code = process.poll()
        how = f"was not ready within {timeout_s:.0f} s" if code is None else f"ended with code {code}"
        log = self._logs[name]
        raise EnvironmentUnusable(
            f"{name} {how}; its last words:\n  {processes.log_tail(log)}\n", next_step=f"Read {log}"
        )

    def identities(self) -> dict[str, Identity]:
        with self._lock:
            return dict(self._identities)

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        return kept | {"HOME": str(self.layout.run), processes.MARKER_VARIABLE: self.layout.id}

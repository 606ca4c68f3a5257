"""A real Prometheus for tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.needed import lacks

READY_S = 30.0
"""It takes one."""


def program(name: str) -> str:
    """``prometheus`` or ``promtool``: beside Python, where ``make prometheus`` puts them, or on the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        lacks(name, "make prometheus takes it out of Debian's package")
    return found


@dataclass(frozen=True, kw_only=True)
class Prometheus:
    """One that answers at ``url``."""

    url: str

    def now(self, expression: str) -> list[dict[str, Any]]:
        """Series and values of an instant query."""
        return self._ask("query", {"query": expression})

    def between(self, expression: str, *, begin_s: float, end_s: float, step_s: float) -> list[dict[str, Any]]:
        """Series with a value at some step of the time."""
        span = {"start": f"{begin_s}", "end": f"{end_s}", "step": f"{step_s}"}
        return self._ask("query_range", {"query": expression, **span})

    def _ask(self, what: str, parameters: dict[str, str]) -> list[dict[str, Any]]:
        answer = httpx.post(f"{self.url}/api/v1/{what}", data=parameters, timeout=30.0)
        document = answer.json()
        assert document["status"] == "success", f"{document.get('error')}: {parameters['query']}"
        found: list[dict[str, Any]] = document["data"]["result"]
        return found


@contextmanager
def prometheus(config: Path, *, directory: Path, port: int) -> Iterator[Prometheus]:
    """Runs until the block ends."""
    command = [
        program("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'series'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    url = f"http://127.0.0.1:{port}"
    log_path = directory / "prometheus.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline_s = time.monotonic() + READY_S
        while not _is_ready(url):
            assert process.poll() is None, log_path.read_text()
            assert time.monotonic() < deadline_s, log_path.read_text()
            time.sleep(0.1)
        yield Prometheus(url=url)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False

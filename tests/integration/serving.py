"""Ray with Serve for a module's tests, and what they do to a channel."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from orchestrator.release import channels
from orchestrator.release.channels import Canary, ChannelStatus
from orchestrator.store import Store
from orchestrator.targets.ports import is_free

CHANNEL = "production"


@contextmanager
def ray_with_serve(cache: Path) -> Iterator[int]:
    """A local Ray with Serve's proxy on a port of its own, which is given."""
    ray = pytest.importorskip("ray")
    from ray import serve

    port = next(port for port in range(21000 + os.getpid() % 5000, 32000) if is_free(port))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWAY_CACHE", str(cache))
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else ray.init leaves a token mode in this process's environment
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
        ray.init(
            address="local",
            num_cpus=1,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            namespace="headway-tests",
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield port
        finally:
            serve.shutdown()
            ray.shutdown()


def promote(store: Store, model: str, version: int, *, canary: Canary | None = None) -> int:
    """Returns the entry's number."""
    entry = channels.append(store, model, CHANNEL, version=version, by="a test", reason="a test", canary=canary)
    return entry.number


def status(store: Store, model: str, channel: str = CHANNEL) -> ChannelStatus:
    """What the server says of the channel."""
    return channels.read_status(store, model, channel) or ChannelStatus()


class Load:
    """Requests one after the other in each of a few threads, until told to stop; remembers who answered."""

    def __init__(
        self, url: str, body: Mapping[str, object], *, num_threads: int = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        self.versions: list[str] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._url, self._body, self._headers = url, body, headers
        self._users = itertools.count()
        self._threads = [threading.Thread(target=self._run) for _ in range(num_threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def answer_more(self, num: int) -> None:
        """Wait for so many more answers."""
        num_before = len(self.versions)
        wait_for(lambda: len(self.versions) >= num_before + num)

    def _run(self) -> None:
        with httpx.Client(timeout=60, headers=dict(self._headers or {})) as http:
            while not self._stop.is_set():
                body = {**self._body, "user": f"user-{next(self._users)}"}
                try:
                    response = http.post(self._url, json=body)
                except httpx.TransportError as e:
                    self.failures.append(repr(e))
                    continue
                if response.status_code == 200:
                    self.versions.append(response.headers["x-headway-version"])
                else:
                    self.failures.append(response.text)


def serving(url: str) -> int | None:
    """The version that answers there."""
    number: int | None = httpx.get(f"{url}/healthz", timeout=60).json()["serving"]
    return number


def replica_pids(application: str) -> list[int]:
    """By the title that Ray gives to the process of an actor."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                title = (folder / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended
            if f"ServeReplica:{application}:replica".encode() in title:
                found.append(int(folder.name))
    return sorted(found)


def wait_for(condition: Callable[[], bool], timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)

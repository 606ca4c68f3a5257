"""Ray with Serve for a module's tests, and what they do to a channel."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from orchestrator.release import channels
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


def promote(store: Store, model: str, version: int) -> None:
    channels.append(store, model, CHANNEL, version=version, by="a test", reason="a test")


def serving(url: str) -> int | None:
    """The version that answers there."""
    number: int | None = httpx.get(f"{url}/healthz").json()["serving"]
    return number


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)

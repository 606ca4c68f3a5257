"""One start or end at a time."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator

from orchestrator.errors import EnvironmentUnusable
from tests.cluster.layout import Layout


@contextlib.contextmanager
def only_one(layout: Layout) -> Iterator[None]:
    """
    Raises:
        EnvironmentUnusable: another process is starting or ending this cluster.
    """
    layout.directory.mkdir(parents=True, exist_ok=True)
    with layout.lock.open("w") as file:  # the kernel releases it, however this process ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise EnvironmentUnusable(
                "Another `make cluster` or `make cluster-down` is at work.", next_step="Wait for it, or end it"
            ) from e
        yield

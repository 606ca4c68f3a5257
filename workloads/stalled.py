"""Notices that a run makes no step, whatever the reason: no room on the cluster, a hang, restart after restart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from workloads.watchdog import ANSWER_TIMEOUT_S, LastStep

MAX_LOOK_S = 30.0


@contextmanager
def told_when_stalled(
    last_step: Callable[[], LastStep | None], *, after_s: float | None, tell: Callable[[LastStep], None]
) -> Iterator[None]:
    """Look from a thread of its own how long ago the last step was, and tell it once when that is too long ago.

    Args:
        last_step: None where it is not known now.
        after_s: None tells nothing.
    """
    if after_s is None:
        yield
        return
    closed = threading.Event()
    thread = threading.Thread(target=_look, args=(last_step, after_s, closed, tell), name="stalled", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()


def _look(
    last_step: Callable[[], LastStep | None], after_s: float, closed: threading.Event, tell: Callable[[LastStep], None]
) -> None:
    while not closed.wait(min(MAX_LOOK_S, after_s / 4)):
        last = last_step()
        if last is not None and last.ago_s >= after_s:
            tell(last)
            return


def asking(watchdog: Any) -> Callable[[], LastStep | None]:
    """How to ask the watchdog's actor, which knows every rank's step. None where it cannot be reached now."""
    import ray

    def ask() -> LastStep | None:
        try:
            found: LastStep = ray.get(watchdog.last_step.remote(), timeout=ANSWER_TIMEOUT_S)
        except ray.exceptions.RayError:
            return None
        return found

    return ask

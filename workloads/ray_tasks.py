"""The Ray tasks of a stage: whoever waits for them looks meanwhile whether to go on, and leaves none behind."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

logger = logging.getLogger(__name__)
_LOOK_EVERY_S = 5.0
_MAX_CANCEL_S = 30.0
_look: ContextVar[Callable[[], None]] = ContextVar("look", default=lambda: None)


@contextmanager
def looking(check: Callable[[], None]) -> Iterator[None]:
    """Inside, whoever waits for tasks calls ``check`` every few seconds; what it raises ends the tasks and the wait."""
    before = _look.set(check)
    try:
        yield
    finally:
        _look.reset(before)


def look() -> None:
    """Whether to go on: raises what says no."""
    _look.get()()


def as_done(tasks: Sequence[Any]) -> Iterator[Any]:
    """The results of these object references as they come, not in their order.

    After an error, or where the caller goes no further, no task goes on: what is deleted then stays deleted.

    Raises:
        ray.exceptions.RayError: the first task that failed. What the look raises.
    """
    import ray

    waiting, looked_s = list(tasks), time.monotonic()
    try:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=_LOOK_EVERY_S)
            if time.monotonic() - looked_s >= _LOOK_EVERY_S:
                look()
                looked_s = time.monotonic()
            for task in done:
                yield ray.get(task)
    finally:
        _end(waiting)


def all_of(tasks: Sequence[Any]) -> list[Any]:
    """The same, all at once and in the tasks' order."""
    import ray

    for _ in as_done(tasks):
        pass
    return ray.get(list(tasks))  # type: ignore[no-any-return]


def _end(tasks: list[Any]) -> None:
    """A cancelled task has ended when its process has, a moment after the call."""
    import ray

    for task in tasks:
        ray.cancel(task, force=True)
    if tasks:
        _, going_on = ray.wait(tasks, num_returns=len(tasks), timeout=_MAX_CANCEL_S)
        if going_on:
            logger.warning("%d tasks have not ended within %.0f s of being cancelled.", len(going_on), _MAX_CANCEL_S)

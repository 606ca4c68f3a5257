"""What rank 0 tells the world about its run, and what the world tells rank 0."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.checkpoint.save import CheckpointWriter
from orchestrator.errors import HeadwayError
from orchestrator.record import EventLog
from orchestrator.store import Attempt, Store
from orchestrator.store.attempts import stop_reason

logger = logging.getLogger(__name__)
MONITOR_S = 3.0  # between two looks for a stop request or a newer attempt


class Observer:
    """Rank 0's events and its watch for a stop. Other ranks' observers do nothing."""

    def __init__(self, store: Store, attempt: Attempt, *, rank: int) -> None:
        self.stop_wanted = 0.0
        self._events = EventLog(store, attempt, "train") if rank == 0 else None
        self._store, self._attempt = store, attempt
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        if rank == 0:
            self._thread.start()

    def note(self, kind: str, **fields: Any) -> None:
        if self._events:
            self._events.append(kind, **fields)

    def step(self, figures: dict[str, float]) -> None:
        self.note("step", **{k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()})

    def saves(self, writer: CheckpointWriter) -> None:
        for saved in writer.take_results():
            kind = "checkpoint" if saved.error is None else "checkpoint_failed"
            error = {"error": str(saved.error)} if saved.error else {}
            self.note(kind, step=saved.step, seconds=round(saved.seconds, 3), **error)

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._events:
            self._events.close()

    def _watch(self) -> None:
        while not self._closed.wait(MONITOR_S):
            try:
                reason = stop_reason(self._store, self._attempt)
            except HeadwayError as e:
                logger.warning("Whether this attempt is to stop cannot be seen now: %s", e)
                continue
            if reason:
                logger.warning("Stopping after this step: %s.", reason)
                self.note("stopping", reason=reason)
                self.stop_wanted = 1.0
                return


@contextmanager
def observed(store: Store, attempt: Attempt, *, rank: int) -> Iterator[Observer]:
    observer = Observer(store, attempt, rank=rank)
    try:
        yield observer
    finally:
        observer.close()

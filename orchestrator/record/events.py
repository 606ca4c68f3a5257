"""Run events: JSON lines in numbered segments under ``runs/<run>/events/<attempt>-<nonce>/<writer>-<n>.jsonl``.

Each writer has its own numbers and never overwrites a segment, so that a record written by several processes, and
by attempts one after the other, is whole whatever dies. Everyone who watches a run reads these: no target needed.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from typing import Any

from orchestrator.errors import HeadwayError, NotFound
from orchestrator.store import Attempt, Store, layout

logger = logging.getLogger(__name__)
Event = dict[str, Any]
"""``{"time_s", "kind", "attempt", …}``; kinds are listed in docs/concepts.md."""

MIN_FLUSH_S, MAX_FLUSH_S = 2.0, 10.0
CLOSE_S = 60.0
"""How long closing waits for a request under way: a server that restarts is waited for, a silent one is not."""
_SEGMENT = re.compile(r"(?P<attempt>\d+)-[0-9a-f]+/(?P<writer>[a-z0-9-]+)-\d+\.jsonl")


class EventLog:
    """Appends events; a thread writes them out as segments.

    A segment goes out every two seconds at first and every ten in a long run, so that a watcher sees a young run live
    and a month's run does not fill the store with small objects. Events that cannot be written are kept and
    retried: the record never stops training.
    """

    def __init__(self, store: Store, attempt: Attempt, writer: str) -> None:
        self._store, self._attempt = store, attempt
        self._prefix = f"{layout.events(attempt.run_id)}{attempt.prefix}/{writer}-{secrets.token_hex(2)}-"
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._events: list[Event] = []
        self._unwritten = b""
        self._segment = 0
        self._started = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"events-{writer}", daemon=True)
        self._thread.start()

    def append(self, kind: str, **fields: Any) -> None:
        event = {"time_s": round(time.time(), 3), "kind": kind, "attempt": self._attempt.number, **fields}
        with self._lock:
            self._events.append(event)

    def flush(self) -> None:
        """Write out what was appended so far.

        Raises:
            HeadwayError: it could not be written; it is kept for the next flush.
        """
        with self._flushing:
            while self._unwritten or self._take():
                # The very same bytes at each try, so that one whose answer was lost is known again, not repeated.
                self._store.create(f"{self._prefix}{layout.number(self._segment + 1)}.jsonl", self._unwritten)
                self._segment, self._unwritten = self._segment + 1, b""

    def _take(self) -> bool:
        """Make what was appended the next segment. False where there is nothing."""
        with self._lock:
            batch, self._events = self._events, []
        lines = (json.dumps(event, separators=(",", ":"), default=str) + "\n" for event in batch)
        self._unwritten = "".join(lines).encode()
        return bool(batch)

    def close(self) -> None:
        """Write out the rest and end the thread."""
        self._closed.set()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.warning("The last events of %s may be lost: the store does not answer.", self._attempt.run_id)
            return
        try:
            self.flush()
        except HeadwayError as e:
            logger.warning("The last events of %s are lost: %s", self._attempt.run_id, e)

    def _run(self) -> None:
        while not self._closed.wait(self._interval_s()):
            try:
                self.flush()
            except HeadwayError as e:
                logger.warning("Events of %s are not written yet: %s", self._attempt.run_id, e)

    def _interval_s(self) -> float:
        return min(MAX_FLUSH_S, max(MIN_FLUSH_S, (time.monotonic() - self._started) / 60))


class EventReader:
    """Reads a run's events as they come: each call of :meth:`poll` gives those that are new."""

    def __init__(self, store: Store, run_id: str, *, from_attempt: int = 0) -> None:
        self._store, self._prefix, self._from = store, layout.events(run_id), from_attempt
        self._seen: set[str] = set()

    def poll(self) -> list[Event]:
        """New events in the order of their time."""
        events: list[Event] = []
        for item in self._store.list(self._prefix):
            match = _SEGMENT.fullmatch(item.key.removeprefix(self._prefix))
            if item.key in self._seen or match is None or int(match["attempt"]) < self._from:
                continue
            try:
                data = self._store.get(item.key)
            except NotFound:
                continue
            self._seen.add(item.key)
            events += [json.loads(line) for line in data.decode().splitlines()]
        return sorted(events, key=lambda event: float(event["time_s"]))

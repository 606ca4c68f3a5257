"""Run events: JSON lines in numbered segments under ``runs/<run>/events/<attempt>-<nonce>/<writer>-<n>.jsonl``.

Each writer has its own numbers and never overwrites a segment, so that a record written by several processes, and
by attempts one after the other, is whole whatever dies. Everyone who watches a run reads these: no target needed.

A run of a month has some 500,000 segments. So every hundred of them are written once more as one object,
``<writer>-<first>-<last>.jsonl``, and whoever reads them all reads those.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from typing import Any, NamedTuple

from orchestrator.errors import HeadwayError, NotFound
from orchestrator.record.model import Event
from orchestrator.store import Attempt, Store, layout

logger = logging.getLogger(__name__)
__all__ = ["Event", "EventLog", "EventReader"]

MIN_FLUSH_S, MAX_FLUSH_S = 2.0, 5.0
LOST_S = 10.0
"""What is lost of the record at most where a cluster vanishes: half of it is left for the request itself."""
NUM_GATHERED = 100
"""Segments that are written once more as one object."""
CLOSE_S = 60.0
"""How long closing waits for a request under way: a server that restarts is waited for, a silent one is not."""
_SEGMENT = re.compile(r"(?P<attempt>\d+)-[0-9a-f]+/[a-z]+-[0-9a-f]{4}-(?P<first>\d{5,})(-(?P<last>\d{5,}))?\.jsonl")


class EventLog:
    """Appends events; a thread writes them out as segments.

    A segment goes out every two seconds at first and every five in a long run, so that a watcher sees a young run live
    and no more than :data:`LOST_S` of the record is lost with a cluster. Events that cannot be written are kept and
    retried: the record never stops training.
    """

    def __init__(self, store: Store, attempt: Attempt, writer: str) -> None:
        self._store, self._attempt = store, attempt
        self._prefix = f"{layout.events(attempt.run_id)}{attempt.prefix}/{writer}-{secrets.token_hex(2)}-"
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._events: list[Event] = []
        self._unwritten = b""
        self._segment = 0
        self._gathered: list[bytes] = []
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
                self._gathered.append(self._unwritten)
                self._segment, self._unwritten = self._segment + 1, b""
            if len(self._gathered) >= NUM_GATHERED:
                self._write_gathered()

    def _write_gathered(self) -> None:
        first, last = self._segment - len(self._gathered) + 1, self._segment
        try:
            self._store.create(
                f"{self._prefix}{layout.number(first)}-{layout.number(last)}.jsonl", b"".join(self._gathered)
            )
        except HeadwayError as e:  # some more are tried the next time: these are in the store already
            logger.warning("Events of %s are not gathered yet: %s", self._attempt.run_id, e)
            return
        self._gathered = []

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
        while not self._closed.wait(flush_interval_s(time.monotonic() - self._started)):
            try:
                self.flush()
            except HeadwayError as e:
                logger.warning("Events of %s are not written yet: %s", self._attempt.run_id, e)


def flush_interval_s(age_s: float) -> float:
    """Seconds between two segments of a log of this age. Pure."""
    return min(MAX_FLUSH_S, max(MIN_FLUSH_S, age_s / 60))


class EventReader:
    """Reads a run's events as they come: each call of :meth:`poll` gives those that are new."""

    def __init__(self, store: Store, run_id: str, *, from_attempt: int = 0) -> None:
        self._store, self._prefix, self._from = store, layout.events(run_id), from_attempt
        self._read_to: dict[str, int] = {}
        """The last segment that was read of each writer; each writes them in the order of their numbers."""

    def poll(self) -> list[Event]:
        """New events in the order of their time."""
        events: list[Event] = []
        for writer, longest in self._listed().items():
            while piece := longest.get(self._read_to.get(writer, 0) + 1):
                try:
                    data = self._store.get(self._prefix + piece.key)
                except NotFound:
                    break
                self._read_to[writer] = piece.last
                events += [json.loads(line) for line in data.decode().splitlines()]
        return sorted(events, key=lambda event: float(event["time_s"]))

    def _listed(self) -> dict[str, dict[int, _Piece]]:
        """By writer and by its first segment, the longest object that begins with it."""
        found: dict[str, dict[int, _Piece]] = {}
        for item in self._store.list(self._prefix):
            key = item.key.removeprefix(self._prefix)
            match = _SEGMENT.fullmatch(key)
            if match is not None and int(match["attempt"]) >= self._from:
                piece = _Piece(last=int(match["last"] or match["first"]), key=key)
                longest = found.setdefault(key[: match.start("first")], {})
                longest[int(match["first"])] = max(piece, longest.get(int(match["first"]), piece))
        return found


class _Piece(NamedTuple):
    """One object: a segment, or several that were gathered."""

    last: int
    key: str

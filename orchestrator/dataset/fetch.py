"""Gets pieces of datasets: from this node's disk, else by ranged GETs on threads, with a second request where one lags.

A request that fails or breaks off is asked for again by the store's client. Here comes what that cannot see: one that
takes much longer than its like gets a rival (hedging: Dean & Barroso 2013, "The Tail at Scale"), and bytes that do not
match their digest are asked for once more.
"""

from __future__ import annotations

import hashlib
import logging
import os
import statistics
import threading
import time
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

from orchestrator.dataset.cache import Bytes, PieceCache
from orchestrator.dataset.pieces import Piece
from orchestrator.errors import IntegrityError, UsageError
from orchestrator.store.s3 import Store

logger = logging.getLogger(__name__)
THREADS_VARIABLE = "HEADWAY_READ_THREADS"
DEFAULT_THREADS = 8
_TRIES = 3  # of bytes that do not match their digest
_HEDGE_MIN_S = 0.25
_HEDGE_TIMES = 4.0  # as long as usual
_HEDGE_SHARE = 0.1  # of all requests, at most, have a rival
_REMEMBERED = 64


class Fetcher:
    """Threads that get pieces. Belongs to one process: after a fork the child makes its own.

    Args:
        num_threads: requests at a time, of each of which one piece is in memory. None is ``HEADWAY_READ_THREADS``.
    """

    def __init__(self, store: Store, cache: PieceCache, *, num_threads: int | None = None) -> None:
        self._store, self._cache = store, cache
        threads = num_threads or _threads_of_environment()
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="pieces")
        self._requests = ThreadPoolExecutor(2 * threads, thread_name_prefix="requests")
        self._lock = threading.Lock()
        self._took_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._credit = 1.0
        self._counts: Counter[str] = Counter()

    def submit(self, piece: Piece) -> Future[Bytes]:
        """The piece's bytes, to come, checked.

        Raises (from the future):
            IntegrityError: they are not those of the manifest. StoreError: they cannot be had.
        """
        return self._workers.submit(self._get, piece)

    @property
    def holds_memory(self) -> bool:
        """Whether pieces that it gives may be memory of this process, and no files."""
        return self._cache.is_refused

    def counts(self) -> dict[str, int]:
        """What was done so far.

        ``cached_pieces`` were on this node, ``fetched_pieces`` of ``fetched_bytes`` were not. ``hedged`` requests got a
        rival, ``hedges_won`` of which came first; ``damaged`` pieces were asked for again, as were ``retries``
        requests. ``evicted_pieces`` were deleted from the node to make room.
        """
        with self._lock:
            counts = dict(self._counts)
        return {**counts, "retries": self._store.retries, "evicted_pieces": self._cache.num_evicted}

    def close(self) -> None:
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._requests.shutdown(wait=False, cancel_futures=True)

    def _get(self, piece: Piece) -> Bytes:
        found = self._cache.open(piece.sha256, piece.num_bytes)
        if found is not None:
            self._count(cached_pieces=1)
            return found
        with self._cache.fetching(piece.sha256):
            found = self._cache.open(piece.sha256, piece.num_bytes)  # another may have been quicker
            if found is not None:
                self._count(cached_pieces=1)
                return found
            data = self._fetch(piece)
            self._count(fetched_pieces=1, fetched_bytes=len(data))
            kept = self._cache.add(piece.sha256, data)
        return np.frombuffer(data, dtype=np.uint8) if kept is None else kept

    def _fetch(self, piece: Piece) -> bytes:
        """The bytes from the store; what is damaged on its way, and not where it lies, is right at another try."""
        for tried in range(1, _TRIES + 1):
            data = self._request(piece)
            if len(data) == piece.num_bytes and hashlib.sha256(data).hexdigest() == piece.sha256:
                return data
            if tried < _TRIES:
                self._count(damaged=1)
                logger.warning("%s came damaged; asked for again.", piece)
        what = f"ends after {len(data):,} of them" if len(data) < piece.num_bytes else "does not match its digest"
        raise IntegrityError(
            f"{self._store.uri_of(piece.key)}, bytes {piece.start:,} to {piece.start + piece.num_bytes:,}: "
            f"what lies there {what} (sha256 {piece.sha256[:12]}…).",
            next_step="headway verify tells all that is damaged. Delete the dataset's folder and prepare it anew.",
        )

    def _request(self, piece: Piece) -> bytes:
        began_s = time.monotonic()
        first = self._requests.submit(self._store.get_range, piece.key, piece.start, piece.num_bytes)
        rivals = {first}
        if not wait(rivals, timeout=self._patience_s()).done and self._may_hedge():
            rivals.add(self._requests.submit(self._store.get_range, piece.key, piece.start, piece.num_bytes))
        while True:
            done, rest = wait(rivals, return_when=FIRST_COMPLETED)
            winner = min(done, key=lambda future: future.exception() is not None)  # one that succeeded, if any did
            if winner.exception() is None or not rest:
                break
            rivals = rest
        data = winner.result()
        with self._lock:
            self._took_s.append(time.monotonic() - began_s)
            self._counts["hedges_won"] += winner is not first
        return data

    def _patience_s(self) -> float:
        """How long a request may take before it gets a rival."""
        with self._lock:
            usual_s = statistics.median(self._took_s) if self._took_s else _HEDGE_MIN_S
        return max(_HEDGE_MIN_S, _HEDGE_TIMES * usual_s)

    def _may_hedge(self) -> bool:
        """Not where many requests lag: then the server is slow, and more of them would make it slower."""
        with self._lock:
            if self._credit < 1.0:
                return False
            self._credit -= 1.0
            self._counts["hedged"] += 1
            return True

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)
            self._credit = min(8.0, self._credit + _HEDGE_SHARE * counts.get("fetched_pieces", 0))


def _threads_of_environment() -> int:
    told = os.environ.get(THREADS_VARIABLE, "").strip() or str(DEFAULT_THREADS)
    if not told.isascii() or not told.isdigit() or not 1 <= int(told) <= 256:
        raise UsageError(f"{THREADS_VARIABLE}: {told!r} is no number from 1 to 256.")
    return int(told)

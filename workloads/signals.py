"""SIGTERM to a job's driver, as a request that its attempt saves and ends."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import StoreError
from orchestrator.store import Attempt, Store
from orchestrator.store.attempts import request_stop

logger = logging.getLogger(__name__)


@contextmanager
def stop_on_signal(store: Store, attempt: Attempt) -> Iterator[None]:
    """SIGTERM asks this attempt to save and end: ranks see the request in the store, agree on it, and save."""

    def ask(number: int, _frame: object) -> None:
        reason = f"the job was asked to stop ({signal.Signals(number).name})"
        threading.Thread(target=_ask_to_stop, args=(store, attempt, reason), daemon=True).start()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ask_to_stop(store: Store, attempt: Attempt, reason: str) -> None:
    try:
        request_stop(store, attempt.run_id, attempt.number, reason=reason)
    except StoreError as e:
        logger.warning("Attempt %d goes on, since the stop could not be asked for: %s", attempt.number, e)

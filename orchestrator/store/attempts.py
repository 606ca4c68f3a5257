"""Attempts at a run: claiming a number, being the newest, being asked to stop.

An attempt writes only under keys that carry its number and nonce. Before it commits anything it checks that
it is still the newest; one that sees a newer number stops. So a process that was frozen and wakes up later can
never touch what a newer attempt wrote.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import AlreadyExists, Fenced, NotFound
from orchestrator.store import layout
from orchestrator.store.s3 import Store

_NUMBERED = r"(\d+)\.json"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The claim of one Ray job on a run."""

    run_id: str
    number: int
    nonce: str

    @property
    def prefix(self) -> str:
        """``00002-1f9a…``: the name of everything that this attempt writes."""
        return f"{layout.number(self.number)}-{self.nonce}"


def claim_attempt(store: Store, run_id: str, *, facts: dict[str, Any]) -> Attempt:
    """Claim the next number, which fences every older attempt. ``facts`` (host, job, …) are for people."""
    nonce = secrets.token_hex(4)
    value = {"nonce": nonce, "claimed_s": time.time(), **facts}
    claimed = store.create_numbered(newest_attempt(store, run_id), lambda number: layout.attempt(run_id, number), value)
    return Attempt(run_id=run_id, number=claimed, nonce=nonce)


def newest_attempt(store: Store, run_id: str) -> int:
    """The highest attempt number, or 0 where there is none."""
    keys = [item.key for item in store.list(layout.attempts(run_id))]
    return layout.last_number(keys, _NUMBERED)


def read_attempt(store: Store, run_id: str, number: int) -> dict[str, Any]:
    found: dict[str, Any] = store.get_json(layout.attempt(run_id, number))
    return found


def ensure_newest(store: Store, attempt: Attempt) -> None:
    """Call before every commit.

    Raises:
        Fenced: a newer attempt exists; nothing may be written any more.
    """
    newest = newest_attempt(store, attempt.run_id)
    if newest != attempt.number:
        raise Fenced(f"Attempt {attempt.number} of {attempt.run_id} is fenced: attempt {newest} has taken over.")


def request_stop(store: Store, run_id: str, number: int, *, reason: str) -> None:
    """Ask an attempt to save and end. Asking twice is the same as asking once."""
    try:
        store.create_json(layout.stop_request(run_id, number), {"reason": reason, "asked_s": time.time()})
    except AlreadyExists:
        return


def stop_reason(store: Store, attempt: Attempt) -> str | None:
    """Why this attempt is to stop: it was asked to, or a newer one has taken over. None to go on."""
    names = {item.key.rsplit("/", 1)[-1] for item in store.list(layout.attempts(attempt.run_id))}
    newest = layout.last_number(list(names), _NUMBERED)
    if newest != attempt.number:
        return f"attempt {newest} has taken over"
    if f"{layout.number(attempt.number)}.stop.json" not in names:
        return None
    try:
        return str(store.get_json(layout.stop_request(attempt.run_id, attempt.number))["reason"])
    except NotFound:
        return None


def end_attempt(store: Store, attempt: Attempt, *, state: str, reason: str) -> None:
    """Say that this attempt ended and why. A later attempt may go on from what it committed."""
    try:
        store.create_json(
            layout.attempt_end(attempt.run_id, attempt.number),
            {"state": state, "reason": reason, "ended_s": time.time()},
        )
    except AlreadyExists:
        return


def attempt_end(store: Store, run_id: str, number: int) -> dict[str, Any] | None:
    """How an attempt ended, or None while it goes on (or where it died without a word)."""
    try:
        found: dict[str, Any] = store.get_json(layout.attempt_end(run_id, number))
    except NotFound:
        return None
    return found

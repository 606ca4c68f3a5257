"""Attempts at a run: claiming a number, being the newest, being asked to stop.

An attempt writes only under keys that carry its number and nonce. Before it commits anything it checks that
it is still the newest; one that sees a newer number stops. So a process that was frozen and wakes up later can
never touch what a newer attempt wrote.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import AlreadyExists, AttemptsUsedUp, Fenced, NotFound
from orchestrator.store import layout
from orchestrator.store.s3 import Store

POD_ENDS = "its pod is being ended"
"""The reason of a stop that a pod asks for while Kubernetes ends it: the run is to go on in another one."""

_NUMBERED = r"(\d+)\.json"
_GROUP = r"\.group-(\d+)\.json"


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


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """The claim of one group of workers within an attempt: each restart of the group is a new one."""

    attempt: Attempt
    number: int
    nonce: str

    @property
    def run_id(self) -> str:
        return self.attempt.run_id


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """The attempts that one job may make where a system starts it again and again, as KubeRay does."""

    job_id: str
    first: int
    """The number that its first attempt was to claim."""
    max_attempts: int


def require_turn(store: Store, run_id: str, allowance: Allowance, *, saved_by: int = 0) -> None:
    """Check before a claim that it is still this job's turn. An attempt that was stopped or displaced costs nothing.

    Args:
        saved_by: the newest attempt that committed a checkpoint, 0 for none. Failures before it no longer count: a run
            of weeks may lose its head any number of times, as long as it comes further in between. Jobs that end with
            an error are besides counted by the system that starts them again.

    Raises:
        Fenced: another job works on the run by now. AttemptsUsedUp: so many failed already.
    """
    failures = []
    for number in range(allowance.first, newest_attempt(store, run_id) + 1):
        job = str(read_attempt(store, run_id, number).get("job", ""))
        if job != allowance.job_id:
            raise Fenced(f"{allowance.job_id} gives way: {job} works on {run_id} by now, as attempt {number}.")
        if number < saved_by:
            continue
        end = attempt_end(store, run_id, number)
        if end is None and _stop_request(store, run_id, number) != POD_ENDS:
            failures.append("it died without a word")
        elif end is not None and end["state"] == "failed":
            failures.append(str(end["reason"]))
    if len(failures) >= allowance.max_attempts:
        raise AttemptsUsedUp(
            f"{run_id}: {len(failures)} attempts failed, the last one because: {failures[-1]}",
            next_step="Mend that, then submit it again to go on from the last checkpoint.",
        )


def claim_attempt(store: Store, run_id: str, *, facts: dict[str, Any]) -> Attempt:
    """Claim the next number, which fences every older attempt. ``facts`` (host, job, …) are for people."""
    nonce = secrets.token_hex(4)
    value = {"nonce": nonce, "claimed_s": time.time(), **facts}
    claimed = store.create_numbered(newest_attempt(store, run_id), lambda number: layout.attempt(run_id, number), value)
    return Attempt(run_id=run_id, number=claimed, nonce=nonce)


def claim_group(store: Store, attempt: Attempt) -> WorkerGroup:
    """Claim the attempt's next group number, which fences its older groups: a worker of one may outlive it.

    Raises:
        Fenced: a newer attempt exists.
    """
    ensure_newest(store, attempt)
    nonce = secrets.token_hex(4)
    value = {"nonce": nonce, "claimed_s": time.time()}
    names = _names(store, attempt.run_id)
    claimed = store.create_numbered(
        _newest_group(names, attempt),
        lambda number: layout.worker_group(attempt.run_id, attempt.number, number),
        value,
    )
    return WorkerGroup(attempt=attempt, number=claimed, nonce=nonce)


def newest_attempt(store: Store, run_id: str) -> int:
    """The highest attempt number, or 0 where there is none."""
    return layout.last_number(_names(store, run_id), _NUMBERED)


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


def ensure_newest_group(store: Store, group: WorkerGroup) -> None:
    """Call before every commit of what workers wrote.

    Raises:
        Fenced: a newer attempt exists, or a newer group of the same one.
    """
    reason = _fenced_by(_names(store, group.run_id), group)
    if reason:
        group_of = "" if reason.startswith("attempt") else f" (group {group.number})"
        raise Fenced(f"Attempt {group.attempt.number}{group_of} of {group.run_id} is fenced: {reason} has taken over.")


def _fenced_by(names: list[str], group: WorkerGroup) -> str | None:
    """What has taken over from this group, if anything has. Pure."""
    attempt = layout.last_number(names, _NUMBERED)
    if attempt != group.attempt.number:
        return f"attempt {attempt}"
    newest = _newest_group(names, group.attempt)
    return f"group {newest}" if newest != group.number else None


def _newest_group(names: list[str], attempt: Attempt) -> int:
    return layout.last_number(names, re.escape(layout.number(attempt.number)) + _GROUP)


def _names(store: Store, run_id: str) -> list[str]:
    return [item.key for item in store.list(layout.attempts(run_id))]


def request_stop(store: Store, run_id: str, number: int, *, reason: str) -> None:
    """Ask an attempt to save and end. Asking twice is the same as asking once."""
    try:
        store.create_json(layout.stop_request(run_id, number), {"reason": reason, "asked_s": time.time()})
    except AlreadyExists:
        return


def stop_reason(store: Store, attempt: Attempt, group: WorkerGroup | None = None) -> str | None:
    """Why this attempt, or this group of it, is to stop: it was asked to, or a newer one has taken over; else None."""
    names = _names(store, attempt.run_id)
    newest = layout.last_number(names, _NUMBERED)
    if newest != attempt.number:
        return f"attempt {newest} has taken over"
    if group is not None and (reason := _fenced_by(names, group)):
        return f"{reason} has taken over"
    if layout.stop_request(attempt.run_id, attempt.number) not in names:
        return None
    return _stop_request(store, attempt.run_id, attempt.number)


def _stop_request(store: Store, run_id: str, number: int) -> str | None:
    """The reason of the request that this attempt stops, where there is one."""
    try:
        return str(store.get_json(layout.stop_request(run_id, number))["reason"])
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

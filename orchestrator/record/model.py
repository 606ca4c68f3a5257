"""What a run's record holds, as values that reports and accounts are made from. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]
"""``{"time_s", "kind", "attempt", …}``; kinds are listed in docs/concepts.md."""


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """One attempt, from its claim on. Times are seconds since 1970."""

    number: int
    claimed_s: float
    ended_s: float | None
    """None while it goes on, and for ever where it died without a word."""
    state: str
    """``done``, ``refused``, ``failed``, ``stopped``; empty where it has not said."""
    reason: str
    job: str
    host: str


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One sending of the run to a target. Runs that ``ray job submit`` started have none."""

    submission_id: str
    submitted_s: float
    facts: dict[str, Any]
    """Who sent it, to which target, and from which CI job."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as the store knows it at ``read_s``."""

    run_id: str
    spec: dict[str, Any]
    """``runs/<run>/spec.json``: the run file as understood under ``spec``, and the digests that identify the run."""
    submissions: tuple[Submission, ...]
    attempts: tuple[AttemptRecord, ...]
    events: tuple[Event, ...]
    """In the order of their time."""
    outcome: dict[str, Any] | None
    """``runs/<run>/outcome.json``."""
    read_s: float

    def events_of(self, *kinds: str) -> Iterator[Event]:
        return (event for event in self.events if event["kind"] in kinds)

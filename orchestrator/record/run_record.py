"""All that the store knows of a run, read in one go: what accounts and reports are made from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.errors import NotFound
from orchestrator.record.events import EventReader
from orchestrator.record.model import AttemptRecord, RunRecord, Submission
from orchestrator.store import Store, layout
from orchestrator.store.attempts import attempt_end, newest_attempt, read_attempt

__all__ = ["AttemptRecord", "RunRecord", "Submission", "read_record"]


def read_record(store: Store, run_id: str, *, now_s: float) -> RunRecord:
    """Read a run's record.

    Raises:
        StoreError: it cannot be read.
    """
    return RunRecord(
        run_id=run_id,
        spec=_optional(store, layout.run_spec(run_id)) or {},
        submissions=tuple(_submissions(store, run_id)),
        attempts=tuple(_attempts(store, run_id)),
        events=tuple(EventReader(store, run_id).poll()),
        outcome=_optional(store, layout.outcome(run_id)),
        read_s=now_s,
    )


def _attempts(store: Store, run_id: str) -> Iterator[AttemptRecord]:
    for number in range(1, newest_attempt(store, run_id) + 1):
        claim, end = read_attempt(store, run_id, number), attempt_end(store, run_id, number) or {}
        yield AttemptRecord(
            number=number,
            claimed_s=float(claim["claimed_s"]),
            ended_s=end.get("ended_s"),
            state=str(end.get("state", "")),
            reason=str(end.get("reason", "")),
            job=str(claim.get("job", "")),
            host=str(claim.get("host", "")),
        )


def _submissions(store: Store, run_id: str) -> Iterator[Submission]:
    found = []
    for item in store.list(layout.submissions(run_id)):
        facts: dict[str, Any] = store.get_json(item.key)
        name = item.key.rpartition("/")[2].removesuffix(".json")
        found.append(Submission(submission_id=name, submitted_s=float(facts.pop("submitted_s")), facts=facts))
    return iter(sorted(found, key=lambda each: each.submitted_s))


def _optional(store: Store, key: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = store.get_json(key)
    except NotFound:
        return None
    return found

"""How a run ended for good: ``runs/<run>/outcome.json``, created once and never changed."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.errors import AlreadyExists, GateRefused, IntegrityError, NotFound, RunError
from orchestrator.store import Store, layout


class Outcome(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["headway/outcome/1"] = "headway/outcome/1"
    run_id: str
    state: Literal["done", "refused", "failed"]
    reason: str = ""
    attempt: int
    facts: dict[str, Any] = {}
    """What the run came to: steps, final loss, evaluation, checkpoint, version."""
    ended_s: float

    @classmethod
    def failed(cls, run_id: str, *, attempt: int, reason: str) -> Outcome:
        return cls(run_id=run_id, state="failed", reason=reason, attempt=attempt, ended_s=time.time())

    def raise_unless_done(self) -> None:
        """Turn an outcome into its exit code.

        Raises:
            GateRefused, RunError: as it ended.
        """
        if self.state == "refused":
            raise GateRefused(f"{self.run_id} was refused by the gate: {self.reason}")
        if self.state == "failed":
            raise RunError(f"{self.run_id} failed for good: {self.reason}")


def read_outcome(store: Store, run_id: str) -> Outcome | None:
    """The run's outcome, or None while it has none."""
    key = layout.outcome(run_id)
    try:
        return Outcome.model_validate(store.get_json(key))
    except NotFound:
        return None
    except ValidationError as e:
        raise IntegrityError(f"{store.uri_of(key)} is not a headway/outcome/1 object.") from e


def commit_outcome(store: Store, outcome: Outcome) -> Outcome:
    """Create the outcome; where another came first, that one stands and is returned."""
    try:
        store.create_json(layout.outcome(outcome.run_id), outcome.model_dump(mode="json"))
    except AlreadyExists:
        standing = read_outcome(store, outcome.run_id)
        return standing or outcome
    return outcome

"""What a replica tells the decider, and what it hears."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from workloads.serve.counters import Counts


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Trial(_Frozen):
    """A canary beside the stable version on one replica. It counts since both were there: no lost report loses any."""

    entry: int
    """The channel's entry that names the canary."""
    version: int
    weight: float
    stable: Counts
    canary: Counts


class ReplicaReport(_Frozen):
    """One replica, as it is now."""

    replica: str
    sequence: Annotated[int, Field(ge=0)] = 0
    """Grows with each report of this replica: they may come out of order."""
    serving: int | None = None
    canary: int | None = None
    loading: int | None = None
    tried: int | None = None
    problem: str | None = None
    failures: dict[int, str] = {}
    """Versions that did not load here by what seems to be their own fault, and why."""
    trial: Trial | None = None
    wants_turn: bool = False
    """It asks to reload without a version of its own, or is doing so. False gives the turn back."""


class Reply(_Frozen):
    has_turn: bool = False
    """The replica may reload, as long as it goes on reporting."""
    num_others: int = 0
    """Other replicas that answer now."""

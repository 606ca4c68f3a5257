"""What every target offers. A target only starts, watches and stops attempts; what they do is in the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from orchestrator.package import Package
from orchestrator.render import RequestedJob
from orchestrator.spec import ResourcesSpec


class JobState(StrEnum):
    """A job's state, in Ray's words."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"

    @property
    def ended(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED)


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    state: JobState
    message: str
    exit_code: int | None = None
    """The entrypoint's own, once it has ended by itself: Headway's exit codes are in ``errors``."""
    holds: bool = False
    """It has ended, and what it held is not given back yet."""
    stands_still: bool = False
    """The message says what keeps it from going on."""
    hopeless: bool = False
    """It cannot begin, yet what it holds is not given back until it is stopped."""

    @property
    def over(self) -> bool:
        """It has ended, so that another job may take its place; what it ``holds`` is given back by itself."""
        return self.state.ended and not self.hopeless


@dataclass(frozen=True, kw_only=True)
class Submission:
    submission_id: str
    created: bool
    """False where a job of this id existed already: attach to it."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a target's nodes have in all, in use or not."""

    num_cpus: float
    num_gpus: float
    memory_bytes: int | None
    gpu_kind: str | None
    """Ray's name of the commonest accelerator, such as ``A100``."""


class Request(Protocol):
    """What a target takes, ready to be sent."""

    @property
    def submission_id(self) -> str: ...

    def body(self) -> dict[str, Any]:
        """Exactly what is sent, as JSON."""
        ...


Sent = TypeVar("Sent", bound=Request)


class Target(Protocol[Sent]):
    """Where attempts execute.

    Raises:
        TargetError: from every method, where the system behind it refuses or cannot be reached.
    """

    flag: str
    """The option that names it, after a space, for commands that a person may type next; empty for the default."""
    restarts_jobs: bool
    """Whether a job that failed is started again, so that the end of an attempt is not the end of its job."""

    def capacity(self, resources: ResourcesSpec) -> Capacity:
        """What there is for a run that asks for these.

        Raises:
            SpecError: they can never be had here.
        """
        ...

    def render(self, job: RequestedJob) -> Sent: ...

    def submit(self, request: Sent, package: Package | None = None) -> Submission: ...

    def find(self, submission_id: str) -> JobStatus | None:
        """How a job is doing; None where there is none of this id."""
        ...

    def runs(self) -> dict[str, str]:
        """The newest job of each run that the target knows, by the run's id, oldest first: a run that waits for its
        place is in no store yet.
        """
        ...

    def logs(self, run_id: str, submission_id: str) -> str: ...

    def follow(self, run_id: str, submission_id: str) -> Iterator[str]:
        """New pieces of the log as they come, until the job has ended."""
        ...

    def stop(self, submission_id: str) -> bool:
        """Ask the job to end. False where it had ended already."""
        ...

"""What every job that is sent to a target says of itself, before it takes the form that the target wants."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from orchestrator.spec import ResourcesSpec


@dataclass(frozen=True, kw_only=True)
class RequestedJob(ABC):
    """What is to be started."""

    repeat: int = 0
    """Tells a submission apart from earlier ones of the same."""
    run_file: str
    """Relative to the working directory."""
    version: str
    """Headway's own."""
    package_digest: str | None
    """Of the packaged working directory; None runs in the cluster's own."""
    store_uri: str
    resources: ResourcesSpec = field(default_factory=ResourcesSpec)
    env: dict[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()

    @property
    @abstractmethod
    def command(self) -> list[str]:
        """What the job executes."""

    @property
    @abstractmethod
    def submission_id(self) -> str:
        """At most 47 characters, the first a letter: what KubeRay takes as a RayJob's name."""

    @property
    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """What Ray's dashboard shows beside the job."""

    @property
    @abstractmethod
    def labels(self) -> dict[str, str]:
        """What Kubernetes finds its pods by, without the prefix."""

    @property
    @abstractmethod
    def logs_of(self) -> str:
        """Whose logs the job's are in the store: a run's id, or NAME@FINGERPRINT of a dataset."""

    def num_starts(self, max_attempts: int) -> int:
        """How often a target that starts failed jobs again starts this one in all, of ``max_attempts`` allowed."""
        return 1

    def restart_options(self, max_attempts: int) -> list[str]:
        """What such a target adds to the command."""
        return []

    def save_command(self, timeout_s: int) -> tuple[str, ...]:
        """What has the job save before its head goes away; empty where it has nothing to save."""
        return ()

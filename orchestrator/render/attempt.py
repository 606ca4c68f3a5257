"""One attempt at a run, before it takes the form that a target wants."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.spec import ResourcesSpec


@dataclass(frozen=True, kw_only=True)
class AttemptRequest:
    """What is to be started."""

    run_id: str
    attempt: int
    """The number that the job claims, unless another comes first."""
    repeat: int = 0
    """Tells a submission apart from earlier ones of the same attempt number."""
    run_file: str
    """Relative to the working directory."""
    edition: int = 0
    """Of the run that the file describes: 0 but where the same is done anew."""
    version: str
    """Headway's own."""
    package_digest: str | None
    """Of the packaged working directory; None runs in the cluster's own."""
    store_uri: str
    resources: ResourcesSpec = field(default_factory=ResourcesSpec)
    env: dict[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """What the job executes."""
        return ["headway", "run", self.run_file, "--edition", str(self.edition)]

    @property
    def submission_id(self) -> str:
        return submission_id(self.run_id, self.attempt, repeat=self.repeat)


def submission_id(run_id: str, attempt: int, *, repeat: int = 0) -> str:
    """``code-lm-1a2b3c4d-00002``, or ``code-lm-1a2b3c4d-2-1`` for a repeat; ``r7b-1a2b3c4d--0002`` of ``7b-1a2b3c4d``.

    At most 47 characters, the first a letter: what KubeRay takes as a RayJob's name.
    """
    if run_id[0].isdigit():  # the double dash tells it from a run that is called r7b
        return f"r{run_id}--" + (f"{attempt}-{repeat}" if repeat else f"{attempt:04d}")
    return f"{run_id}-" + (f"{attempt}-{repeat}" if repeat else f"{attempt:05d}")

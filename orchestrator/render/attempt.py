"""One attempt at a run, before it takes the form that a target wants."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.render.requested_job import RequestedJob


@dataclass(frozen=True, kw_only=True)
class AttemptRequest(RequestedJob):
    """What is to be started."""

    run_id: str
    attempt: int
    """The number that the job claims, unless another comes first."""
    edition: int = 0
    """Of the run that the file describes: 0 but where the same is done anew."""

    @property
    def command(self) -> list[str]:
        return ["headway", "run", self.run_file, "--run", self.run_id, "--edition", str(self.edition)]

    @property
    def submission_id(self) -> str:
        return submission_id(self.run_id, self.attempt, repeat=self.repeat)

    @property
    def metadata(self) -> dict[str, str]:
        return {
            "headway_run": self.run_id,
            "headway_attempt": str(self.attempt),
            "headway_version": self.version,
        }

    @property
    def labels(self) -> dict[str, str]:
        return {"run": self.run_id, "attempt": str(self.attempt)}

    @property
    def logs_of(self) -> str:
        return self.run_id

    def num_starts(self, max_attempts: int) -> int:
        return max_attempts

    def restart_options(self, max_attempts: int) -> list[str]:
        return ["--first-attempt", str(self.attempt), "--max-attempts", str(max_attempts)]

    def save_command(self, timeout_s: int) -> tuple[str, ...]:
        stop = ("headway", "pod", "save-and-stop", "--run", self.run_id, "--job", self.submission_id)
        return (*stop, "--timeout", str(timeout_s))


def submission_id(run_id: str, attempt: int, *, repeat: int = 0) -> str:
    """``code-lm-1a2b3c4d-00002``, or ``code-lm-1a2b3c4d-2-1`` for a repeat; ``r7b-1a2b3c4d--0002`` of ``7b-1a2b3c4d``.

    At most 47 characters, the first a letter: what KubeRay takes as a RayJob's name.
    """
    if run_id[0].isdigit():  # the double dash tells it from a run that is called r7b
        return f"r{run_id}--" + (f"{attempt}-{repeat}" if repeat else f"{attempt:04d}")
    return f"{run_id}-" + (f"{attempt}-{repeat}" if repeat else f"{attempt:05d}")

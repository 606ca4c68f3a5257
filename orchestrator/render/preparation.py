"""The making of one dataset, before it takes the form that a target wants."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.render.requested_job import RequestedJob

_DIGITS = 8  # of the fingerprint: a name of 31 characters leaves room for no more in an id of 47


@dataclass(frozen=True, kw_only=True)
class PrepareRequest(RequestedJob):
    """What is to be made. A failed one is not started again by itself; the next goes on from what it made."""

    dataset: str
    fingerprint: str

    @property
    def command(self) -> list[str]:
        return ["headway", "prepare", self.run_file, "--here"]

    @property
    def submission_id(self) -> str:
        return preparation_id(self.dataset, self.fingerprint, repeat=self.repeat)

    @property
    def metadata(self) -> dict[str, str]:
        return {"headway_dataset": self.logs_of, "headway_version": self.version}

    @property
    def labels(self) -> dict[str, str]:
        return {"dataset": self.dataset, "fingerprint": self.fingerprint}

    @property
    def logs_of(self) -> str:
        return f"{self.dataset}@{self.fingerprint}"


def preparation_id(dataset: str, fingerprint: str, *, repeat: int = 0) -> str:
    """``data-code-1a2b3c4d`` of ``code@1a2b3c4d…``, or ``data-code-1a2b3c4d-1`` for a repeat.

    No run's job has such an id: those end in five digits, or in two numbers behind the run's id.
    """
    return f"data-{dataset}-{fingerprint[:_DIGITS]}" + (f"-{repeat}" if repeat else "")

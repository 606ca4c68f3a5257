"""An attempt as a job of Ray's Jobs API."""

from __future__ import annotations

import shlex
from typing import Any

from pydantic import BaseModel, ConfigDict

from orchestrator.render.attempt import AttemptRequest


class JobRequest(BaseModel):
    """The body of Ray's ``POST /api/jobs/``, field for field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    submission_id: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]

    def body(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def job_request(attempt: AttemptRequest) -> JobRequest:
    runtime_env: dict[str, Any] = {
        "env_vars": dict(sorted({**attempt.env, "HEADWAY_STORE": attempt.store_uri}.items()))
    }
    if attempt.package_digest is not None:
        runtime_env["working_dir"] = package_uri(attempt.package_digest)
    if attempt.resources.pip:
        runtime_env["pip"] = list(attempt.resources.pip)
    return JobRequest(
        submission_id=attempt.submission_id,
        entrypoint=shlex.join(attempt.command),
        runtime_env=runtime_env,
        metadata=job_metadata(attempt),
    )


def job_metadata(attempt: AttemptRequest) -> dict[str, str]:
    """What Ray's dashboard shows beside the job."""
    return {
        "headway_run": attempt.run_id,
        "headway_attempt": str(attempt.attempt),
        "headway_version": attempt.version,
    }


def package_uri(digest: str) -> str:
    """Ray's name for a package that lies in its GCS (``ray._private.runtime_env.packaging``)."""
    return f"gcs://_ray_pkg_{digest}.zip"

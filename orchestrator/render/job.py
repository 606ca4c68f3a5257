"""A job of Ray's Jobs API."""

from __future__ import annotations

import shlex
from typing import Any

from pydantic import BaseModel, ConfigDict

from orchestrator.render.requested_job import RequestedJob


class JobRequest(BaseModel):
    """The body of Ray's ``POST /api/jobs/``, field for field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    submission_id: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]

    def body(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def job_request(job: RequestedJob) -> JobRequest:
    runtime_env: dict[str, Any] = {"env_vars": dict(sorted({**job.env, "HEADWAY_STORE": job.store_uri}.items()))}
    if job.package_digest is not None:
        runtime_env["working_dir"] = package_uri(job.package_digest)
    if job.resources.pip:
        runtime_env["pip"] = list(job.resources.pip)
    return JobRequest(
        submission_id=job.submission_id,
        entrypoint=shlex.join(job.command),
        runtime_env=runtime_env,
        metadata=job.metadata,
    )


def package_uri(digest: str) -> str:
    """Ray's name for a package that lies in its GCS (``ray._private.runtime_env.packaging``)."""
    return f"gcs://_ray_pkg_{digest}.zip"

"""What is sent to a target, as plain objects. Pure: what ``plan`` prints is what ``submit`` sends."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class JobRequest(BaseModel):
    """The body of Ray's ``POST /api/jobs/``, field for field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    submission_id: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]


def job_request(
    *,
    run_id: str,
    attempt: int,
    run_file: str,
    version: str,
    package_digest: str | None = None,
    env_vars: Mapping[str, str] | None = None,
    repeat: int = 0,
) -> JobRequest:
    """The Ray job of one attempt.

    Args:
        run_file: the run file's path relative to the working directory.
        version: Headway's own version.
        package_digest: the digest of the packaged working directory; None runs in the cluster's own.
        repeat: tells a submission apart from earlier ones of the same attempt number.
    """
    runtime_env: dict[str, Any] = {}
    if package_digest is not None:
        runtime_env["working_dir"] = package_uri(package_digest)
    if env_vars:
        runtime_env["env_vars"] = dict(sorted(env_vars.items()))
    return JobRequest(
        submission_id=submission_id(run_id, attempt, repeat=repeat),
        entrypoint=shlex.join(["headway", "run", run_file]),
        runtime_env=runtime_env,
        metadata={"headway_run": run_id, "headway_attempt": str(attempt), "headway_version": version},
    )


def submission_id(run_id: str, attempt: int, *, repeat: int = 0) -> str:
    """``code-lm-1a2b3c4d-00002``, or ``…-00002-1`` for a repeat."""
    return f"{run_id}-{attempt:05d}" + (f"-{repeat}" if repeat else "")


def package_uri(digest: str) -> str:
    """Ray's name for a package that lies in its GCS (``ray._private.runtime_env.packaging``)."""
    return f"gcs://_ray_pkg_{digest}.zip"

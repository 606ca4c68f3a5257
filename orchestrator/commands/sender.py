"""Who asks for something, and from which CI job."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping

from orchestrator.errors import StoreError
from orchestrator.store.client import caller_arn

_GITHUB = {
    "repository": "GITHUB_REPOSITORY",
    "commit": "GITHUB_SHA",
    "ref": "GITHUB_REF",
    "workflow": "GITHUB_WORKFLOW",
    "trigger": "GITHUB_EVENT_NAME",
    "actor": "GITHUB_ACTOR",
}
_GITLAB = {
    "repository": "CI_PROJECT_PATH",
    "commit": "CI_COMMIT_SHA",
    "ref": "CI_COMMIT_REF_NAME",
    "workflow": "CI_JOB_NAME",
    "trigger": "CI_PIPELINE_SOURCE",
    "actor": "GITLAB_USER_LOGIN",
    "url": "CI_JOB_URL",
}


def caller() -> str:
    """Who asks: the identity that AWS knows these credentials by, else this machine's user."""
    try:
        arn = caller_arn()
    except StoreError:  # no AWS behind these credentials, or no way to it
        arn = None
    if arn is not None:
        return arn
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def ci_job(environ: Mapping[str, str]) -> dict[str, str]:
    """The CI job that these variables tell of, in the same words for each system; empty outside of one. Pure.

    Variables: GitHub, "Variables reference"; GitLab, "Predefined CI/CD variables".
    """
    if environ.get("GITHUB_ACTIONS") == "true":
        found = {"system": "github", **_present(environ, _GITHUB)}
        run = [environ.get(name, "") for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")]
        return {**found, "url": f"{run[0]}/{run[1]}/actions/runs/{run[2]}"} if all(run) else found
    if environ.get("GITLAB_CI") == "true":
        return {"system": "gitlab", **_present(environ, _GITLAB)}
    return {}


def _present(environ: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    return {field: environ[variable] for field, variable in names.items() if environ.get(variable)}

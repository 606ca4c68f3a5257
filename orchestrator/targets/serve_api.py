"""Ray Serve's REST API over plain HTTP (``ray/dashboard/modules/serve/serve_head.py``, Ray 2.60).

Measured on 2 cores: the first application answers 6 s after it is deployed, 3 s of it Serve's own start.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from orchestrator.errors import TargetError, TimedOut
from orchestrator.targets.jobs_api import RayHttp

_APPLICATIONS = "/api/serve/applications/"
_POLL_S = 0.2
RUNNING = "RUNNING"
FAILED = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})
ABSENT = "NOT_STARTED"
_MAX_WORDS = 500
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*: ", re.MULTILINE)
_OWN_ERROR = re.compile(r"orchestrator\.errors\.\w+: ")


@dataclass(frozen=True, kw_only=True)
class ApplicationStatus:
    state: str
    """Serve's word: DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, DELETING; NOT_STARTED where there is none."""
    message: str


class ServeApi:
    """Applications of one Ray cluster."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ray = RayHttp(url, token=token, transport=transport)
        self._transport = transport
        self._sleep = sleep
        self._clock = clock

    def deploy(self, application: dict[str, Any], *, host: str = "127.0.0.1", port: int = 8000) -> None:
        """Add or change one application by its name; the others stay.

        ``host`` and ``port`` count only where Serve is not started yet: a running proxy cannot be moved.
        """
        details = self._details()
        self._put(details, merged(deployed(details), application), host=host, port=port)

    def remove(self, name: str) -> None:
        """Take one application away; the others stay. One that is gone already does not matter."""
        details = self._details()
        before = deployed(details)
        after = [each for each in before if each["name"] != name]
        if len(after) < len(before):
            self._put(details, after, host="", port=0)

    def status(self, name: str) -> ApplicationStatus:
        found = self._details()["applications"].get(name)
        if found is None:
            return ApplicationStatus(state=ABSENT, message="")
        return ApplicationStatus(state=str(found["status"]), message=str(found.get("message") or ""))

    def wait_until_answering(self, name: str, url: str, *, timeout_s: float) -> None:
        """Wait until the application runs and a GET of ``url`` answers with a success.

        Raises:
            TargetError: its deployment failed. TimedOut: neither in time.
        """
        deadline = self._clock() + timeout_s
        while True:
            status = self.status(name)
            if status.state in FAILED:
                raise TargetError(
                    f"Ray Serve could not start {name}: {gist(status.message) or status.state}",
                    next_step=f"Its logs are in the dashboard, {self._ray.url}",
                )
            if status.state == RUNNING and self._answers(url):
                return
            if self._clock() >= deadline:
                raise TimedOut(
                    f"{name} did not answer at {url} within {timeout_s:.0f} s; Serve says {status.state}: "
                    f"{gist(status.message)}",
                    next_step=f"See the dashboard, {self._ray.url}: are there free CPUs, or GPUs, for its replicas?",
                )
            self._sleep(_POLL_S)

    def _answers(self, url: str) -> bool:
        try:
            with httpx.Client(trust_env=False, timeout=10.0, transport=self._transport) as http:
                return http.get(url).is_success
        except httpx.HTTPError:
            return False

    def _details(self) -> dict[str, Any]:
        found = self._ray.json("GET", _APPLICATIONS)
        if not isinstance(found, dict) or "applications" not in found:
            raise TargetError(f"Ray Serve at {self._ray.url} describes its applications in an unknown form.")
        return found

    def _put(self, details: dict[str, Any], applications: list[dict[str, Any]], *, host: str, port: int) -> None:
        """Send the whole set: Serve deletes applications that a PUT does not name."""
        started = details.get("http_options")
        options = {"host": started["host"], "port": started["port"]} if started else {"host": host, "port": port}
        answer = self._ray.send("PUT", _APPLICATIONS, json={"http_options": options, "applications": applications})
        if answer.status_code != 200:
            raise self._ray.refused(answer)


def gist(message: str) -> str:
    """What Serve says of an application in one line: of tracebacks, the exception that came last. Pure."""
    raised = list(_EXCEPTION.finditer(message)) if "Traceback (most recent call last)" in message else []
    said = " ".join(message[raised[-1].start() if raised else 0 :].split())
    return _OWN_ERROR.sub("", said, count=1)[-_MAX_WORDS:]


def deployed(details: dict[str, Any]) -> list[dict[str, Any]]:
    """The configurations of the applications that REST deployed and that are not on their way out. Pure."""
    return [
        each["deployed_app_config"]
        for each in details["applications"].values()
        if each.get("deployed_app_config") and each.get("status") != "DELETING"
    ]


def merged(before: list[dict[str, Any]], application: dict[str, Any]) -> list[dict[str, Any]]:
    """``before`` with the application of this name replaced or added. Pure."""
    return [*(each for each in before if each["name"] != application["name"]), application]

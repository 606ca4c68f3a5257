"""Ray's Jobs API over plain HTTP: any Ray cluster, from a machine without Ray.

Routes: ``ray/dashboard/modules/job/job_head.py``; nodes: ``ray/dashboard/modules/state/state_head.py`` (Ray 2.60).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any
from urllib.parse import urlsplit

import httpx

from orchestrator.errors import TargetError, TimedOut, UsageError
from orchestrator.package import Package
from orchestrator.render import JobRequest, RequestedJob, job_request, package_uri
from orchestrator.spec import ResourcesSpec
from orchestrator.targets import ray_token
from orchestrator.targets.base import Capacity, JobState, JobStatus, Submission

OLDEST_RAY = (2, 59, 1)
_AGENT_TIMEOUT_S = 60.0
_POLL_S = (0.5, 2.0)
"""How often the log is read: at first, and at the slowest while nothing new comes."""


class RayHttp:
    """One Ray dashboard. Every failure of HTTP leaves here as a :class:`TargetError`."""

    def __init__(self, url: str, *, token: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                f"{url!r} is not the address of a Ray dashboard.", next_step="Write it as http://127.0.0.1:8265"
            )
        self.url = url.rstrip("/")
        chosen = token if token is not None else ray_token.token_for(parts.hostname, os.environ)
        self._http = httpx.Client(
            base_url=self.url,
            headers=ray_token.headers(chosen),
            timeout=httpx.Timeout(60.0, connect=5.0),
            transport=transport,
            # A proxy, where one is set, is for other machines.
            trust_env=not ray_token.is_loopback(parts.hostname),
        )

    def send(self, method: str, path: str, **content: Any) -> httpx.Response:
        """One request. The answer may be of any status but 401 and 403."""
        try:
            answer = self._http.request(method, path, **content)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as e:
            raise TargetError(
                f"Ray at {self.url} cannot be reached ({type(e).__name__}: {e}).",
                next_step="Is Ray running there? For the embedded one: headway up",
            ) from e
        if answer.status_code in (401, 403):
            raise TargetError(
                f"Ray at {self.url} refuses this token ({answer.status_code}).",
                next_step=f"Set {ray_token.TOKEN_VARIABLE} to the cluster's token.",
            )
        return answer

    def json(self, method: str, path: str, **content: Any) -> Any:
        """One request that must succeed, and its answer's JSON."""
        return self.parsed(self.send(method, path, **content))

    def parsed(self, answer: httpx.Response) -> Any:
        """An answer's JSON, where the request succeeded."""
        if answer.status_code != 200:
            raise self.refused(answer)
        try:
            return answer.json()
        except ValueError as e:
            path = answer.request.url.path
            raise TargetError(
                f"What answers at {self.url} is not a Ray dashboard: {path} gave no JSON.",
                next_step="Give the dashboard's address, http://127.0.0.1:8265 by default.",
            ) from e

    def refused(self, answer: httpx.Response) -> TargetError:
        """Ray answers with a traceback; its last line is what matters."""
        lines = [line for line in answer.text.splitlines() if line.strip(" .")]
        said = lines[-1].strip()[:500] if lines else answer.reason_phrase
        return TargetError(f"Ray at {self.url} answered {answer.status_code} to {answer.request.url.path}: {said}")


class JobsApiTarget:
    """Attempts as Ray jobs. A token that is not given comes from ``RAY_AUTH_TOKEN`` or, on this machine, Ray's file."""

    restarts_jobs = False

    def __init__(
        self,
        url: str,
        *,
        flag: str = "",
        token: str | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ray = RayHttp(url, token=token, transport=transport)
        self.url, self.flag = self._ray.url, flag
        self._sleep = sleep
        self._clock = clock

    def ray_version(self) -> str:
        """The cluster's Ray version.

        Raises:
            TargetError: it is older than Headway supports.
        """
        found = str(self._ray.json("GET", "/api/version").get("ray_version", ""))
        numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
        if numbers < OLDEST_RAY:
            oldest = ".".join(map(str, OLDEST_RAY))
            raise TargetError(
                f"Ray at {self.url} is {found or 'of an unknown version'}; Headway needs {oldest} or newer.",
                next_step="Upgrade Ray there: older ones have known security holes.",
            )
        return found

    def capacity(self, _resources: ResourcesSpec | None = None) -> Capacity:
        """What all of its nodes have."""
        answer = self._ray.json("GET", "/api/v0/nodes", params={"detail": 1, "limit": 10_000})
        try:
            nodes = answer["data"]["result"]["result"]
            return capacity_of([node["resources_total"] for node in nodes if node["state"] == "ALIVE"])
        except (KeyError, TypeError) as e:
            raise TargetError(f"Ray at {self.url} describes its nodes in an unknown form ({e!r}).") from e

    def render(self, job: RequestedJob) -> JobRequest:
        return job_request(job)

    def submit(self, request: JobRequest, package: Package | None = None) -> Submission:
        """Upload the package if the cluster lacks it, then submit. Submitting an id twice is safe.

        Raises:
            TimedOut: Ray's agent, which starts jobs, did not come up in time.
        """
        if package is not None:
            self._upload(package)
        deadline = self._clock() + _AGENT_TIMEOUT_S
        while True:
            answer = self._ray.send("POST", "/api/jobs/", json=request.body())
            if answer.status_code == 200:
                return Submission(submission_id=request.submission_id, created=True)
            if "already exists" in answer.text:
                return Submission(submission_id=request.submission_id, created=False)
            if "No available agent" not in answer.text:
                raise self._ray.refused(answer)
            if self._clock() >= deadline:
                raise TimedOut(
                    f"Ray at {self.url} has no agent to start jobs after {_AGENT_TIMEOUT_S:.0f} s.",
                    next_step="Read dashboard_agent.log in Ray's session directory on the head node.",
                )
            self._sleep(1.0)

    def status(self, submission_id: str) -> JobStatus:
        found = self.find(submission_id)
        if found is None:
            raise self._forgotten(submission_id)
        return found

    def find(self, submission_id: str) -> JobStatus | None:
        if not submission_id:
            return None
        answer = self._ray.send("GET", f"/api/jobs/{submission_id}")
        if answer.status_code == 404:
            return None
        if answer.status_code != 200:
            raise self._ray.refused(answer)
        try:
            details = answer.json()
            return JobStatus(
                state=JobState(details["status"]),
                message=str(details.get("message") or ""),
                exit_code=details.get("driver_exit_code"),
            )
        except (ValueError, KeyError) as e:
            raise TargetError(f"Ray at {self.url} describes {submission_id} in an unknown form ({e!r}).") from e

    def runs(self) -> dict[str, str]:
        jobs = self._ray.json("GET", "/api/jobs/")
        try:
            sent = [(job["start_time"] or 0, job) for job in jobs if (job.get("metadata") or {}).get("headway_run")]
            return {job["metadata"]["headway_run"]: job["submission_id"] for _, job in sorted(sent, key=itemgetter(0))}
        except (KeyError, TypeError, AttributeError) as e:
            raise TargetError(f"Ray at {self.url} lists its jobs in an unknown form ({e!r}).") from e

    def logs(self, _run_id: str, submission_id: str) -> str:
        """The whole log so far."""
        answer = self._ray.send("GET", f"/api/jobs/{submission_id}/logs")
        if answer.status_code == 404:
            raise self._forgotten(submission_id)
        return str(self._ray.parsed(answer).get("logs") or "")

    def follow(self, run_id: str, submission_id: str) -> Iterator[str]:
        """New text as it comes, until the job has ended and all of its log is read.

        Ray streams logs over a websocket only; this asks for the log again, less often while nothing comes.
        """
        seen = 0
        pause_s = _POLL_S[0]
        while True:
            ended = self.status(submission_id).state.ended  # before the log: then the log read after it is whole
            text = self.logs(run_id, submission_id)
            new, seen = text[seen:], max(seen, len(text))
            if new:
                yield new
            if ended:
                return
            pause_s = _POLL_S[0] if new else min(pause_s * 1.5, _POLL_S[1])
            self._sleep(pause_s)

    def stop(self, submission_id: str) -> bool:
        """Send SIGTERM to the job's driver; Ray kills it after its own grace period."""
        return bool(self._ray.json("POST", f"/api/jobs/{submission_id}/stop").get("stopped"))

    def _forgotten(self, submission_id: str) -> TargetError:
        return TargetError(
            f"Ray at {self.url} has no job {submission_id}.",
            next_step="A cluster forgets its jobs when its head restarts; the run itself is in the store.",
        )

    def _upload(self, package: Package) -> None:
        path = "/api/packages/" + package_uri(package.digest).replace("://", "/")
        found = self._ray.send("GET", path)
        if found.status_code == 200:
            return
        answer = self._ray.send("PUT", path, content=package.data)
        if answer.status_code != 200:
            raise self._ray.refused(answer)


def capacity_of(nodes: list[Mapping[str, float]]) -> Capacity:
    """Sum Ray's resources of the live nodes. Pure."""
    gpus_by_kind: dict[str, float] = {}
    for node in nodes:
        for name in node:
            if name.startswith("accelerator_type:") and node.get("GPU"):
                kind = name.removeprefix("accelerator_type:")
                gpus_by_kind[kind] = gpus_by_kind.get(kind, 0.0) + node["GPU"]
    memory = sum(node.get("memory", 0.0) for node in nodes)
    return Capacity(
        num_cpus=sum(node.get("CPU", 0.0) for node in nodes),
        num_gpus=sum(node.get("GPU", 0.0) for node in nodes),
        memory_bytes=int(memory) or None,
        gpu_kind=max(gpus_by_kind, key=lambda kind: gpus_by_kind[kind], default=None),
    )

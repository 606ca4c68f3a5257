"""What a RayJob, its pods and its place in the queue say about an attempt, and in one line why nothing moves. Pure.

Every argument is an object in the API's own JSON. Fields: KubeRay 1.6 ``apis/ray/v1/rayjob_types.go``, Kueue 0.17
``apis/kueue/v1beta2/workload_types.go``. Events: KubeRay's ``controllers/ray/utils/constant.go``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import EnvironmentUnusable
from orchestrator.targets.base import JobState, JobStatus

Object = dict[str, Any]

_ENDED_DEPLOYMENTS = ("Complete", "Failed", "ValidationFailed")
_ENTRYPOINT_FAILED = re.compile(r"(Job entrypoint command failed with exit code (\d+))\b")
"""Ray's own sentence (``ray/dashboard/modules/job/job_supervisor.py``), which the end of the log follows."""
_OWN_WORD = "headway: "
_CREATION_REFUSED = re.compile(r"^Failed (?:to create|creating) .*?, ")
_HOPELESS_WAITS = ("InvalidImageName", "ErrImageNeverPull")
_REFUSED_EXIT_CODES = (1, 2)
"""With which ``headway pod fetch-code`` ends where the stored code is damaged, or the image is of another version."""
_MAX_MESSAGE = 300


@dataclass(frozen=True, kw_only=True)
class Standstill:
    """Why an attempt does not go on."""

    reason: str
    hopeless: bool = False
    """It would stand still for ever."""


def job_status(
    ray_job: Object, *, pods: Sequence[Object] = (), workloads: Sequence[Object] = (), events: Sequence[Object] = ()
) -> JobStatus:
    """A RayJob in the words of Ray's Jobs API.

    Args:
        pods: its cluster's.
        workloads: all of the namespace, for the place in the queue.
        events: about the RayJob, then about its cluster, each oldest first.
    """
    status = ray_job.get("status") or {}
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    if deployment in _ENDED_DEPLOYMENTS:
        return _ended(ray_job["spec"], status)
    if _ending(ray_job):
        return JobStatus(state=JobState.RUNNING, message="it is being ended")
    found = standstill(ray_job, pods=pods, workloads=workloads, events=events)
    running = deployment == "Running" and job == "RUNNING"
    if found is not None and found.hopeless and not running:
        return JobStatus(
            state=JobState.FAILED, message=found.reason, exit_code=EnvironmentUnusable.exit_code, hopeless=True
        )
    state = JobState.RUNNING if running else JobState.PENDING
    message = found.reason if found else _progress(ray_job, pods)
    return JobStatus(state=state, message=message, stands_still=found is not None)


def standstill(
    ray_job: Object, *, pods: Sequence[Object], workloads: Sequence[Object], events: Sequence[Object]
) -> Standstill | None:
    """The first thing that keeps an attempt from going on, or None where all is well. Of a RayService too."""
    if ray_job["spec"].get("suspend"):
        return Standstill(reason=_queued(ray_job, workloads))
    alive = sorted((pod for pod in pods if not _ending(pod)), key=lambda each: _node_type(each) != "head")
    for pod in alive:
        found = _pod_standstill(pod)
        if found is not None:
            return found
    refusal = _refusal(events)
    if refusal and len(alive) < _num_pods(ray_job):
        return Standstill(reason=refusal)
    deployment = (ray_job.get("status") or {}).get("jobDeploymentStatus")
    if deployment == "Running" and not any(_node_type(pod) == "head" for pod in alive):
        return Standstill(reason="its head pod is lost; KubeRay makes another, where the run goes on")
    return None


def _ended(spec: Object, status: Object) -> JobStatus:
    """A RayJob that goes on no more. KubeRay calls a stopped job Complete too."""
    deployment, job, reason = (status.get(key) or "" for key in ("jobDeploymentStatus", "jobStatus", "reason"))
    message = str(status.get("message") or "")
    state = JobState(job) if deployment == "Complete" and job else JobState.FAILED
    code = _ENTRYPOINT_FAILED.search(message)
    if reason == "DeadlineExceeded":
        said = f"it took longer than deadlines.run allows, {spec.get('activeDeadlineSeconds')} s"
    elif reason == "PreRunningDeadlineExceeded":
        said = f"it did not start within deadlines.start, {spec.get('preRunningDeadlineSeconds')} s"
    elif state is not JobState.FAILED or reason == "AppFailed":
        said = _one_line(message)
    else:
        said = f"{reason or deployment}: {_one_line(message)}".rstrip(": ")
    # Kueue takes ValidationFailed for a job that goes on, so only deleting it gives its quota back.
    hopeless = deployment == "ValidationFailed"
    return JobStatus(state=state, message=said, exit_code=int(code[2]) if code else None, hopeless=hopeless)


def _one_line(message: str) -> str:
    """The gist of what Ray says of a job: often a traceback, or a sentence and the end of the log."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not lines:
        return ""
    failed = _ENTRYPOINT_FAILED.match(lines[0])
    if failed:
        own = [line.removeprefix(_OWN_WORD) for line in lines if line.startswith(_OWN_WORD)]
        return _short(f"{failed[1]}: {own[-1]}" if own else failed[1])
    if lines[0].startswith("Traceback"):
        return _short(lines[-1])
    return _short(lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}")


# -- the queue


def _queued(ray_job: Object, workloads: Sequence[Object]) -> str:
    """Its place in Kueue's queue, and what Kueue says is missing."""
    own = next((each for each in workloads if _belongs_to(each, ray_job)), None)
    if own is None:
        queue = (ray_job["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name")
        return f"suspended; Kueue has no workload of it yet (queue {queue})" if queue else "suspended by spec.suspend"
    unreserved, evicted = _condition(own, "QuotaReserved", "False"), _condition(own, "Evicted", "True")
    said = _short((unreserved or evicted).get("message"))
    if own["spec"].get("active") is False:
        return f"Kueue has set its workload aside: {_short(evicted.get('message')) or said}".rstrip(": ")
    if unreserved.get("reason") == "Inadmissible":
        return f"Kueue cannot admit it: {said}"
    queue = own["spec"].get("queueName", "")
    waiting = [each for each in workloads if each["spec"].get("queueName") == queue and not _admitted(each)]
    if own not in waiting:
        return f"admitted from queue {queue}; its pods are about to be made"
    place = sorted(waiting, key=_precedence).index(own) + 1
    line = f"queued in {queue}, place {place} of {len(waiting)}"
    return f"{line}: {said}" if said else line


def _belongs_to(workload: Object, ray_job: Object) -> bool:
    owners = workload["metadata"].get("ownerReferences") or []
    return any(owner.get("uid") == ray_job["metadata"].get("uid") for owner in owners)


def _admitted(workload: Object) -> bool:
    return any(_condition(workload, kind, "True") for kind in ("Admitted", "Finished"))


def _precedence(workload: Object) -> tuple[int, str]:
    """Kueue's order: priority, then age."""
    return -int(workload["spec"].get("priority") or 0), str(workload["metadata"].get("creationTimestamp"))


def _condition(thing: Object, kind: str, status: str) -> Object:
    """The condition of this type, where it has this status; else empty."""
    conditions = (thing.get("status") or {}).get("conditions") or []
    return next((each for each in conditions if each["type"] == kind and each["status"] == status), {})


# -- pods


def _pod_standstill(pod: Object) -> Standstill | None:
    who = f"{_node_type(pod)} pod {pod['metadata']['name']}"
    status = pod.get("status") or {}
    unscheduled = _condition(pod, "PodScheduled", "False")
    if unscheduled:
        # The scheduler adds what it thought of preempting, which says nothing new.
        said = str(unscheduled.get("message") or unscheduled.get("reason") or "").partition(" preemption: ")[0]
        return Standstill(reason=f"{who} cannot be scheduled: {_short(said)}")
    if status.get("phase") == "Failed":
        said = ": ".join(str(status[key]) for key in ("reason", "message") if status.get(key))
        return Standstill(reason=f"{who} failed: {_short(said) or 'its containers ended'}")
    for container in _containers(status):
        found = _container_standstill(who, container)
        if found is not None:
            return found
    return None


def _container_standstill(who: str, container: Object) -> Standstill | None:
    state = container.get("state") or {}
    waiting = state.get("waiting") or {}
    ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated") or {}
    name = container["name"]
    if name == "fetch-code" and ended.get("exitCode") in _REFUSED_EXIT_CODES:
        return Standstill(reason=f"{who} cannot use the code: {_own_words(ended)}", hopeless=True)
    if ended.get("reason") == "OOMKilled" and not container.get("ready"):
        advice = "; raise its memory in target.yaml" if name == "ray" else ""
        return Standstill(reason=f"{who}: {name} was killed for want of memory (OOMKilled){advice}")
    why = waiting.get("reason", "")
    if why == "CrashLoopBackOff":
        last = f", the last time with code {ended.get('exitCode')}: {_own_words(ended)}" if ended else ""
        return Standstill(reason=f"{who}: {name} ends again and again{last}")
    if why and why not in ("PodInitializing", "ContainerCreating"):
        said = f"{who}: {name} waits, {why}: {_short(waiting.get('message'))}".rstrip(": ")
        return Standstill(reason=said, hopeless=why in _HOPELESS_WAITS)
    return None


def _containers(status: Object) -> Iterator[Object]:
    yield from status.get("initContainerStatuses") or []
    yield from status.get("containerStatuses") or []


def _own_words(ended: Object) -> str:
    """What a container said of its end: Headway's own line, which is followed by the next step, else its last one."""
    lines = [line for line in str(ended.get("message") or "").splitlines() if line.strip()]
    told = [line.removeprefix(_OWN_WORD) for line in lines if line.startswith(_OWN_WORD)] or lines
    return _short(told[-1]) if told else str(ended.get("reason") or "no word of it")


def _refusal(events: Sequence[Object]) -> str:
    """Why the API made no pod, or not even a cluster, when KubeRay last asked; empty where it made it."""
    asked = [each for each in events if str(each.get("reason")).startswith(("Created", "FailedToCreate", "Invalid"))]
    if not asked or asked[-1].get("type") != "Warning":
        return ""
    said = _CREATION_REFUSED.sub("", str(asked[-1].get("message") or ""))
    what = "a pod" if str(asked[-1]["reason"]).endswith("Pod") else "the cluster"
    return f"{what} is refused: {_short(said)}"


# -- how far it is


def _progress(ray_job: Object, pods: Sequence[Object]) -> str:
    status = ray_job.get("status") or {}
    deployment, said = status.get("jobDeploymentStatus", ""), _one_line(str(status.get("message") or ""))
    if deployment == "Retrying":
        failed, limit = status.get("failed", 0), ray_job["spec"].get("backoffLimit", 0) + 1
        because = f" ({said})" if said else ""
        return f"failure {failed} of {limit}{because}; a new cluster takes over"
    if not pods:
        return f"waiting for pods ({deployment or 'not seen by KubeRay yet'})"
    num_ending, expected = sum(map(_ending, pods)), _num_pods(ray_job)
    ready = sum(1 for pod in pods if not _ending(pod) and _condition(pod, "Ready", "True"))
    line = f"{ready} of {expected} pods ready" + (f", {num_ending} being ended" if num_ending else "")
    if ready < expected or status.get("jobStatus") == "RUNNING":
        return line
    return f"{line}; {said or 'Ray has yet to start the job'}"


def _num_pods(ray_job: Object) -> int:
    """Pods that the whole cluster of a RayJob, or a RayService, has."""
    cluster = ray_job["spec"].get("rayClusterSpec") or ray_job["spec"].get("rayClusterConfig") or {}
    groups = cluster.get("workerGroupSpecs") or []
    return 1 + sum(int(group.get("replicas") or 0) for group in groups)


def _ending(thing: Object) -> bool:
    return bool(thing["metadata"].get("deletionTimestamp"))


def _node_type(pod: Object) -> str:
    return str((pod["metadata"].get("labels") or {}).get("ray.io/node-type", "a"))


def _short(message: Any) -> str:
    text = " ".join(str(message or "").split())
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}…"

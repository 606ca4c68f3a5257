"""Served models as RayServices: created, changed in place, waited for, deleted.

KubeRay 1.6 does not carry a changed number of worker pods from a RayService to its running RayCluster
(``rayservice_controller.go``: ``isClusterSpecHashEqual`` leaves replicas out), so that is done here: more pods at
once, fewer only when Serve has taken its replicas off them. Whatever else changes in the pods makes KubeRay start a
second cluster and move over to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from orchestrator.errors import TargetError, TimedOut
from orchestrator.render.ray_service import SERVE_PORT, SERVICE_LABEL, WORKERS, RayServiceRequest
from orchestrator.targets.kubernetes.client import RAY_SERVICES, Object
from orchestrator.targets.kubernetes.forward import Forwarding, forwarded
from orchestrator.targets.kubernetes.reasons import standstill
from orchestrator.targets.serve_api import RUNNING, gist

RAY_CLUSTERS = "rayclusters"
_MANAGER = "app.kubernetes.io/managed-by"
_HOPELESS_CONDITIONS = ("ValidationFailed", "InitializingTimeout")
_DEPLOY_FAILED = "DEPLOY_FAILED"
_NOT_SENT = "FailedToUpdateServeApplications"
_POLL_S = 1.0
_SETTLE_S = 10.0
"""How long a failure must last: KubeRay looks every 2 s, so what it says first may be of the time before a change."""
_ANSWER_S = 10.0


class Client(Forwarding, Protocol):
    """As much of :class:`orchestrator.targets.kubernetes.client.KubernetesClient` as this needs."""

    namespace: str

    def create(self, plural: str, manifest: Object) -> bool: ...

    def get(self, plural: str, name: str) -> Object | None: ...

    def patch(self, plural: str, name: str, change: Object) -> Object | None: ...

    def delete(self, plural: str, name: str) -> bool: ...

    def pods(self, selector: str) -> Sequence[Object]: ...

    def events(self, name: str) -> Sequence[Object]: ...


def apply_service(client: Client, request: RayServiceRequest) -> bool:
    """Make the RayService what is asked for. False where it is that already.

    Raises:
        TargetError: one of this name is being deleted, or is not Headway's.
    """
    if client.create(RAY_SERVICES, request.manifest):
        return True
    current = client.get(RAY_SERVICES, request.name)
    if current is None or current["metadata"].get("deletionTimestamp"):
        raise TargetError(
            f"RayService {request.name} is being deleted.",
            next_step=f"Wait until it is gone: kubectl -n {client.namespace} get rayservices",
        )
    wanted = request.manifest["metadata"]
    if (current["metadata"].get("labels") or {}).get(_MANAGER) != wanted["labels"][_MANAGER]:
        raise TargetError(
            f"Namespace {client.namespace} has a RayService {request.name} that Headway did not create.",
            next_step="Rename or delete it.",
        )
    change = {
        "metadata": {"labels": wanted["labels"], "annotations": wanted["annotations"]},
        "spec": merge_patch(current["spec"], request.manifest["spec"]),
    }
    patched = client.patch(RAY_SERVICES, request.name, change)
    return patched is None or patched["metadata"]["generation"] != current["metadata"]["generation"]


def delete_service(client: Client, name: str) -> bool:
    """Take a served model away, with its pods. False where there was none."""
    return client.delete(RAY_SERVICES, name)


def wait_until_answering(
    client: Client,
    request: RayServiceRequest,
    *,
    path: str,
    timeout_s: float,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Wait until the service is as asked for and a GET of ``path`` on one of its pods answers with a success.

    Args:
        say: is told in one line what it waits for, whenever that changes.

    Raises:
        TargetError: it was deleted, or failed in a way that waiting does not change. TimedOut: neither in time.
    """
    deadline, told, failing_since_s = clock() + timeout_s, "", None
    where = f"kubectl -n {client.namespace} get pods -l {SERVICE_LABEL}={request.name}"
    while True:
        seen = _look(client, request)
        if seen.ready_pod is not None and _answers(client, seen.ready_pod, path):
            return
        if not seen.failed:
            failing_since_s = None
        elif failing_since_s is None:
            failing_since_s = clock()
        elif clock() - failing_since_s >= _SETTLE_S:
            raise TargetError(f"{request.name} cannot serve: {seen.message}.", next_step=f"Look at its pods: {where}")
        if seen.message != told:
            told = seen.message
            say(f"{request.name}: {told}")
        if clock() >= deadline:
            raise TimedOut(
                f"{request.name} did not answer within {timeout_s:.0f} s: {told}.",
                next_step=f"It goes on starting; wait again with the same command, or look: {where}",
            )
        sleep(_POLL_S)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a service has come."""

    message: str
    failed: bool = False
    ready_pod: str | None = None
    """One that serves, once all is as asked for."""


def progress(
    service: Object, *, pods: Sequence[Object], events: Sequence[Object], request: RayServiceRequest
) -> Progress:
    """What a RayService and its current cluster's pods say. Pure.

    Args:
        pods: of the current cluster, the head's too.
        events: about the RayService and its cluster, oldest first.
    """
    status = service.get("status") or {}
    ready: Object = next((each for each in status.get("conditions") or [] if each["type"] == "Ready"), {})
    if ready.get("reason") in _HOPELESS_CONDITIONS:
        return Progress(message=f"{ready['reason']}: {_line(ready.get('message'))}", failed=True)
    stuck = standstill(service, pods=pods, workloads=(), events=events)
    if stuck is not None:
        return Progress(message=stuck.reason, failed=stuck.hopeless)
    if int(status.get("observedGeneration") or 0) < int(service["metadata"]["generation"]):
        return Progress(message="KubeRay has not seen it yet")
    application = (_current(service).get("applicationStatuses") or {}).get(request.application) or {}
    state = application.get("status") or "not started"
    if not application and not any(map(_is_ready, _of_type("head", pods))):
        return Progress(message="waiting for its head pod")
    if state != RUNNING:
        return Progress(message=_deployment(state, application, events), failed=state == _DEPLOY_FAILED)
    workers = _of_type("worker", pods)
    serving = [pod["metadata"]["name"] for pod in workers if _is_ready(pod)]
    if len(serving) < request.replicas:
        return Progress(message=f"{len(serving)} of {request.replicas} replicas' pods ready")
    if len(workers) > request.replicas:
        return Progress(message=f"{len(workers)} pods, to be {request.replicas} once Serve has left the others")
    if (status.get("pendingServiceStatus") or {}).get("rayClusterName"):
        return Progress(message="moving over to the new cluster")
    if ready.get("status") != "True":
        return Progress(message="waiting for the service's endpoints")
    return Progress(message="waiting for an answer", ready_pod=serving[0])


def scaled(cluster: Object, *, pods: Sequence[Object], replicas: int) -> Object | None:
    """How a RayCluster's worker groups are to change for so many replicas; None where they need not. Pure.

    A pod is given up only where its Serve proxy no longer takes requests, which is where it has no replica any more.
    """
    groups: list[Object] = cluster["spec"]["workerGroupSpecs"]
    group = next((each for each in groups if each["groupName"] == WORKERS), None)
    if group is None or group.get("replicas") == replicas:
        return None
    change: Object = {"replicas": replicas, "minReplicas": replicas, "maxReplicas": replicas}
    surplus = int(group.get("replicas") or 0) - replicas
    if surplus > 0:
        idle = [pod["metadata"]["name"] for pod in _of_type("worker", pods) if not _is_ready(pod)]
        if len(idle) < surplus:
            return None
        change["scaleStrategy"] = {"workersToDelete": sorted(idle)[:surplus]}
    return {"spec": {"workerGroupSpecs": [{**each, **change} if each is group else each for each in groups]}}


def merge_patch(current: Any, wanted: Any) -> Any:
    """The RFC 7386 patch that makes ``current`` be ``wanted``: what is to go is null. Pure."""
    if not isinstance(current, dict) or not isinstance(wanted, dict):
        return wanted
    gone = {key: None for key in current if key not in wanted}
    return {**gone, **{key: merge_patch(current.get(key), value) for key, value in wanted.items()}}


def _look(client: Client, request: RayServiceRequest) -> Progress:
    """See where the service stands, and fit its cluster's pods to the replicas."""
    service = client.get(RAY_SERVICES, request.name)
    if service is None:
        raise TargetError(
            f"RayService {request.name} was deleted while it was waited for.", next_step="Serve the model again."
        )
    name = str(_current(service).get("rayClusterName") or "")
    if not name:
        return progress(service, pods=[], events=client.events(request.name), request=request)
    pods = [pod for pod in client.pods(f"ray.io/cluster={name}") if not pod["metadata"].get("deletionTimestamp")]
    cluster = client.get(RAY_CLUSTERS, name)
    change = scaled(cluster, pods=pods, replicas=request.replicas) if cluster is not None else None
    if change is not None:
        client.patch(RAY_CLUSTERS, name, change)
        return Progress(message=f"changing the number of pods to {request.replicas}")
    events = [*client.events(request.name), *client.events(name)]
    return progress(service, pods=pods, events=events, request=request)


def _answers(client: Client, pod: str, path: str) -> bool:
    try:
        with (
            forwarded(client, pod, SERVE_PORT) as port,
            httpx.Client(trust_env=False, timeout=_ANSWER_S) as http,
        ):
            return http.get(f"http://127.0.0.1:{port}{path}").is_success
    except httpx.HTTPError:
        return False


def _current(service: Object) -> Object:
    """The cluster that is to serve: the one that is being prepared, else the one that does."""
    status = service.get("status") or {}
    pending: Object = status.get("pendingServiceStatus") or {}
    active: Object = status.get("activeServiceStatus") or {}
    return pending if pending.get("rayClusterName") else active


def _of_type(node_type: str, pods: Sequence[Object]) -> list[Object]:
    return [pod for pod in pods if (pod["metadata"].get("labels") or {}).get("ray.io/node-type") == node_type]


def _is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _deployment(state: str, application: Object, events: Sequence[Object]) -> str:
    """Serve's own words about the application, or KubeRay's where Serve has not heard of it."""
    deployments = (application.get("serveDeploymentStatuses") or {}).values()
    words = [application.get("message"), *(each.get("message") for each in deployments)]
    if not application:
        refusals = [str(each.get("message")) for each in events if each.get("reason") == _NOT_SENT]
        words += [each.rpartition("err: ")[2] for each in refusals[-1:]]
    said = next((gist(str(each)) for each in words if each), "")
    return f"Ray Serve says {state}: {said}" if said else f"Ray Serve says {state}"


def _line(message: Any) -> str:
    return " ".join(str(message or "").split())[-500:]

"""Pods for KubeRay: the Ray container, what runs beside it, and what every pod of a "restricted" namespace must say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.target_settings import PodSize, Pool, S3Settings, TargetSettings

Manifest = dict[str, Any]

PREFIX = "headway.dev"
RUN_LABEL, JOB_LABEL, COMPONENT_LABEL = f"{PREFIX}/run", f"{PREFIX}/job", f"{PREFIX}/component"
STORE = f"{PREFIX}/store"
"""Annotation: two stores may hold runs of one id, and a namespace only one RayJob of a name."""
CODE, RAY_TEMP = "/headway/code", "/tmp/ray"
_POD_NAME = "POD_NAME"  # ship-logs reads it
_USER = 1000  # of Ray's images
_RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
# What KubeRay asks by itself, but from the start and each second; it asks after 10 s and every 5, and a job starts when
# the last pod is ready.
_READINESS = {
    "httpGet": {"path": "/api/healthz", "port": 52365},
    "periodSeconds": 1,
    "timeoutSeconds": 5,
    "failureThreshold": 60,
}
# Beside Ray: short-lived or nearly idle, and a memory limit that a Python process with boto3 keeps well below.
_HELPER_RESOURCES = {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"cpu": "1", "memory": "512Mi"}}


@dataclass(frozen=True, kw_only=True)
class RayPod:
    """One Ray node's pod."""

    component: str
    """``trainer`` or ``server``."""
    labels: Mapping[str, str]
    account: str
    size: PodSize
    pool: Pool | None = None
    """Where the pod runs and what it asks for besides; None for a head."""
    priority: str | None
    s3_secret: str | None
    env: Mapping[str, str]
    secrets: tuple[str, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)
    fetch_code: tuple[str, ...] = ()
    """Command that fills the working directory before Ray starts."""
    ship_logs: tuple[str, ...] = ()
    """Command that keeps Ray's logs in the store."""
    pre_stop: tuple[str, ...] = ()
    """Command that runs in the Ray container before it is asked to end."""
    grace_s: int


def template(pod: RayPod, settings: TargetSettings) -> Manifest:
    """The pod template of a group in a RayCluster."""
    beside = [
        *([_container("fetch-code", pod.fetch_code, pod, settings)] if pod.fetch_code else []),
        *([_container("logs", pod.ship_logs, pod, settings) | {"restartPolicy": "Always"}] if pod.ship_logs else []),
    ]
    spec: Manifest = {
        "serviceAccountName": pod.account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": pod.grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "initContainers": beside,
        "containers": [_without_empty(_ray_container(pod, settings))],
        "volumes": _volumes(pod, settings),
    }
    if pod.priority:
        spec["priorityClassName"] = pod.priority
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if pod.pool and pod.pool.node_selector:
        spec["nodeSelector"] = dict(pod.pool.node_selector)
    if pod.pool and pod.pool.tolerations:
        spec["tolerations"] = [each.model_dump(mode="json", exclude_none=True) for each in pod.pool.tolerations]
    labels = {"app.kubernetes.io/name": "headway", COMPONENT_LABEL: pod.component, **pod.labels}
    return {"metadata": {"labels": labels}, "spec": _without_empty(spec)}


def _without_empty(manifest: Manifest) -> Manifest:
    """What the API server keeps of it: an empty list is none."""
    return {key: value for key, value in manifest.items() if value != []}


def s3_environment(s3: S3Settings, store_uri: str) -> dict[str, str]:
    """Variables by which boto3 finds the store."""
    found = {"HEADWAY_STORE": store_uri}
    if s3.endpoint_url:
        found["AWS_ENDPOINT_URL"] = s3.endpoint_url
    if s3.region:
        found |= {"AWS_REGION": s3.region, "AWS_DEFAULT_REGION": s3.region}
    return found


def _ray_container(pod: RayPod, settings: TargetSettings) -> Manifest:
    container = _container("ray", (), pod, settings)
    container["resources"] = _resources(pod)
    container["ports"] = [{"name": name, "containerPort": port} for name, port in pod.ports.items()]
    container["readinessProbe"] = _READINESS
    container["volumeMounts"] = [*container["volumeMounts"], {"name": "shared-memory", "mountPath": "/dev/shm"}]
    if pod.fetch_code:
        container["workingDir"] = CODE
    if pod.pre_stop:
        container["lifecycle"] = {"preStop": {"exec": {"command": list(pod.pre_stop)}}}
    return container


def _container(name: str, command: tuple[str, ...], pod: RayPod, settings: TargetSettings) -> Manifest:
    """A container that reaches the store, sees the working directory and Ray's files, and has no privilege."""
    # Of a key in two of them the last one's value counts: the store's own come last.
    secrets = [*(pod.secrets if name == "ray" else ()), *([pod.s3_secret] if pod.s3_secret else [])]
    container: Manifest = {
        "name": name,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "env": _environment(pod, code=name == "ray" and bool(pod.fetch_code)),
        "envFrom": [{"secretRef": {"name": secret}} for secret in secrets],
        "securityContext": _RESTRICTED,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(pod, settings),
    }
    if command:
        container |= {"command": list(command), "resources": _HELPER_RESOURCES}
    return _without_empty(container)


def _environment(pod: RayPod, *, code: bool) -> list[Manifest]:
    """Each name once: of two the API server refuses the whole object.

    Args:
        code: let Python find the working directory, before what ``PYTHONPATH`` holds already.
    """
    values = {key: value for key, value in pod.env.items() if key != _POD_NAME}
    if code:
        values["PYTHONPATH"] = ":".join(filter(None, [CODE, values.get("PYTHONPATH")]))
    own = {"name": _POD_NAME, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    return [own, *({"name": key, "value": value} for key, value in sorted(values.items()))]


def _resources(pod: RayPod) -> Manifest:
    """Requests equal limits but for the CPU, where ``cpu_request`` says so."""
    size = pod.size
    extended = {}
    if pod.pool:
        extended = {name: str(count) for name, count in pod.pool.extended_resources.items()}
        if pod.pool.gpus_per_pod:
            extended[pod.pool.gpu_resource] = str(pod.pool.gpus_per_pod)
    return {
        "requests": {"cpu": size.cpu_request or size.cpu, "memory": size.memory, **extended},
        "limits": {"cpu": size.cpu, "memory": size.memory, **extended},
    }


def _mounts(pod: RayPod, settings: TargetSettings) -> list[Manifest]:
    return [
        {"name": "ray-temp", "mountPath": RAY_TEMP},
        *([{"name": "code", "mountPath": CODE}] if pod.fetch_code else []),
        *(
            {"name": f"claim-{number}", "mountPath": mount.path, "readOnly": mount.read_only}
            for number, mount in enumerate(settings.claims)
        ),
    ]


def _volumes(pod: RayPod, settings: TargetSettings) -> list[Manifest]:
    shared_memory = pod.pool.shared_memory if pod.pool else "1Gi"
    return [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}},
        {"name": "ray-temp", "emptyDir": {}},
        *([{"name": "code", "emptyDir": {}}] if pod.fetch_code else []),
        *(
            {
                "name": f"claim-{number}",
                "persistentVolumeClaim": {"claimName": mount.claim, "readOnly": mount.read_only},
            }
            for number, mount in enumerate(settings.claims)
        ),
    ]

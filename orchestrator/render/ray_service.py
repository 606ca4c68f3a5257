"""A model's channel as a RayService of KubeRay (``ray.io/v1``, KubeRay 1.6: ``apis/ray/v1/rayservice_types.go``).

No queue label: a served model answers people, and must not wait behind training for its quota.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from orchestrator.errors import SpecError
from orchestrator.node_cache import CACHE_VARIABLE
from orchestrator.render.pods import PREFIX, RAY_TEMP, Manifest, RayPod, s3_environment, template
from orchestrator.render.ray_job import HEAD_PORTS
from orchestrator.target_settings import Pool, TargetSettings, amount

SERVE_PORT = 8000
SERVICE_LABEL = f"{PREFIX}/service"
WORKERS = "replicas"
"""The one worker group: each pod of it holds one replica."""
_IMPORT_PATH = "workloads.serve.app:build"
_MAX_NAME = 47
"""KubeRay's own limit: 53 for a RayCluster, less the 6 characters that tell its clusters apart."""
_DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")  # RFC 1035
_OF_THE_POOL = {
    "num_cpus": "a replica has a pod to itself",
    "num_gpus": "a replica has all GPUs of its pod, as the pool serve_pool says",
    "min_replicas": "the service has as many pods as --replicas says",
    "max_replicas": "the service has as many pods as --replicas says",
}
"""Arguments that follow from the pods, and why."""
_GRACE_S = 60
"""For requests that are being answered. ``ray start`` drains for half of that by itself."""


class RayServiceRequest(BaseModel):
    """A RayService, whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    application: str
    """Serve's name of the one application."""
    replicas: int
    manifest: dict[str, Any]


def service_name(model: str, channel: str) -> str:
    """``code-lm-production``; with a digest where that is too long, begins with a digit, or could mean another pair."""
    plain = f"{model}-{channel}"
    if "-" not in channel and len(plain) <= _MAX_NAME and _DNS_LABEL.fullmatch(plain):
        return plain
    digest = hashlib.sha256(f"{model}/{channel}".encode()).hexdigest()[:8]
    letter = "" if plain[0].isalpha() else "m"
    return f"{letter}{plain}"[: _MAX_NAME - 9].rstrip("-") + f"-{digest}"


def application_name(model: str, channel: str) -> str:
    """Serve's name of a channel's application. A dot is in no name of a model, so no two share one."""
    return f"headway-{model}" if channel == "production" else f"headway-{model}.{channel}"


def serve_application(
    *,
    model: str,
    channel: str,
    store_uri: str,
    replicas: int,
    route_prefix: str,
    arguments: Mapping[str, Any] | None = None,
) -> Manifest:
    """One model as an application of Ray Serve.

    Args:
        arguments: more of the application's (``workloads.serve.settings.ServeSettings``).
    """
    return {
        "name": application_name(model, channel),
        "route_prefix": route_prefix,
        "import_path": _IMPORT_PATH,
        "args": {"model": model, "channel": channel, "store": store_uri, "num_replicas": replicas, **(arguments or {})},
    }


def ray_service(
    *,
    model: str,
    channel: str,
    store_uri: str,
    replicas: int,
    version: str,
    settings: TargetSettings,
    route_prefix: str = "/",
    arguments: Mapping[str, Any] | None = None,
) -> RayServiceRequest:
    """The RayService that serves a channel, a pod for each replica.

    Args:
        version: Headway's own.
        arguments: more of the application's.

    Raises:
        SpecError: ``serve_pool`` has too few pods, or the engine is not for pods.
    """
    pool = settings.pools[settings.serve_pool]
    if replicas > pool.max_pods:
        raise SpecError(
            f"--replicas {replicas} needs as many pods of pool {settings.serve_pool}; its max_pods is {pool.max_pods}.",
            next_step=f"Ask for at most {pool.max_pods}, or raise max_pods in target.yaml.",
        )
    for name in _OF_THE_POOL.keys() & (arguments or {}).keys():
        raise SpecError(f"--set {name} is not for Kubernetes: {_OF_THE_POOL[name]}.")
    if (arguments or {}).get("engine") == "vllm":
        raise SpecError(
            "--set engine=vllm is not for Kubernetes: each pod of the service is laid out for one replica.",
            next_step="Serve from a Ray cluster whose nodes have GPUs: --target http://…",
        )
    name = service_name(model, channel)
    application = serve_application(
        model=model,
        channel=channel,
        store_uri=store_uri,
        replicas=replicas,
        route_prefix=route_prefix,
        arguments={
            "headway": version,
            # Torch would count the node's cores, not the pod's.
            "num_threads": _whole_cpus(settings),
            # All of its pod, so that Ray never puts two replicas into one.
            "num_cpus": 1,
            "num_gpus": pool.gpus_per_pod,
            **(arguments or {}),
        },
    )
    serve_config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT},
        "applications": [application],
    }
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {
            "name": name,
            "namespace": settings.namespace,
            "labels": {"app.kubernetes.io/name": "headway", "app.kubernetes.io/managed-by": "headway"},
            "annotations": {
                f"{PREFIX}/version": version,
                f"{PREFIX}/store": store_uri,
                f"{PREFIX}/model": model,
                f"{PREFIX}/channel": channel,
            },
        },
        "spec": {
            "serveConfigV2": json.dumps(serve_config, indent=2),  # JSON is YAML
            "excludeHeadPodFromServeSvc": True,
            "rayClusterConfig": _cluster(name, pool, store_uri, replicas, settings),
        },
    }
    return RayServiceRequest(name=name, application=application["name"], replicas=replicas, manifest=manifest)


def _cluster(name: str, pool: Pool, store_uri: str, replicas: int, settings: TargetSettings) -> Manifest:
    head = _pod(name, store_uri, settings, size=settings.head, ports={**HEAD_PORTS, "serve": SERVE_PORT})
    worker = _pod(name, store_uri, settings, size=settings.server, pool=pool, ports={"serve": SERVE_PORT})
    worker_template = template(worker, settings)
    # KubeRay's own asks for the same, but through wget in the image.
    worker_template["spec"]["containers"][0]["readinessProbe"] = {
        "httpGet": {"path": "/-/healthz", "port": SERVE_PORT},
        "periodSeconds": 5,
        "timeoutSeconds": 2,
        "failureThreshold": 1,
    }
    return {
        "rayVersion": settings.ray_version,
        "authOptions": {"mode": "token", "secretName": settings.token_secret},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
            "template": template(head, settings),
        },
        "workerGroupSpecs": [
            {
                "groupName": WORKERS,
                "replicas": replicas,
                "minReplicas": replicas,
                "maxReplicas": replicas,
                "rayStartParams": {"num-cpus": "1"},
                "template": worker_template,
            }
        ],
    }


def _pod(name: str, store_uri: str, settings: TargetSettings, *, pool: Pool | None = None, **fields: Any) -> RayPod:
    ours = s3_environment(settings.s3, store_uri)
    # Downloaded versions, where a container that is started again still finds them.
    cache = {CACHE_VARIABLE: f"{RAY_TEMP}/headway"}
    return RayPod(
        component="server",
        labels={SERVICE_LABEL: name},
        account=settings.server_account,
        pool=pool,
        priority=settings.serving_priority,
        s3_secret=settings.s3.server_secret,
        secrets=settings.serve_secrets,
        env={**cache, **(pool.env if pool else {}), **ours},
        grace_s=_GRACE_S,
        **fields,
    )


def _whole_cpus(settings: TargetSettings) -> int:
    return max(1, int(amount(settings.server.cpu)))

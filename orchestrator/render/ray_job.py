"""A job as a RayJob of KubeRay (``ray.io/v1``, KubeRay 1.6: ``apis/ray/v1/rayjob_types.go``)."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

from pydantic import BaseModel, ConfigDict

from orchestrator.errors import SpecError
from orchestrator.render.pods import (
    CODE,
    JOB_LABEL,
    PREFIX,
    RAY_TEMP,
    STORE,
    Manifest,
    RayPod,
    s3_environment,
    template,
)
from orchestrator.render.requested_job import RequestedJob
from orchestrator.spec import ResourcesSpec
from orchestrator.target_settings import Pool, TargetSettings, amount

HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265}
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
POOL_VARIABLE = "HEADWAY_POOL"
"""Tells the job that all workers are of one pool, so that it need not ask Ray for a kind of GPU by Ray's own name."""
LEAVE_S = 20
"""Of a pod's grace: what Ray and the log keeper need after the save."""


class RayJobRequest(BaseModel):
    """A RayJob, whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    submission_id: str
    """The RayJob's name and the Ray job's id."""
    manifest: dict[str, Any]

    def body(self) -> dict[str, Any]:
        return self.manifest


def ray_job(job: RequestedJob, settings: TargetSettings) -> RayJobRequest:
    """The RayJob that does this, and is started again as often as ``settings.max_attempts`` allows.

    Raises:
        SpecError: the target has no such pool, or less of it than the run asks for.
    """
    name = job.submission_id
    spec: Manifest = {
        "entrypoint": _entrypoint(job, settings),
        "submissionMode": "HTTPMode",  # no submitter pod, which would need a security context of its own
        "jobId": name,
        "metadata": job.metadata,
        "backoffLimit": job.num_starts(settings.max_attempts) - 1,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": settings.keep_finished,
        "rayClusterSpec": _cluster(job, settings),
    }
    if job.resources.pip:
        spec["runtimeEnvYAML"] = json.dumps({"pip": list(job.resources.pip)})
    if settings.deadlines.run:
        spec["activeDeadlineSeconds"] = settings.deadlines.run
    if settings.deadlines.start:
        spec["preRunningDeadlineSeconds"] = settings.deadlines.start
    return RayJobRequest(
        submission_id=name,
        manifest={
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {
                "name": name,
                "namespace": settings.namespace,
                "labels": {**_labels(job), **_queue(settings)},
                "annotations": {f"{PREFIX}/version": job.version, STORE: job.store_uri},
            },
            "spec": spec,
        },
    )


def num_pods(resources: ResourcesSpec, name: str, pool: Pool) -> int:
    """Worker pods for ``workers.max`` ranks.

    Raises:
        SpecError: a pod is too small for one rank, or the pool has too few of them.
    """
    ranks = ranks_per_pod(resources, name, pool)
    pods = math.ceil(resources.workers.max / ranks)
    if pods > pool.max_pods:
        raise SpecError(
            f"resources.workers.max {resources.workers.max} needs {pods} pods of pool {name}, at {ranks} ranks each; "
            f"its max_pods is {pool.max_pods}.",
            next_step=f"Ask for at most {pool.max_pods * ranks} workers, or raise max_pods in target.yaml.",
        )
    return pods


def ranks_per_pod(resources: ResourcesSpec, name: str, pool: Pool) -> int:
    """Ranks that one pod takes: one for each GPU, or as many as its CPUs allow."""
    cpus = int(amount(pool.size.cpu))
    ranks = pool.gpus_per_pod or cpus // resources.cpus_per_worker
    if ranks == 0 or ranks * resources.cpus_per_worker > cpus:
        needed = max(ranks, 1) * resources.cpus_per_worker
        raise SpecError(
            f"resources.cpus_per_worker {resources.cpus_per_worker} needs {needed} CPUs in a pod of pool {name}; "
            f"its size.cpu is {pool.size.cpu}.",
            next_step="Ask for fewer CPUs, or raise size.cpu in target.yaml.",
        )
    return ranks


def _entrypoint(job: RequestedJob, settings: TargetSettings) -> str:
    return shlex.join([*job.command, *job.restart_options(settings.max_attempts)])


def _cluster(job: RequestedJob, settings: TargetSettings) -> Manifest:
    name, pool = settings.pool_of(job.resources.gpu)
    pods = num_pods(job.resources, name, pool)
    return {
        "rayVersion": settings.ray_version,
        "authOptions": {"mode": "token", "secretName": settings.token_secret},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
            "template": template(_head(job, settings), settings),
        },
        "workerGroupSpecs": [
            {
                "groupName": name,
                "replicas": pods,
                "minReplicas": pods,
                "maxReplicas": pods,
                "rayStartParams": {"num-cpus": str(int(amount(pool.size.cpu)))},
                "template": template(_worker(job, settings, pool), settings),
            }
        ],
    }


def _head(job: RequestedJob, settings: TargetSettings) -> RayPod:
    save_s = settings.grace - LEAVE_S
    return _pod(
        job,
        settings,
        size=settings.head,
        ports=HEAD_PORTS,
        # A deleted RayJob has its job stopped, which Ray by itself gives 3 s. After that the head has nothing to drain.
        env={
            "RAY_JOB_STOP_WAIT_TIME_S": str(save_s),
            _DRAIN: "0",
            POOL_VARIABLE: settings.pool_of(job.resources.gpu)[0],
        },
        pre_stop=job.save_command(save_s),
    )


def _worker(job: RequestedJob, settings: TargetSettings, pool: Pool) -> RayPod:
    # By itself Ray gives a node that is told to end 30 s, and the ranks on it no longer for their save.
    return _pod(job, settings, size=pool.size, pool=pool, env={**pool.env, _DRAIN: str(settings.grace - LEAVE_S)})


def _pod(job: RequestedJob, settings: TargetSettings, *, env: dict[str, str], **fields: Any) -> RayPod:
    ours = s3_environment(settings.s3, job.store_uri)
    digest = job.package_digest or ""
    fetch = ("headway", "pod", "fetch-code", "--digest", digest, "--to", CODE, "--version", job.version)
    return RayPod(
        component="trainer",
        labels={**_labels(job), JOB_LABEL: job.submission_id},
        account=settings.trainer_account,
        priority=settings.training_priority,
        s3_secret=settings.s3.trainer_secret,
        # Pods' own interface; without it gloo guesses by the host name, and may bind to the loopback.
        env={"GLOO_SOCKET_IFNAME": "eth0", **settings.env, **env, **job.env, **ours},
        secrets=(*settings.secrets, *job.secrets),
        fetch_code=fetch if digest else (),
        ship_logs=("headway", "pod", "ship-logs", "--run", job.logs_of, "--root", RAY_TEMP),
        grace_s=settings.grace,
        **fields,
    )


def _labels(job: RequestedJob) -> dict[str, str]:
    return {f"{PREFIX}/{name}": value for name, value in job.labels.items()}


def _queue(settings: TargetSettings) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "headway",
        "app.kubernetes.io/managed-by": "headway",
        **({"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {}),
    }

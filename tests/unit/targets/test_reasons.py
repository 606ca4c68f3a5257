"""One line for each way in which a RayJob stands still or ends, from objects in the shapes that the cluster gives them.

Messages are those of KubeRay 1.6.1 (``rayjob_controller.go``, ``raycluster_controller.go``), Kueue 0.17
(``scheduler.go``, ``flavorassigner.go``), Kubernetes 1.34 and Ray 2.60 (``job_supervisor.py``, ``job/common.py``).
"""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.targets.base import JobState, JobStatus
from orchestrator.targets.kubernetes.reasons import job_status

Object = dict[str, Any]
NAME, CLUSTER, UID = "demo-1a2b3c4d-00001", "demo-1a2b3c4d-00001-x7k2p", "0a1b"


def ray_job(
    deployment: str = "Initializing",
    job: str = "",
    *,
    message: str = "",
    reason: str = "",
    spec: Object | None = None,
    metadata: Object | None = None,
    **status: Any,
) -> Object:
    """A RayJob of a head and two workers."""
    return {
        "metadata": {
            "name": NAME,
            "uid": UID,
            "labels": {"kueue.x-k8s.io/queue-name": "headway"},
            "creationTimestamp": "2026-03-01T10:00:00Z",
            **(metadata or {}),
        },
        "spec": {
            "suspend": False,
            "backoffLimit": 4,
            "rayClusterSpec": {"workerGroupSpecs": [{"groupName": "cpu", "replicas": 2}]},
            **(spec or {}),
        },
        "status": {
            "jobDeploymentStatus": deployment,
            "jobStatus": job,
            "message": message,
            "reason": reason,
            "rayClusterName": CLUSTER,
            **status,
        },
    }


def pod(
    name: str = "w1",
    *,
    node_type: str = "worker",
    ready: bool = False,
    phase: str = "Pending",
    init: list[Object] | None = None,
    ray: Object | None = None,
    conditions: list[Object] | None = None,
    ending: bool = False,
    **status: Any,
) -> Object:
    scheduled = {"type": "PodScheduled", "status": "True"}
    readiness = {"type": "Ready", "status": "True" if ready else "False", "reason": "ContainersNotReady"}
    return {
        "metadata": {
            "name": f"{CLUSTER}-{name}",
            "labels": {"ray.io/node-type": node_type, "ray.io/cluster": CLUSTER},
            **({"deletionTimestamp": "2026-03-01T10:05:00Z"} if ending else {}),
        },
        "status": {
            "phase": "Running" if ready else phase,
            "conditions": conditions or [scheduled, readiness],
            "initContainerStatuses": init or [],
            "containerStatuses": [ray or container("ray", ready=ready)],
            **status,
        },
    }


def head(**fields: Any) -> Object:
    return pod("head", node_type="head", **fields)


def container(name: str, *, state: Object | None = None, last: Object | None = None, **fields: Any) -> Object:
    running = {"running": {"startedAt": "2026-03-01T10:01:00Z"}}
    return {
        "name": name,
        "state": state or running,
        "lastState": last or {},
        "ready": False,
        "restartCount": 0,
        **fields,
    }


def waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason, **({"message": message} if message else {})}}


def terminated(code: int, *, reason: str = "Error", message: str = "") -> Object:
    return {"terminated": {"exitCode": code, "reason": reason, **({"message": message} if message else {})}}


def event(reason: str, message: str, *, kind: str = "Warning") -> Object:
    return {"type": kind, "reason": reason, "message": message}


def workload(
    *conditions: Object, name: str = "w", uid: str = "other", created: str = "2026-03-01T10:00:00Z", **spec: Any
) -> Object:
    return {
        "metadata": {
            "name": name,
            "creationTimestamp": created,
            "ownerReferences": [{"kind": "RayJob", "name": NAME, "uid": uid}],
        },
        "spec": {"queueName": "headway", "priority": 0, "active": True, **spec},
        "status": {"conditions": list(conditions)},
    }


def condition(kind: str, status: str, reason: str, message: str) -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def pending(message: str, reason: str = "Pending") -> Object:
    return condition("QuotaReserved", "False", reason, message)


ADMITTED = condition("Admitted", "True", "Admitted", "The workload is admitted")
LACKING = (
    "couldn't assign flavors to pod set cpu: insufficient unused quota for nvidia.com/gpu in flavor headway-default, "
    "2 more needed"
)
READY = [head(ready=True), pod("w1", ready=True), pod("w2", ready=True)]
VERSIONS = (
    "headway: This image holds Headway 0.1.0, and the run was submitted by Headway 0.2.0.\n"
    "  → Name the image of 0.2.0 in the target's settings, or submit with 0.1.0: pip install headway==0.1.0\n"
)
SUSPENDED = {"spec": {"suspend": True}}


def assert_waits(status: JobStatus, line: str) -> None:
    """Something keeps it from going on."""
    assert status == JobStatus(state=JobState.PENDING, message=line, stands_still=True)
    assert "\n" not in line


def assert_on_its_way(status: JobStatus, line: str) -> None:
    assert status == JobStatus(state=JobState.PENDING, message=line)
    assert "\n" not in line


# -- pods that do not start


@pytest.mark.parametrize(
    ("stuck", "line"),
    [
        pytest.param(
            pod(
                conditions=[
                    condition(
                        "PodScheduled",
                        "False",
                        "Unschedulable",
                        "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. preemption: 0/2 nodes are available: "
                        "2 No preemption victims found for incoming pod.",
                    )
                ]
            ),
            f"worker pod {CLUSTER}-w1 cannot be scheduled: 0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
            id="unschedulable",
        ),
        pytest.param(
            pod(
                conditions=[
                    condition("PodScheduled", "False", "Unschedulable", 'persistentvolumeclaim "datasets" not found')
                ]
            ),
            f'worker pod {CLUSTER}-w1 cannot be scheduled: persistentvolumeclaim "datasets" not found',
            id="missing claim",
        ),
        pytest.param(
            pod(conditions=[condition("PodScheduled", "False", "SchedulingGated", "")]),
            f"worker pod {CLUSTER}-w1 cannot be scheduled: SchedulingGated",
            id="gated",
        ),
        pytest.param(
            head(
                init=[
                    container(
                        "fetch-code",
                        state=waiting(
                            "ImagePullBackOff",
                            'Back-off pulling image "registry.example.com/headway:9": ErrImagePull: failed to resolve '
                            "reference: not found",
                        ),
                    )
                ],
                ray=container("ray", state=waiting("PodInitializing")),
            ),
            f"head pod {CLUSTER}-head: fetch-code waits, ImagePullBackOff: Back-off pulling image "
            '"registry.example.com/headway:9": ErrImagePull: failed to resolve reference: not found',
            id="image pull",
        ),
        pytest.param(
            pod(
                ray=container(
                    "ray", state=waiting("CreateContainerConfigError", 'secret "headway-s3-trainer" not found')
                )
            ),
            f'worker pod {CLUSTER}-w1: ray waits, CreateContainerConfigError: secret "headway-s3-trainer" not found',
            id="missing secret",
        ),
        pytest.param(
            pod(
                ray=container(
                    "ray",
                    state=waiting("CrashLoopBackOff", "back-off 40s restarting failed container=ray"),
                    last=terminated(1, message="usage: ray start\nRuntimeError: Version mismatch: Ray 2.59\n"),
                    restartCount=3,
                )
            ),
            f"worker pod {CLUSTER}-w1: ray ends again and again, the last time with code 1: RuntimeError: Version "
            "mismatch: Ray 2.59",
            id="crash loop",
        ),
        pytest.param(
            pod(ray=container("ray", state=waiting("CrashLoopBackOff"), last=terminated(137))),
            f"worker pod {CLUSTER}-w1: ray ends again and again, the last time with code 137: Error",
            id="crash loop without a word",
        ),
        pytest.param(
            pod(ray=container("ray", state=terminated(137, reason="OOMKilled"))),
            f"worker pod {CLUSTER}-w1: ray was killed for want of memory (OOMKilled); raise its memory in target.yaml",
            id="OOM worker",
        ),
        pytest.param(
            head(ray=container("ray", state=waiting("CrashLoopBackOff"), last=terminated(137, reason="OOMKilled"))),
            f"head pod {CLUSTER}-head: ray was killed for want of memory (OOMKilled); raise its memory in target.yaml",
            id="OOM head, again and again",
        ),
        pytest.param(
            pod(init=[container("logs", last=terminated(137, reason="OOMKilled"))]),
            f"worker pod {CLUSTER}-w1: logs was killed for want of memory (OOMKilled)",
            id="OOM beside Ray",
        ),
        pytest.param(
            pod(
                phase="Failed",
                reason="Evicted",
                message="The node was low on resource: ephemeral-storage. Threshold quantity: 1, available: 0.",
            ),
            f"worker pod {CLUSTER}-w1 failed: Evicted: The node was low on resource: ephemeral-storage. Threshold "
            "quantity: 1, available: 0.",
            id="evicted",
        ),
        pytest.param(
            pod(phase="Failed"), f"worker pod {CLUSTER}-w1 failed: its containers ended", id="failed without a word"
        ),
        pytest.param(
            pod(init=[container("fetch-code", state=waiting("CrashLoopBackOff"), last=terminated(4, message="boom"))]),
            f"worker pod {CLUSTER}-w1: fetch-code ends again and again, the last time with code 4: boom",
            id="fetch-code fails otherwise",
        ),
    ],
)
def test_a_pod_that_does_not_start(stuck: Object, line: str) -> None:
    assert_waits(job_status(ray_job(), pods=[pod("ok", ready=True), stuck]), line)


def test_the_head_is_named_before_the_workers() -> None:
    refused = [condition("PodScheduled", "False", "Unschedulable", "0/2 nodes are available: 2 Insufficient cpu.")]
    status = job_status(ray_job(), pods=[pod(conditions=refused), head(conditions=refused)])
    assert status.message.startswith(f"head pod {CLUSTER}-head cannot be scheduled")


@pytest.mark.parametrize(
    "fine",
    [
        pod(ray=container("ray", state=waiting("PodInitializing")), init=[container("fetch-code")]),
        pod(ray=container("ray", state=waiting("ContainerCreating"))),
        pod(init=[container("fetch-code", state=terminated(0, reason="Completed"), ready=True)]),
        pod(ray=container("ray", last=terminated(137, reason="OOMKilled"), ready=True, restartCount=1), ready=True),
        pod(conditions=[condition("PodScheduled", "False", "Unschedulable", "no")], ending=True),
        pod(ray=container("ray", state=terminated(137, reason="OOMKilled")), ending=True),
    ],
)
def test_a_pod_that_is_on_its_way_or_goes_away_is_no_standstill(fine: Object) -> None:
    status = job_status(ray_job(), pods=[head(ready=True), fine])
    assert (status.state, status.hopeless) == (JobState.PENDING, False)
    assert " of 3 pods ready" in status.message


def test_a_long_message_is_cut() -> None:
    long = [condition("PodScheduled", "False", "Unschedulable", "x\n " * 400)]
    message = job_status(ray_job(), pods=[pod(conditions=long)]).message
    assert message.endswith("x x x …")
    assert len(message) < 400


# -- what can never start


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (
            waiting("InvalidImageName", 'couldn\'t parse image name "a b"'),
            "InvalidImageName: couldn't parse image name",
        ),
        (waiting("ErrImageNeverPull", 'Container image "x" is not present'), "ErrImageNeverPull: Container image"),
    ],
)
def test_an_image_that_never_comes(state: Object, line: str) -> None:
    status = job_status(ray_job(), pods=[head(init=[container("fetch-code", state=state)])])
    assert (status.state, status.exit_code, status.hopeless) == (JobState.FAILED, 4, True)
    assert line in status.message


def refusing(restarts: int, **fields: Any) -> Object:
    return head(init=[container("fetch-code", restartCount=restarts, **fields)])


REFUSALS = [
    {"state": terminated(2, message=VERSIONS)},
    {"state": waiting("CrashLoopBackOff"), "last": terminated(2, message=VERSIONS)},
    {"last": terminated(2, message=VERSIONS)},
]


@pytest.mark.parametrize("fields", REFUSALS)
def test_code_that_does_not_fit_is_given_up_at_once(fields: Object) -> None:
    line = f"head pod {CLUSTER}-head cannot use the code: This image holds Headway 0.1.0, and the run was submitted"
    status = job_status(ray_job(), pods=[refusing(0, **fields)])
    assert status.message.startswith(line)
    assert (status.state, status.exit_code, status.hopeless) == (JobState.FAILED, 4, True)


# -- pods that the API refuses


QUOTA = (
    'pods "demo-head-x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: '
    "requests.nvidia.com/gpu=2, limited: requests.nvidia.com/gpu=2"
)
SECURITY = (
    'pods "demo-head-x" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false '
    '(container "ray" must set securityContext.allowPrivilegeEscalation=false)'
)


@pytest.mark.parametrize("said", [QUOTA, SECURITY])
def test_a_head_that_the_api_refuses(said: str) -> None:
    events = [
        event("CreatedRayCluster", f"Created RayCluster headway/{CLUSTER}", kind="Normal"),
        event("FailedToCreateHeadPod", f"Failed to create head Pod headway/{CLUSTER}-head-, {said}"),
    ]
    assert_waits(job_status(ray_job(), events=events), f"a pod is refused: {said}")


def test_workers_that_the_api_refuses_beside_a_head_that_is_ready() -> None:
    events = [
        event("CreatedHeadPod", f"Created head Pod headway/{CLUSTER}-head", kind="Normal"),
        event("FailedToCreateWorkerPod", f"Failed to create worker Pod for the cluster headway/{CLUSTER}, {QUOTA}"),
    ]
    assert_waits(job_status(ray_job(), pods=[head(ready=True)], events=events), f"a pod is refused: {QUOTA}")


def test_a_cluster_that_the_api_refuses() -> None:
    events = [event("FailedToCreateRayCluster", f"Failed to create RayCluster headway/{CLUSTER}: quota")]
    assert_waits(
        job_status(ray_job(), events=events),
        f"the cluster is refused: Failed to create RayCluster headway/{CLUSTER}: quota",
    )


def test_a_refusal_that_is_over_is_not_told() -> None:
    refusal = event("FailedToCreateWorkerPod", f"Failed to create worker Pod for the cluster headway/x, {QUOTA}")
    created = event("CreatedWorkerPod", "Created worker Pod headway/w2", kind="Normal")
    starting = [head(ready=True), pod("w1", ready=True)]
    assert_on_its_way(job_status(ray_job(), pods=starting, events=[refusal, created]), "2 of 3 pods ready")
    assert_on_its_way(job_status(ray_job(), pods=[*starting, pod("w2")], events=[refusal]), "2 of 3 pods ready")


def test_other_warnings_are_not_refusals() -> None:
    events = [event("FailedToDeleteWorkerPod", "Failed deleting pod"), event("Unhealthy", "probe failed")]
    assert_on_its_way(job_status(ray_job(), events=events), "waiting for pods (Initializing)")


# -- the queue


def test_its_place_in_the_queue_and_what_is_lacking() -> None:
    workloads = [
        workload(pending(LACKING), uid=UID, created="2026-03-01T10:00:00Z"),
        workload(pending(LACKING), created="2026-03-01T09:00:00Z"),
        workload(pending(LACKING), created="2026-03-01T11:00:00Z", priority=100),
        workload(pending(LACKING), created="2026-03-01T09:00:00Z", queueName="other"),
        workload(condition("QuotaReserved", "True", "QuotaReserved", "…"), ADMITTED, created="2026-03-01T08:00:00Z"),
        workload(ADMITTED, condition("Finished", "True", "Succeeded", "…"), created="2026-03-01T07:00:00Z"),
    ]
    status = job_status(ray_job("Suspended", **SUSPENDED), workloads=workloads)
    assert_waits(status, f"queued in headway, place 3 of 3: {LACKING}")


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ([workload(uid=UID)], "queued in headway, place 1 of 1"),
        (
            [workload(pending("LocalQueue headway doesn't exist", "Inadmissible"), uid=UID)],
            "Kueue cannot admit it: LocalQueue headway doesn't exist",
        ),
        (
            [workload(pending("ClusterQueue headway is inactive", "Inadmissible"), uid=UID)],
            "Kueue cannot admit it: ClusterQueue headway is inactive",
        ),
        (
            [
                workload(
                    condition("Evicted", "True", "Preempted", "Preempted to accommodate a workload (UID: 1)"),
                    pending("Preempted to accommodate a workload (UID: 1)"),
                    uid=UID,
                )
            ],
            "queued in headway, place 1 of 1: Preempted to accommodate a workload (UID: 1)",
        ),
        (
            [
                workload(
                    condition("Evicted", "True", "Deactivated", "The workload is deactivated"), uid=UID, active=False
                )
            ],
            "Kueue has set its workload aside: The workload is deactivated",
        ),
        ([workload(uid=UID, active=False)], "Kueue has set its workload aside"),
        (
            [workload(condition("QuotaReserved", "True", "QuotaReserved", "Quota reserved"), ADMITTED, uid=UID)],
            "admitted from queue headway; its pods are about to be made",
        ),
        ([workload(pending(LACKING))], "suspended; Kueue has no workload of it yet (queue headway)"),
        ([], "suspended; Kueue has no workload of it yet (queue headway)"),
    ],
)
def test_what_the_queue_says(own: list[Object], line: str) -> None:
    assert_waits(job_status(ray_job("Suspended", **SUSPENDED), workloads=own), line)


def test_suspended_by_hand() -> None:
    assert_waits(job_status(ray_job("Suspended", metadata={"labels": {}}, **SUSPENDED)), "suspended by spec.suspend")


def test_preempted_while_its_pods_end() -> None:
    """Kueue sets spec.suspend first; then KubeRay ends the cluster, whose pods save."""
    lost = [workload(pending("Preempted to accommodate a workload (UID: 1)"), uid=UID)]
    status = job_status(ray_job("Suspending", "RUNNING", **SUSPENDED), pods=READY, workloads=lost)
    assert status.state is JobState.PENDING
    assert "place 1 of 1: Preempted" in status.message


# -- under way


@pytest.mark.parametrize(
    ("job", "pods", "line"),
    [
        ({"metadata": {"name": NAME, "uid": UID}, "spec": {}}, [], "waiting for pods (not seen by KubeRay yet)"),
        (ray_job("Initializing"), [], "waiting for pods (Initializing)"),
        (ray_job("Initializing"), [head(), pod("w1", ready=True)], "1 of 3 pods ready"),
        (ray_job("Initializing"), READY, "3 of 3 pods ready; Ray has yet to start the job"),
        (
            ray_job(
                "Running", "PENDING", message="Job has not started yet. It may be waiting for the runtime environment."
            ),
            READY,
            "3 of 3 pods ready; Job has not started yet. It may be waiting for the runtime environment.",
        ),
        (ray_job("Initializing"), [head(ready=True), pod(ending=True)], "1 of 3 pods ready, 1 being ended"),
        (
            ray_job(
                "Retrying",
                "FAILED",
                reason="AppFailed",
                message="Job entrypoint command failed with exit code 1, last available logs (truncated to 20,000 "
                "chars):\nheadway: rank 1 died\n",
                failed=2,
            ),
            [],
            "failure 2 of 5 (Job entrypoint command failed with exit code 1: rank 1 died); a new cluster takes over",
        ),
    ],
)
def test_what_is_not_running_yet(job: Object, pods: list[Object], line: str) -> None:
    assert_on_its_way(job_status(job, pods=pods), line)


@pytest.mark.parametrize(
    ("pods", "line"),
    [
        (READY, "3 of 3 pods ready"),
        ([head(ready=True), pod("w1", ready=True), pod("w2", ending=True)], "2 of 3 pods ready, 1 being ended"),
    ],
)
def test_what_is_running(pods: list[Object], line: str) -> None:
    job = ray_job("Running", "RUNNING", message="Job is currently running.")
    assert job_status(job, pods=pods) == JobStatus(state=JobState.RUNNING, message=line)


@pytest.mark.parametrize(
    ("pods", "line"),
    [
        ([pod("w1", ready=True)], "its head pod is lost; KubeRay makes another, where the run goes on"),
        ([head(ready=True, ending=True)], "its head pod is lost; KubeRay makes another, where the run goes on"),
        (
            [head(ready=True), pod(ray=container("ray", state=terminated(137, reason="OOMKilled")))],
            f"worker pod {CLUSTER}-w1: ray was killed for want of memory (OOMKilled); raise its memory in target.yaml",
        ),
        (
            # KubeRay makes a lost worker anew, beside a head that goes on.
            [head(ready=True), pod(init=[container("fetch-code", last=terminated(2, message=VERSIONS))])],
            f"worker pod {CLUSTER}-w1 cannot use the code: {VERSIONS.splitlines()[0].removeprefix('headway: ')}",
        ),
        (
            [head(ready=True), pod(ray=container("ray", state=waiting("ErrImageNeverPull", "not present")))],
            f"worker pod {CLUSTER}-w1: ray waits, ErrImageNeverPull: not present",
        ),
    ],
)
def test_a_job_that_runs_is_not_given_up_for_what_keeps_it_from_going_on(pods: list[Object], line: str) -> None:
    job = ray_job("Running", "RUNNING", message="Job is currently running.")
    assert job_status(job, pods=pods) == JobStatus(state=JobState.RUNNING, message=line, stands_still=True)


@pytest.mark.parametrize(("deployment", "job"), [("Running", "PENDING"), ("Initializing", "")])
def test_one_whose_program_has_yet_to_begin_is(deployment: str, job: str) -> None:
    worker = pod(init=[container("fetch-code", last=terminated(2, message=VERSIONS))])
    status = job_status(ray_job(deployment, job), pods=[head(ready=True), worker])
    assert (status.state, status.hopeless) == (JobState.FAILED, True)


def test_a_job_that_is_being_deleted_has_not_ended() -> None:
    status = job_status(ray_job("Running", "STOPPED", metadata={"deletionTimestamp": "2026-03-01T10:05:00Z"}))
    assert status == JobStatus(state=JobState.RUNNING, message="it is being ended")


# -- ends


ENTRYPOINT = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\n"


@pytest.mark.parametrize(
    ("job", "state", "line", "exit_code"),
    [
        pytest.param(
            ray_job("Complete", "SUCCEEDED", message="Job finished successfully."),
            JobState.SUCCEEDED,
            "Job finished successfully.",
            None,
            id="succeeded",
        ),
        pytest.param(
            ray_job("Complete", "STOPPED", message="Job was intentionally stopped."),
            JobState.STOPPED,
            "Job was intentionally stopped.",
            None,
            id="stopped is Complete to KubeRay",
        ),
        pytest.param(
            ray_job(
                "Failed",
                "FAILED",
                reason="AppFailed",
                message=ENTRYPOINT.format(4) + "INFO exit code 9\nheadway: S3 is down.\nbye",
            ),
            JobState.FAILED,
            "Job entrypoint command failed with exit code 4: S3 is down.",
            4,
            id="its program failed",
        ),
        pytest.param(
            ray_job("Failed", "FAILED", reason="AppFailed", message=ENTRYPOINT.format(1) + "Traceback\n"),
            JobState.FAILED,
            "Job entrypoint command failed with exit code 1",
            1,
            id="its program failed without a word of ours",
        ),
        pytest.param(
            ray_job(
                "Failed", "FAILED", reason="AppFailed", message="Traceback (most recent call last):\n x\nOSError: no"
            ),
            JobState.FAILED,
            "OSError: no",
            None,
            id="Ray could not start it",
        ),
        pytest.param(
            ray_job(
                "Failed",
                "FAILED",
                reason="AppFailed",
                message="runtime_env setup failed: Failed to set up runtime environment.\npip exit code 1\nERROR: No "
                "matching distribution found for einopss",
            ),
            JobState.FAILED,
            "runtime_env setup failed: Failed to set up runtime environment. … ERROR: No matching distribution found "
            "for einopss",
            None,
            id="pip failed",
        ),
        pytest.param(
            ray_job(
                "Failed",
                reason="DeadlineExceeded",
                message="The RayJob has passed the activeDeadlineSeconds. StartTime: x. ActiveDeadlineSeconds: 60",
                spec={"activeDeadlineSeconds": 60},
            ),
            JobState.FAILED,
            "it took longer than deadlines.run allows, 60 s",
            None,
            id="deadline of the run",
        ),
        pytest.param(
            ray_job(
                "Failed",
                reason="PreRunningDeadlineExceeded",
                message="The RayJob has passed the preRunningDeadlineSeconds. StartTime: x.",
                spec={"preRunningDeadlineSeconds": 30},
            ),
            JobState.FAILED,
            "it did not start within deadlines.start, 30 s",
            None,
            id="deadline of the start",
        ),
        pytest.param(
            ray_job(
                "Failed", reason="SubmissionFailed", message="Job submission has failed. Reason: BackoffLimitExceeded."
            ),
            JobState.FAILED,
            "SubmissionFailed: Job submission has failed. Reason: BackoffLimitExceeded.",
            None,
            id="not submitted",
        ),
        pytest.param(
            ray_job(
                "Complete",
                "SUCCEEDED",
                reason="JobDeploymentStatusTransitionGracePeriodExceeded",
                message="JobDeploymentStatus does not transition to Complete or Failed within the grace period.",
            ),
            JobState.SUCCEEDED,
            "JobDeploymentStatus does not transition to Complete or Failed within the grace period.",
            None,
            id="KubeRay saw the end late",
        ),
        pytest.param(ray_job("Complete"), JobState.FAILED, "Complete", None, id="complete without a job"),
        pytest.param(ray_job("Failed"), JobState.FAILED, "Failed", None, id="failed without a reason"),
        pytest.param(
            ray_job("Failed", "FAILED", reason="AppFailed", metadata={"deletionTimestamp": "2026-03-01T10:05:00Z"}),
            JobState.FAILED,
            "",
            None,
            id="ended, and being deleted",
        ),
    ],
)
def test_every_end(job: Object, state: JobState, line: str, exit_code: int | None) -> None:
    status = job_status(job, pods=READY)
    assert status == JobStatus(state=state, message=line, exit_code=exit_code)
    assert status.over
    assert "\n" not in line


def test_what_kuberay_refuses_keeps_its_quota_until_it_is_deleted() -> None:
    """Kueue asks the RayJob for an end, and takes ValidationFailed for none."""
    said = "The RayJob metadata is invalid: RayJob name should be no more than 47 characters"
    status = job_status(ray_job("ValidationFailed", reason="ValidationFailed", message=said))
    assert (status.state, status.message) == (JobState.FAILED, f"ValidationFailed: {said}")
    assert status.hopeless
    assert not status.over

"""What a RayJob says beyond its pods: attempts, deadlines, how many pods, and what a target cannot give."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.render import ray_job
from orchestrator.render.ray_job import LEAVE_S, POOL_VARIABLE
from tests.unit.render.requests import attempt, settings

GPUS = {"a100": {"gpus_per_pod": 4, "max_pods": 2, "size": {"cpu": "16"}}, "cpu": {"max_pods": 1}}


def group(resources: dict[str, Any], **target: Any) -> dict[str, Any]:
    spec = ray_job(attempt(resources), settings(**target)).body()["spec"]
    (found,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert isinstance(found, dict)
    return found


def test_kuberay_starts_a_job_as_often_as_the_job_itself_counts() -> None:
    spec = ray_job(attempt(attempt=7), settings(max_attempts=3)).body()["spec"]
    assert shlex.split(spec["entrypoint"])[2:] == [
        "run.yaml",
        "--run",
        "code-lm-1a2b3c4d",
        "--edition",
        "0",
        "--first-attempt",
        "7",
        "--max-attempts",
        "3",
    ]
    assert spec["backoffLimit"] == 2


def test_the_job_is_named_as_the_ray_job_that_it_makes() -> None:
    request = ray_job(attempt(repeat=4), settings())
    body = request.body()
    assert request.submission_id == body["metadata"]["name"] == body["spec"]["jobId"] == "code-lm-1a2b3c4d-2-4"


def test_a_save_has_the_grace_but_for_what_ends_after_it() -> None:
    head = ray_job(attempt(), settings(grace=100)).body()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    command = head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert head["terminationGracePeriodSeconds"] == 100
    assert command[-2:] == ["--timeout", str(100 - LEAVE_S)]


def ray_pods(resources: dict[str, Any] | None = None, **target: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The templates of the head and of the workers."""
    cluster = ray_job(attempt(resources), settings(**target)).body()["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"]["template"], workers["template"]


def environment(template: dict[str, Any]) -> dict[str, str | None]:
    """Ray's own, without what Kubernetes fills in."""
    ray = template["spec"]["containers"][0]
    assert ray["name"] == "ray"
    return {each["name"]: each.get("value") for each in ray["env"]}


def test_a_node_that_is_told_to_end_has_as_long_as_a_save() -> None:
    """Ray by itself ends the ranks on it after 30 s, and holds a head up that long with nothing left to drain."""
    head, workers = ray_pods(grace=100)
    assert environment(workers)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(100 - LEAVE_S)
    assert environment(head)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "0"
    assert environment(head)["RAY_JOB_STOP_WAIT_TIME_S"] == str(100 - LEAVE_S)


@pytest.mark.parametrize(("resources", "target", "pool"), [({}, {}, "cpu"), ({"gpu": "A100"}, {"pools": GPUS}, "a100")])
def test_the_job_is_told_the_pool_of_its_workers(resources: dict[str, Any], target: dict[str, Any], pool: str) -> None:
    head, _ = ray_pods(resources, **target)
    assert environment(head)[POOL_VARIABLE] == pool


def test_pods_are_found_by_their_job_when_it_is_deleted() -> None:
    for template in ray_pods():
        assert template["metadata"]["labels"]["headway.dev/job"] == "code-lm-1a2b3c4d-00002"


def test_the_job_says_which_store_it_works_with() -> None:
    body = ray_job(attempt(store_uri="s3://mine/prefix"), settings()).body()
    assert body["metadata"]["annotations"]["headway.dev/store"] == "s3://mine/prefix"


def test_no_port_is_open_for_rays_client() -> None:
    head, workers = ray_pods()
    ports = [
        port["containerPort"] for each in (head, workers) for port in each["spec"]["containers"][0].get("ports", [])
    ]
    assert ports == [6379, 8265]


def test_without_deadlines_none_is_set() -> None:
    spec = ray_job(attempt(), settings()).body()["spec"]
    assert not {"activeDeadlineSeconds", "preRunningDeadlineSeconds", "runtimeEnvYAML"} & spec.keys()


@pytest.mark.parametrize(
    ("resources", "target", "pods"),
    [
        ({"workers": {"max": 1}}, {}, 1),
        ({"workers": {"max": 2}}, {}, 1),  # one for each CPU of a pod
        ({"workers": {"max": 3}}, {}, 2),
        ({"workers": {"max": 3}, "cpus_per_worker": 2}, {}, 3),
        ({"workers": {"max": 4}, "gpu": "A100"}, {"pools": GPUS}, 1),
        ({"workers": {"max": 8}, "gpu": "any", "cpus_per_worker": 4}, {"pools": GPUS}, 2),
    ],
)
def test_pods_for_as_many_ranks(resources: dict[str, Any], target: dict[str, Any], pods: int) -> None:
    found = group(resources, **target)
    assert found["replicas"] == found["minReplicas"] == found["maxReplicas"] == pods


@pytest.mark.parametrize(
    ("resources", "target", "words"),
    [
        ({"workers": {"max": 9}}, {}, r"workers\.max 9 needs 5 pods of pool cpu.*max_pods is 4.*at most 8 workers"),
        ({"cpus_per_worker": 3}, {}, r"cpus_per_worker 3 needs 3 CPUs.*size\.cpu is 2"),
        ({"gpu": "a100", "cpus_per_worker": 5}, {"pools": GPUS}, r"needs 20 CPUs in a pod of pool a100.*is 16"),
        ({}, {"pools": {"cpu": {"max_pods": 1, "size": {"cpu": "500m"}}}}, r"needs 1 CPUs.*size\.cpu is 500m"),
        ({"gpu": "h100"}, {}, r"resources\.gpu h100: this target has no such pool; it has cpu"),
        ({"gpu": "any"}, {}, r"resources\.gpu any: this target has no such pool"),
        ({}, {"pools": {"t4": GPUS["a100"]}, "serve_pool": "t4"}, r"resources\.gpu null.*it has t4"),
    ],
)
def test_what_the_target_cannot_give(resources: dict[str, Any], target: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        group(resources, **target)
    assert caught.value.next_step


def test_without_a_queue_and_a_priority_neither_is_named() -> None:
    body = ray_job(attempt(), settings(queue=None, training_priority=None)).body()
    assert "kueue.x-k8s.io/queue-name" not in body["metadata"]["labels"]
    head = body["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert "priorityClassName" not in head

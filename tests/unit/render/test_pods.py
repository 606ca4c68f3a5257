"""Pods that a "restricted" namespace takes, that hold no secret, and that Kubernetes reads as they are meant."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

from orchestrator.render import ray_job
from orchestrator.render.pods import CODE, s3_environment
from orchestrator.target_settings import S3Settings
from tests.unit.render.requests import attempt, settings
from tests.unit.render.test_golden import CASES, EVERYTHING

RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
RESTRICTED_VOLUMES |= {"secret"}
Pod = dict[str, Any]


def pods(manifest: dict[str, Any]) -> Iterator[Pod]:
    """The specs of the head's and the workers' pods, with what KubeRay 1.6 adds to a worker's."""
    cluster = manifest["spec"]["rayClusterSpec"]
    yield cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield with_wait_gcs_ready(group["template"]["spec"])


def with_wait_gcs_ready(spec: Pod) -> Pod:
    """``common/pod.go`` copies these fields of the Ray container into an init container, and its envFrom not."""
    found = deepcopy(spec)
    ray = found["containers"][0]
    copied = {key: ray[key] for key in ("image", "imagePullPolicy", "securityContext", "env", "volumeMounts")}
    found["initContainers"].append({"name": "wait-gcs-ready", **copied})
    return found


def containers(spec: Pod) -> list[dict[str, Any]]:
    return [*spec["initContainers"], *spec["containers"]]


ALL_PODS = [
    pytest.param(spec, id=f"{name}-{'worker' if number else 'head'}")
    for name, (request, target) in CASES.items()
    for number, spec in enumerate(pods(ray_job(request, target).body()))
]


@pytest.mark.parametrize("spec", ALL_PODS)
def test_pod_security_restricted(spec: Pod) -> None:
    """Every control of https://kubernetes.io/docs/concepts/security/pod-security-standards/ that a pod can break."""
    assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & spec.keys()
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"sysctls", "seLinuxOptions", "windowsOptions", "appArmorProfile"} & security.keys()
    for volume in spec["volumes"]:
        assert set(volume) - {"name"} <= RESTRICTED_VOLUMES
    for container in containers(spec):
        own = container["securityContext"]
        assert own == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, container["name"]
        assert all("hostPort" not in port for port in container.get("ports", []))


@pytest.mark.parametrize("spec", ALL_PODS)
def test_the_api_server_takes_each_list(spec: Pod) -> None:
    """In a RayJob these lists are maps by a key, and a key twice is refused; each mount needs its volume."""
    volumes = [volume["name"] for volume in spec["volumes"]]
    assert len(volumes) == len(set(volumes))
    names = [container["name"] for container in containers(spec)]
    assert len(names) == len(set(names))
    for container in containers(spec):
        for field, key in (("env", "name"), ("volumeMounts", "mountPath"), ("ports", "containerPort")):
            keys = [each[key] for each in container.get(field, [])]
            assert len(keys) == len(set(keys)), (container["name"], field)
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)


@pytest.mark.parametrize("spec", ALL_PODS)
def test_nothing_reaches_the_kubernetes_api(spec: Pod) -> None:
    assert spec["automountServiceAccountToken"] is False


def test_secrets_are_named_for_ray_alone_and_the_stores_own_comes_last() -> None:
    request, target = CASES["gpu-everything"]
    for spec in pods(ray_job(request, target).body()):
        named = {each["name"]: [s["secretRef"]["name"] for s in each.get("envFrom", [])] for each in containers(spec)}
        assert named["ray"] == ["hub-token", "wandb", "s3-rw"]
        assert named["fetch-code"] == named["logs"] == ["s3-rw"]
        assert named.get("wait-gcs-ready", []) == []


def test_wait_gcs_ready_has_what_it_asks_ray_with() -> None:
    """It calls ``ray health-check``; Ray's token comes from KubeRay, and the S3 keys are not needed."""
    *_, worker = pods(ray_job(attempt(), settings()).body())
    waits = next(each for each in worker["initContainers"] if each["name"] == "wait-gcs-ready")
    assert "envFrom" not in waits
    assert {"name": "ray-temp", "mountPath": "/tmp/ray"} in waits["volumeMounts"]


def test_with_a_role_no_secret_is_named() -> None:
    request, target = CASES["no-queue-role"]
    for spec in pods(ray_job(request, target).body()):
        assert all(not each.get("envFrom") for each in containers(spec))


def test_a_name_of_ours_in_a_run_file_is_there_once() -> None:
    job = ray_job(attempt(env={"PYTHONPATH": "/mnt/lib", "POD_NAME": "mine"}), settings()).body()
    for spec in pods(job):
        ray = {each["name"]: each for each in spec["containers"][0]["env"]}
        assert ray["PYTHONPATH"]["value"] == f"{CODE}:/mnt/lib"
        for container in containers(spec):
            names = [each["name"] for each in container["env"]]
            assert names.count("PYTHONPATH") == names.count("POD_NAME") == 1
            assert next(each for each in container["env"] if each["name"] == "POD_NAME")["valueFrom"]


def test_a_run_file_cannot_move_the_store() -> None:
    target = settings(s3={"endpoint_url": "https://s3.example.com"}, env={"HEADWAY_STORE": "s3://other"})
    job = ray_job(attempt(env={"AWS_ENDPOINT_URL": "http://evil", "HEADWAY_STORE": "s3://evil"}), target).body()
    for spec in pods(job):
        values = {each["name"]: each.get("value") for each in spec["containers"][0]["env"]}
        assert values["HEADWAY_STORE"] == "s3://bucket/prefix"
        assert values["AWS_ENDPOINT_URL"] == "https://s3.example.com"


def test_one_claim_may_be_mounted_twice_and_be_called_like_a_volume_of_ours() -> None:
    target = settings(claims=[{"claim": "code", "path": "/a"}, {"claim": "code", "path": "/b", "read_only": False}])
    for spec in pods(ray_job(attempt(), target).body()):
        claimed = {v["name"]: v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
        assert list(claimed.values()) == [
            {"claimName": "code", "readOnly": True},
            {"claimName": "code", "readOnly": False},
        ]
        mounts = {each["mountPath"]: each for each in spec["containers"][0]["volumeMounts"]}
        assert mounts["/a"]["name"] != mounts["/b"]["name"]
        assert claimed[mounts["/b"]["name"]]["readOnly"] is mounts["/b"]["readOnly"] is False


def test_the_sidecar_starts_before_ray_and_ends_after_it() -> None:
    """A native sidecar: an init container that Kubernetes keeps alive."""
    for spec in pods(ray_job(attempt(), settings()).body()):
        by_name = {each["name"]: each for each in spec["initContainers"]}
        assert by_name["logs"]["restartPolicy"] == "Always"
        assert "restartPolicy" not in by_name["fetch-code"]


def test_without_a_package_nothing_is_fetched() -> None:
    for spec in pods(ray_job(attempt(package_digest=None), settings()).body()):
        assert [each["name"] for each in spec["initContainers"] if each["name"] == "fetch-code"] == []
        assert "workingDir" not in spec["containers"][0]
        assert all(each["name"] != "PYTHONPATH" for each in spec["containers"][0]["env"])


@pytest.mark.parametrize(
    ("s3", "expected"),
    [
        (S3Settings(), {}),
        (S3Settings(endpoint_url="http://s3:8333"), {"AWS_ENDPOINT_URL": "http://s3:8333"}),
        (S3Settings(region="eu-west-1"), {"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-1"}),
    ],
)
def test_how_boto3_finds_the_store(s3: S3Settings, expected: dict[str, str]) -> None:
    assert s3_environment(s3, "s3://b/p") == {"HEADWAY_STORE": "s3://b/p", **expected}


def test_everything_is_in_the_golden_case() -> None:
    """A field that gets a default later must be set there too."""
    left_out = {"apiVersion", "kind", "server_account", "serving_priority", "server", "serve_secrets", "prices"}
    assert set(type(EVERYTHING).model_fields) - EVERYTHING.model_fields_set <= left_out

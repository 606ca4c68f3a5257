"""RayJobs, whole, as files that a person has read. ``HEADWAY_UPDATE_GOLDEN=1`` writes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.render import RequestedJob, ray_job
from orchestrator.target_settings import TargetSettings
from tests.unit.render.requests import attempt, preparation, settings

GOLDEN = Path(__file__).parents[2] / "golden"
EVERYTHING = settings(
    context="prod",
    namespace="ml",
    image="registry.example.com/headway@sha256:" + "0" * 64,
    image_pull_policy="Always",
    image_pull_secrets=["registry"],
    ray_version="2.61.0",
    queue="research",
    training_priority="low",
    trainer_account="trainer",
    token_secret="ray-token",
    s3={"endpoint_url": "https://s3.example.com", "region": "eu-west-1", "trainer_secret": "s3-rw"},
    pools={
        "h100": {
            "gpus_per_pod": 8,
            "max_pods": 4,
            "size": {"cpu": "64", "memory": "512Gi", "cpu_request": "60"},
            "shared_memory": "64Gi",
            "node_selector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
            "tolerations": [
                {"key": "nvidia.com/gpu", "effect": "NoSchedule"},
                {"key": "team", "operator": "Equal", "value": "ml"},
            ],
            "extended_resources": {"rdma/ib": 8},
            "env": {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "net1"},
        }
    },
    serve_pool="h100",
    head={"cpu": "2", "memory": "8Gi", "cpu_request": "500m"},
    env={"HF_HUB_OFFLINE": "1"},
    secrets=["hub-token"],
    claims=[
        {"claim": "datasets", "path": "/mnt/datasets"},
        {"claim": "scratch", "path": "/mnt/scratch", "read_only": False},
    ],
    max_attempts=3,
    deadlines={"start": 600, "run": 86400},
    grace=300,
    keep_finished=0,
)
CASES = {
    "minimal": (attempt(), settings()),
    "gpu-everything": (
        attempt(
            {"workers": {"min": 8, "max": 16}, "gpu": "H100", "cpus_per_worker": 8, "pip": ["einops==0.8.1"]},
            repeat=1,
            run_file="runs/big.yaml",
            env={"WANDB_MODE": "offline"},
            secrets=("wandb",),
        ),
        EVERYTHING,
    ),
    "no-queue-role": (
        attempt({"workers": {"min": 1, "max": 3}}, attempt=1),
        settings(
            queue=None,
            training_priority=None,
            s3={"trainer_secret": None, "server_secret": None, "region": "us-east-1"},
        ),
    ),
    "prepare": (preparation(), settings()),
}


class Plain(yaml.SafeDumper):
    """No anchors: what is said twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@pytest.mark.parametrize("name", CASES)
def test_the_ray_job_is_the_one_that_was_read(name: str) -> None:
    request, target = CASES[name]
    path = GOLDEN / f"rayjob-{name}.yaml"
    manifest = rendered(request, target)
    if os.environ.get("HEADWAY_UPDATE_GOLDEN"):
        path.write_text(yaml.dump(manifest, Dumper=Plain, sort_keys=False, width=120, allow_unicode=True))
    assert manifest == yaml.safe_load(path.read_text()), "read the difference, then: HEADWAY_UPDATE_GOLDEN=1 pytest …"


def test_there_is_no_file_that_no_test_reads() -> None:
    assert {path.name for path in GOLDEN.glob("rayjob-*")} == {f"rayjob-{name}.yaml" for name in CASES}


def rendered(request: RequestedJob, target: TargetSettings) -> dict[str, Any]:
    return ray_job(request, target).body()

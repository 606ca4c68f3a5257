"""Headway installed on the cluster as docs/kubernetes.md says, and how tests reach it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.description import Cluster, load
from tests.cluster.layout import NAMESPACE, REPOSITORY, find_layout
from tests.cluster.volumes import CLAIM, repository_volume

_KUBECTL_TIMEOUT_S = 120.0
_NOT_UP = "The test cluster is not up; start it: make cluster"
_GIVEN = (
    "KUBECONFIG is set, so the tests use that cluster. They need kubectl, HEADWAY_TEST_TARGET (its target.yaml, with "
    "an image of this code) and HEADWAY_TEST_STORE (s3://bucket, which pods reach too)."
)


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A cluster with Headway on it.

    Tests that need more than the API, the S3 server and an image of this very code get these from the environment
    where ``KUBECONFIG`` names a cluster of someone else's: see docs/kubernetes.md.
    """

    kubeconfig: str
    kubectl_program: str
    target: dict[str, Any]
    """The contents of ``target.yaml``."""
    s3_environment: dict[str, str]
    bucket: str

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        found = subprocess.run(
            [self.kubectl_program, "--kubeconfig", self.kubeconfig, *arguments],
            input=stdin, capture_output=True, text=True, timeout=_KUBECTL_TIMEOUT_S, check=False,
        )  # fmt: skip
        if check and found.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {found.stderr}")
        return found.stdout if found.returncode == 0 else found.stderr

    def objects(self, kind: str, selector: str = "", *, namespace: str = NAMESPACE) -> list[dict[str, Any]]:
        found = json.loads(self.kubectl("-n", namespace, "get", kind, "-l", selector, "-o", "json"))
        return list(found["items"])

    def apply(self, *manifests: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(manifests))

    def settings(self, prefix: str) -> dict[str, str]:
        """Variables of a command that works with this cluster and a store of its own."""
        return {**self.s3_environment, "KUBECONFIG": self.kubeconfig, "HEADWAY_STORE": f"s3://{self.bucket}/{prefix}"}

    def write_target(self, directory: Path, **changes: Any) -> None:
        (directory / "target.yaml").write_text(yaml.safe_dump({**self.target, **changes}))


def install() -> Installed:
    """Apply the overlay and make the Secrets, as a person does. Doing it again changes nothing but the keys.

    Raises:
        AssertionError: there is no cluster.
    """
    given = os.environ.get("KUBECONFIG")
    cluster = load(find_layout())
    if given and (cluster is None or given != cluster.kubeconfig):
        return _install_on_given(given)
    assert cluster is not None, _NOT_UP
    assert cluster.is_running(), _NOT_UP
    installed = Installed(
        kubeconfig=cluster.kubeconfig,
        kubectl_program=cluster.kubectl,
        target=_target(cluster),
        s3_environment=cluster.store_environment(),
        bucket=cluster.s3_bucket,
    )
    _apply(installed, REPOSITORY / "k8s" / "overlays" / "test")
    installed.apply(*repository_volume())
    for user in ("trainer", "server"):
        keys = cluster.s3_keys[user]
        _secret(
            installed,
            f"headway-s3-{user}",
            {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key},
        )
    _secret(installed, "headway-ray-token", {"auth_token": secrets.token_hex(32)}, replace=False)
    return installed


def _target(cluster: Cluster) -> dict[str, Any]:
    """The cluster's GPUs are numbers, so runs train on CPUs and ask for the GPUs besides."""
    return {
        "apiVersion": "headway/v1",
        "kind": "kubernetes",
        "image": cluster.image,
        "image_pull_policy": "Never",
        "s3": {"endpoint_url": cluster.s3_endpoint_url, "region": cluster.s3_region},
        "pools": {
            "cpu": {
                "max_pods": 2,
                "size": {"cpu": "1", "cpu_request": "100m", "memory": "3Gi"},
                "shared_memory": "1Gi",
                "extended_resources": {"nvidia.com/gpu": 1},
            }
        },
        "head": {"cpu": "1", "cpu_request": "100m"},  # with the memory that heads have by default
        "server": {"cpu": "1", "cpu_request": "100m", "memory": "3Gi"},
        "claims": [{"claim": CLAIM, "path": str(REPOSITORY)}],
        "grace": 50,  # a worker pod that is deleted trains on until then, and these runs are short
        "keep_finished": 5,
    }


def _install_on_given(kubeconfig: str) -> Installed:
    """On a cluster of someone else's: the environment names its ``target.yaml`` and store, and it has the rest."""
    settings, store = os.environ.get("HEADWAY_TEST_TARGET"), os.environ.get("HEADWAY_TEST_STORE", "")
    program = shutil.which("kubectl")
    assert settings, _GIVEN
    assert store.startswith("s3://"), _GIVEN
    assert program, _GIVEN
    return Installed(
        kubeconfig=kubeconfig,
        kubectl_program=program,
        target=yaml.safe_load(Path(settings).read_text()),
        s3_environment={name: value for name, value in os.environ.items() if name.startswith("AWS_")},
        bucket=store.removeprefix("s3://").strip("/"),
    )


def _apply(installed: Installed, overlay: Path) -> None:
    installed.kubectl("apply", "-k", str(overlay))


def _secret(installed: Installed, name: str, values: dict[str, str], *, replace: bool = True) -> None:
    manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "stringData": values,
    }
    there = not installed.kubectl("-n", NAMESPACE, "get", "secret", name, check=False).startswith("Error")
    if replace or not there:
        installed.apply(manifest)

"""Applies DNS, KubeRay and Kueue, and waits until each really works."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence

from orchestrator.errors import EnvironmentUnusable
from orchestrator.targets.processes import MARKER_VARIABLE
from tests.cluster.layout import API_SERVICE_ADDRESS, CLUSTER_DOMAIN, DNS_SERVICE_ADDRESS, Layout
from tests.cluster.manifests import Manifest
from tests.cluster.nodes import gpu_patch
from tests.cluster.shell import run

_QUERY_ID = 0x4857


def kubectl(layout: Layout, *words: str, stdin: str | None = None, timeout_s: float = 90.0) -> str:
    """Its output, as the administrator. It is marked as the cluster's, so that ending the cluster ends it."""
    command = [layout.program("kubectl"), f"--kubeconfig={layout.kubeconfig}", *words]
    environment = os.environ | {MARKER_VARIABLE: layout.id}
    return run(command, stdin=stdin, environment=environment, timeout_s=timeout_s)


def apply(layout: Layout, objects: Sequence[Manifest]) -> None:
    """Server-side, since the definitions of KubeRay's kinds are too large for kubectl's annotation."""
    wrapped = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
    kubectl(
        layout, "apply", "--server-side", "--validate=false", "--force-conflicts", "-f", "-", stdin=json.dumps(wrapped)
    )


def register_gpus(layout: Layout, node: str, num_gpus: int) -> None:
    """Give a registered node GPUs that are only numbers."""
    kubectl(layout, "patch", "node", node, "--subresource=status", "--type=merge", "--patch", gpu_patch(num_gpus))


def wait_for_node(layout: Layout, node: str) -> None:
    kubectl(layout, "wait", f"node/{node}", "--for=create", "--timeout=60s")


def wait_until_node_ready(layout: Layout, node: str) -> None:
    kubectl(layout, "wait", f"node/{node}", "--for=condition=Ready", "--timeout=60s")


def wait_for_deployment(layout: Layout, namespace: str, name: str) -> None:
    kubectl(layout, "wait", "-n", namespace, f"deployment/{name}", "--for=condition=Available", "--timeout=90s")


def kueue_answers(layout: Layout) -> bool:
    """Whether its webhook admits a flavour; nothing is stored."""
    flavour = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ResourceFlavor", "metadata": {"name": "probe"}}
    try:
        kubectl(layout, "create", "--dry-run=server", "-f", "-", stdin=json.dumps(flavour))
    except EnvironmentUnusable:
        return False
    return True


def dns_answers(name: str = f"kubernetes.default.svc.{CLUSTER_DOMAIN}", *, timeout_s: float = 1.0) -> bool:
    """Whether the DNS service, reached as a pod reaches it, gives the API server's address for its name."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    # RFC 1035, section 4.1: one question, recursion desired, type A, class IN.
    question = struct.pack(">6H", _QUERY_ID, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(timeout_s)
        try:
            client.sendto(question, (DNS_SERVICE_ADDRESS, 53))
            return client.recv(512).endswith(socket.inet_aton(API_SERVICE_ADDRESS))
        except OSError:
            return False

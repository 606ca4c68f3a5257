"""Where the cluster keeps its files, and which addresses it uses. Constants and paths; nothing is touched here.

Each node is a network namespace, so that it has interfaces, ports, routes and firewall rules of its own, as a
machine does, and all of them end with it::

    this machine 10.89.0.1 ──┐
    node0 ────── 10.89.0.10 ─┤ a bridge in a namespace of its own ── S3 server 10.89.0.2
    node1 ────── 10.89.0.11 ─┘
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
DIRECTORY_VARIABLE = "HEADWAY_CLUSTER_DIR"
GPUS_VARIABLE = "HEADWAY_CLUSTER_GPUS"
_MAX_DIRECTORY_LENGTH = 50
"""Sockets are made under it, some by the kubelet in folders of its own, and their paths end at 107 bytes (unix(7))."""

LAN_NETWORK = "10.89.0.0/24"
POD_NETWORK = "10.244.0.0/16"
SERVICE_NETWORK = "10.96.0.0/16"
HOST_ADDRESS = "10.89.0.1"
S3_ADDRESS = "10.89.0.2"
API_SERVICE_ADDRESS = "10.96.0.1"
DNS_SERVICE_ADDRESS = "10.96.0.10"
CLUSTER_DOMAIN = "cluster.local"
API_PORT = 6443
ETCD_PORT = 2379
S3_PORT = 8333

BUCKET = "headway"
REGION = "us-east-1"
TEST_IMAGE = "docker.io/headway/test:1"
NAMESPACE = "headway"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node: a network namespace, a containerd and a kubelet."""

    index: int

    @property
    def name(self) -> str:
        return f"node{self.index}"

    @property
    def address(self) -> str:
        return f"10.89.0.{10 + self.index}"

    @property
    def pod_subnet(self) -> str:
        return f"10.244.{self.index}.0/24"


NODES = (Node(index=0), Node(index=1))
CONTROL_PLANE = NODES[0]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Paths under the cluster's directory, which is outside the repository."""

    directory: Path

    @property
    def id(self) -> str:
        """Marks everything that the cluster of this directory starts."""
        return "headway-cluster-" + hashlib.sha256(str(self.directory).encode()).hexdigest()[:12]

    @property
    def programs(self) -> Path:
        return self.directory / "bin"

    @property
    def sources(self) -> Path:
        """A Go module per set of programs, and their stamps."""
        return self.directory / "src"

    @property
    def images(self) -> Path:
        return self.directory / "images"

    @property
    def run(self) -> Path:
        """What belongs to one start, readable by its owner only: keys, tokens, etcd's data, sockets."""
        return self.directory / "run"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def kubeconfig(self) -> Path:
        return self.run / "admin.kubeconfig"

    @property
    def description(self) -> Path:
        """The running cluster as JSON; what tests read."""
        return self.directory / "cluster.json"

    @property
    def lock(self) -> Path:
        """Held while the cluster is started or ended."""
        return self.directory / "lock"

    def node(self, node: Node) -> Path:
        """Kept between starts: containerd's images are in it."""
        return self.directory / node.name

    def machine(self, node: Node) -> str:
        """What belongs to a node on this machine is named so: network namespace, control group, pods' network."""
        return f"{self.id}-{node.name}"

    @property
    def lan(self) -> str:
        """The network namespace of the wire between the nodes."""
        return f"{self.id}-lan"

    @property
    def host_interface(self) -> str:
        """This machine's end of the wire. Such a name has at most 15 characters."""
        return f"hw-{self.id[-12:]}"

    def socket(self, node: Node) -> Path:
        return self.run / f"{node.name}.sock"

    def program(self, name: str) -> str:
        return str(self.programs / name)


def find_layout() -> Layout:
    """The directory that ``HEADWAY_CLUSTER_DIR`` names, else ``~/.cache/headway-cluster``.

    Raises:
        UsageError: its path is too long.
    """
    named = os.environ.get(DIRECTORY_VARIABLE)
    directory = Path(named).resolve() if named else Path.home() / ".cache" / "headway-cluster"
    if len(str(directory)) > _MAX_DIRECTORY_LENGTH:
        raise UsageError(
            f"The cluster's directory {directory} has {len(str(directory))} characters; a socket's path leaves room "
            f"for {_MAX_DIRECTORY_LENGTH}.",
            next_step=f"Name a shorter one in {DIRECTORY_VARIABLE}",
        )
    return Layout(directory=directory)

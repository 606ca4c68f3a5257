"""The running cluster as one JSON file, for tests and for the next start. It holds keys: only its owner can read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.targets import processes
from orchestrator.targets.processes import Identity
from orchestrator.targets.seaweedfs import Keys
from tests.cluster.credentials import write_private
from tests.cluster.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """How to reach a running test cluster."""

    kubeconfig: str
    kubectl: str
    """The program, in the cluster's own version."""
    api_server: str
    nodes: list[str]
    image: str
    s3_endpoint_url: str
    """Reachable from this machine and from pods."""
    s3_region: str
    s3_bucket: str
    s3_keys: dict[str, Keys]
    """By user: ``admin``, ``trainer``, ``server``."""
    processes: dict[str, Identity]

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        partial = path.with_suffix(".partial")
        write_private(partial, json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(path)

    def store_environment(self, user: str = "admin") -> dict[str, str]:
        """What reaches its S3 server, in boto3's own words."""
        keys = self.s3_keys[user]
        return {
            "AWS_ACCESS_KEY_ID": keys.access_key,
            "AWS_SECRET_ACCESS_KEY": keys.secret_key,
            "AWS_ENDPOINT_URL": self.s3_endpoint_url,
            "AWS_REGION": self.s3_region,
        }

    def is_running(self) -> bool:
        return all(processes.alive(each) for each in self.processes.values())


def load(layout: Layout) -> Cluster | None:
    """The cluster that was started last and not taken down, or None. It may have ended; see ``is_running``."""
    try:
        value = json.loads(layout.description.read_text())
        keys: Mapping[str, Mapping[str, str]] = value.pop("s3_keys")
        started: Mapping[str, Mapping[str, int]] = value.pop("processes")
        return Cluster(
            **value,
            s3_keys={user: Keys(**each) for user, each in keys.items()},
            processes={name: Identity.from_json(each) for name, each in started.items()},
        )
    except (OSError, ValueError, KeyError, TypeError):  # none, or one of another version: it cannot be used
        return None

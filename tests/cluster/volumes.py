"""The repository, with its virtual environment, as a read-only claim for pods that may not mount a host's folder."""

from __future__ import annotations

from typing import Any

from tests.cluster.layout import NAMESPACE, REPOSITORY

CLAIM = "headway-venv"
_CAPACITY = "10Gi"


def repository_volume(namespace: str = NAMESPACE) -> list[dict[str, Any]]:
    """A PersistentVolume of this namespace and its claim. The namespace must be there when they are applied.

    Mount the claim read-only at :data:`tests.cluster.layout.REPOSITORY`: the scripts of a virtual environment name
    their interpreter by its absolute path.
    """
    size = {"storage": _CAPACITY}
    name = f"{CLAIM}-{namespace}"
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "capacity": size,
            "claimRef": {"namespace": namespace, "name": CLAIM},
            "hostPath": {"path": str(REPOSITORY), "type": "Directory"},
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": CLAIM, "namespace": namespace},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "resources": {"requests": size},
            "storageClassName": "",
            "volumeName": name,
        },
    }
    return [volume, claim]

"""Packs a root file system as a container image of one layer: an OCI archive that ``ctr image import`` takes.

Format: https://github.com/opencontainers/image-spec/blob/v1.1.0/image-layout.md
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.shell import run

_MEDIA = "application/vnd.oci.image"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What a container of the image runs, unless it is told otherwise."""

    name: str
    entrypoint: Sequence[str] = ()
    user: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    working_directory: str = "/"


def pack(root: Path, archive: Path, *, config: ImageConfig) -> None:
    """Write ``root`` as an image. The archive appears whole or not at all."""
    layer = archive.with_suffix(".layer")
    # pax keeps times to the nanosecond, by which ninja tells whether what was built is still up to date.
    run(["tar", "--format=pax", "--numeric-owner", "--sort=name", "-C", str(root), "-cf", str(layer), "."])
    try:
        partial = archive.with_suffix(".partial")
        _write_archive(partial, layer, config)
        partial.replace(archive)
    finally:
        layer.unlink()


def _write_archive(archive: Path, layer: Path, config: ImageConfig) -> None:
    with layer.open("rb") as file:
        layer_digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    described = _json(
        {
            "architecture": _ARCHITECTURES[platform.machine()],
            "os": "linux",
            "config": {
                "Entrypoint": list(config.entrypoint),
                "Env": [f"{name}={value}" for name, value in config.environment.items()],
                "User": config.user,
                "WorkingDir": config.working_directory,
            },
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
        }
    )
    layers = [{"mediaType": f"{_MEDIA}.layer.v1.tar", "digest": layer_digest, "size": layer.stat().st_size}]
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{_MEDIA}.manifest.v1+json",
            "config": _descriptor(described, f"{_MEDIA}.config.v1+json"),
            "layers": layers,
        }
    )
    named = _descriptor(manifest, f"{_MEDIA}.manifest.v1+json")
    named["annotations"] = {"io.containerd.image.name": config.name}
    with tarfile.open(archive, "w") as tar:
        _add(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add(tar, "index.json", _json({"schemaVersion": 2, "manifests": [named]}))
        for blob in (manifest, described):
            _add(tar, _blob_path(_digest(blob)), blob)
        tar.add(layer, _blob_path(layer_digest))


def _descriptor(blob: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}


def _digest(blob: bytes) -> str:
    return "sha256:" + hashlib.sha256(blob).hexdigest()


def _blob_path(digest: str) -> str:
    return "blobs/sha256/" + digest.removeprefix("sha256:")


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _add(tar: tarfile.TarFile, path: str, data: bytes) -> None:
    entry = tarfile.TarInfo(path)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))

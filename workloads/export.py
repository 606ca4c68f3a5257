"""From a run's last checkpoint to a Hugging Face directory in the store, committed by ``runs/<run>/export.json``."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.checkpoint.catalog import read_manifest
from orchestrator.checkpoint.export import ExportedFile, export_file, plan_files, weight_index
from orchestrator.checkpoint.resume import CheckpointReader
from orchestrator.dataset.format import DatasetManifest
from orchestrator.errors import AlreadyExists, IntegrityError, NotFound
from orchestrator.release.versions import VersionFile, claim_version
from orchestrator.spec import RunSpec
from orchestrator.store import Attempt, Store, layout
from orchestrator.store.attempts import ensure_newest
from workloads.tasks import Task

MAX_SHARD_BYTES = 2 * 2**30


class Export(BaseModel):
    """Where an exported model lies. ``version`` is the number claimed for it, None where nothing is released."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["headway/export/1"] = "headway/export/1"
    prefix: str
    version: int | None
    step: int
    dtype: str
    files: dict[str, VersionFile]


def read_export(store: Store, run_id: str) -> Export | None:
    key = layout.export(run_id)
    try:
        return Export.model_validate(store.get_json(key))
    except NotFound:
        return None
    except ValidationError as e:
        raise IntegrityError(f"{store.uri_of(key)} is not a headway/export/1 object.") from e


def export(spec: RunSpec, store: Store, attempt: Attempt, task: Task, dataset: DatasetManifest, *, step: int) -> Export:
    """Export the checkpoint of ``step`` in its own precision, straight to the folder of the version it may become."""
    manifest, _ = read_manifest(store, attempt.run_id, step)
    dtype = manifest.state.precision
    version = None
    prefix = f"{layout.run(attempt.run_id)}export/{attempt.prefix}/"
    if spec.release:
        facts = {"run_id": attempt.run_id, "attempt": attempt.number}
        version = claim_version(store, spec.release.model, facts=facts)
        prefix = layout.version(spec.release.model, version)
    reader = CheckpointReader(store, attempt.run_id, manifest)
    layouts = plan_files(manifest, dtype=dtype, max_shard_bytes=MAX_SHARD_BYTES)
    written = [export_file(reader, file, store, prefix, dtype=dtype) for file in layouts]
    index = weight_index(layouts)
    if index is not None:
        written.append(_upload(store, prefix, "model.safetensors.index.json", index))
    written += _upload_assets(store, prefix, task, dataset, dtype=dtype)
    result = Export(
        prefix=prefix,
        version=version,
        step=step,
        dtype=dtype,
        files={f.name: VersionFile(size_bytes=f.size_bytes, sha256=f.sha256) for f in written},
    )
    ensure_newest(store, attempt)
    try:
        store.create_json(layout.export(attempt.run_id), result.model_dump(mode="json"))
    except AlreadyExists:
        standing = read_export(store, attempt.run_id)
        return standing or result
    return result


def _upload_assets(
    store: Store, prefix: str, task: Task, dataset: DatasetManifest, *, dtype: str
) -> list[ExportedFile]:
    with tempfile.TemporaryDirectory(prefix="headway-assets-") as folder:
        directory = Path(folder) / "model"
        directory.mkdir()
        tokenizer = fetch_tokenizer(store, dataset, Path(folder))
        task.save_assets(directory, tokenizer=tokenizer, dtype=dtype)
        return [_upload(store, prefix, path.name, path.read_bytes()) for path in sorted(directory.iterdir())]


def fetch_tokenizer(store: Store, dataset: DatasetManifest, folder: Path) -> Path:
    """The dataset's tokenizer.json, verified, in ``folder``."""
    path = folder / "tokenizer.json"
    key = layout.dataset(dataset.name, dataset.fingerprint) + dataset.tokenizer.file
    path.write_bytes(store.get_verified(key, sha256=dataset.tokenizer.sha256, size_bytes=dataset.tokenizer.size_bytes))
    return path


def _upload(store: Store, prefix: str, name: str, data: bytes) -> ExportedFile:
    store.upload(prefix + name, data)
    return ExportedFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

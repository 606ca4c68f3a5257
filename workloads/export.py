"""From a run's last checkpoint to a Hugging Face directory in the store, committed by ``runs/<run>/export.json``."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.checkpoint.catalog import find, read_manifest
from orchestrator.checkpoint.export import INDEX_NAME, ExportedFile, plan_files, weight_index
from orchestrator.checkpoint.retention import pin
from orchestrator.dataset.format import DatasetManifest
from orchestrator.dataset.format import read_manifest as read_dataset
from orchestrator.errors import AlreadyExists, AttemptFailed, IntegrityError, NotFound, RunError, SpecError
from orchestrator.release.versions import VersionFile, claim_version
from orchestrator.spec import RunSpec
from orchestrator.store import Attempt, Store, layout
from orchestrator.store.attempts import ensure_newest
from workloads.export_file import FileJob
from workloads.tasks import Task, task_of


class Export(BaseModel):
    """Where an exported model lies. ``version`` is the number claimed for it, None where nothing is released."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["headway/export/1"] = "headway/export/1"
    prefix: str
    version: int | None
    step: int
    checkpoint: str
    """The folder of the checkpoint that was exported."""
    tokens: int
    loss: float | None
    """As the checkpoint's scalars have them."""
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


def export(
    spec: RunSpec,
    store: Store,
    attempt: Attempt,
    task: Task,
    dataset: DatasetManifest,
    *,
    step: int,
    write_all: Callable[[Sequence[FileJob]], list[ExportedFile]],
) -> Export:
    """Export the checkpoint of ``step``, straight to the folder of the version that it may become.

    Args:
        write_all: carries out one job per output file.

    Raises:
        AttemptFailed: the weights do not fit the dtype. It is no part of the run's identity, so another may be set.
        NotFound: there is no such checkpoint. IntegrityError: it is damaged.
    """
    folder = find(store, attempt.run_id, step)
    manifest, _ = read_manifest(store, folder)
    dtype = manifest.state.precision if spec.export.dtype == "auto" else spec.export.dtype
    version = None
    prefix = f"{layout.run(attempt.run_id)}export/{attempt.prefix}/"
    if spec.release:
        facts = {"run_id": attempt.run_id, "attempt": attempt.number}
        version = claim_version(store, spec.release.model, facts=facts)
        prefix = layout.version(spec.release.model, version)
    pin(store, attempt.run_id, step, "export", reason=f"exported to {store.uri_of(prefix)}")
    layouts = plan_files(manifest, dtype=dtype, max_shard_bytes=spec.export.max_shard_bytes)
    jobs = [
        FileJob(
            store=store.uri,
            folder=folder,
            file=file.name,
            dtype=dtype,
            max_shard_bytes=spec.export.max_shard_bytes,
            prefix=prefix,
        )
        for file in layouts
    ]
    try:
        written = write_all(jobs)
    except RunError as e:
        raise AttemptFailed(e.message, next_step="Set export.dtype to bf16 or fp32, and submit it again.") from e
    index = weight_index(layouts)
    if index is not None:
        written.append(_upload(store, prefix, INDEX_NAME, index))
    written += _upload_assets(store, prefix, task, dataset, dtype=dtype)
    result = Export(
        prefix=prefix,
        version=version,
        step=step,
        checkpoint=folder.prefix,
        tokens=manifest.state.tokens,
        loss=manifest.state.loss,
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


def save_assets(store: Store, run_id: str, directory: Path, *, dtype: str) -> list[str]:
    """Write what a Hugging Face directory holds besides weights, for a checkpoint of a Headway run.

    Returns the names of the files.

    Raises:
        SpecError: the run's task is not to be found here, or its run file is that of another version of Headway.
        ModuleNotFoundError: the task needs a package that is not installed. NotFound: the dataset is gone.
    """
    facts = store.get_json(layout.run_spec(run_id))
    try:
        spec, fingerprint = RunSpec.model_validate(facts["spec"]), str(facts["dataset_fingerprint"])
    except (ValidationError, KeyError, TypeError) as e:
        raise SpecError(
            f"{store.uri_of(layout.run_spec(run_id))} is not a run file of this version of Headway.",
            next_step="Use the version that trained the run.",
        ) from e
    dataset = _dataset_of(store, spec, fingerprint)
    with tempfile.TemporaryDirectory(prefix="headway-assets-") as scratch:
        assets = Path(scratch) / "model"
        assets.mkdir()
        tokenizer = fetch_tokenizer(store, dataset, Path(scratch))
        task_of(spec, dataset).save_assets(assets, tokenizer=tokenizer, dtype=dtype)
        for path in assets.iterdir():
            shutil.copyfile(path, directory / path.name)
        return sorted(path.name for path in assets.iterdir())


def _dataset_of(store: Store, spec: RunSpec, fingerprint: str) -> DatasetManifest:
    name = spec.data.dataset.partition("@")[0] if spec.data.dataset else spec.name
    return read_dataset(store, name, fingerprint)


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

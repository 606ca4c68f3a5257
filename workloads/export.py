"""From a run's last checkpoint to a Hugging Face directory in the store, committed by ``runs/<run>/export.json``."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.checkpoint.adapter import BaseReference
from orchestrator.checkpoint.catalog import find, read_manifest
from orchestrator.checkpoint.export import INDEX_NAME, ExportedFile, Form, plan_files, weight_index
from orchestrator.checkpoint.retention import pin
from orchestrator.dataset.format import DatasetManifest
from orchestrator.dataset.format import read_manifest as read_dataset
from orchestrator.dataset.tokenizer import fetch_tokenizer
from orchestrator.errors import AlreadyExists, AttemptFailed, IntegrityError, NotFound, RunError, SpecError
from orchestrator.release.versions import VersionFile, claim_version
from orchestrator.spec import RunSpec
from orchestrator.store import Attempt, Store, layout
from orchestrator.store.attempts import ensure_newest
from workloads.export_file import FileJob
from workloads.pretrained_model import adapter_config
from workloads.tasks import Task, task_of
from workloads.tasks.base_context import base_context


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
    base: BaseReference | None = None
    """The pretrained weights without which the files are no model: an adapter alone was exported."""


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
        task: with the base that the run started from, where it did.
        write_all: carries out one job per output file.

    Raises:
        AttemptFailed: the weights do not fit the dtype, or give no adapter. Neither is part of the run's identity, so
        another may be set.
        NotFound: there is no such checkpoint. IntegrityError: it is damaged.
    """
    folder = find(store, attempt.run_id, step)
    manifest, _ = read_manifest(store, folder)
    dtype = manifest.state.precision if spec.export.dtype == "auto" else spec.export.dtype
    form = _form(spec)
    try:
        layouts = plan_files(manifest, dtype=dtype, max_shard_bytes=spec.export.max_shard_bytes, form=form)
    except RunError as e:  # the form is no part of the run's identity either
        raise AttemptFailed(e.message, next_step=e.next_step) from e
    version = None
    prefix = f"{layout.run(attempt.run_id)}export/{attempt.prefix}/"
    if spec.release:
        facts = {"run_id": attempt.run_id, "attempt": attempt.number}
        version = claim_version(store, spec.release.model, facts=facts)
        prefix = layout.version(spec.release.model, version)
    pin(store, attempt.run_id, step, "export", reason=f"exported to {store.uri_of(prefix)}")
    jobs = [
        FileJob(
            store=store.uri,
            folder=folder,
            file=file.name,
            form=form,
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
    written += _upload_assets(spec, store, prefix, task, dataset, dtype=dtype, form=form)
    result = Export(
        prefix=prefix,
        version=version,
        step=step,
        checkpoint=folder.prefix,
        tokens=manifest.state.tokens,
        loss=manifest.state.loss,
        dtype=dtype,
        files={f.name: VersionFile(size_bytes=f.size_bytes, sha256=f.sha256) for f in written},
        base=manifest.base if form == "adapter" else None,
    )
    ensure_newest(store, attempt)
    try:
        store.create_json(layout.export(attempt.run_id), result.model_dump(mode="json"))
    except AlreadyExists:
        standing = read_export(store, attempt.run_id)
        return standing or result
    return result


def save_assets(store: Store, run_id: str, directory: Path, *, dtype: str, form: Form = "merged") -> list[str]:
    """Write what a Hugging Face directory, or peft's, holds besides weights, for a checkpoint of a Headway run.

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
    base_fingerprint = str(facts.get("base_fingerprint") or "")
    if spec.model.pretrained is not None and not base_fingerprint:
        raise SpecError(f"{store.uri_of(layout.run_spec(run_id))} does not say which pretrained model that was.")
    dataset = _dataset_of(store, spec, fingerprint)
    with tempfile.TemporaryDirectory(prefix="headway-assets-") as scratch:
        assets = Path(scratch) / "model"
        assets.mkdir()
        task = task_of(spec, dataset, base_context(spec, store, base_fingerprint))
        tokenizer = fetch_tokenizer(store, dataset, Path(scratch) / "tokenizer") / dataset.tokenizer.file
        _write_assets(spec, task, assets, tokenizer=tokenizer, dtype=dtype, form=form)
        for path in assets.iterdir():
            shutil.copyfile(path, directory / path.name)
        return sorted(path.name for path in assets.iterdir())


def _dataset_of(store: Store, spec: RunSpec, fingerprint: str) -> DatasetManifest:
    name = spec.data.dataset.partition("@")[0] if spec.data.dataset else spec.name
    return read_dataset(store, name, fingerprint)


def _form(spec: RunSpec) -> Form:
    return spec.export.lora if spec.model.lora is not None else "merged"


def _upload_assets(
    spec: RunSpec, store: Store, prefix: str, task: Task, dataset: DatasetManifest, *, dtype: str, form: Form
) -> list[ExportedFile]:
    with tempfile.TemporaryDirectory(prefix="headway-assets-") as folder:
        directory = Path(folder) / "model"
        directory.mkdir()
        tokenizer = fetch_tokenizer(store, dataset, Path(folder) / "tokenizer") / dataset.tokenizer.file
        _write_assets(spec, task, directory, tokenizer=tokenizer, dtype=dtype, form=form)
        return [_upload(store, prefix, path.name, path.read_bytes()) for path in sorted(directory.iterdir())]


def _write_assets(spec: RunSpec, task: Task, directory: Path, *, tokenizer: Path, dtype: str, form: Form) -> None:
    """All but the weights. An adapter has peft's config beside the model's, which says what the classes are."""
    if form == "merged":
        task.save_assets(directory, tokenizer=tokenizer, dtype=dtype)
        return
    adapter_config(task, base_name=str(spec.model.pretrained)).save_pretrained(directory)
    task.save_config(directory, dtype=dtype)
    task.save_tokenizer(directory, tokenizer=tokenizer)


def _upload(store: Store, prefix: str, name: str, data: bytes) -> ExportedFile:
    store.upload(prefix + name, data)
    return ExportedFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

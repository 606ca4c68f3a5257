"""One output file of an export, as a Ray task. A module of its own, so that the task's process imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from orchestrator.checkpoint.catalog import Folder, read_manifest
from orchestrator.checkpoint.export import ExportedFile, Form, export_to_store, plan_files
from orchestrator.checkpoint.sources import open_weights
from orchestrator.store import open_store
from workloads.ray_tasks import all_of


class FileJob(BaseModel):
    """All that a task needs to write one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str
    folder: Folder
    file: str
    form: Form
    dtype: str
    max_shard_bytes: int
    prefix: str


def write(job: FileJob) -> ExportedFile:
    """Write one file to the store, in memory that does not grow with it."""
    store = open_store(job.store)
    manifest, _ = read_manifest(store, job.folder)
    files = plan_files(manifest, dtype=job.dtype, max_shard_bytes=job.max_shard_bytes, form=job.form)
    file = next(file for file in files if file.name == job.file)
    return export_to_store(open_weights(store, job.folder, manifest), file, store, job.prefix)


def one_by_one(jobs: Sequence[FileJob]) -> list[ExportedFile]:
    return [write(job) for job in jobs]


def as_ray_tasks(jobs: Sequence[FileJob]) -> list[ExportedFile]:
    """All files at once, as many as the cluster has CPUs for."""
    import ray

    task = ray.remote(num_cpus=1)(write)
    return all_of([task.remote(job) for job in jobs])

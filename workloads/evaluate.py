"""Evaluates an exported model on the held-out split, its samples shared out over Ray tasks."""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from orchestrator.dataset.format import DatasetManifest, read_manifest
from orchestrator.dataset.reader import TokenReader, cache_directory, require_samples
from orchestrator.errors import RunError
from orchestrator.pretrained.format import read_base
from orchestrator.release.versions import download_files
from orchestrator.spec import RunSpec
from orchestrator.store import Store, open_store
from workloads.adapter import download_base
from workloads.export import Export
from workloads.pretrained_model import is_whole
from workloads.tasks import Samples, Task, task_of
from workloads.tasks.base_context import BaseContext, base_context

_SEED = 0x0E7A1  # of masks and noise in evaluation; the same for every model that is compared


class EvaluationJob(BaseModel):
    """All that a Ray task needs to evaluate its share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: RunSpec
    store: str
    dataset: tuple[str, str]
    """Name and fingerprint."""
    base: str
    """Fingerprint of the pretrained model that the run started from, empty where it started from none."""
    exported: Export | None
    """None evaluates that pretrained model itself."""


def evaluate(
    spec: RunSpec, store: Store, dataset: DatasetManifest, exported: Export, base: BaseContext | None = None
) -> dict[str, float]:
    """The task's figures for the exported model; beside them the losses, on the same samples, of a unigram model and of
    the pretrained model before training, where that can do the task.

    Args:
        base: the pretrained model that the run started from, where it did.
    """
    job = EvaluationJob(
        spec=spec,
        store=store.uri,
        dataset=(dataset.name, dataset.fingerprint),
        base=base.manifest.fingerprint if base is not None else "",
        exported=exported,
    )
    task = task_of(spec, dataset, base)
    figures = _figures(job, task, dataset)
    figures["unigram_loss"] = dataset.unigram_loss
    if base is not None and is_whole(task):
        figures["pretrained_loss"] = _figures(job.model_copy(update={"exported": None}), task, dataset)["loss"]
    return figures


def _figures(job: EvaluationJob, task: Task, dataset: DatasetManifest) -> dict[str, float]:
    import ray

    resources = job.spec.resources
    num_shares = resources.workers.min
    remote = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=1 if resources.gpu else 0, max_calls=1)(_share)
    shares = ray.get([remote.remote(job.model_dump_json(), share, num_shares) for share in range(num_shares)])
    num_targets = sum(count for _, count in shares)
    if num_targets == 0:
        raise RunError("The held-out split gave no targets to evaluate.")
    sums: Counter[str] = Counter()
    for part, _ in shares:
        sums.update(part)
    return {**task.metrics(sums, num_targets=num_targets, split=dataset.eval), "num_targets": num_targets}


def _share(job_json: str, share: int, num_shares: int) -> tuple[dict[str, float], int]:
    """:func:`add_up` of every ``num_shares``-th micro-batch, as a Ray task."""
    job = EvaluationJob.model_validate_json(job_json)
    spec, store = job.spec, open_store(job.store)
    dataset = read_manifest(store, *job.dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(spec.resources.cpus_per_worker)
    task = task_of(spec, dataset, base_context(spec, store, job.base))
    model = _load(job, store, task).to(device).eval()
    return add_up(spec, task, model, dataset, store, share=share, num_shares=num_shares, device=device)


def _load(job: EvaluationJob, store: Store, task: Task) -> torch.nn.Module:
    exported = job.exported
    if exported is None:
        return task.load_model(download_base(store, read_base(store, job.base).reference, cache_directory()))
    whole = download_base(store, exported.base, cache_directory()) if exported.base is not None else None
    with tempfile.TemporaryDirectory(prefix="headway-evaluate-") as folder:
        directory = Path(folder) / "model"
        download_files(store, exported.prefix, exported.files, directory)
        return task.load_model(directory, whole)


def add_up(
    spec: RunSpec,
    task: Task,
    model: Any,
    dataset: DatasetManifest,
    store: Store,
    *,
    share: int,
    num_shares: int,
    device: torch.device,
) -> tuple[dict[str, float], int]:
    """The task's sums and the number of targets over one share of the held-out split."""
    reader = TokenReader(store, dataset, dataset.eval, sequence_length=spec.data.sequence_length)
    require_samples(reader, at_least=1, what="held-out")
    num_samples = min(reader.num_samples, spec.gate.max_eval_samples or reader.num_samples)
    rows = spec.train.micro_batch_size
    sums: Counter[str] = Counter()
    num_targets = 0
    with torch.inference_mode():
        for start in range(share * rows, num_samples, rows * num_shares):
            indices = np.arange(start, min(start + rows, num_samples), dtype=np.int64)
            samples = Samples(
                rows=reader.rows(indices),
                num_real=len(indices),
                row_rng=partial(row_rng, start),
            )
            batch = task.collate(samples)
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            sums.update(task.eval_sums(model, on_device))  # type: ignore[arg-type]  # a Counter adds floats as well
            num_targets += task.num_targets(batch)
    return dict(sums), num_targets


def row_rng(first: int, row: int) -> np.random.Generator:
    """Of row ``row`` of the samples from ``first`` on."""
    return np.random.default_rng([_SEED, first + row])

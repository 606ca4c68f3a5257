"""Evaluates an exported model on the held-out split, its samples shared out over Ray tasks."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.checkpoint.adapter import BaseReference
from orchestrator.dataset.format import DatasetManifest, read_manifest
from orchestrator.dataset.reader import TokenReader, require_samples
from orchestrator.errors import RunError
from orchestrator.node_cache import cache_directory
from orchestrator.pretrained.format import read_base
from orchestrator.release.download import download_cached
from orchestrator.release.versions import Version, VersionFile, files_digest
from orchestrator.spec import RunSpec
from orchestrator.store import Store, layout, open_store
from workloads.adapter import download_base
from workloads.answers import held_out_answers
from workloads.export import Export
from workloads.pretrained_model import is_whole
from workloads.ray_tasks import all_of
from workloads.tasks import Samples, Task, task_of
from workloads.tasks.base_context import BaseContext, base_context

_SEED = 0x0E7A1  # of masks and noise in evaluation; the same for every model that is compared


MAX_BLOCKS = 4096
_LEAST_BLOCKS = 32  # as long as there are as many samples: a bootstrap needs some


class ModelFiles(BaseModel):
    """A Hugging Face directory in the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: str
    files: dict[str, VersionFile]
    base: BaseReference | None = None
    """The pretrained weights without which the files are no model."""

    @classmethod
    def of_export(cls, exported: Export) -> ModelFiles:
        return cls(prefix=exported.prefix, files=exported.files, base=exported.base)

    @classmethod
    def of_version(cls, version: Version) -> ModelFiles:
        return cls(prefix=layout.version(version.model, version.number), files=version.files, base=version.base)


class EvaluationJob(BaseModel):
    """All that a Ray task needs to evaluate its share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: RunSpec
    store: str
    dataset: tuple[str, str]
    """Name and fingerprint."""
    base: str
    """Fingerprint of the pretrained model that the run started from, empty where it started from none."""
    model: ModelFiles | None
    """None evaluates that pretrained model itself."""
    with_answers: bool = False
    """Whether to give answers to some samples too."""


class Blocks(BaseModel):
    """Losses of samples that lie side by side, one entry a block: what two models are compared by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[float, ...] = ()
    """Nats, summed over the block's targets."""
    num_targets: tuple[int, ...] = ()


class Evaluation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["headway/evaluation/1"] = "headway/evaluation/1"
    figures: dict[str, float]
    """The task's, such as ``loss`` in nats per target; beside it the losses, on the same samples, of a unigram model
    and of the pretrained model before training, where that can do the task."""
    blocks: Blocks
    answers: tuple[dict[str, str], ...] = Field(default=(), exclude=True)
    """To some held-out samples, as :meth:`workloads.tasks.Task.answers` gives them. They are told as an event."""


class Summed(NamedTuple):
    """One micro-batch of the held-out split: its first sample, the task's sums, and its targets."""

    first: int
    sums: dict[str, float]
    num_targets: int


class Share(NamedTuple):
    """What one Ray task found."""

    found: list[Summed]
    answers: list[dict[str, str]]


def evaluate(
    spec: RunSpec, store: Store, dataset: DatasetManifest, exported: Export, base: BaseContext | None = None
) -> Evaluation:
    """The exported model on the held-out split.

    Args:
        base: the pretrained model that the run started from, where it did.
    """
    found = evaluate_files(spec, store, dataset, ModelFiles.of_export(exported), base, with_answers=True)
    figures = {**found.figures, "unigram_loss": dataset.unigram_loss}
    if base is not None and is_whole(task_of(spec, dataset, base)):
        figures["pretrained_loss"] = evaluate_files(spec, store, dataset, None, base).figures["loss"]
    return found.model_copy(update={"figures": figures})


def evaluate_files(
    spec: RunSpec,
    store: Store,
    dataset: DatasetManifest,
    model: ModelFiles | None,
    base: BaseContext | None,
    *,
    with_answers: bool = False,
) -> Evaluation:
    """Any model of the run's task on the run's held-out split; None is the pretrained model itself."""
    import ray

    job = EvaluationJob(
        spec=spec,
        store=store.uri,
        dataset=(dataset.name, dataset.fingerprint),
        base=base.manifest.fingerprint if base is not None else "",
        model=model,
        with_answers=with_answers,
    )
    resources = spec.resources
    num_shares = resources.workers.min
    remote = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=1 if resources.gpu else 0, max_calls=1)(_share)
    shares = all_of([remote.remote(job.model_dump_json(), share, num_shares) for share in range(num_shares)])
    found = sorted(summed for share in shares for summed in share.found)
    num_targets = sum(each.num_targets for each in found)
    if num_targets == 0:
        raise RunError("The held-out split gave no targets to evaluate.")
    sums: Counter[str] = Counter()
    for each in found:
        sums.update(each.sums)
    figures = task_of(spec, dataset, base).metrics(sums, num_targets=num_targets, split=dataset.eval)
    answers = tuple(answer for share in shares for answer in share.answers)
    return Evaluation(figures={**figures, "num_targets": num_targets}, blocks=blocks_of(found), answers=answers)


def blocks_of(found: Sequence[Summed]) -> Blocks:
    """Neighbouring micro-batches, in the order of their samples, as at most :data:`MAX_BLOCKS` blocks. Pure."""
    found = [each for each in found if each.num_targets]
    if any("loss" not in each.sums for each in found):  # a task of one's own that sums something else
        return Blocks()
    size = math.ceil(len(found) / MAX_BLOCKS) or 1
    parts = [found[start : start + size] for start in range(0, len(found), size)]
    return Blocks(
        losses=tuple(sum(each.sums["loss"] for each in part) for part in parts),
        num_targets=tuple(sum(each.num_targets for each in part) for part in parts),
    )


def _share(job_json: str, share: int, num_shares: int) -> Share:
    """Every ``num_shares``-th micro-batch, as a Ray task. The first one gives the answers."""
    job = EvaluationJob.model_validate_json(job_json)
    spec, store = job.spec, open_store(job.store)
    dataset = read_manifest(store, *job.dataset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(spec.resources.cpus_per_worker)
    task = task_of(spec, dataset, base_context(spec, store, job.base))
    model = _load(job, store, task).to(device).eval()
    found = list(summed(spec, task, model, dataset, store, share=share, num_shares=num_shares, device=device))
    wanted = job.with_answers and share == 0
    return Share(found, held_out_answers(spec, task, model, dataset, store) if wanted else [])


def _load(job: EvaluationJob, store: Store, task: Task) -> torch.nn.Module:
    found = job.model
    if found is None:
        return task.load_model(download_base(store, read_base(store, job.base).reference, cache_directory()))
    whole = download_base(store, found.base, cache_directory()) if found.base is not None else None
    directory = cache_directory() / "evaluated" / files_digest(found.files)
    return task.load_model(download_cached(store, found.prefix, found.files, directory), whole)


def summed(
    spec: RunSpec,
    task: Task,
    model: Any,
    dataset: DatasetManifest,
    store: Store,
    *,
    share: int,
    num_shares: int,
    device: torch.device,
) -> Iterator[Summed]:
    """One share of the held-out split, micro-batch by micro-batch."""
    reader = TokenReader(store, dataset, dataset.eval, sequence_length=spec.data.sequence_length)
    require_samples(reader, at_least=1, what="held-out")
    num_samples = min(reader.num_samples, spec.gate.max_eval_samples or reader.num_samples)
    rows = max(1, min(spec.train.micro_batch_size, num_samples // _LEAST_BLOCKS))
    with contextlib.closing(reader), torch.inference_mode():
        for start in range(share * rows, num_samples, rows * num_shares):
            indices = np.arange(start, min(start + rows, num_samples), dtype=np.int64)
            samples = Samples(
                rows=reader.rows(indices),
                num_real=len(indices),
                row_rng=partial(row_rng, start),
            )
            batch = task.collate(samples)
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            yield Summed(start, task.eval_sums(model, on_device), task.num_targets(batch))


def row_rng(first: int, row: int) -> np.random.Generator:
    """Of row ``row`` of the samples from ``first`` on."""
    return np.random.default_rng([_SEED, first + row])

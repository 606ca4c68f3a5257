"""What a run will cost in GPU-hours, from what the last one of its name came to."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from orchestrator.commands.changes import Earlier
from orchestrator.dataset.format import DatasetManifest, read_manifest
from orchestrator.errors import HeadwayError
from orchestrator.plan import num_steps
from orchestrator.record import EventReader
from orchestrator.runs import RunIdentity
from orchestrator.spec import RunSpec
from orchestrator.store import Store


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of training alone. Both figures are None where nothing is known to go by."""

    gpu_hours: float | None = None
    cpu_hours: float | None = None
    basis: str

    def __str__(self) -> str:
        hours = self.gpu_hours if self.gpu_hours is not None else self.cpu_hours
        if hours is None:
            return f"unknown: {self.basis}"
        return f"{hours:,.3g} {'GPU' if self.gpu_hours is not None else 'CPU'}-hours: {self.basis}"


def estimate(store: Store, spec: RunSpec, identity: RunIdentity, earlier: Earlier | None) -> Estimate:
    """What training will take if a worker trains as many tokens a second as those of the earlier run did.

    Raises:
        StoreError: the earlier run's events cannot be read.
    """
    if earlier is None:
        return Estimate(basis="no run of this name has been trained")
    rate = _tokens_per_worker_s(store, earlier.run_id)
    if rate is None:
        return Estimate(basis=f"{earlier.run_id} was not trained")
    steps, note = _steps(store, spec, identity, earlier)
    if steps is None:
        return Estimate(basis=note)
    hours = steps * spec.train.global_batch_size * spec.data.sequence_length / rate / 3600
    basis = f"{steps:,} steps{note} at the {rate:,.0f} tokens/s and worker of {earlier.run_id}"
    if spec.resources.gpu is not None:
        return Estimate(gpu_hours=hours, basis=basis)
    return Estimate(cpu_hours=hours * spec.resources.cpus_per_worker, basis=basis)


def _steps(store: Store, spec: RunSpec, identity: RunIdentity, earlier: Earlier) -> tuple[int | None, str]:
    """How many, and what that was taken from; None where it cannot be told."""
    length = spec.data.sequence_length
    found = identity.dataset or _dataset(store, spec.name, identity.dataset_fingerprint)
    if found is not None:
        return num_steps(spec.train, found.num_samples(found.train, length), sequence_length=length), ""
    if spec.train.steps is not None:
        return spec.train.steps, ""
    before = _dataset(store, spec.name, str(earlier.recorded.get("dataset_fingerprint", "")))
    if before is None or not before.source.get("num_bytes"):
        return None, "how much data there is shows once it is prepared"
    growth = sum(file.size_bytes for file in identity.files if not file.left_out) / before.source["num_bytes"]
    samples = round(before.num_samples(before.train, length) * growth)
    return num_steps(spec.train, samples, sequence_length=length), f", for {growth:.3g} times the last run's data,"


def _dataset(store: Store, name: str, fingerprint: str) -> DatasetManifest | None:
    try:
        return read_manifest(store, name, fingerprint)
    except HeadwayError:
        return None


def _tokens_per_worker_s(store: Store, run_id: str) -> float | None:
    """The median over the run's steps."""
    workers, rates = 1, []
    for event in EventReader(store, run_id).poll():
        if event["kind"] == "training":
            workers = max(1, int(event["world_size"]))
        elif event["kind"] == "step":
            rates.append(float(event["tokens_per_s"]) / workers)
    return statistics.median(rates) if rates else None

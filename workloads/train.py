"""Training: what every worker runs, from a fresh or resumed state to the last step. DeepSpeed is in engine.py."""

from __future__ import annotations

import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import distributed as dist

from orchestrator.checkpoint.format import State
from orchestrator.checkpoint.resume import resume_newest
from orchestrator.checkpoint.save import CheckpointWriter
from orchestrator.dataset.format import read_manifest
from orchestrator.dataset.order import SampleOrder
from orchestrator.dataset.reader import TokenReader, require_samples
from orchestrator.errors import Fenced, HeadwayError, RunError
from orchestrator.plan import BatchSplit, resolve_precision, split_batch
from orchestrator.record import EventLog
from orchestrator.release.outcome import Outcome, commit_outcome, read_outcome
from orchestrator.schedule import learning_rate
from orchestrator.spec import RunSpec
from orchestrator.store import Attempt, Store, open_store
from orchestrator.store.attempts import ensure_newest, stop_reason
from workloads.engine import Engine
from workloads.tasks import Batch, Samples, Task, task_of

logger = logging.getLogger(__name__)
MONITOR_S = 2.0  # between two looks for a stop request or a newer attempt


class TrainJob(BaseModel):
    """All that a worker needs, as it travels from the driver."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str
    spec: RunSpec
    run_id: str
    attempt: int
    attempt_nonce: str
    dataset: tuple[str, str]
    """Name and fingerprint."""
    total_steps: int

    def attempt_claim(self) -> Attempt:
        return Attempt(run_id=self.run_id, number=self.attempt, nonce=self.attempt_nonce)


End = Literal["complete", "stopped", "failed"]


def train(
    job: TrainJob,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    on_step: Callable[[dict[str, float]], None] = lambda _: None,
) -> End:
    """Train from the newest committed checkpoint to the last step. Every rank calls it with torch.distributed set up.

    Raises:
        Fenced: a newer attempt has taken over. StoreError, IntegrityError: the data or a checkpoint is unusable.
    """
    spec, store, attempt = job.spec, open_store(job.store), job.attempt_claim()
    if read_outcome(store, job.run_id) is not None:
        return "failed"
    ensure_newest(store, attempt)
    manifest = read_manifest(store, *job.dataset)
    reader = TokenReader(store, manifest, manifest.train, sequence_length=spec.data.sequence_length)
    require_samples(reader, at_least=spec.train.global_batch_size, what="train")
    order = SampleOrder(fingerprint=manifest.fingerprint, seed=spec.train.seed, num_samples=reader.num_samples)
    task = task_of(spec, manifest)
    split = split_batch(
        world_size=world_size,
        global_batch_size=spec.train.global_batch_size,
        micro_batch_size=spec.train.micro_batch_size,
    )
    torch.manual_seed(spec.train.seed)
    precision = resolve_precision(spec.train.precision, gpu=device.type == "cuda", native_bf16=_has_native_bf16(device))
    engine = Engine(task.build_model(), train=spec.train, split=split, precision=precision, device=device)
    resumed = resume_newest(store, job.run_id, engine.state, engine.model, rank=rank)
    first_step = resumed.state.step if resumed else 0
    writer = CheckpointWriter(
        store,
        attempt,
        engine.state,
        engine.model,
        rank=rank,
        world_size=world_size,
        group_nonce=_shared_nonce(rank),
        keep=spec.checkpoint.keep,
    )
    batches = BatchFeed(task, reader, order, split, rank=rank, seed=spec.train.seed, device=device)
    try:
        with _observed(store, attempt, rank=rank) as observer:
            observer.note("training", first_step=first_step, total_steps=job.total_steps, world_size=world_size)
            return _steps(job, engine, task, batches, writer, observer, on_step, first_step, rank)
    finally:
        writer.close()
        batches.close()


def _steps(
    job: TrainJob,
    engine: Engine,
    task: Task,
    batches: BatchFeed,
    writer: CheckpointWriter,
    observer: Observer,
    on_step: Callable[[dict[str, float]], None],
    first_step: int,
    rank: int,
) -> End:
    """The loop itself. One small all-reduce a step carries the loss, the stop and the next step's target count."""
    spec, total_steps = job.spec, job.total_steps
    tokens_per_step = spec.train.global_batch_size * spec.data.sequence_length
    micro_batches = batches.take(first_step)
    (targets,) = _sum_over_ranks(_count(task, micro_batches))
    for step in range(first_step, total_steps):
        started = time.perf_counter()
        batches.prefetch(step + 1)
        torch.manual_seed(_step_seed(spec.train.seed, step, rank))
        loss_sum = torch.zeros((), device=engine.device)
        for batch in micro_batches:
            loss = task.loss_sum(engine.module, batch)
            loss_sum += loss.detach()
            engine.backward(loss, global_targets=int(targets))
        rate = learning_rate(spec.train.optimizer, step=step, total_steps=total_steps)
        grad_norm = engine.step(rate)

        micro_batches = batches.take(step + 1)
        total_loss, next_targets, stops = _sum_over_ranks(
            float(loss_sum), _count(task, micro_batches), observer.stop_wanted
        )
        mean_loss, targets = total_loss / targets, next_targets
        if not math.isfinite(mean_loss + grad_norm):
            raise RunError(
                f"The loss became {mean_loss} and the gradient norm {grad_norm} at step {step + 1}.",
                next_step="Lower train.optimizer.learning_rate, add warmup_steps, or look at the data of that step.",
            )
        elapsed = time.perf_counter() - started
        figures = {
            "step": step + 1,
            "loss": mean_loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "tokens": (step + 1) * tokens_per_step,
            "tokens_per_s": tokens_per_step / elapsed,
            "step_s": elapsed,
        }
        observer.step(figures)
        on_step(figures)
        stopping = stops > 0
        if (step + 1) % spec.checkpoint.every_steps == 0 or step + 1 == total_steps or stopping:
            writer.save(_scalars(job, engine, step + 1, tokens_per_step, mean_loss))
        observer.saves(writer)
        if stopping and step + 1 < total_steps:
            _finish(writer, observer)
            return "stopped"
    _finish(writer, observer)
    return "complete"


def _finish(writer: CheckpointWriter, observer: Observer) -> None:
    """Wait for the last save; unlike those before, its failure is the run's."""
    saved = writer.wait()
    observer.saves(writer)
    if saved is not None and saved.error is not None:
        raise saved.error


def _scalars(job: TrainJob, engine: Engine, step: int, tokens_per_step: int, loss: float) -> State:
    return State(
        step=step,
        tokens=step * tokens_per_step,
        loss=loss,
        precision=engine.precision,
        optimizer_step=engine.state.optimizer_step,
        spec_sha256=job.spec.sha256(),
        dataset_fingerprint=job.dataset[1],
    )


class BatchFeed:
    """This rank's micro-batches of each step, built one step ahead on a thread."""

    def __init__(
        self,
        task: Task,
        reader: TokenReader,
        order: SampleOrder,
        split: BatchSplit,
        *,
        rank: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._task, self._reader, self._order, self._split = task, reader, order, split
        self._rows = split.rows_of(rank)
        self._seed, self._device = seed, device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Any] = {}

    def prefetch(self, step: int) -> None:
        if step not in self._ahead:
            self._ahead[step] = self._pool.submit(self._build, step)

    def take(self, step: int) -> list[Batch]:
        """The micro-batches of ``step``: ``accumulation`` of them with ``micro_rows`` rows each."""
        self.prefetch(step)
        batches: list[Batch] = self._ahead.pop(step).result()
        if self._device.type == "cpu":
            return batches
        return [{k: v.to(self._device, non_blocking=True) for k, v in batch.items()} for batch in batches]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _build(self, step: int) -> list[Batch]:
        indices = self._order.batch(step, self._split.global_batch_size)
        batches = []
        for micro in range(self._split.accumulation):
            start = self._rows.start + micro * self._split.micro_rows
            mine = range(min(start, self._rows.stop), min(start + self._split.micro_rows, self._rows.stop))
            padded = [*mine, *[self._rows.start] * (self._split.micro_rows - len(mine))]
            samples = Samples(
                tokens=self._reader.samples(indices[padded]),
                num_real=len(mine),
                row_rng=partial(_row_rng, self._seed, step, padded),
            )
            batches.append(self._task.collate(samples))
        return batches


class Observer:
    """What rank 0 tells the world, and what the world tells rank 0. Other ranks' observers do nothing."""

    def __init__(self, store: Store, attempt: Attempt, *, rank: int) -> None:
        self.stop_wanted = 0.0
        self._events = EventLog(store, attempt, "train") if rank == 0 else None
        self._store, self._attempt = store, attempt
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        if rank == 0:
            self._thread.start()

    def note(self, kind: str, **fields: Any) -> None:
        if self._events:
            self._events.append(kind, **fields)

    def step(self, figures: dict[str, float]) -> None:
        self.note("step", **{k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()})

    def saves(self, writer: CheckpointWriter) -> None:
        for saved in writer.take_results():
            kind = "checkpoint" if saved.error is None else "checkpoint_failed"
            error = {"error": str(saved.error)} if saved.error else {}
            self.note(kind, step=saved.step, seconds=round(saved.seconds, 3), **error)

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._events:
            self._events.close()

    def _watch(self) -> None:
        while not self._closed.wait(MONITOR_S):
            try:
                reason = stop_reason(self._store, self._attempt)
            except HeadwayError as e:
                logger.warning("Whether this attempt is to stop cannot be seen now: %s", e)
                continue
            if reason:
                logger.warning("Stopping after this step: %s.", reason)
                self.note("stopping", reason=reason)
                self.stop_wanted = 1.0
                return


@contextmanager
def _observed(store: Store, attempt: Attempt, *, rank: int) -> Iterator[Observer]:
    observer = Observer(store, attempt, rank=rank)
    try:
        yield observer
    finally:
        observer.close()


def _count(task: Task, micro_batches: list[Batch]) -> float:
    return float(sum(task.num_targets(batch) for batch in micro_batches))


def _sum_over_ranks(*values: float) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def _shared_nonce(rank: int) -> str:
    """Eight random hex digits, drawn by rank 0 and the same on every rank."""
    drawn = torch.tensor([secrets.randbits(32) if rank == 0 else 0], dtype=torch.int64)
    dist.broadcast(drawn, src=0)
    return f"{int(drawn):08x}"


def _row_rng(seed: int, step: int, rows: list[int], row: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, rows[row]])


def _step_seed(seed: int, step: int, rank: int) -> int:
    """One seed per (run, step, rank), so that no random state has to be saved."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _has_native_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def worker(config: dict[str, Any]) -> None:
    """Ray Train's train function: one call per worker, on a thread beside the worker's main thread."""
    import ray.train
    import ray.train.torch

    job = TrainJob.model_validate(config)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(job.spec.resources.cpus_per_worker)
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        train(job, rank=rank, world_size=world_size, device=device, on_step=_ray_metrics(job, rank))
    except RunError as e:
        # A retry cannot change this: it is committed, so that neither Ray nor a later attempt tries again.
        store = open_store(job.store)
        commit_outcome(store, Outcome.failed(job.run_id, attempt=job.attempt, reason=str(e)))
        logger.error("%s", e)
    except Fenced as e:
        logger.warning("%s", e)


def _ray_metrics(job: TrainJob, rank: int) -> Callable[[dict[str, float]], None]:
    """Training's figures as Ray metrics, for the dashboard and Prometheus."""
    if rank != 0:
        return lambda _: None
    from ray.util.metrics import Gauge

    names = {
        "step": "Optimizer steps done",
        "loss": "Mean loss of the step, nats per target",
        "learning_rate": "Learning rate of the step",
        "grad_norm": "Global gradient norm before clipping",
        "tokens_per_s": "Tokens trained per second, over all workers",
        "step_s": "Seconds of the step",
    }
    gauges = {name: Gauge(f"headway_train_{name}", description=text, tag_keys=("run",)) for name, text in names.items()}

    def record(figures: dict[str, float]) -> None:
        for name, gauge in gauges.items():
            gauge.set(figures[name], tags={"run": job.run_id})

    return record

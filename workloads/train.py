"""Training: what every worker runs, from a fresh or resumed state to the last step. DeepSpeed is in engine.py."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import distributed as dist

from orchestrator.checkpoint.agreement import tell_all
from orchestrator.checkpoint.format import State
from orchestrator.checkpoint.resume import load_weights, resume_newest
from orchestrator.checkpoint.save import CheckpointWriter, Saved, writing
from orchestrator.dataset.format import read_manifest
from orchestrator.errors import Fenced, RunError
from orchestrator.plan import resolve_precision, split_batch
from orchestrator.release.outcome import Outcome, commit_outcome, read_outcome
from orchestrator.schedule import learning_rate
from orchestrator.spec import RunSpec
from orchestrator.store import Attempt, Store, WorkerGroup, claim_group, open_store
from orchestrator.store.attempts import ensure_newest, ensure_newest_group, newest_attempt
from workloads.engine import Engine
from workloads.feed import BatchFeed, open_feed
from workloads.observer import Observer, observed, preempted_nodes
from workloads.pulse import Link, Pulse, RayLink, beating
from workloads.tasks import Batch, Task, task_of

logger = logging.getLogger(__name__)


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


End = Literal["complete", "stopped"]


def train(
    job: TrainJob,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    on_step: Callable[[dict[str, float]], None] = lambda _: None,
    link: Link | None = None,
    preempted: Callable[[], frozenset[str]] = frozenset,
) -> End:
    """Train from the newest committed checkpoint to the last step. Every rank calls it with torch.distributed set up.

    Args:
        link: to the watchdog that notices a hang; None trains unwatched.
        preempted: the nodes of this group that are about to be taken away, by id.

    Raises:
        Fenced: a newer attempt has taken over, or the run has its outcome. NotFinite: the loss or the gradient is not
        a number, on all ranks alike. RunError: another fault that a retry does not change.
        StoreError, IntegrityError: the data or a checkpoint is unusable.
    """
    spec, store, attempt = job.spec, open_store(job.store), job.attempt_claim()
    require_ours(store, attempt, rank=rank)
    manifest = read_manifest(store, *job.dataset)
    task = task_of(spec, manifest)
    split = split_batch(spec.train.global_batch_size, world_size, spec.train.micro_batch_size)
    batches = open_feed(spec, store, manifest, task, split, rank=rank, device=device)
    torch.manual_seed(spec.train.seed)
    precision = resolve_precision(spec.train.precision, gpu=device.type == "cuda", native_bf16=_has_native_bf16(device))
    engine = Engine(task.build_model(), train=spec.train, split=split, precision=precision, device=device)
    group = _claim_group(store, attempt, rank=rank)
    first_step = _load(spec, store, job.run_id, engine, rank=rank)
    try:
        with (
            observed(store, group, rank=rank, preempted=preempted) as observer,
            writing(
                CheckpointWriter(
                    store,
                    group,
                    engine.state,
                    engine.model,
                    rank=rank,
                    world_size=world_size,
                    keep=spec.checkpoint.keep,
                    before_commit=observer.flush,
                )
            ) as writer,
            beating(
                link,
                group=group.nonce,
                rank=rank,
                world_size=world_size,
                first_step=first_step + 1,
                step_timeout_s=spec.train.step_timeout,
            ) as pulse,
        ):
            loop = Loop(job, rank, task, engine, batches, writer, observer, on_step, pulse)
            return loop.run(first_step)
    except RunError:
        ensure_newest_group(store, group)  # else it would become the outcome of a run that a newer group trains
        raise
    finally:
        batches.close()


@dataclass(frozen=True)
class Loop:
    """The training loop of one rank."""

    job: TrainJob
    rank: int
    task: Task
    engine: Engine
    batches: BatchFeed
    writer: CheckpointWriter
    observer: Observer
    on_step: Callable[[dict[str, float]], None]
    pulse: Pulse

    def run(self, first_step: int) -> End:
        """Steps, and checkpoints between them. One small all-reduce a step carries all that ranks must agree on."""
        job, every_steps, total_steps = self.job, self.job.spec.checkpoint.every_steps, self.job.total_steps
        world_size = dist.get_world_size()
        self.observer.note("training", first_step=first_step, total_steps=total_steps, world_size=world_size)
        num_saved_notices = 0.0
        self.pulse.at(first_step + 1, "waiting for data")
        micro_batches = self.batches.take(first_step)
        self.pulse.at(first_step + 1, "agreeing")
        (targets,) = _sum_over_ranks(self._count(micro_batches))
        for step in range(first_step, total_steps):
            started = time.perf_counter()
            self.batches.prefetch(step + 1)
            rate = learning_rate(job.spec.train.optimizer, step=step, total_steps=total_steps)
            loss_sum, grad_norm = self._compute(step, micro_batches, targets, rate)
            self.pulse.at(step + 1, "waiting for data")
            micro_batches = self.batches.take(step + 1)
            self.pulse.at(step + 1, "agreeing")
            loss_sum, next_targets, stops, num_notices = _sum_over_ranks(
                loss_sum, self._count(micro_batches), self.observer.stop_wanted, self.observer.num_notices
            )
            loss, targets = loss_sum / max(targets, 1.0), next_targets
            require_finite(loss, grad_norm, step=step + 1)
            self._report(step + 1, loss, rate, grad_norm, time.perf_counter() - started)
            is_last, stopping = step + 1 == total_steps, stops > 0
            preempted, num_saved_notices = num_notices > num_saved_notices, num_notices
            if is_last or stopping or preempted or (step + 1) % every_steps == 0:
                self.pulse.at(step + 1, "saving")
                self.writer.save(self._scalars(step + 1, loss), urgent=is_last or stopping or preempted)
            self.observer.saves(self.writer)
            if stopping and not is_last:
                saved = self._finish(step + 1)
                if saved is not None and isinstance(saved.error, Fenced):
                    raise saved.error  # another failure leaves the next attempt what is committed already
                return "stopped"
        saved = self._finish(total_steps)
        if saved is not None and saved.error is not None:
            raise saved.error
        return "complete"

    def _compute(self, step: int, micro_batches: list[Batch], targets: float, rate: float) -> tuple[float, float]:
        """One optimizer step. Returns this rank's sum of losses and the global gradient norm."""
        torch.manual_seed(_step_seed(self.job.spec.train.seed, step, self.rank))
        loss_sum = torch.zeros((), device=self.engine.device)
        for batch in micro_batches:
            self.pulse.at(step + 1, "forward")
            loss = self.task.loss_sum(self.engine.module, batch)
            loss_sum += loss.detach()
            self.pulse.at(step + 1, "backward")
            self.engine.backward(loss, global_targets=max(1, int(targets)))
        return float(loss_sum), self.engine.step(rate)

    def _report(self, step: int, loss: float, rate: float, grad_norm: float, elapsed_s: float) -> None:
        figures = {
            "step": step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "tokens": step * self.tokens_per_step,
            "tokens_per_s": self.tokens_per_step / elapsed_s,
            "step_s": elapsed_s,
        }
        self.observer.step(figures)
        self.on_step(figures)

    def _finish(self, step: int) -> Saved | None:
        """Wait for the last save and tell what became of it."""
        self.pulse.at(step, "saving")
        saved = self.writer.wait()
        self.observer.saves(self.writer)
        return saved

    def _scalars(self, step: int, loss: float) -> State:
        return State(
            step=step,
            tokens=step * self.tokens_per_step,
            loss=loss,
            precision=self.engine.precision,
            optimizer_step=self.engine.state.optimizer_step,
            loss_scaler=self.engine.state.loss_scaler,
            spec_sha256=self.job.spec.sha256(),
            dataset_fingerprint=self.job.dataset[1],
        )

    @property
    def tokens_per_step(self) -> int:
        return self.job.spec.train.global_batch_size * self.job.spec.data.sequence_length

    def _count(self, micro_batches: list[Batch]) -> float:
        return float(sum(self.task.num_targets(batch) for batch in micro_batches))


class NotFinite(RunError):
    """Raised by all ranks at the same step, since they share the loss and the norm."""


def require_ours(store: Store, attempt: Attempt, *, rank: int) -> None:
    """Rank 0 looks whether the run is still this attempt's to train, and all ranks do as it found. Collective.

    Raises:
        Fenced: a newer attempt has taken over, or the run has its outcome.
    """
    seen = torch.zeros(2, dtype=torch.int64)
    if rank == 0:
        seen[0] = newest_attempt(store, attempt.run_id)
        seen[1] = read_outcome(store, attempt.run_id) is not None
    dist.broadcast(seen, src=0)
    if int(seen[0]) != attempt.number:
        raise Fenced(f"Attempt {attempt.number} of {attempt.run_id} is fenced: attempt {int(seen[0])} has taken over.")
    if seen[1]:
        raise Fenced(f"{attempt.run_id} has its outcome; there is nothing to train.")


def require_finite(loss: float, grad_norm: float, *, step: int) -> None:
    """
    Raises:
        NotFinite: the step's loss or gradient is NaN or infinite; going on would only save broken weights.
    """
    if not math.isfinite(loss + grad_norm):
        raise NotFinite(
            f"The loss became {loss} and the gradient norm {grad_norm} at step {step}.",
            next_step="Lower train.optimizer.learning_rate, add warmup_steps, or look at the data of that step.",
        )


def _sum_over_ranks(*values: float) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def _claim_group(store: Store, attempt: Attempt, *, rank: int) -> WorkerGroup:
    """Rank 0 claims this start of the group of workers and tells the others. Collective.

    Raises:
        Fenced: a newer attempt has taken over, on all ranks alike.
    """
    claimed = ""
    if rank == 0:
        try:
            group = claim_group(store, attempt)
            claimed = f"{group.number} {group.nonce}"
        except Fenced as e:
            logger.warning("%s", e)
    number, _, nonce = tell_all(claimed, rank=rank).partition(" ")
    if not number:
        raise Fenced(f"Attempt {attempt.number} of {attempt.run_id} is fenced: a newer one has taken over.")
    return WorkerGroup(attempt=attempt, number=int(number), nonce=nonce)


def _load(spec: RunSpec, store: Store, run_id: str, engine: Engine, *, rank: int) -> int:
    """Go on from the newest checkpoint, or start from another run's weights, or from random ones. Returns the step."""
    resumed = resume_newest(store, run_id, engine.state, engine.model, rank=rank)
    if resumed is not None:
        return resumed.step
    if spec.model.init_from is not None:
        load_weights(store, *spec.model.init_from_checkpoint(), engine.state, engine.model, rank=rank)
    return 0


def _step_seed(seed: int, step: int, rank: int) -> int:
    """One seed per (run, step, rank), so that no random state has to be saved."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _has_native_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def worker(config: dict[str, Any]) -> None:
    """Ray Train's train function: one call per worker, on a thread beside the worker's main thread.

    Args:
        config: ``job``, a :class:`TrainJob` as JSON, and ``watchdog``, the actor's handle.
    """
    import ray.train
    import ray.train.torch

    job = TrainJob.model_validate(config["job"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(job.spec.resources.cpus_per_worker)
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        train(
            job,
            rank=rank,
            world_size=world_size,
            device=device,
            on_step=ray_metrics(job, rank),
            link=RayLink(config["watchdog"]),
            preempted=preempted_nodes,
        )
    except Fenced as e:
        logger.warning("%s", e)
    except RunError as e:
        # A retry cannot change this: it is committed, so that neither Ray nor a later attempt tries again.
        store = open_store(job.store)
        ensure_newest(store, job.attempt_claim())
        commit_outcome(store, Outcome.failed(job.run_id, attempt=job.attempt, reason=str(e)))
        logger.error("%s", e)
        if not isinstance(e, NotFinite):
            raise  # the other ranks know nothing of it: Ray ends the group, and the next one finds the outcome


def ray_metrics(job: TrainJob, rank: int) -> Callable[[dict[str, float]], None]:
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

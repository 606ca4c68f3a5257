"""Training: what every worker runs around the loop (loop.py), from a fresh or resumed state. DeepSpeed: engine.py."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import distributed as dist

from orchestrator.checkpoint.agreement import tell_all
from orchestrator.checkpoint.base import Origin
from orchestrator.checkpoint.format import State
from orchestrator.checkpoint.resume import load_base, load_weights, resume_newest
from orchestrator.checkpoint.save import CheckpointWriter, writing
from orchestrator.dataset.format import read_manifest
from orchestrator.errors import Fenced, RunError
from orchestrator.plan import resolve_precision, split_batch
from orchestrator.release.outcome import Outcome, commit_outcome, read_outcome
from orchestrator.spec import RunSpec
from orchestrator.store import Attempt, Store, WorkerGroup, claim_group, open_store
from orchestrator.store.attempts import ensure_newest, ensure_newest_group, newest_attempt
from workloads.activations import checkpoint_activations
from workloads.engine import Engine
from workloads.feed import open_feed
from workloads.flops import flops_per_token
from workloads.in_run_evaluation import open_evaluation
from workloads.loop import End, Loop, NotFinite
from workloads.metrics import Listener, train_metrics
from workloads.observer import observed, preempted_nodes
from workloads.pretrained_model import origin_of
from workloads.pulse import Link, RayLink, beating
from workloads.tasks import Task, task_of
from workloads.tasks.base_context import base_context

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
    base: str = ""
    """Fingerprint of the pretrained model, empty where the run starts from random weights."""
    total_steps: int

    def attempt_claim(self) -> Attempt:
        return Attempt(run_id=self.run_id, number=self.attempt, nonce=self.attempt_nonce)


def train(
    job: TrainJob,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    on_event: Listener = lambda *_: None,
    link: Link | None = None,
    preempted: Callable[[], frozenset[str]] = frozenset,
) -> End:
    """Train from the newest committed checkpoint to the last step. Every rank calls it with torch.distributed set up.

    Args:
        on_event: told of the events of this rank, which are rank 0's to record.
        link: to the watchdog that notices a hang; None trains unwatched.
        preempted: the nodes of this group that are about to be taken away, by id.

    Raises:
        Fenced: a newer attempt has taken over, or the run has its outcome. NotFinite: the loss or the gradient is not
        a number, on all ranks alike. RunError: another fault that a retry does not change.
        StoreError, IntegrityError: the data or a checkpoint is unusable.
    """
    spec, store, attempt, started_s = job.spec, open_store(job.store), job.attempt_claim(), time.time()
    require_ours(store, attempt, rank=rank)
    manifest = read_manifest(store, *job.dataset)
    base = base_context(spec, store, job.base)
    task = task_of(spec, manifest, base)
    split = split_batch(spec.train.global_batch_size, world_size, spec.train.micro_batch_size)
    batches = open_feed(spec, store, manifest, task, split, rank=rank, num_steps=job.total_steps, device=device)
    torch.manual_seed(spec.train.seed)
    precision = resolve_precision(spec.train.precision, gpu=device.type == "cuda", native_bf16=_has_native_bf16(device))
    model = task.build_model()
    if spec.train.activation_checkpointing:
        checkpoint_activations(model)
    facts = _facts(model, task, device)
    origin = origin_of(model, base.manifest) if base is not None else None
    unfilled = origin.tensors if origin is not None else ()
    engine = Engine(model, train=spec.train, split=split, precision=precision, device=device, unfilled=unfilled)
    del model
    evaluation = open_evaluation(spec, store, manifest, task, split, rank=rank, engine=engine)
    group = _claim_group(store, attempt, rank=rank)
    loading_s = time.perf_counter()
    resumed = _load(spec, store, job.run_id, engine, origin, rank=rank)
    facts |= {"started_s": round(started_s, 3), "load_s": round(time.perf_counter() - loading_s, 3)}
    try:
        with (
            observed(store, group, rank=rank, preempted=preempted, on_event=on_event) as observer,
            writing(
                CheckpointWriter(
                    store,
                    group,
                    engine.state,
                    engine.model,
                    rank=rank,
                    world_size=world_size,
                    keep=spec.checkpoint.keep,
                    origin=origin,
                    before_commit=observer.flush,
                )
            ) as writer,
            beating(
                link,
                group=str(group.number),
                rank=rank,
                world_size=world_size,
                first_step=resumed.step + 1 if resumed else 1,
                step_timeout_s=spec.train.step_timeout,
            ) as pulse,
        ):
            observer.note(
                "training",
                group=group.number,
                first_step=resumed.step if resumed else 0,
                total_steps=job.total_steps,
                world_size=world_size,
                **facts,
            )
            loop = Loop(
                spec=spec,
                total_steps=job.total_steps,
                dataset_fingerprint=manifest.fingerprint,
                rank=rank,
                task=task,
                engine=engine,
                batches=batches,
                evaluation=evaluation,
                writer=writer,
                observer=observer,
                pulse=pulse,
            )
            return loop.run(resumed)
    except RunError:
        ensure_newest_group(store, group)  # else it would become the outcome of a run that a newer group trains
        raise
    finally:
        batches.close()


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


def _load(
    spec: RunSpec, store: Store, run_id: str, engine: Engine, origin: Origin | None, *, rank: int
) -> State | None:
    """Go on from the newest checkpoint, whose scalars are returned, or start from pretrained weights, or another run's,
    or random ones."""
    resumed = resume_newest(store, run_id, engine.state, engine.model, rank=rank)
    if resumed is not None:
        return resumed.manifest.state
    if spec.model.init_from is not None:
        load_weights(store, *spec.model.init_from_checkpoint(), engine.state, engine.model, rank=rank)
    if origin is not None:
        load_base(store, origin, engine.state, engine.model)
    return None


def _facts(model: torch.nn.Module, task: Task, device: torch.device) -> dict[str, Any]:
    """What the account of a run wants to know of its workers. Asked before the engine cuts the model up."""
    try:
        flops = flops_per_token(model, sequence_length=task.context.sequence_length)
    except Exception as e:  # a model of one's own may be like no other, and trains all the same
        logger.warning("How many FLOPs a token takes is not known: %s", e)
        flops = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_token": flops,
    }


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
        with train_metrics(job.run_id, rank=rank) as on_event:
            train(
                job,
                rank=rank,
                world_size=world_size,
                device=device,
                on_event=on_event,
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

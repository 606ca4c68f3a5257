"""The Ray cluster that a run executes on: joining it, and running the group of workers on it."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orchestrator.errors import AttemptFailed, HeadwayError, TargetError
from orchestrator.render.ray_job import POOL_VARIABLE
from workloads.metrics import Listener, restart_counter
from workloads.stalled import asking, told_when_stalled
from workloads.watchdog import LastStep, guarded

if TYPE_CHECKING:
    from workloads.train import TrainJob

_MEMORY_SHORT = re.compile(
    r"Memory on the node \(IP: (?P<ip>[^,]+), .*?was (?P<used>[\d.]+)GB used / (?P<limit>[\d.]+)GB"
)
"""Of ``OutOfMemoryError``, as Ray's raylet words it."""
_KILLED = re.compile(r"^Selected to kill: .*? task name=(?:[^,]*:)?([^,:]+?)(?:\.__init__)?,", re.MULTILINE)


def connect(say: Callable[[str], None]) -> str:
    """Join the Ray cluster that this process runs in or that RAY_ADDRESS names. Returns this job's id.

    Raises:
        TargetError: there is none.
    """
    import ray

    try:
        context = ray.init(
            address=os.environ.get("RAY_ADDRESS") or "auto",
            log_to_driver=True,
            logging_level=logging.WARNING,
            runtime_env={"worker_process_setup_hook": "orchestrator.pinning.pin"},
        )
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as e:
        raise TargetError(
            f"There is no Ray cluster to run on: {e}.",
            next_step="Start the embedded one (headway up), or submit to one (headway submit).",
        ) from e
    say(f"on Ray {ray.__version__} at {context.address_info.get('gcs_address', 'local')}")
    return _submission_id(os.environ) or str(ray.get_runtime_context().get_job_id())


def _submission_id(environ: Mapping[str, str]) -> str:
    """The id that this job was submitted under, by which the Jobs API finds it; empty outside of a job."""
    config = json.loads(environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return str(config.get("metadata", {}).get("job_submission_id", ""))


def fit(
    job: TrainJob,
    name: str,
    *,
    say: Callable[[str], None],
    note: Callable[..., None],
    stalled: Callable[[LastStep], None] = lambda _: None,
) -> None:
    """Run the group of workers through Ray Train until it ends, restarting it where a worker dies or hangs.

    Args:
        say: told of a hang in a sentence.
        note: takes an event's kind and fields.
        stalled: told once where no step is made for as long as the run file's ``notify`` allows.

    Raises:
        AttemptFailed: it kept failing; the message ends with the first worker's last line.
    """
    import ray.train
    import ray.train.torch

    from workloads.train import worker  # here: preparing data needs no torch, which takes seconds to import

    resources = job.spec.resources
    workers = resources.workers
    with (
        tempfile.TemporaryDirectory(prefix="headway-train-") as scratch,
        guarded(job.spec.train.step_timeout, say=say, note=_counted(note, restart_counter(job.run_id))) as watchdog,
        told_when_stalled(asking(watchdog), after_s=_stalled_after_s(job), tell=stalled),
    ):
        trainer = ray.train.torch.TorchTrainer(
            worker,
            train_loop_config={"job": job.model_dump(mode="json"), "watchdog": watchdog},
            torch_config=ray.train.torch.TorchConfig(backend="cpu:gloo,cuda:nccl" if resources.gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers.min if workers.min == workers.max else (workers.min, workers.max),
                use_gpu=resources.gpu is not None,
                resources_per_worker={"CPU": resources.cpus_per_worker, **({"GPU": 1} if resources.gpu else {})},
                accelerator_type=_accelerator_type(resources.gpu, os.environ),
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            ),
        )
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as e:
            logs = f"See the workers' own words: headway logs {name}"
            told, next_step = last_words(e, otherwise=logs)
            raise AttemptFailed(
                f"Training failed {resources.max_failures + 1} times, the last time with: {told}", next_step=next_step
            ) from e


def _stalled_after_s(job: TrainJob) -> float | None:
    return job.spec.notify.stalled_minutes * 60 if job.spec.notify is not None else None


def _counted(note: Callable[..., None], count: Listener) -> Callable[..., None]:
    """The same, telling metrics too."""

    def note_and_count(kind: str, **fields: Any) -> None:
        note(kind, **fields)
        count(kind, fields)

    return note_and_count


def _accelerator_type(gpu: str | None, environ: Mapping[str, str]) -> str | None:
    """The kind of GPU to ask Ray for; None where any will do, or a pool was chosen already (render/ray_job.py)."""
    return None if gpu in (None, "any") or environ.get(POOL_VARIABLE) else gpu


@contextmanager
def own_errors() -> Iterator[None]:
    """What a Ray task raised, as the error that it raised, without the traceback of the way.

    Raises:
        HeadwayError: the task's own. AttemptFailed: the task died, or raised something else.
    """
    import ray

    try:
        yield
    except HeadwayError as e:
        if not isinstance(e, ray.exceptions.RayError):
            raise
        raise _own_error(e) from e
    except ray.exceptions.RayError as e:
        raise _own_error(e) from e


def _own_error(error: BaseException) -> HeadwayError:
    """The Headway error at the bottom of Ray's, or one that quotes its last line. Pure."""
    import ray

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HeadwayError) and not isinstance(seen, ray.exceptions.RayError):
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__
    told, next_step = last_words(error, otherwise="Submit it again to go on; the whole log: headway logs")
    return AttemptFailed(f"A task on the cluster failed: {told}", next_step=next_step)


def last_words(error: BaseException, *, otherwise: str) -> tuple[str, str]:
    """What a person needs of Ray's error, and the next step. Pure.

    That is its last line, except where a node ran out of memory: then Ray ends with advice on its own settings.

    Args:
        otherwise: the next step where no memory was short.
    """
    short = _MEMORY_SHORT.search(str(error))
    if short is not None:
        killed = ", ".join(dict.fromkeys(_KILLED.findall(str(error)))) or "processes"
        in_use = f"{short['used']} of {short['limit']} GB in use"
        return (
            f"the node {short['ip']} ran out of memory, {in_use}, so Ray killed {killed}.",
            "Give it more: in target.yaml, head.memory or the pool's size.memory; or lower train.micro_batch_size.",
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__), otherwise

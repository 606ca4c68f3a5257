"""A run's figures as Ray metrics, for Ray's dashboard and Prometheus. They are made of the run's own events, so both
say the same. Ray puts ``ray_`` before every name."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from orchestrator.record.peak import utilization

Listener = Callable[[str, Mapping[str, Any]], None]
"""Told of each event: its kind and its fields."""

SHOW_S = 5.0
"""Between two times that all gauges are set: Ray drops one from its export some 20 s after it was set last."""

_STEP = {
    "step": "Optimizer steps done",
    "loss": "Mean loss of the step, nats per target",
    "learning_rate": "Learning rate of the step",
    "grad_norm": "Global gradient norm before clipping",
    "tokens_per_s": "Tokens trained per second, over all workers",
    "step_s": "Seconds of the step",
    "data_wait_s": "Seconds that the last step waited for data, on the rank that waited longest",
    "save_s": "Seconds that training stood still for a checkpoint before the last step",
}
"""Fields of ``step`` that are ``headway_train_<field>``, with what they say."""
_GAUGES = {
    **{f"headway_train_{name}": text for name, text in _STEP.items()},
    "headway_train_eval_loss": "Loss on the held-out split while training, nats per target",
    "headway_train_last_step_time_s": "When the last step was done, seconds since 1970",
    "headway_train_mfu": "Model FLOPs utilization of the last step: of the devices' bf16 peak, where both are known",
    "headway_train_world_size": "Workers that train",
    "headway_checkpoint_step": "Step of the newest committed checkpoint",
    "headway_checkpoint_time_s": "When training saw that it was committed, seconds since 1970",
    "headway_checkpoint_seconds": "Seconds that the last save took behind training, whether it succeeded or not",
}
_SECONDS = "headway_train_seconds_total"
_COUNTERS = {
    _SECONDS: "Seconds of this group of workers, by what it did",
    "headway_checkpoints_total": "Checkpoints committed by this group of workers",
    "headway_checkpoint_failures_total": "Checkpoints that could not be saved",
}


class Reading(NamedTuple):
    """What an event says to one metric: a gauge's value, or what a counter goes up by."""

    name: str
    value: float
    part: str = ""
    """Of the group's seconds."""


def readings(kind: str, fields: Mapping[str, Any], *, group: Mapping[str, Any], now_s: float) -> Iterator[Reading]:
    """What an event says to the metrics. Pure.

    Args:
        group: fields of the group's own event ``training``; empty before it.
        now_s: seconds since 1970.
    """
    match kind:
        case "training":
            yield Reading("headway_train_world_size", fields["world_size"])
            yield Reading(_SECONDS, fields["load_s"], "resuming")
        case "step":
            yield from _of_step(fields, group, now_s)
        case "look":
            if fields["eval_loss"] is not None:
                yield Reading("headway_train_eval_loss", fields["eval_loss"])
            yield Reading(_SECONDS, fields["seconds"], "evaluating")
        case "checkpoint":
            yield Reading("headway_checkpoints_total", 1)
            yield Reading("headway_checkpoint_step", fields["step"])
            yield Reading("headway_checkpoint_time_s", now_s)
            yield Reading("headway_checkpoint_seconds", fields["seconds"])
        case "checkpoint_failed":
            yield Reading("headway_checkpoint_failures_total", 1)
            yield Reading("headway_checkpoint_seconds", fields["seconds"])
        case "training_done":
            yield Reading(_SECONDS, fields["save_s"], "saving")


def _of_step(fields: Mapping[str, Any], group: Mapping[str, Any], now_s: float) -> Iterator[Reading]:
    for name in _STEP:
        yield Reading(f"headway_train_{name}", fields[name])
    yield Reading("headway_train_last_step_time_s", now_s)
    mfu = utilization(
        tokens_per_s=fields["tokens_per_s"],
        flops_per_token=group.get("flops_per_token"),
        device=group.get("device", ""),
        num_devices=group.get("world_size", 1),
    )
    if mfu is not None:
        yield Reading("headway_train_mfu", mfu)
    # The wait for a group's first batch lies before its first step.
    yield Reading(_SECONDS, max(0.0, fields["step_s"] - fields["data_wait_s"]), "computing")
    yield Reading(_SECONDS, fields["data_wait_s"], "waiting for data")
    yield Reading(_SECONDS, fields["save_s"], "saving")


class TrainMetrics:
    """Metrics of one group of workers, from its rank 0. A :data:`Listener`. Made inside a Ray worker."""

    def __init__(self, run_id: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self._run_id = run_id
        self._gauges = {name: Gauge(name, description=text, tag_keys=("run",)) for name, text in _GAUGES.items()}
        self._counters = {
            name: Counter(name, description=text, tag_keys=("run", "part") if name == _SECONDS else ("run",))
            for name, text in _COUNTERS.items()
        }
        self._group: Mapping[str, Any] = {}
        self._shown: dict[str, float] = {}
        self._lock = threading.Lock()

    def __call__(self, kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "training":
            self._group = fields
        for reading in readings(kind, fields, group=self._group, now_s=time.time()):
            if reading.name in self._gauges:
                with self._lock:
                    self._shown[reading.name] = reading.value
                self._gauges[reading.name].set(reading.value, tags={"run": self._run_id})
            elif reading.value > 0:  # Ray takes nothing else
                part = {"part": reading.part} if reading.part else {}
                self._counters[reading.name].inc(reading.value, tags={"run": self._run_id, **part})

    def show(self) -> None:
        """Set all gauges again to what they were set to last."""
        with self._lock:
            for name, value in self._shown.items():
                self._gauges[name].set(value, tags={"run": self._run_id})


@contextmanager
def train_metrics(run_id: str, *, rank: int) -> Iterator[Listener]:
    """The metrics of a group of workers while it trains; only rank 0 has any."""
    if rank != 0:
        yield lambda *_: None
        return
    metrics, closed = TrainMetrics(run_id), threading.Event()

    def show() -> None:
        while not closed.wait(SHOW_S):
            metrics.show()

    thread = threading.Thread(target=show, name="metrics", daemon=True)
    thread.start()
    try:
        yield metrics
    finally:
        closed.set()
        thread.join()


def restart_counter(run_id: str) -> Listener:
    """Counts the groups of workers that were lost, on the driver; Ray Train starts another for each, within
    ``resources.max_failures``."""
    from ray.util.metrics import Counter

    restarts = Counter(
        "headway_train_restarts_total",
        description="Groups of workers that were lost while they trained",
        tag_keys=("run",),
    )

    def count(kind: str, _: Mapping[str, Any]) -> None:
        if kind == "group_lost":
            restarts.inc(1, tags={"run": run_id})

    return count

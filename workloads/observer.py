"""What rank 0 tells the world about its run, and what the world tells rank 0."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.checkpoint.save import CheckpointWriter
from orchestrator.errors import HeadwayError
from orchestrator.record import EventLog
from orchestrator.store import Store, WorkerGroup
from orchestrator.store.attempts import stop_reason
from workloads.metrics import Listener

logger = logging.getLogger(__name__)
CLOSE_S = 10.0  # an error that is on its way out does not wait longer for a store that is down
MONITOR_S = 3.0  # between two looks for a stop request or a newer attempt


class Observer:
    """Rank 0's events and its watch for a stop or a preemption. Other ranks' observers only tell their listener."""

    def __init__(
        self,
        store: Store,
        group: WorkerGroup,
        *,
        rank: int,
        preempted: Callable[[], frozenset[str]] = frozenset,
        on_event: Listener = lambda *_: None,
    ) -> None:
        self.stop_wanted = 0.0
        self.num_notices = 0.0
        """Preemptions that were announced so far. Each is worth one checkpoint."""
        self._preempted, self._announced = preempted, frozenset[str]()
        self._on_event = on_event
        self._told_blocked_s = 0.0
        self._events = EventLog(store, group.attempt, "train") if rank == 0 else None
        self._store, self._group = store, group
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        if rank == 0:
            self._thread.start()

    def note(self, kind: str, **fields: Any) -> None:
        if self._events:
            self._events.append(kind, **fields)
        self._on_event(kind, fields)

    def step(self, figures: dict[str, float]) -> None:
        self.note("step", **{k: _short(v) if isinstance(v, float) else v for k, v in figures.items()})

    def look(self, figures: dict[str, float], *, best_loss: float | None, ended_early: bool) -> None:
        """A look at the held-out split."""
        loss = figures["eval_loss"]
        self.note(
            "look",
            step=figures["step"],
            eval_loss=round(loss, 6) if math.isfinite(loss) else None,
            best_loss=None if best_loss is None else round(best_loss, 6),
            seconds=round(figures["eval_s"], 3),
            ended_early=ended_early,
        )

    def saves(self, writer: CheckpointWriter) -> None:
        for saved in writer.take_results():
            kind = "checkpoint" if saved.error is None else "checkpoint_failed"
            error = {"error": str(saved.error)} if saved.error else {}
            self.note(kind, step=saved.step, seconds=round(saved.seconds, 3), **error)

    def blocked_s(self, writer: CheckpointWriter) -> float:
        """Seconds that saves held up training since this was last asked."""
        told_s, self._told_blocked_s = self._told_blocked_s, writer.counts.blocked_s
        return writer.counts.blocked_s - told_s

    def flush(self) -> None:
        """Write out what was noted so far. Before each commit: what lies behind a checkpoint is never trained again, so
        no later group would note it."""
        if self._events:
            try:
                self._events.flush()
            except HeadwayError as e:
                logger.warning("The run's events are not written yet: %s", e)

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
        if self._events:
            self._events.close()

    def _watch(self) -> None:
        while not self._closed.wait(MONITOR_S):
            try:
                self.look_for_preemption()
                reason = stop_reason(self._store, self._group.attempt, self._group)
            except Exception as e:  # whatever it is: without this thread nobody could stop the run
                logger.warning("Whether this attempt is to stop cannot be seen now: %s", e)
                continue
            if reason:
                logger.warning("Stopping after this step: %s.", reason)
                self.note("stopping", reason=reason)
                self.stop_wanted = 1.0
                return

    def look_for_preemption(self) -> None:
        """Count a notice where a node of the group is new among those to be taken away."""
        nodes = self._preempted()
        if nodes - self._announced:
            logger.warning("Saving after this step: preemption of node %s.", ", ".join(sorted(nodes)))
            self.note("preemption", nodes=sorted(nodes))
            self.num_notices += 1
        self._announced |= nodes


def preempted_nodes() -> frozenset[str]:
    """The nodes under this Ray Train group that are about to be taken away, by id.

    Ray Train's own watcher looks for drained nodes every 5 s (``RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S``) and tells every
    worker. ``ray.train.get_preemption_info`` reads what was told behind a barrier over all ranks; here only rank 0
    looks, since the ranks agree in the step's own all-reduce, so its private place is read instead.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        info = get_train_context().preemption_context.preemption_info
        return frozenset(info.preempted_node_ids) if info else frozenset()
    except (ImportError, AttributeError):  # another Ray: a preemption then costs the steps since the last checkpoint
        return frozenset()


@contextmanager
def observed(
    store: Store,
    group: WorkerGroup,
    *,
    rank: int,
    preempted: Callable[[], frozenset[str]] = frozenset,
    on_event: Listener = lambda *_: None,
) -> Iterator[Observer]:
    observer = Observer(store, group, rank=rank, preempted=preempted, on_event=on_event)
    try:
        yield observer
    finally:
        observer.close()


def _short(value: float) -> float:
    """The same to seven digits, so that a small learning rate is no zero."""
    return float(f"{value:.7g}")

"""What a run's own job tells the webhook of its run file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from orchestrator.checkpoint.catalog import newest_to_commit
from orchestrator.errors import AttemptsUsedUp, Fenced, HeadwayError, Interrupted, UsageError
from orchestrator.record import notice
from orchestrator.record.notice import Notice
from orchestrator.record.notify import notify
from orchestrator.release.outcome import Outcome
from orchestrator.spec import NotifySpec
from orchestrator.store import Store
from orchestrator.store.attempts import Allowance, newest_attempt, require_turn
from workloads.watchdog import LastStep


def _unrecorded(kind: str, **fields: object) -> None:
    """For a job that has claimed no attempt, and so has no events."""


@dataclass(frozen=True, kw_only=True)
class Notices:
    """None of these raises, or tells anything twice."""

    settings: NotifySpec | None
    store: Store
    run_id: str
    note: Callable[..., None] = _unrecorded
    """Takes an event's kind and fields."""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def ended(self, outcome: Outcome) -> None:
        self._tell(notice.of_outcome(outcome))

    def attempt_failed(self, attempt: int, error: BaseException) -> None:
        self._tell(notice.attempt_failed(self.run_id, attempt, str(error) or type(error).__name__))

    @contextmanager
    def of_attempts_used_up(self) -> Iterator[None]:
        """Around the question whether this job may go on: the attempt before may have died without a word."""
        try:
            yield
        except AttemptsUsedUp as e:
            self.attempt_failed(newest_attempt(self.store, self.run_id), e)
            raise

    def stalled(self, attempt: int, last: LastStep) -> None:
        self._tell(notice.stalled(self.run_id, attempt, step=last.step, seconds=last.ago_s))

    def _tell(self, told: Notice) -> None:
        delivery = notify(self.settings, told, self.store, environ=self.environ)
        if delivery is not None:
            self.note("notice", **delivery.fields())


def is_the_last(error: BaseException, store: Store, run_id: str, allowance: Allowance | None) -> bool:
    """Whether an attempt that ended with ``error``, and has said so, is followed by none that starts by itself.

    Args:
        allowance: of a job that is started again and again; None is a job that is not.
    """
    if isinstance(error, Interrupted | Fenced | KeyboardInterrupt | SystemExit):
        return False
    if allowance is None or isinstance(error, UsageError):  # headway run ends there with 0: nothing starts it again
        return True
    try:
        require_turn(store, run_id, allowance, saved_by=newest_to_commit(store, run_id))
    except AttemptsUsedUp:
        return True
    except HeadwayError:  # another job works on it by now, or the store does not say
        return False
    return False

"""Following a job that is no run's: its log as it grows, until it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.commands.watch import error_class
from orchestrator.errors import AttemptFailed, HeadwayError, Interrupted, StoreError, TargetError
from orchestrator.reporter import Reporter
from orchestrator.targets.base import JobState, JobStatus, Target

_POLL_S = (0.5, 3.0)
"""How often it is looked at: at first, and at the slowest while nothing new comes."""
_REST = 9.0  # times as long as reading the log took: each time all of it is read, from Kubernetes in many small pieces
_OUTAGE_S = 120.0  # how long the target may be away before following ends
_ERROR, _NEXT_STEP = "headway: ", "  → "


@dataclass(frozen=True, kw_only=True)
class Followed:
    """How a job ended."""

    status: JobStatus | None
    """None where the target knows it no more."""
    log: str

    def error(self, what: str, *, again: str) -> HeadwayError:
        """Why ``what`` was not made, by the job's own last words where it said any. Pure.

        Args:
            again: the command that makes it, for a person to type.
        """
        status = self.status
        if status is None:
            return AttemptFailed(f"{what}: the cluster no longer knows its job.", next_step=f"Go on: {again}")
        if status.hopeless:
            return error_class(status.exit_code)(f"{what} cannot be made: {status.message}.")
        if status.state is JobState.STOPPED:
            return Interrupted(f"{what}: its job was stopped.", next_step=f"Go on from what is made: {again}")
        lines = self.log.splitlines()
        kind = error_class(status.exit_code)
        said = [number for number, line in enumerate(lines) if line.startswith(_ERROR)]
        if said:
            message = lines[said[-1]].removeprefix(_ERROR)
            steps = [line.removeprefix(_NEXT_STEP) for line in lines[said[-1] :] if line.startswith(_NEXT_STEP)]
            return kind(f"{what}: {message}", next_step=steps[0] if steps else f"Mend that, then go on: {again}")
        because = f" ({status.message})" if status.message else ""
        return kind(
            f"{what} is not there, though its job ended as {status.state}{because}.", next_step=f"Go on: {again}"
        )


def follow(
    job: str,
    logs_of: str,
    target: Target[Any],
    reporter: Reporter,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Followed:
    """Tell a job's log line by line until the job has ended. The error that it ends with is left to the caller.

    Args:
        logs_of: whose logs the job's are in the store.

    Raises:
        StoreError, TargetError: they cannot be reached for two minutes.
    """
    told = _Told(reporter)
    last_seen, pause_s = clock(), _POLL_S[0]
    log, read_again_s = "", last_seen
    while True:
        try:
            status = target.find(job)  # before the log: then the log read after it is whole
            over = status is None or status.state.ended
            if over or clock() >= read_again_s:
                began_s = clock()
                log = target.logs(logs_of, job) if status is not None and not status.hopeless else ""
                read_again_s = clock() + _REST * (clock() - began_s)
        except (StoreError, TargetError):
            if clock() - last_seen > _OUTAGE_S:
                raise
        else:
            last_seen = clock()
            news = told.tell(log, status, whole=over)
            if over:
                return Followed(status=status, log=log)
            pause_s = _POLL_S[0] if news else min(1.5 * pause_s, _POLL_S[1])
        sleep(pause_s)


class _Told:
    """What has been said already of a job."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._num_lines = 0
        self._message = ""

    def tell(self, log: str, status: JobStatus | None, *, whole: bool) -> bool:
        """Say what is new. Returns whether anything was. ``whole``: the last line has ended too."""
        lines = log.splitlines()
        if lines and not whole and not log.endswith("\n"):
            lines.pop()
        new, self._num_lines = lines[self._num_lines :], max(self._num_lines, len(lines))
        for line in new:
            if not line.startswith((_ERROR, _NEXT_STEP)):
                self._reporter.say(line)
        waits = status is not None and (status.state is JobState.PENDING or status.stands_still)
        if status is not None and waits and status.message not in ("", self._message):
            self._message = status.message
            self._reporter.say(f"waiting: {status.message}")
        return bool(new)

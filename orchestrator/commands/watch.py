"""Watching a run: its events from the store drawn as a progress bar, its job's state from the target."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from orchestrator.errors import (
    AttemptFailed,
    EnvironmentUnusable,
    HeadwayError,
    Interrupted,
    StoreError,
    TargetError,
    TimedOut,
    UsageError,
)
from orchestrator.record import EventReader
from orchestrator.release.outcome import Outcome, read_outcome
from orchestrator.reporter import Reporter
from orchestrator.store import Store
from orchestrator.targets.base import JobState, JobStatus, Target

_POLL_S = 0.7
_JOB_EVERY = 3  # polls of the store to one of the target
_OUTAGE_S = 120.0  # how long the store or the target may be away before watching ends


@dataclass(kw_only=True)
class Watched:
    """What came of watching a run."""

    outcome: Outcome | None = None
    ended: dict[str, Any] | None = None
    job: JobStatus | None = None
    log_tail: str = ""
    flag: str = ""
    """The target's, for commands that a person may type next."""
    stages_s: dict[str, float] = field(default_factory=dict)
    last_step: dict[str, Any] = field(default_factory=dict)

    def require_outcome(self, run_id: str) -> Outcome:
        """The outcome, or the error that stands for its absence.

        Raises:
            Interrupted: it was stopped. AttemptFailed: the attempt or its job failed.
        """
        if self.outcome is not None:
            return self.outcome
        if self.ended is not None and self.ended["state"] == "stopped":
            raise Interrupted(f"{run_id} stopped: {self.ended['reason']}", next_step="Submit it again to go on.")
        if self.ended is not None:
            kind = error_class(self.ended.get("exit_code"))
            raise kind(f"{run_id}: {self.ended['reason']}", next_step="Mend that, then submit it again to go on.")
        if self.job is None:
            raise AttemptFailed(
                f"{run_id}: the cluster no longer knows its job: it was deleted, or the head was restarted.",
                next_step="Submit it again to go on from the last checkpoint.",
            )
        if self.job.hopeless:
            raise error_class(self.job.exit_code)(f"{run_id} cannot start: {self.job.message}.")
        if self.job.state is JobState.STOPPED:
            raise Interrupted(f"{run_id}: its job was stopped.", next_step="Submit it again to go on.")
        said = [line.removeprefix("headway: ") for line in self.log_tail.splitlines() if line.startswith("headway: ")]
        kind = error_class(self.job.exit_code)
        if said:
            raise kind(f"{run_id}: {said[-1]}", next_step=f"The whole log: headway logs{self.flag} {run_id}")
        because = f" ({self.job.message})" if self.job.message else ""
        raise kind(
            f"{run_id}: its job ended as {self.job.state} without an outcome{because}. Its last words:\n"
            f"{self.log_tail}",
            next_step=f"All of it: headway logs{self.flag} {run_id}. "
            "Submit it again to go on from the last checkpoint.",
        )


def error_class(exit_code: int | None) -> type[HeadwayError]:
    """The kind of error that a job's exit code stands for."""
    return {2: UsageError, 4: EnvironmentUnusable}.get(exit_code or 1, AttemptFailed)


def watch(
    run_id: str,
    submission_id: str,
    store: Store,
    target: Target[Any],
    reporter: Reporter,
    *,
    from_attempt: int,
    timeout_s: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Watched:
    """Follow a run until it has an outcome, or its attempt has ended and no other follows by itself.

    Args:
        from_attempt: the first attempt whose events count; how an older one ended says nothing of this job.

    Raises:
        TimedOut: after ``timeout_s``; the run goes on. Interrupted: Ctrl-C; the run goes on.
    """
    deadline = time.monotonic() + timeout_s if timeout_s is not None else None
    events = EventReader(store, run_id, from_attempt=from_attempt)
    watched = Watched(flag=target.flag)
    last_seen = time.monotonic()
    polls = 0
    with _Bar(reporter) as bar:
        try:
            while True:
                try:
                    for event in events.poll():
                        _note(event, watched)
                        bar.show(event)
                    if polls % _JOB_EVERY == 0 or watched.job is None:
                        watched.job = target.find(submission_id)
                        bar.waiting(watched.job)
                    if _is_over(watched, store, run_id, restarts_jobs=target.restarts_jobs):
                        break
                    last_seen = time.monotonic()
                except (StoreError, TargetError):
                    if time.monotonic() - last_seen > _OUTAGE_S:
                        raise
                if deadline is not None and time.monotonic() > deadline:
                    raise TimedOut(
                        f"{run_id} is not done after {timeout_s:.0f} s; it goes on.",
                        next_step=f"Watch it again: headway submit, or headway logs -f{target.flag} {run_id}",
                    )
                polls += 1
                sleep(_POLL_S)
        except KeyboardInterrupt as e:
            raise Interrupted(
                f"No longer watching {run_id}; it goes on.", next_step=f"To stop it: headway stop{target.flag} {run_id}"
            ) from e
    if watched.job is not None and watched.job.hopeless:
        target.stop(submission_id)
    if watched.outcome is None:
        watched.log_tail = _tail(target, run_id, submission_id)
    return watched


def _is_over(watched: Watched, store: Store, run_id: str, *, restarts_jobs: bool) -> bool:
    """Whether nothing more is to come. Where the target starts a job again, an attempt's end alone is followed by the
    next attempt.
    """
    job_ended = watched.job is None or watched.job.state.ended
    if watched.ended is None and not job_ended:
        return False
    watched.outcome = read_outcome(store, run_id)
    return watched.outcome is not None or job_ended or not restarts_jobs


def _note(event: dict[str, Any], watched: Watched) -> None:
    if watched.ended is not None and event["attempt"] > watched.ended["attempt"]:
        watched.ended = None
    if event["kind"] == "stage_done":
        watched.stages_s[event["stage"]] = event["seconds"]
    elif event["kind"] == "step":
        watched.last_step = event
    elif event["kind"] in ("attempt_ended", "outcome"):
        watched.ended = event


def _tail(target: Target[Any], run_id: str, submission_id: str, *, num_lines: int = 15) -> str:
    try:
        return "\n".join(target.logs(run_id, submission_id).splitlines()[-num_lines:])
    except HeadwayError as e:
        return f"(its log cannot be read: {e.message})"


class _Bar:
    """The live line: stage, step, loss, tokens per second, time left. Plain lines where there is no terminal."""

    def __init__(self, reporter: Reporter) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._reporter = reporter
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("waiting for the job", total=None, figures="")
        self._first_step: tuple[float, int] | None = None
        self._total_steps = 0
        self._printed_step = 0
        self._told = ""

    def __enter__(self) -> _Bar:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._progress.stop()

    def waiting(self, job: JobStatus | None) -> None:
        """Say once why a job has not begun, or does not go on, as the target puts it."""
        waits = job is not None and (job.state is JobState.PENDING or job.stands_still)
        if job is None or not waits or job.message in ("", self._told):
            return
        self._told = job.message
        if job.state is JobState.PENDING:
            self._progress.update(self._task, description=f"waiting: {job.message}")
        self._print(f"waiting: {job.message}")

    def show(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "stage_started":
            self._progress.update(self._task, description=event["stage"], total=None, completed=0, figures="")
        elif kind == "stage_done":
            self._print(f"{event['stage']:<9} {event['seconds']:7.1f} s")
        elif kind == "dataset":
            self._dataset(event["counts"])
        elif kind == "training":
            self._first_step = (event["time_s"], event["first_step"])
            self._total_steps = self._printed_step = event["total_steps"]
            self._printed_step = event["first_step"]
            resumed = f", resumed at step {event['first_step']}" if event["first_step"] else ""
            self._print(f"training on {event['world_size']} workers{resumed}")
        elif kind == "step":
            self._step(event)
        elif kind == "look":
            self._look(event)
        elif kind == "checkpoint_failed":
            self._print(f"checkpoint of step {event['step']} was not saved: {event['error']}")
        elif kind == "hang":
            ranks = ", ".join(map(str, event["ranks"]))
            self._print(f"hung: rank {ranks} in step {event['step']} ({event['phase']}); the group is restarted")
        elif kind == "preemption":
            self._print(f"a node is about to be taken away, a checkpoint is made: {', '.join(event['nodes'])}")
        elif kind == "stopping":
            self._print(f"stopping: {event['reason']}")

    def _dataset(self, counts: dict[str, int]) -> None:
        """What became of the source's records. Those of running text are not counted, but files that were skipped."""
        samples = [counts.get(f"{split}.samples", 0) for split in ("train", "eval")]
        told = [f"{samples[0]:,} samples to train on, {samples[1]:,} held out"] if any(samples) else []
        sums = Counter[str]()
        for what, count in counts.items():
            sums[what.rpartition(".")[2]] += count
        told += [f"{sums['truncated']:,} cut to data.sequence_length"] if sums["truncated"] else []
        told += [f"{sums['divided']:,} learned turn by turn"] if sums["divided"] else []
        skipped = {what.removeprefix("skipped_"): n for what, n in sums.most_common() if what.startswith("skipped_")}
        told += ["skipped: " + ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())] if skipped else []
        num_foreign = sum(count for what, count in counts.items() if what.startswith("left_out_"))
        told += [f"{num_foreign:,} files that do not belong to a source tree"] if num_foreign else []
        if told:
            self._print("; ".join(told))

    def _step(self, event: dict[str, Any]) -> None:
        figures = (
            f"step {event['step']}/{self._total_steps}  loss {event['loss']:.3f}  {event['tokens_per_s']:,.0f} tokens/s"
        )
        left_s = self._left_s(event)
        if left_s is not None:
            figures += f"  {left_s:.0f} s left"
        self._progress.update(
            self._task, description="train", total=self._total_steps, completed=event["step"], figures=figures
        )
        tenth = max(1, self._total_steps // 10)
        if not self._live and (event["step"] >= self._printed_step + tenth or event["step"] == self._total_steps):
            self._printed_step = event["step"]
            self._print(figures)

    def _look(self, event: dict[str, Any]) -> None:
        loss = "not a number" if event["eval_loss"] is None else f"{event['eval_loss']:.3f}"
        early = "; it no longer falls, so training ends here" if event["ended_early"] else ""
        self._print(f"step {event['step']}: held-out loss {loss}{early}")

    def _left_s(self, event: dict[str, Any]) -> float | None:
        if self._first_step is None or event["step"] <= self._first_step[1]:
            return None
        per_step_s = (event["time_s"] - self._first_step[0]) / (event["step"] - self._first_step[1])
        return float(per_step_s * (self._total_steps - event["step"]))

    def _print(self, text: str) -> None:
        if self._live:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            self._reporter.say(text)

"""Collects what the replicas report, judges the canary, gives out turns, and writes the channel's status.

There is one of each application. It may be restarted at any moment: what it has decided is in the status, and what
it has to know the replicas report again. While a service moves from one cluster to another there are two, which write
the same status: each takes in what the other has decided before it writes, and every few seconds. Of two writes at
the same moment one is lost, until its decider looks the next time.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from orchestrator.errors import HeadwayError, IntegrityError
from orchestrator.release import channels
from orchestrator.release.canary_policy import CanaryPolicy, Promote, Reject, Seen, decide
from orchestrator.release.channels import CanaryStatus, ChannelStatus, ReplicaStatus
from orchestrator.store import Store
from workloads.serve.counters import Counts
from workloads.serve.reports import ReplicaReport, Reply, Trial

logger = logging.getLogger("headway.serve")

_COUNTS_EVERY_S = 10.0
"""Between two writes of the status in which only a canary's counts differ."""
_LOOK_EVERY_S = 10.0
"""Between two looks at the status, for what another decider has written."""


@dataclass(kw_only=True)
class Decider:
    """Called by several threads."""

    store: Store
    model: str
    channel: str
    policy: CanaryPolicy
    expire_s: float
    """A replica that has not reported for so long is gone."""
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    """Of the times in the status. It may jump, which makes no replica look gone and no canary older."""
    tell: Callable[[int, str], None] = lambda number, reason: None
    """Takes each version that the written status rejects, with the reason; again after a restart. Returns at once."""

    _status: ChannelStatus | None = field(default=None, init=False)
    _written: ChannelStatus | None = field(default=None, init=False)
    """What lies in the store, as far as is known."""
    _written_s: float = field(default=-math.inf, init=False)
    """When this process wrote last."""
    _looked_s: float = field(default=-math.inf, init=False)
    _reports: dict[str, tuple[float, ReplicaReport]] = field(default_factory=dict, init=False)
    _holder: str | None = field(default=None, init=False)
    """The replica whose turn it is."""
    _begun_s: float = field(default=0.0, init=False)
    """When this process first heard of a replica."""
    _watched_since_s: float | None = field(default=None, init=False)
    """When the canary began; None until this process has heard of it."""
    _told: set[int] = field(default_factory=set, init=False)
    """Rejected versions that were told."""
    _has_judged: bool = field(default=False, init=False)
    """Whether this process has heard of a canary."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def report(self, report: ReplicaReport) -> Reply:
        """Take a report in, and act on all of them. Never raises: the store may be down for a while."""
        with self._lock:
            now_s = self.clock()
            before = self._reports.get(report.replica)
            if before is not None and report.sequence < before[1].sequence:
                return self._turn(before[1])  # a newer one has overtaken it
            self._reports[report.replica] = (now_s, report)
            self._reports = {
                name: (time_s, each) for name, (time_s, each) in self._reports.items() if now_s - time_s < self.expire_s
            }
            try:
                if self._status is None:
                    self._look(now_s)
                self._take_in(report, None if before is None else before[1], now_s)
                self._judge(now_s)
                self._describe()
                self._write(now_s)
                self._tell()
            except HeadwayError as e:
                logger.warning("The status could not be written: %s", e)
            return self._turn(report)

    @property
    def _replicas(self) -> list[ReplicaReport]:
        return [report for _, (_, report) in sorted(self._reports.items())]

    def _look(self, now_s: float) -> None:
        """Take in the status in the store: what was decided before this process began, or by another decider."""
        try:
            found = channels.read_status(self.store, self.model, self.channel)
        except IntegrityError as e:
            logger.warning("The status is written anew: %s", e)
            found = None
        if self._status is None:
            self._begun_s = now_s
        found_or_empty = found or ChannelStatus()
        self._status = (self._status or found_or_empty).with_verdicts_of(found_or_empty)
        self._written, self._looked_s = found, now_s

    def _update(self, **changes: object) -> None:
        assert self._status is not None
        self._status = self._status.model_copy(update=changes)

    def _take_in(self, report: ReplicaReport, before: ReplicaReport | None, now_s: float) -> None:
        """What a load came to: a version that does not load on one replica is for none, unless it has ever answered
        on some. Then it is the replica's problem, which its report names."""
        assert self._status is not None
        answers = {number for number in (report.serving, report.canary) if number is not None}
        self._update(answered=tuple(sorted({*self._status.answered, *answers})))
        if report.tried is not None and (before is None or report.tried != before.tried):
            self._update(tried=report.tried)
        if self._unknown_failures(report):
            self._look(now_s)  # another decider may know that it answers
        new = self._unknown_failures(report)
        if new:
            logger.error("Rejected by %s: %s", report.replica, new)
            self._update(rejected={**self._status.rejected, **new})

    def _unknown_failures(self, report: ReplicaReport) -> dict[int, str]:
        assert self._status is not None
        known = {*self._status.rejected, *self._status.answered}
        return {number: reason for number, reason in report.failures.items() if number not in known}

    def _judge(self, now_s: float) -> None:
        assert self._status is not None
        known, trials = self._status.canary, [report.trial for report in self._replicas if report.trial is not None]
        if not trials:
            # After a restart, the replicas that have it may not have reported yet.
            is_over = self._has_judged or now_s - self._begun_s >= self.expire_s
            if known is not None and known.phase == "watched" and (is_over or known.version in self._status.rejected):
                self._update(canary=_ended(known, self._status.rejected))
            return
        self._has_judged = True
        entry = max(trial.entry for trial in trials)
        trials = [trial for trial in trials if trial.entry == entry]
        version = trials[0].version
        if entry in self._status.promoted or version in self._status.rejected:
            return  # the replicas have yet to hear of it
        wall_s = self.wall_clock()
        if known is None or (known.entry, known.version) != (entry, version):
            since_s, self._watched_since_s = wall_s, now_s
        else:
            since_s = known.since_s
            if self._watched_since_s is None:  # it began before this process, so only the wall clock knows its age
                self._watched_since_s = now_s - max(0.0, wall_s - since_s)
        self._apply(_watched(trials, since_s=since_s), age_s=now_s - self._watched_since_s)

    def _apply(self, canary: CanaryStatus, *, age_s: float) -> None:
        assert self._status is not None
        seen = Seen(age_s=age_s, stable=canary.stable, canary=canary.canary)
        verdict = decide(seen, policy=self.policy)
        if isinstance(verdict, Promote):
            logger.info("%s@%d has passed: %s", self.model, canary.version, verdict.reason)
            self._update(promoted={**self._status.promoted, canary.entry: canary.version})
        if isinstance(verdict, Reject):
            logger.error("%s@%d is rejected: %s", self.model, canary.version, verdict.reason)
            self._update(rejected={**self._status.rejected, canary.version: verdict.reason})
        phase = "passed" if isinstance(verdict, Promote) else "rejected" if isinstance(verdict, Reject) else "watched"
        self._update(canary=canary.model_copy(update={"phase": phase, "verdict": verdict.reason}))

    def _describe(self) -> None:
        assert self._status is not None
        replicas = self._replicas
        self._update(
            serving=_agreed([each.serving for each in replicas if each.serving is not None], self._status.serving),
            replicas=tuple(
                ReplicaStatus(
                    id=each.replica,
                    serving=each.serving,
                    canary=each.canary,
                    loading=each.loading,
                    problem=each.problem,
                )
                for each in replicas
            ),
            problem=next((each.problem for each in replicas if each.problem is not None), None),
        )

    def _write(self, now_s: float) -> None:
        """Only when it says something else than before; counts alone not each time."""
        if now_s - self._looked_s >= _LOOK_EVERY_S:
            self._look(now_s)
        if not self._has_news(now_s):
            return
        self._look(now_s)
        assert self._status is not None
        stamped = self._status.model_copy(update={"updated_s": self.wall_clock()})
        channels.write_status(self.store, self.model, self.channel, stamped)
        self._status = self._written = stamped
        self._written_s = now_s

    def _has_news(self, now_s: float) -> bool:
        assert self._status is not None
        written = self._written
        if written is None:
            return True
        if now_s - self._written_s < _COUNTS_EVERY_S:
            return _without_counts(self._status) != _without_counts(written)
        return _without_time(self._status) != _without_time(written)

    def _tell(self) -> None:
        assert self._status is not None
        for number in sorted(self._status.rejected.keys() - self._told):
            self._told.add(number)
            self.tell(number, self._status.rejected[number])

    def _turn(self, report: ReplicaReport) -> Reply:
        """One replica at a time, as long as it reports and wants it."""
        holder = self._reports.get(self._holder or "")
        if holder is None or not holder[1].wants_turn:
            self._holder = None
        others = [each for each in self._replicas if each.replica != report.replica and each.serving is not None]
        if report.wants_turn and self._holder is None and others:
            self._holder = report.replica
        return Reply(has_turn=self._holder == report.replica, num_others=len(others))


def _watched(trials: Sequence[Trial], *, since_s: float) -> CanaryStatus:
    """The counts of all replicas together."""
    return CanaryStatus(
        entry=trials[0].entry,
        version=trials[0].version,
        weight=trials[0].weight,
        since_s=since_s,
        stable=reduce(add, (trial.stable for trial in trials), Counts()).answered(),
        canary=reduce(add, (trial.canary for trial in trials), Counts()).answered(),
    )


def _ended(canary: CanaryStatus, rejected: dict[int, str]) -> CanaryStatus | None:
    """A canary that no replica has any more: rejected by a load, or no longer named by the channel."""
    reason = rejected.get(canary.version)
    return None if reason is None else canary.model_copy(update={"phase": "rejected", "verdict": reason})


def _agreed(serving: Sequence[int], before: int | None) -> int | None:
    """The version that answers: while the replicas differ, the one before, as long as one of them has it."""
    if before in serving:
        return before
    return Counter(serving).most_common(1)[0][0] if serving else None


def _without_time(status: ChannelStatus) -> ChannelStatus:
    return status.model_copy(update={"updated_s": 0.0})


def _without_counts(status: ChannelStatus) -> ChannelStatus:
    canary = status.canary
    if canary is not None:
        same = {"stable": channels.Answered(), "canary": channels.Answered()}
        canary = canary.model_copy(update={**same, "verdict": "" if canary.phase == "watched" else canary.verdict})
    return _without_time(status).model_copy(update={"canary": canary})

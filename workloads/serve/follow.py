"""Follows a channel: makes what one replica answers with what the channel says."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import dataclass, field
from threading import Event

from orchestrator.errors import HeadwayError, IntegrityError
from orchestrator.release import channels
from orchestrator.release.channels import ChannelEntry, ChannelStatus
from orchestrator.release.versions import Version
from orchestrator.release.wanted import Wanted, wanted
from workloads.serve.counters import Counter, Counts
from workloads.serve.loaded import Loaded, Serving
from workloads.serve.loads import MAX_RETRY_S, Loads, NotNow
from workloads.serve.reports import ReplicaReport, Trial

logger = logging.getLogger("headway.serve")


@dataclass(kw_only=True)
class Follower:
    """One replica's view of its channel. :meth:`step` runs in one thread; others may read :attr:`serving`.

    What it serves is a function of the channel's entries and of what the status says was rejected or promoted, so
    that all replicas come to the same, and come to it again after a restart. What does not load here alone moves it to
    no other version: it keeps the one that serves until the decider has said whether the version is at fault. A
    version that is swapped out is freed when the last request that holds it ends.
    """

    channel: str
    loads: Loads

    serving: Serving = field(default_factory=Serving, init=False)
    has_looked: Event = field(default_factory=Event, init=False)
    """Set once the first step is done."""
    problem: str | None = field(default=None, init=False)
    """What keeps a wanted version from serving for now."""
    _status: ChannelStatus = field(default_factory=ChannelStatus, init=False)
    _entries: dict[int, ChannelEntry] = field(default_factory=dict, init=False)
    _trial: _Trial | None = field(default=None, init=False)
    _let_go: weakref.ref[Loaded] | None = field(default=None, init=False)
    _let_go_version: Version | None = field(default=None, init=False)
    _damaged: set[str] = field(default_factory=set, init=False)
    """What was warned of."""
    _has_garbage: bool = field(default=False, init=False)
    _retry_wait_s: float = field(default=0.0, init=False)
    _retry_at_s: float = field(default=0.0, init=False)

    def run(self, stop: Event, *, poll_s: float) -> None:
        """Step now, and every ``poll_s`` seconds until ``stop`` is set."""
        while True:
            self.step()
            self.has_looked.set()
            if stop.wait(poll_s):
                return

    def step(self) -> None:
        """Look at the channel once and act. Never raises: what goes wrong is in :attr:`problem` and the log."""
        if self.loads.clock() < self._retry_at_s:
            return
        problem = None
        try:
            self._read_status()
            self._reconcile()
            self._retry_wait_s = 0.0
        except NotNow as e:
            problem = str(e)
        except HeadwayError as e:
            problem = str(e)
            self._retry_wait_s = min(MAX_RETRY_S, max(1.0, 2 * self._retry_wait_s))
            self._retry_at_s = self.loads.clock() + self._retry_wait_s
        except Exception as e:
            problem = f"{type(e).__name__}: {e}"
            logger.exception("%s/%s: following the channel failed", self.loads.model, self.channel)
        self.loads.turns.give_back()
        if problem not in (None, self.problem):
            logger.warning("%s/%s: %s", self.loads.model, self.channel, problem)
        self.problem = problem
        if self._has_garbage and self.loads.num_held <= len(self.serving.versions()):
            gc.collect()  # a model is full of cycles, which outlive its last request
            self._has_garbage = False

    @property
    def rejected(self) -> dict[int, str]:
        """Versions that do not answer here though an entry may name them: by the decider, or by a load here."""
        return {**self.loads.failures, **self._status.rejected}

    @property
    def version(self) -> Version | None:
        """The stable version that answers; while this replica reloads, the one that it answered with before."""
        serving = self.serving
        if serving.stable is not None:
            return serving.stable.version
        return self._let_go_version if serving.draining else None

    def report(self, replica: str) -> ReplicaReport:
        """This replica as it is now. May be called in another thread."""
        serving, trial = self.serving, self._trial
        return ReplicaReport(
            replica=replica,
            serving=None if serving.stable is None else serving.stable.version.number,
            canary=None if serving.canary is None else serving.canary.version.number,
            loading=self.loads.loading,
            tried=self.loads.tried,
            problem=self.problem,
            failures=self.loads.failures,
            trial=None if trial is None else trial.now(),
        )

    def _read_status(self) -> None:
        try:
            found = channels.read_status(self.loads.store, self.loads.model, self.channel)
        except IntegrityError as e:
            self._warn_once(f"The status is passed over until it is written anew: {e}")
        else:
            self._status = found or ChannelStatus()

    def _reconcile(self) -> None:
        """Load what the channel says, and serve it.

        Raises:
            EnvironmentUnusable: for now; try again later.
        """
        numbers = channels.entry_numbers(self.loads.store, self.loads.model, self.channel)
        status = self._status
        aim = wanted(numbers, self._entry, rejected=status.rejected, promoted=status.promoted)
        if aim is not None:
            self._settle(aim)
        elif self.serving.draining:
            self._swap(Serving())  # there is nothing to come back to
        else:
            self._drop_rejected()

    def _entry(self, number: int) -> ChannelEntry | None:
        """An entry, or None where what lies there is not one."""
        if number not in self._entries:
            try:
                self._entries[number] = channels.read_entry(self.loads.store, self.loads.model, self.channel, number)
            except IntegrityError as e:
                self._warn_once(f"An entry is passed over: {e}")
                return None
        return self._entries[number]

    def _warn_once(self, message: str) -> None:
        if message not in self._damaged:
            logger.warning("%s", message)
        self._damaged.add(message)

    def _settle(self, aim: Wanted) -> None:
        """Serve this. Nothing here may keep hold of a version while another is loaded: its memory may be needed."""
        self._drop_canary(aim)
        if self.serving.find(aim.stable) is None:
            self._add_stable(aim)
        if aim.canary is not None and self.serving.find(aim.canary) is None:
            self._swap(Serving(stable=self.serving.find(aim.stable)))
            self._add_canary(aim.canary, aim)
        canary = self.serving.find(aim.canary)
        self._swap(Serving(stable=self.serving.find(aim.stable), canary=canary, weight=aim.weight))
        self._watch(aim)

    def _drop_canary(self, aim: Wanted) -> None:
        canary = self.serving.canary
        if canary is not None and canary.version.number not in (aim.stable, aim.canary):
            self._swap(Serving(stable=self.serving.stable))

    def _drop_rejected(self) -> None:
        """What the decider rejected gets no request, though nothing else may answer for now."""
        serving, rejected = self.serving, self._status.rejected
        if serving.stable is not None and serving.stable.version.number in rejected:
            self._swap(Serving())
        elif serving.canary is not None and serving.canary.version.number in rejected:
            self._swap(Serving(stable=serving.stable))

    def _add_stable(self, aim: Wanted) -> None:
        try:
            loaded = self.loads.load(aim.stable, aim.entry, let_go=self._release)
        except NotNow:
            self._take_back(aim)
            self._drop_rejected()
            raise
        # The one before goes on beside it where it is the canary now.
        self._swap(Serving(stable=loaded, canary=self.serving.find(aim.canary), weight=aim.weight))

    def _add_canary(self, number: int, aim: Wanted) -> None:
        loaded = self.loads.load(number, aim.canary_entry or aim.entry, let_go=None)
        self._swap(Serving(stable=self.serving.stable, canary=loaded, weight=aim.weight))

    def _release(self) -> None:
        """Hold no version, so that each is freed with its last request. Other replicas answer meanwhile."""
        stable = self.serving.stable
        if stable is not None:
            self._let_go, self._let_go_version = weakref.ref(stable), stable.version
        self._swap(Serving(draining=True))

    def _take_back(self, aim: Wanted) -> None:
        """Answer with the version that was let go: a request may have kept it in memory, else it is loaded anew."""
        version = self._let_go_version
        if not self.serving.draining or version is None or version.number in self._status.rejected:
            return
        loaded = self._let_go() if self._let_go is not None else None
        self._swap(Serving(stable=loaded or self.loads.load(version.number, aim.entry, let_go=None)))

    def _swap(self, serving: Serving) -> None:
        self._has_garbage = self._has_garbage or any(
            serving.find(loaded.version.number) is None for loaded in self.serving.versions()
        )
        self.serving = serving
        if serving.canary is None:
            self._trial = None

    def _watch(self, aim: Wanted) -> None:
        """Count anew where the canary or its entry is another."""
        canary, stable, entry = self.serving.canary, self.serving.stable, aim.canary_entry
        if canary is None or stable is None or entry is None:
            self._trial = None
            return
        trial = self._trial
        if trial is None or (trial.entry, trial.stable, trial.canary) != (entry.number, stable.counter, canary.counter):
            self._trial = _Trial.begin(entry.number, stable, canary, weight=aim.weight)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """What both versions had answered when the canary began. Holds no version."""

    entry: int
    version: int
    weight: float
    stable: Counter
    canary: Counter
    stable_before: Counts
    canary_before: Counts

    @classmethod
    def begin(cls, entry: int, stable: Loaded, canary: Loaded, *, weight: float) -> _Trial:
        return cls(
            entry=entry,
            version=canary.version.number,
            weight=weight,
            stable=stable.counter,
            canary=canary.counter,
            stable_before=stable.counter.counts(),
            canary_before=canary.counter.counts(),
        )

    def now(self) -> Trial:
        return Trial(
            entry=self.entry,
            version=self.version,
            weight=self.weight,
            stable=self.stable.counts() - self.stable_before,
            canary=self.canary.counts() - self.canary_before,
        )

"""Loads versions beside those that are loaded, or in their place by turns where both do not fit."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.errors import EnvironmentUnusable, HeadwayError
from orchestrator.release.channels import ChannelEntry
from orchestrator.release.versions import read_version
from orchestrator.store import Store
from workloads.serve.counters import Counter
from workloads.serve.faults import is_lack_of_memory, is_of_the_machine
from workloads.serve.loaded import Loaded
from workloads.serve.memory import DoesNotFit, require_fit
from workloads.serve.models import Fetched, Models
from workloads.serve.reports import Reply

logger = logging.getLogger("headway.serve")

MAX_RETRY_S = 60.0
FAILED_RETRY_S = 600.0
"""Until what failed by its own fault, or does not fit alone, is tried again: in place, each try costs a reload."""
_LOOK_S = 0.05  # between two looks whether the last request of a version has ended


class NotNow(EnvironmentUnusable):
    """A version cannot be loaded for now. The channel is read on meanwhile."""


class Turns(Protocol):
    """Leave to answer nothing for a while, for one replica at a time."""

    def ask(self) -> Reply:
        """
        Raises:
            EnvironmentUnusable: nobody is there to ask.
        """
        ...

    def give_back(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SwapTimes:
    """The way of the last version from its entry in the channel to its first request, in stages."""

    version: int
    poll_s: float
    """Until this replica saw the entry, by the clocks of two machines."""
    download_s: float
    room_s: float
    """Until there was memory: nearly nothing, unless the version before had to go first."""
    load_s: float
    warm_up_s: float

    def __str__(self) -> str:
        return (
            f"seen after {self.poll_s:.2f} s, download {self.download_s:.2f}, room {self.room_s:.2f}, "
            f"load {self.load_s:.2f}, warm-up {self.warm_up_s:.2f}"
        )


@dataclass(frozen=True, kw_only=True)
class _Postponed:
    reason: str
    wait_s: float
    until_s: float


@dataclass(kw_only=True)
class Loads:
    """One replica's loads. Used by one thread; others may read."""

    store: Store
    model: str
    models: Models
    turns: Turns
    memory_bytes: int | None = None
    """Limit of all loaded versions together."""
    drain_s: float = 60.0
    """The longest wait for the last request of a version that has to go before another is loaded."""
    clock: Callable[[], float] = time.time

    loading: int | None = field(default=None, init=False)
    tried: int | None = field(default=None, init=False)
    """The version that was loaded last, or whose load failed last."""
    failures: dict[int, str] = field(default_factory=dict, init=False)
    """Versions that did not load here by what seems to be their own fault, and why. Whether they are rejected is the
    decider's to say; until it does, they are tried again after a while."""
    counters: dict[int, Counter] = field(default_factory=dict, init=False)
    """Of all versions that were loaded since this process began."""
    times: SwapTimes | None = field(default=None, init=False)
    _held: list[tuple[weakref.ref[Loaded], int]] = field(default_factory=list, init=False)
    _fetched: Fetched | None = field(default=None, init=False)
    _postponed: dict[int, _Postponed] = field(default_factory=dict, init=False)

    def load(self, number: int, entry: ChannelEntry, *, let_go: Callable[[], None] | None) -> Loaded:
        """A version that has answered once.

        Args:
            let_go: gives up what is loaded, once it is this replica's turn; None where that must not be.

        Raises:
            NotNow: it is tried again after a while. Where the fault is the version's, it is in :attr:`failures` too.
        """
        postponed = self._postponed.get(number)
        if postponed is not None and self.clock() < postponed.until_s:
            raise NotNow(postponed.reason)
        self.loading = number
        try:
            loaded = self._load(number, entry, let_go)
        except NotNow:
            raise  # it has its own time
        except Exception as e:  # whatever a foreign file makes transformers raise
            not_now = self._failed(number, e)
        else:
            self._postponed.pop(number, None)
            self._fetched = None
            self.failures = {key: reason for key, reason in self.failures.items() if key != number}
            self.tried = number
            return loaded
        finally:
            self.loading = None
        gc.collect()  # here no traceback holds the model any more, and it is full of cycles
        raise not_now

    @property
    def num_held(self) -> int:
        """Versions in memory, those that only a last request holds included."""
        self._held = [(reference, size) for reference, size in self._held if reference() is not None]
        return len(self._held)

    def _held_bytes(self) -> int:
        return sum(size for reference, size in self._held if reference() is not None)

    def _load(self, number: int, entry: ChannelEntry, let_go: Callable[[], None] | None) -> Loaded:
        seen_s, begun_s = self.clock(), time.monotonic()
        fetched = self._fetch(number)
        version = fetched.version
        fetched_s = time.monotonic()
        needed = self.models.needed_bytes(fetched)
        self._make_room(version.name, needed, let_go)
        room_s = time.monotonic()
        engine = self.models.load(fetched)
        loaded_s = time.monotonic()
        warm_up_s = self.models.warm_up(engine)
        loaded = Loaded(version=version, engine=engine, counter=self.counters.setdefault(number, Counter()))
        self._held.append((weakref.ref(loaded), needed))
        self.times = SwapTimes(
            version=number,
            poll_s=seen_s - entry.created_s,
            download_s=fetched_s - begun_s,
            room_s=room_s - fetched_s,
            load_s=loaded_s - room_s,
            warm_up_s=warm_up_s,
        )
        logger.info("%s loaded: %s", version.name, self.times)
        return loaded

    def _fetch(self, number: int) -> Fetched:
        """Once, however long the version waits for its turn or for memory: all its bytes are verified."""
        if self._fetched is None or self._fetched.version.number != number:
            self._fetched = self.models.fetch(read_version(self.store, self.model, number))
        return self._fetched

    def _make_room(self, name: str, needed: int, let_go: Callable[[], None] | None) -> None:
        """
        Raises:
            DoesNotFit: there is no room, and none can be made. NotNow: it is another's turn.
        """
        gc.collect()
        held = self._held_bytes()
        try:
            require_fit(needed, held=0, available=needed, limit=self.memory_bytes)
            if not self.num_held:
                return  # an estimate is no reason to serve nothing
            require_fit(needed, held=held, available=self.models.free_bytes(), limit=self.memory_bytes)
        except DoesNotFit as e:
            if needed > (self.memory_bytes or needed):
                raise DoesNotFit(f"{name} does not fit into memory. {e}") from e
            why = f"{name} does not fit beside the version that answers. {e}"
            if let_go is None:
                raise DoesNotFit(why) from e
            self._take_turn(why)
            let_go()
            self._wait_until_free(name)

    def _take_turn(self, why: str) -> None:
        reply = self.turns.ask()
        if not reply.num_others:
            raise DoesNotFit(f"{why} No other replica answers meanwhile, so that one goes on answering.")
        if not reply.has_turn:
            raise NotNow(f"{why} Another replica is reloading first.")

    def _wait_until_free(self, name: str) -> None:
        deadline_s = time.monotonic() + self.drain_s
        while True:
            if not self.num_held:
                gc.collect()  # a model is full of cycles, which outlive its last request
                return
            if time.monotonic() > deadline_s:
                raise EnvironmentUnusable(f"{name} waits for requests that have been going on for {self.drain_s:g} s.")
            threading.Event().wait(_LOOK_S)

    def _failed(self, number: int, error: Exception) -> NotNow:
        name = f"{self.model}@{number}"
        reason = (str(error) if isinstance(error, HeadwayError) else f"{type(error).__name__}: {error}")[:1000]
        if isinstance(error, HeadwayError) and is_of_the_machine(error):
            return self._postpone(number, reason)
        if is_lack_of_memory(error):
            wait_s = None if self.num_held else FAILED_RETRY_S
            return self._postpone(number, f"{name} does not fit into memory now: {error}.", wait_s=wait_s)
        if is_of_the_machine(error):
            return self._postpone(number, f"This machine failed to load {name}: {reason}")
        self._fetched = None
        logger.error("%s does not load: %s", name, reason)
        self.tried = number
        self.failures = {**self.failures, number: reason}
        return self._postpone(number, f"{name} does not load: {reason}", wait_s=FAILED_RETRY_S)

    def _postpone(self, number: int, reason: str, *, wait_s: float | None = None) -> NotNow:
        before = self._postponed.get(number)
        if wait_s is None:
            wait_s = 1.0 if before is None else min(MAX_RETRY_S, 2 * before.wait_s)
        self._postponed[number] = _Postponed(reason=reason, wait_s=wait_s, until_s=self.clock() + wait_s)
        return NotNow(reason)

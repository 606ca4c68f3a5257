"""Follows a channel: makes what serves what the channel says, and says in its status what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from orchestrator.errors import EnvironmentUnusable, HeadwayError, IntegrityError, NotFound
from orchestrator.release import channels
from orchestrator.release.channels import ChannelEntry, ChannelStatus
from orchestrator.release.versions import Version, download_version, read_version
from orchestrator.store import Store
from workloads.serve.classifier import Classifier
from workloads.serve.engine import Engine
from workloads.serve.openai_api import ApiError

logger = logging.getLogger("headway.serve")

MAX_RETRY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A version that answers."""

    version: Version
    engine: Engine | Classifier

    def generator(self) -> Engine:
        """
        Raises:
            ApiError: 400, this version gives classes.
        """
        if not isinstance(self.engine, Classifier):
            return self.engine
        raise ApiError(
            400, f"{self.version.model} classifies texts and generates none; use /v1/classify.", code="unsupported"
        )

    def classifier(self) -> Classifier:
        """
        Raises:
            ApiError: 400, this version generates text.
        """
        if isinstance(self.engine, Classifier):
            return self.engine
        raise ApiError(
            400, f"{self.version.model} generates text and gives no classes; use /v1/completions.", code="unsupported"
        )


@dataclass(kw_only=True)
class Follower:
    """One replica's view of its channel. :meth:`step` runs in one thread; others may read :attr:`current`.

    What it serves is a function of the channel's entries and the rejected versions: the newest entry whose
    version was not rejected. So after a restart it comes to the same version again. A version that is swapped
    out is freed when the last request that holds it ends.
    """

    store: Store
    model: str
    channel: str
    cache_directory: Path
    load: Callable[[Version, Path], Engine | Classifier]
    """The version whose files the directory holds. Raises where they are no model that answers."""
    writes_status: bool = True
    """False on all replicas but one: a status has one writer."""
    clock: Callable[[], float] = time.time

    current: Loaded | None = field(default=None, init=False)
    status: ChannelStatus = field(default_factory=ChannelStatus, init=False)
    _entries: dict[int, ChannelEntry] = field(default_factory=dict, init=False)
    _status_read: bool = field(default=False, init=False)
    _status_written: ChannelStatus | None = field(default=None, init=False)
    _retry_wait_s: float = field(default=0.0, init=False)
    _retry_at_s: float = field(default=0.0, init=False)

    def run(self, stop: Event, *, poll_s: float) -> None:
        """Step every ``poll_s`` seconds until ``stop`` is set."""
        while not stop.wait(poll_s):
            self.step()

    def step(self) -> None:
        """Look at the channel once and act. Never raises: what goes wrong is in the status and the log."""
        if self.clock() < self._retry_at_s:
            return
        problem = None
        try:
            self._read_rejected()
            self._reconcile()
            self._retry_wait_s = 0.0
        except HeadwayError as e:
            problem = str(e)
            self._retry_wait_s = min(MAX_RETRY_S, max(1.0, 2 * self._retry_wait_s))
            self._retry_at_s = self.clock() + self._retry_wait_s
            logger.warning("%s/%s: %s", self.model, self.channel, problem)
        except Exception as e:
            problem = f"{type(e).__name__}: {e}"
            logger.exception("%s/%s: following the channel failed", self.model, self.channel)
        self.status = self.status.model_copy(update={"problem": problem})
        self._write_status()

    def _reconcile(self) -> None:
        """Load what the channel says, until something that loads is serving.

        Raises:
            EnvironmentUnusable: for now; try again later.
        """
        while (entry := self._wanted()) is not None:
            if self.current is not None and self.current.version.number == entry.version:
                return
            loaded = self._try(entry.version)
            if loaded is not None:
                self._swap(loaded)
                return

    def _wanted(self) -> ChannelEntry | None:
        numbers = channels.entry_numbers(self.store, self.model, self.channel)
        return newest_usable(numbers, self._entry, self.status.rejected)

    def _entry(self, number: int) -> ChannelEntry | None:
        """An entry, or None where what lies there is not one."""
        if number not in self._entries:
            try:
                self._entries[number] = channels.read_entry(self.store, self.model, self.channel, number)
            except IntegrityError as e:
                logger.warning("An entry is passed over: %s", e)
                return None
        return self._entries[number]

    def _try(self, number: int) -> Loaded | None:
        """Load a version beside the one that serves; None where it is rejected."""
        started_s = self.clock()
        try:
            version = read_version(self.store, self.model, number)
            directory = download_version(self.store, version, self.cache_directory)
            engine = self.load(version, directory)
        except Exception as e:  # whatever a foreign file makes transformers raise
            if isinstance(e, EnvironmentUnusable) and not isinstance(e, NotFound):
                raise
            # By name: torch, whose error it is, is not imported here.
            if isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError":
                raise EnvironmentUnusable(f"{self.model}@{number} does not fit into memory now: {e}.") from e
            self._reject(number, e)
            return None
        logger.info("%s loaded in %.1f s", version.name, self.clock() - started_s)
        return Loaded(version=version, engine=engine)

    def _reject(self, number: int, error: Exception) -> None:
        reason = str(error) if isinstance(error, HeadwayError) else f"{type(error).__name__}: {error}"
        logger.error("%s@%d is rejected: %s", self.model, number, reason)
        self.status = self.status.model_copy(
            update={"tried": number, "rejected": {**self.status.rejected, number: reason[:1000]}}
        )

    def _swap(self, loaded: Loaded) -> None:
        self.current = loaded
        number = loaded.version.number
        self.status = self.status.model_copy(update={"tried": number, "serving": number})

    def _read_rejected(self) -> None:
        """Once: what was rejected before this replica started stays rejected."""
        if self._status_read:
            return
        try:
            found = channels.read_status(self.store, self.model, self.channel)
        except IntegrityError as e:
            logger.warning("The status is written anew: %s", e)
            found = None
        if found is not None:
            self.status = self.status.model_copy(update={"rejected": found.rejected, "tried": found.tried})
        self._status_read = True

    def _write_status(self) -> None:
        if not self.writes_status or not self._status_read or self.status == self._status_written:
            return
        stamped = self.status.model_copy(update={"updated_s": self.clock()})
        try:
            channels.write_status(self.store, self.model, self.channel, stamped)
        except HeadwayError as e:
            logger.warning("The status could not be written: %s", e)
            return
        self.status = self._status_written = stamped


def newest_usable(
    numbers: list[int], entry_of: Callable[[int], ChannelEntry | None], rejected: Mapping[int, str]
) -> ChannelEntry | None:
    """The newest of the entries whose version was not rejected. Reads no more of them than it must."""
    for number in sorted(numbers, reverse=True):
        entry = entry_of(number)
        if entry is not None and entry.version not in rejected:
            return entry
    return None

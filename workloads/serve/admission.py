"""How many sequences one replica takes on at once."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.errors import HeadwayError


class Overloaded(HeadwayError):
    """As many requests are waiting as may wait."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    max_batch: int = 32
    """Sequences decoded, or texts classified, at once."""
    max_batch_tokens: int | None = None
    """Tokens whose keys and values a batch may come to hold: its sequences times the longest one's prompt and
    completion together. None derives it from the free memory (:mod:`workloads.serve.batching_memory`)."""
    default_max_tokens: int = 4096
    """The most tokens of a chat's answer whose request sets no limit: a row reserves all that it may come to take."""
    max_queued: int = 64
    """Sequences that wait for their turn; those beyond are refused."""
    num_threads: int = max(1, len(os.sched_getaffinity(0)) // 2)
    """Threads of one tensor operation; half of the cores, so that serving leaves room for training."""


class Admission:
    """Counts the sequences that are under way or waiting."""

    def __init__(self, settings: EngineSettings) -> None:
        self._room = settings.max_batch + settings.max_queued
        self._lock = threading.Lock()
        self.num_sequences = 0

    @contextlib.contextmanager
    def admit(self, num_sequences: int) -> Iterator[None]:
        """Reserve room for a request's sequences while the context lasts.

        Raises:
            Overloaded: too many are waiting already.
        """
        with self._lock:
            if self.num_sequences + num_sequences > self._room:
                raise Overloaded(
                    f"{self.num_sequences} sequences are under way or waiting; {num_sequences} more would be "
                    f"above the limit of {self._room}.",
                    next_step="Try again later.",
                )
            self.num_sequences += num_sequences
        try:
            yield
        finally:
            with self._lock:
                self.num_sequences -= num_sequences

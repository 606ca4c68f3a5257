"""How far preparing is, said every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from workloads.prepare.committed import PartDone
from workloads.prepare.parts import PartJob

_EVERY_S = 5.0
_MB = 1e6


class Progress:
    """Parts and bytes of the source that are done.

    Args:
        say: told a line at most every five seconds, and at the end.
        clock: seconds.
    """

    def __init__(
        self, jobs: Iterable[PartJob], say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        sizes = [job.size_bytes for job in jobs]
        self._num_parts, self._num_bytes = len(sizes), sum(sizes)
        self._say, self._clock = say, clock
        self._started_s = self._said_s = clock()
        self._parts = self._found = self._bytes = self._new_bytes = self._slices = self._reused = 0

    def found(self, done: PartDone) -> None:
        """A part that an earlier try has finished."""
        self._found += 1
        self._count(done)

    def made(self, done: PartDone) -> None:
        """A part that was finished just now."""
        self._new_bytes += done.source_bytes
        self._slices += done.num_slices - done.num_reused
        self._reused += done.num_reused
        self._count(done)
        if self._clock() - self._said_s >= _EVERY_S:
            self._said_s = self._clock()
            self._say(f"{self._so_far()}.")

    def end(self) -> None:
        """All parts are done."""
        told = [f"{self._slices} files or slices of files tokenized" if self._slices or not self._reused else ""]
        told += [f"{self._reused} unchanged and taken from an earlier preparation" if self._reused else ""]
        told += [f"{self._found} parts were there" if self._found else ""]
        self._say(f"{self._so_far()}: {', '.join(filter(None, told))}.")

    def _count(self, done: PartDone) -> None:
        self._parts += 1
        self._bytes += done.source_bytes

    def _so_far(self) -> str:
        rate = self._new_bytes / _MB / max(1e-9, self._clock() - self._started_s)
        return (
            f"Prepared {self._parts} of {self._num_parts} parts, {self._bytes / _MB:.1f} of "
            f"{self._num_bytes / _MB:.1f} MB, {rate:.1f} MB/s"
        )

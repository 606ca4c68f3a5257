"""Reads ahead of the steps: what they will need is known, since the order is a function of the step."""

from __future__ import annotations

import os
from collections import deque

import numpy as np
import numpy.typing as npt

from orchestrator.dataset.cache import size_of_environment
from orchestrator.dataset.order import SampleOrder
from orchestrator.dataset.reader import TokenReader

AHEAD_VARIABLE = "HEADWAY_READ_AHEAD"
AHEAD_BYTES = 2**30
_REFILL = 0.875  # of what may be on its way: below it, more is asked for
_CHUNK_SAMPLES = 4096  # whose order is computed at once
_MAX_SAMPLES = 2**20

I64 = npt.NDArray[np.int64]


class ReadAhead:
    """The sample numbers of a reader's rows, step by step, with their pieces on the way before.

    Args:
        rows: of each global batch.
        num_steps: where the steps end; None for never.
        every: steps dealt out to several readers, of which this one takes each ``every``-th.
        ahead_bytes: of pieces that are got before their step is asked for; they lie in the node's cache, not in
            memory. None is ``HEADWAY_READ_AHEAD``, such as ``4Gi``.
    """

    def __init__(
        self,
        reader: TokenReader,
        order: SampleOrder,
        rows: range,
        *,
        num_steps: int | None = None,
        every: int = 1,
        ahead_bytes: int | None = None,
    ) -> None:
        self._reader, self._order, self._rows = reader, order, rows
        self._num_steps, self._every = num_steps, every
        self._limit = ahead_bytes or size_of_environment(AHEAD_VARIABLE) or AHEAD_BYTES
        self._chunk = max(1, _CHUNK_SAMPLES // max(1, len(rows)))
        an_epoch = -(-order.num_samples // order.global_batch_size)
        self._max_steps = max(1, min(an_epoch, every * _MAX_SAMPLES // max(1, len(rows))))
        self._process = os.getpid()
        self._start(0)

    def take(self, step: int) -> I64:
        """The sample numbers of ``step``, shape (len(rows),)."""
        if step != self._step or self._process != os.getpid():
            self._process = os.getpid()  # a fork's child has got nothing of it yet
            self._start(step)
        if not self._requested or self._ahead_bytes < self._limit * _REFILL:
            self._request()
        self._step += self._every
        self._ahead_bytes -= self._requested.popleft()
        return self._known.popleft()

    def _start(self, step: int) -> None:
        self._step = step
        self._known: deque[I64] = deque()
        """Sample numbers of ``step`` and those after it."""
        self._requested: deque[int] = deque()
        """Of the first of these, bytes that were asked for on behalf of each."""
        self._ahead_bytes = 0

    def _request(self) -> None:
        """Ask for what this step needs, and for a chunk of what comes behind it, until enough is on its way."""
        if not self._requested:
            if not self._known:
                self._look_on(1)
            self._ask(at_most=0)
        if len(self._requested) == len(self._known):
            self._look_on(self._chunk)
        if self._ahead_bytes < self._limit and len(self._requested) < len(self._known):
            self._ask(at_most=self._limit - self._ahead_bytes)

    def _ask(self, *, at_most: int) -> None:
        num_asked = len(self._requested)
        waiting = np.stack([self._known[place] for place in range(num_asked, len(self._known))])
        num_bytes = self._reader.prefetch(waiting, at_most=at_most)
        self._requested.extend(num_bytes)
        self._ahead_bytes += sum(num_bytes)

    def _look_on(self, num_steps: int) -> None:
        """Find out the numbers of more steps, up to an epoch ahead, which needs all there is."""
        if len(self._known) * self._every >= self._max_steps:
            return
        first = self._step + len(self._known) * self._every
        end = first + num_steps * self._every
        if self._num_steps is not None:
            end = max(min(end, self._num_steps), first + (not self._known))
        if first < end:
            self._known.extend(self._order.batches(range(first, end, self._every), self._rows))

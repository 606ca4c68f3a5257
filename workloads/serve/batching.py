"""Continuous batching: sequences join and leave a running batch between two steps of the model."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers

from workloads.serve.batching_model import BatchedModel
from workloads.serve.batching_row import Outbox, Row
from workloads.serve.decoding import Sampling, choose
from workloads.serve.loading import NonFiniteLogits

PREFILL_TOKENS = 256
"""Of prompts, padding included, between two steps of the batch: the longest that a step is held up."""


class Batcher:
    """One thread that owns the model. It runs while there are sequences; the pool's idle thread holds no reference,
    and ends once nobody holds the batcher."""

    def __init__(self, model: BatchedModel, *, max_batch: int, max_batch_tokens: int) -> None:
        self._model = model
        self._max_batch, self._max_batch_tokens = max_batch, max_batch_tokens
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._lock = threading.Lock()
        self._waiting: deque[Row] = deque()  # under the lock, as is the next
        self._is_running = False
        self._joining: deque[Row] = deque()  # have room, and wait for their prompts' turn
        self._prefill: _Prefill | None = None
        self._rows: list[Row] = []
        self._outbox = Outbox()

    def submit(self, row: Row) -> None:
        """Generate a sequence as soon as there is room for it.

        Raises:
            ValueError: there never will be.
        """
        if row.num_reserved > self._max_batch_tokens:
            raise ValueError(f"{row.num_reserved} tokens are above max_batch_tokens, {self._max_batch_tokens}")
        with self._lock:
            self._waiting.append(row)
            if self._is_running:
                return
            self._is_running = True
        self._thread.submit(self._run)

    def _run(self) -> None:
        while self._has_work():
            try:
                with torch.inference_mode():
                    self._turn()
            except Exception as e:
                self._fail(self._rows, e)
                self._rows = []
                self._model.cache.clear()
            self._outbox.send()

    def _has_work(self) -> bool:
        with self._lock:
            self._is_running = bool(self._rows or self._prefill or self._joining or self._waiting)
            return self._is_running

    def _turn(self) -> None:
        """Let go of what nobody waits for, take in what there is room for, and one step each."""
        for index in reversed(range(len(self._rows))):
            if self._rows[index].gone:
                self._leave(index)
        self._take_in()
        if self._prefill is None:
            self._prefill = self._next_prefill()
        if self._prefill is not None:
            self._advance_prefill(self._prefill)
            self._outbox.send()
        if self._rows:
            self._step()

    def _take_in(self) -> None:
        """In the order in which they came, so that a long one is not overtaken for ever."""
        with self._lock:
            self._waiting = deque(row for row in self._waiting if not row.gone)
            self._joining = deque(row for row in self._joining if not row.gone)
            while self._waiting and self._has_room(self._waiting[0]):
                self._joining.append(self._waiting.popleft())

    def _has_room(self, row: Row) -> bool:
        """Each row of the batch may come to take as much as its longest."""
        held = [*self._rows, *self._joining, *(self._prefill.rows if self._prefill else ())]
        longest = max(each.num_reserved for each in (*held, row))
        return len(held) < self._max_batch and (len(held) + 1) * longest <= self._max_batch_tokens

    def _next_prefill(self) -> _Prefill | None:
        """The first that waits, with as many after it as fit into one pass; a long one alone, in chunks."""
        rows: list[Row] = []
        longest = 0
        while self._joining:
            longest = max(longest, len(self._joining[0].generation.prompt))
            if rows and (len(rows) + 1) * longest > PREFILL_TOKENS:
                break
            rows.append(self._joining.popleft())
        return _Prefill(rows) if rows else None

    def _advance_prefill(self, prefill: _Prefill) -> None:
        """A chunk of one long prompt, or all of several; at their ends, the first tokens."""
        if all(row.gone for row in prefill.rows):
            self._prefill = None
            return
        try:
            sampling = Sampling.of(prefill.rows, self._model.device)
            logits = prefill.advance(self._model)
            if logits is None:
                return
            tokens = choose(logits, sampling)
        except Exception as e:
            self._fail(prefill.rows, e)
            self._prefill = None
            return
        self._prefill = None
        joining = []
        for number, (row, token) in enumerate(zip(prefill.rows, tokens, strict=True)):
            if self._take(row, token):
                joining.append((number, len(row.generation.prompt)))
                self._rows.append(row)
        self._model.cache.join(prefill.cache, joining)

    def _step(self) -> None:
        """One more token of each row."""
        sampling = Sampling.of(self._rows, self._model.device)
        tokens = choose(self._model.step([row.last_token for row in self._rows]), sampling)
        stays = [self._take(row, token) for row, token in zip(self._rows, tokens, strict=True)]
        for index in reversed(range(len(stays))):
            if not stays[index]:
                self._leave(index, scrub=tokens[index] is None)

    def _take(self, row: Row, token: int | None) -> bool:
        """Pass a row's next token on; false where it was the last, or is none."""
        if token is None:
            self._outbox.put(row, NonFiniteLogits("The model's logits are not finite numbers."))
            return False
        taken = row.advance(token)
        self._outbox.put(row, taken)
        return taken.finish_reason is None

    def _leave(self, index: int, *, scrub: bool = False) -> None:
        """As the cache does it: the last row takes the number of the one that leaves."""
        last = self._rows.pop()
        if index < len(self._rows):
            self._rows[index] = last
        self._model.cache.leave(index, scrub=scrub)

    def _fail(self, rows: list[Row], error: Exception) -> None:
        for row in rows:
            self._outbox.put(row, error)


class _Prefill:
    """Prompts on their way through the model: several whole ones, or a long one in chunks."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.cache = transformers.DynamicCache()
        self._done = 0
        self._longest = max(len(row.generation.prompt) for row in rows)

    @property
    def is_done(self) -> bool:
        return self._done >= self._longest

    def advance(self, model: BatchedModel) -> Any:
        """Shape (rows, vocabulary); None while there is more to come."""
        size = PREFILL_TOKENS if len(self.rows) == 1 else self._longest
        chunks = [row.generation.prompt[self._done : self._done + size] for row in self.rows]
        logits = model.prefill(chunks, self.cache)
        self._done += size
        return logits if self.is_done else None

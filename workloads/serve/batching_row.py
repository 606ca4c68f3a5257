"""A sequence under way, between the thread that owns the model and the event loop that waits for its tokens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from workloads.serve.engine import FinishReason, Generation


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One generated token, and whether it is the last."""

    id: int
    finish_reason: FinishReason | None


@dataclass(kw_only=True, eq=False)
class Row:
    """One sequence. All but :attr:`gone` belongs to the thread that owns the model."""

    generation: Generation
    end_tokens: frozenset[int]
    loop: asyncio.AbstractEventLoop
    arrived: asyncio.Queue[Token | Exception]
    """What came, oldest first: tokens, or why there are no more. Read in :attr:`loop`."""
    gone: bool = False
    """Nobody waits for it any more. Set by anyone."""
    num_tokens: int = field(default=0, init=False)
    """Generated so far."""
    last_token: int = field(default=-1, init=False)
    _random: Any = field(default=None, init=False)

    @property
    def num_reserved(self) -> int:
        """Tokens whose keys and values it may come to hold."""
        return len(self.generation.prompt) + self.generation.max_tokens

    @property
    def next_position(self) -> int:
        """Of the newest token, which the model has not seen yet; as many tokens lie before it."""
        return len(self.generation.prompt) + self.num_tokens - 1

    def advance(self, token: int) -> Token:
        """Take the next token."""
        self.num_tokens += 1
        self.last_token = token
        reason: FinishReason | None = None
        if token in self.end_tokens:
            reason = "stop"
        elif self.num_tokens >= self.generation.max_tokens:
            reason = "length"
        return Token(id=token, finish_reason=reason)

    def random(self, device: Any) -> Any:
        """The sequence's own random numbers, so that what runs beside it changes nothing."""
        if self._random is None:
            self._random = torch.Generator(device=device)
            if self.generation.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(self.generation.seed)
        return self._random


class Outbox:
    """What a step brought, sent with one call to each event loop: such a call costs as much as a small tensor
    operation, and wakes the loop."""

    def __init__(self) -> None:
        self._items: dict[asyncio.AbstractEventLoop, list[tuple[Row, Token | Exception]]] = {}

    def put(self, row: Row, item: Token | Exception) -> None:
        self._items.setdefault(row.loop, []).append((row, item))

    def send(self) -> None:
        items, self._items = self._items, {}
        for loop, batch in items.items():
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens
                loop.call_soon_threadsafe(_deliver, batch)
                continue
            for row, _ in batch:
                row.gone = True


def _deliver(batch: Sequence[tuple[Row, Token | Exception]]) -> None:
    for row, item in batch:
        row.arrived.put_nowait(item)

"""Reports a replica to the decider, in a thread of its own, so that a long load does not look like a dead replica."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.errors import EnvironmentUnusable
from workloads.serve.reports import ReplicaReport, Reply

logger = logging.getLogger("headway.serve")


@dataclass(kw_only=True)
class Reporter:
    """Sends reports and, with them, asks for this replica's turn to reload, keeps it and gives it back."""

    report: Callable[[], ReplicaReport]
    send: Callable[[ReplicaReport], Reply]
    """To the decider. Raises whatever Ray raises where it does not answer."""

    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _sequence: int = field(default=0, init=False)
    _wants_turn: bool = field(default=False, init=False)
    _is_heard: bool = field(default=True, init=False)

    def run(self, stop: threading.Event, *, poll_s: float) -> None:
        """Report now, and every ``poll_s`` seconds until ``stop`` is set."""
        while True:
            self.try_send()
            if stop.wait(poll_s):
                return

    def try_send(self) -> None:
        """Report once. Where the decider does not answer, the next report says it all again."""
        try:
            self._send()
        except EnvironmentUnusable as e:
            if self._is_heard:
                logger.warning("%s", e)
            self._is_heard = False
        else:
            self._is_heard = True

    def ask(self) -> Reply:
        """As :meth:`workloads.serve.loads.Turns.ask`."""
        self._wants_turn = True
        return self._send()

    def give_back(self) -> None:
        """Said with the next report, and at once where the turn was asked for."""
        if self._wants_turn:
            self._wants_turn = False
            self.try_send()

    def _send(self) -> Reply:
        with self._lock:  # one after the other; what was sent in vain may still arrive after the next
            self._sequence += 1
            try:
                said = {"sequence": self._sequence, "wants_turn": self._wants_turn}
                return self.send(self.report().model_copy(update=said))
            except Exception as e:
                raise EnvironmentUnusable(f"The decider does not answer: {type(e).__name__}: {e}") from e

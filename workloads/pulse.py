"""What a rank tells the watchdog: where its training loop stands, again and again, from a thread beside it."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from workloads.watchdog import ANSWER_TIMEOUT_S, Beat, Phase, Place, beat_s

logger = logging.getLogger(__name__)


class Link(Protocol):
    """A rank's way to the watchdog. Each call raises OSError where it cannot be reached."""

    node_id: str

    def join(self, group: str, rank: int) -> None: ...

    def beat(self, group: str, beat: Beat) -> bool: ...

    def leave(self, group: str, rank: int, *, failed: bool) -> None: ...


class Pulse:
    """One rank's beats. Training never waits for the watchdog, and goes on where it cannot be reached.

    Args:
        link: None lets the pulse go unheard.
        group: this group's number within its attempt.
        first_step: the first that this group trains, counted from 1.
        die: called where the watchdog found this rank stuck.
    """

    def __init__(
        self,
        link: Link | None,
        *,
        group: str,
        rank: int,
        world_size: int,
        first_step: int,
        step_timeout_s: float,
        die: Callable[[], None],
    ) -> None:
        self._link, self._die = link, die
        self._group, self._rank, self._world_size = group, rank, world_size
        self._first_step, self._every_s = first_step, beat_s(step_timeout_s)
        self._place = Place(first_step, "starting", 0)
        self._warned = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(link,), name="pulse", daemon=True)
        if link is not None:
            self._thread.start()

    def at(self, step: int, phase: Phase) -> None:
        """The training loop enters ``phase`` of ``step``, counted from 1. No more than an assignment."""
        self._place = Place(step, phase, self._place.progress + 1)

    def close(self, *, failed: bool) -> None:
        self._closed.set()
        if self._link is not None:
            self._thread.join()
            self._try(self._link.leave, self._group, self._rank, failed=failed)

    def _run(self, link: Link) -> None:
        self._try(link.join, self._group, self._rank)
        place, since_s = self._place, time.monotonic()
        while not self._closed.is_set():
            if place is not self._place:
                place, since_s = self._place, time.monotonic()
            if self._try(link.beat, self._group, self._beat(link, place, time.monotonic() - since_s)):
                self._die()
                return
            self._closed.wait(self._every_s)

    def _beat(self, link: Link, place: Place, in_place_s: float) -> Beat:
        return Beat(
            rank=self._rank,
            world_size=self._world_size,
            pid=os.getpid(),
            node_id=link.node_id,
            place=place,
            in_place_s=in_place_s,
            warming_up=place.step == self._first_step,
        )

    def _try(self, call: Callable[..., Any], *args: Any, **fields: Any) -> Any:
        try:
            return call(*args, **fields)
        except OSError as e:
            if not self._warned:
                logger.warning("The watchdog cannot be reached; training goes on, and a hang may go unseen: %s", e)
            self._warned = True
            return None


@contextmanager
def beating(
    link: Link | None, *, group: str, rank: int, world_size: int, first_step: int, step_timeout_s: float
) -> Iterator[Pulse]:
    """This rank's pulse while its loop runs."""
    pulse = Pulse(
        link,
        group=group,
        rank=rank,
        world_size=world_size,
        first_step=first_step,
        step_timeout_s=step_timeout_s,
        die=dump_and_die,
    )
    try:
        yield pulse
    except BaseException:
        pulse.close(failed=True)
        raise
    pulse.close(failed=False)


def dump_and_die() -> None:
    """Write all threads' stacks to standard error, and end this process in a way that Ray sees."""
    os.write(2, f"Rank found stuck; the stacks of process {os.getpid()}:\n".encode())
    faulthandler.dump_traceback(file=2, all_threads=True)
    os.kill(os.getpid(), signal.SIGKILL)


class RayLink:
    """The link of a Ray Train worker to the watchdog's actor."""

    def __init__(self, watchdog: Any) -> None:
        import ray

        context = ray.get_runtime_context()
        self.node_id: str = context.get_node_id()
        self._watchdog, self._worker = watchdog, context.current_actor

    def join(self, group: str, rank: int) -> None:
        self._ask(self._watchdog.join.remote(group, rank, self._worker))

    def beat(self, group: str, beat: Beat) -> bool:
        return bool(self._ask(self._watchdog.beat.remote(group, beat)))

    def leave(self, group: str, rank: int, *, failed: bool) -> None:
        self._ask(self._watchdog.leave.remote(group, rank, failed=failed))

    def _ask(self, answer: Any) -> Any:
        import ray

        try:
            return ray.get(answer, timeout=ANSWER_TIMEOUT_S)
        except ray.exceptions.RayError as e:
            raise ConnectionError(f"{type(e).__name__}: {e}") from e

"""Notices a rank that is frozen or stuck, names it, and has it killed, so that Ray Train restarts the group.

Ray Train itself sees a dead worker within seconds, a frozen one after ten minutes
(``RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S``), and one whose training thread is stuck never, since the worker's main
thread answers for it. So every rank tells where its loop stands (pulse.py) to one :class:`Watchdog`, an actor beside
the driver. A stuck rank learns it from the answer to its next beat, dumps its stacks and kills itself; a frozen one is
killed by the driver, through Ray. Either way Ray Train sees a dead worker, and restarts the group.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

logger = logging.getLogger(__name__)
MIN_BEAT_S, MAX_BEAT_S = 0.2, 5.0
BEATS_PER_TIMEOUT = 20
MISSED_BEATS = 2.5  # after which a rank is held to have fallen silent, of a group that is over anyway
WARM_UP_FACTOR = 3  # a group's first step compiles kernels, fills caches and connects the ranks
DEATH_NOTICE_S = 0.5  # Ray tells of a dead actor at once; a frozen one does not answer at all
ANSWER_TIMEOUT_S = 30.0  # for a call to the watchdog

Phase = Literal["starting", "waiting for data", "forward", "backward", "agreeing", "evaluating", "saving"]
"""What a training loop does. "agreeing" is the all-reduce at the end of a step, "evaluating" is entered for each pass
over the held-out split, and "saving" has time-outs of its own."""
Reason = Literal["silent", "stuck"]


def beat_s(step_timeout_s: float) -> float:
    """Seconds between two beats."""
    return min(MAX_BEAT_S, max(MIN_BEAT_S, step_timeout_s / BEATS_PER_TIMEOUT))


def silent_after_s(step_timeout_s: float) -> float:
    """Seconds without a beat after which a rank is silent: half the time-out, and never a mere late beat."""
    return max(step_timeout_s / 2, 5 * beat_s(step_timeout_s))


# -- deciding: pure, the clock is passed in


class Place(NamedTuple):
    """Where a training loop stands."""

    step: int
    """Counted from 1, as in the run's events."""
    phase: Phase
    progress: int
    """Phases entered so far. All ranks of a group enter the same ones in the same order, so the rank with the lowest
    is the one that the others wait for."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    world_size: int
    pid: int
    node_id: str
    place: Place
    in_place_s: float
    """By the rank's own clock."""
    warming_up: bool
    """In the group's first step."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A rank's newest beat and when it came, by the watchdog's clock."""

    beat: Beat
    at_s: float


@dataclass(frozen=True, kw_only=True)
class Hung:
    """A rank that will not go on."""

    beat: Beat
    reason: Reason
    seconds: float
    """Since its last beat, where silent, or since its last progress, where stuck."""


def judge(beats: Iterable[Seen], now_s: float, step_timeout_s: float) -> tuple[Hung, ...]:
    """Which ranks of one group are hung, by rank; empty where all is well.

    Silent ranks come first: the others wait for them. Else those that are furthest behind are stuck where they made no
    progress for ``step_timeout_s``. Whoever is ahead of them waits, and is never named. Both limits are three times as
    long in the group's first step.
    """
    seen = sorted(beats, key=lambda each: each.beat.rank)
    silent = [
        Hung(beat=each.beat, reason="silent", seconds=now_s - each.at_s)
        for each in seen
        if now_s - each.at_s >= _limit(each.beat, silent_after_s(step_timeout_s))
    ]
    if silent:
        return tuple(silent)
    lowest = min((each.beat.place.progress for each in seen), default=0)
    behind = [each for each in seen if each.beat.place.progress == lowest and each.beat.place.phase != "saving"]
    waited = [(each.beat, each.beat.in_place_s + now_s - each.at_s) for each in behind]
    return tuple(
        Hung(beat=beat, reason="stuck", seconds=seconds)
        for beat, seconds in waited
        if seconds >= _limit(beat, step_timeout_s)
    )


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A group that is over before its training was."""

    group: str
    rank: int | None
    """That fell silent first; None where none did so long before the others that it can be told."""
    place: Place
    """Of that rank, else of the one that was furthest."""
    ago_s: float
    """How long ago it fell silent."""


def lost_group(group: str, seen: Collection[Seen], now_s: float, step_timeout_s: float) -> Lost:
    """What is known of a group at the moment that it is over: of the ranks that did not leave it in peace."""
    first = min(seen, key=lambda each: each.at_s)
    if now_s - first.at_s > MISSED_BEATS * beat_s(step_timeout_s):
        return Lost(group=group, rank=first.beat.rank, place=first.beat.place, ago_s=now_s - first.at_s)
    # A rank that failed told so at once, and no other was missed before: whichever died, died just now.
    furthest = max((each.beat.place for each in seen), key=lambda place: place.progress)
    return Lost(group=group, rank=None, place=furthest, ago_s=0.0)


def _limit(beat: Beat, seconds: float) -> float:
    return seconds * WARM_UP_FACTOR if beat.warming_up else seconds


def describe(hung: tuple[Hung, ...]) -> str:
    """A verdict in one sentence. Pure."""
    first, world_size = hung[0], hung[0].beat.world_size
    ranks = ", ".join(f"{each.beat.rank} (pid {each.beat.pid} on node {each.beat.node_id[:8]})" for each in hung)
    who = f"rank {ranks} of {world_size}" if len(hung) == 1 else f"ranks {ranks} of {world_size}"
    where = f"{first.beat.place.phase}, step {first.beat.place.step}"
    if first.reason == "silent":
        return f"no sign of life from {who} for {first.seconds:.1f} s; last seen: {where}"
    together = "; all ranks wait there for each other" if len(hung) == world_size > 1 else ""
    return f"no progress of {who} for {first.seconds:.1f} s: {where}{together}"


class LastStep(NamedTuple):
    """The last change of step that a rank told of."""

    step: int
    """Counted from 1; 0 before any rank has begun."""
    ago_s: float
    """Since then, or since training was to begin."""


@dataclass
class _Group:
    """One start of the workers."""

    id: str = ""
    """Its number within the attempt."""
    seen: dict[int, Seen] = field(default_factory=dict)
    workers: dict[int, Any] = field(default_factory=dict)
    """Handles of Ray's actors, by rank."""
    condemned: dict[int, Reason] = field(default_factory=dict)
    """Ranks of which the driver has told. They learn it from the answer to their next beat, and end themselves."""


class Watchdog:
    """The beats of the group that trains now; those of a group that is over go unheard. Runs as a Ray actor."""

    def __init__(self, step_timeout_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._step_timeout_s, self._clock = step_timeout_s, clock
        self._group = _Group()
        self._over = {self._group.id}
        self._lost: list[tuple[float, Lost]] = []
        """With when each was noticed."""
        self._looked_s = clock()
        self._step, self._stepped_s = 0, clock()

    def join(self, group: str, rank: int, worker: Any) -> None:
        """A rank begins, of a new group or of the present one; its first beat follows."""
        if group in self._over:
            return
        if group != self._group.id:
            self._replace(_Group(group))
        self._group.workers[rank] = worker

    def beat(self, group: str, beat: Beat) -> bool:
        """Note a beat. Returns whether the rank has to end itself: it was found hung, and that has been told."""
        if group != self._group.id:
            return False
        before = self._group.seen.get(beat.rank)
        if before is not None and before.beat.place.step != beat.place.step:
            self._stepped_s = self._clock()
        self._step = beat.place.step
        self._group.seen[beat.rank] = Seen(beat=beat, at_s=self._clock())
        return beat.rank in self._group.condemned

    def last_step(self) -> LastStep:
        """When a rank last went from one step to another. A group that is restarted and comes no further makes none."""
        return LastStep(self._step, self._clock() - self._stepped_s)

    def condemn(self, group: str, ranks: dict[int, Reason]) -> None:
        """Have these ranks end themselves, and find them no more. Not done by :meth:`look`: the driver first checks and
        tells, and neither may meet a rank that is dead already.
        """
        if group == self._group.id:
            self._group.condemned |= ranks

    def leave(self, group: str, rank: int, *, failed: bool) -> None:
        """A rank's loop has ended. Where it failed its group is over: Ray Train ends the other ranks."""
        if failed:
            self.forget(group)
        elif group == self._group.id:
            self._group.seen.pop(rank, None)

    def forget(self, group: str) -> None:
        """Judge this group no more."""
        self._over.add(group)
        if group == self._group.id:
            self._replace(_Group())

    def _replace(self, group: _Group) -> None:
        """Begin another group. The one before is lost, unless all of its ranks have left it in peace."""
        self._over.add(self._group.id)
        if self._group.seen:
            now_s = self._clock()
            lost = lost_group(self._group.id, self._group.seen.values(), now_s, self._step_timeout_s)
            self._lost.append((now_s, lost))
        self._group = group

    def look(self) -> Found:
        """Who hangs and is not condemned yet, and which groups were lost since the last look."""
        now_s = self._clock()
        if now_s - self._looked_s > silent_after_s(self._step_timeout_s) - 2 * beat_s(self._step_timeout_s):
            # It is the one who looks that was frozen, not the ranks: their beats may lie here unread.
            self._group.seen = {rank: Seen(beat=seen.beat, at_s=now_s) for rank, seen in self._group.seen.items()}
        self._looked_s = now_s
        hung = [
            each
            for each in judge(self._group.seen.values(), now_s, self._step_timeout_s)
            if self._group.condemned.get(each.beat.rank) not in (each.reason, "silent")
        ]
        workers = tuple(self._group.workers[each.beat.rank] for each in hung)
        return Found(self._group.id, tuple(hung), workers, self._take_lost())

    def end(self) -> tuple[Lost, ...]:
        """The attempt's training is over. The groups that were lost and not told of yet."""
        self._replace(_Group())
        return self._take_lost()

    def _take_lost(self) -> tuple[Lost, ...]:
        now_s, lost, self._lost = self._clock(), self._lost, []
        return tuple(replace(each, ago_s=each.ago_s + now_s - noticed_s) for noticed_s, each in lost)


class Found(NamedTuple):
    """What one look came to."""

    group: str
    hung: tuple[Hung, ...]
    workers: tuple[Any, ...]
    """The hung ranks' actors, in the same order."""
    lost: tuple[Lost, ...] = ()


# -- on the driver


@contextmanager
def guarded(step_timeout_s: float, *, say: Callable[[str], None], note: Callable[..., None]) -> Iterator[Any]:
    """A watchdog for one attempt, on this node, with a thread that acts on what it finds. Yields the actor's handle.

    Args:
        say: told who hangs, in a sentence.
        note: takes the event's kind and fields.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    watchdog = ray.remote(num_cpus=0, scheduling_strategy=here)(Watchdog).remote(step_timeout_s)
    closed = threading.Event()
    thread = threading.Thread(
        target=_guard, args=(watchdog, beat_s(step_timeout_s), closed, say, note), name="watchdog", daemon=True
    )
    thread.start()
    try:
        yield watchdog
    finally:
        closed.set()
        thread.join()
        with suppress(ray.exceptions.RayError):
            _note_lost(ray.get(watchdog.end.remote(), timeout=ANSWER_TIMEOUT_S), note)
        ray.kill(watchdog)


def _guard(
    watchdog: Any, every_s: float, closed: threading.Event, say: Callable[[str], None], note: Callable[..., None]
) -> None:
    import ray

    warned = False
    while not closed.wait(every_s):
        try:
            found: Found = ray.get(watchdog.look.remote(), timeout=ANSWER_TIMEOUT_S)
            _note_lost(found.lost, note)
            if found.hung:
                _act(watchdog, found, say, note)
        except ray.exceptions.RayError as e:
            if not warned:
                logger.warning("The watchdog cannot be reached; training goes on, and a hang may go unseen: %s", e)
            warned = True


def _note_lost(lost: tuple[Lost, ...], note: Callable[..., None]) -> None:
    """Record where groups were when they were lost: up to 10 s of their own events never reached the store."""
    for each in lost:
        note(
            "group_lost",
            group=int(each.group),
            rank=each.rank,
            step=each.place.step,
            phase=each.place.phase,
            heard_s=round(time.time() - each.ago_s, 3),
        )


def _act(watchdog: Any, found: Found, say: Callable[[str], None], note: Callable[..., None]) -> None:
    """Say who hangs, and kill who is frozen. Those that are stuck end themselves, once they may."""
    import ray

    if any(_is_dead(worker) for worker in found.workers):
        watchdog.forget.remote(found.group)  # it died, was drained or resized: Ray Train restarts its group
        return
    first = found.hung[0]
    say(f"hang: {describe(found.hung)}. The group is restarted.")
    note(
        "hang",
        ranks=[each.beat.rank for each in found.hung],
        reason=first.reason,
        step=first.beat.place.step,
        phase=first.beat.place.phase,
        seconds=round(first.seconds, 1),
    )
    for hung, worker in zip(found.hung, found.workers, strict=True):
        if hung.reason == "silent":
            # Ray declares it dead at once, and its raylet sends the SIGKILL some seconds later.
            ray.kill(worker)
    condemned = watchdog.condemn.remote(found.group, {each.beat.rank: each.reason for each in found.hung})
    ray.get(condemned, timeout=ANSWER_TIMEOUT_S)


def _is_dead(worker: Any) -> bool:
    """Whether Ray knows this actor as dead. One that is frozen or stuck is not."""
    import ray

    answered, _ = ray.wait([worker.__ray_ready__.remote()], timeout=DEATH_NOTICE_S)
    try:
        ray.get(answered)
    except ray.exceptions.RayActorError:
        return True
    return False

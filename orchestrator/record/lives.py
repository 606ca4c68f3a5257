"""From when to when each attempt lived, and what its driver did meanwhile. Pure.

Clocks of several hosts differ. An attempt's life is told by its driver's; its workers' events are moved as a whole to
where they fit into the stage that they belong to, so that their distances stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

from orchestrator.record.groups import WORKER_KINDS, Group, groups_of, time_of
from orchestrator.record.model import AttemptRecord, Event, RunRecord

ALIVE_TIMEOUTS = 3.0
"""An attempt without an end that was heard of so many ``train.step_timeout`` ago still goes on: the watchdog waits no
longer, even for a group's first step."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage, up to when the next one began or the attempt ended."""

    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Life:
    """One attempt, from its claim to its end, to its last sign of life, or to the claim that fenced it."""

    attempt: int
    job: str
    start_s: float
    end_s: float
    goes_on: bool
    end: str
    """How it ended, in words."""
    stages: tuple[Stage, ...]
    groups: tuple[Group, ...]


def lives_of(record: RunRecord) -> list[Life]:
    """The attempts, one after the other: no life reaches into the next."""
    by_attempt: dict[int, list[Event]] = {attempt.number: [] for attempt in record.attempts}
    for event in record.events:
        by_attempt.get(event["attempt"], []).append(event)
    lives: list[Life] = []
    claims_s: list[float] = []
    for attempt in record.attempts:
        claims_s.append(max([attempt.claimed_s, *claims_s[-1:]]))
    for index, attempt in enumerate(record.attempts):
        is_last = index + 1 == len(record.attempts)
        until_s = math.inf if is_last else claims_s[index + 1]
        lives.append(_life(attempt, by_attempt[attempt.number], record, claims_s[index], until_s, is_last=is_last))
    return lives


def _life(
    attempt: AttemptRecord, events: Sequence[Event], record: RunRecord, start_s: float, until_s: float, *, is_last: bool
) -> Life:
    driver = [event for event in events if event["kind"] not in WORKER_KINDS and event["time_s"] <= until_s]
    workers = [event for event in events if event["kind"] in WORKER_KINDS]
    shift_s = _shift_s(driver, workers)
    if shift_s:
        workers = [_moved(event, shift_s) for event in workers]
    workers = [event for event in workers if event["time_s"] <= until_s]
    heard_s = max([start_s, *(time_of(event, "heard_s") for event in [*driver, *workers])])
    has_ended = not is_last or attempt.ended_s is not None or record.outcome is not None
    step_timeout_s = float(record.spec.get("spec", {}).get("train", {}).get("step_timeout", 600.0))
    goes_on = not has_ended and record.read_s - heard_s <= ALIVE_TIMEOUTS * step_timeout_s
    end_s = max(record.read_s, heard_s) if goes_on else _end_s(attempt, heard_s, record, is_last=is_last)
    end_s = min(max(end_s, start_s), until_s)
    ordered = sorted([*driver, *workers], key=lambda event: float(event["time_s"]))
    return Life(
        attempt=attempt.number,
        job=attempt.job,
        start_s=start_s,
        end_s=end_s,
        goes_on=goes_on,
        end=_in_words(attempt),
        stages=tuple(_stages(driver, workers, end_s)),
        groups=tuple(groups_of(attempt.number, ordered)),
    )


def _end_s(attempt: AttemptRecord, heard_s: float, record: RunRecord, *, is_last: bool) -> float:
    """When an attempt ended: by its own word, by the outcome, or when it was last heard of."""
    if attempt.ended_s is not None:
        return attempt.ended_s
    if is_last and record.outcome is not None:
        return float(record.outcome["ended_s"])
    return heard_s


def _shift_s(driver: Sequence[Event], workers: Sequence[Event]) -> float:
    """Seconds to move the workers' events by, so that they lie within the stages in which they were made."""
    trains = [float(event["time_s"]) for event in driver if event.get("stage") == "train"]
    starts = [event["time_s"] for event in driver if event["kind"] == "stage_started" and event["stage"] == "train"]
    if not workers or not starts:
        return 0.0
    too_early_s = float(min(starts)) - time_of(workers[0], "started_s")
    too_late_s = float(workers[-1]["time_s"]) - max(trains)
    if too_early_s > 0:
        return too_early_s
    has_ended = any(event["kind"] == "stage_done" and event["stage"] == "train" for event in driver)
    return -too_late_s if has_ended and too_late_s > 0 else 0.0


def _moved(event: Event, by_s: float) -> Event:
    moved = dict(event)
    moved |= {name: float(event[name]) + by_s for name in ("time_s", "started_s") if name in event}
    return moved


def _stages(driver: Sequence[Event], workers: Sequence[Event], end_s: float) -> list[Stage]:
    started = [(str(event["stage"]), float(event["time_s"])) for event in driver if event["kind"] == "stage_started"]
    if workers and not any(name == "train" for name, _ in started):  # whoever wrote it lost some events
        started = sorted([*started, ("train", time_of(workers[0], "started_s"))], key=itemgetter(1))
    return [
        Stage(name=name, start_s=time_s, end_s=until_s)
        for (name, time_s), (_, until_s) in pairwise([*started, ("", end_s)])
    ]


def _in_words(attempt: AttemptRecord) -> str:
    if not attempt.state:
        return "the attempt before died without a word"
    return f"the attempt before {attempt.state}" + (f": {attempt.reason}" if attempt.reason else "")

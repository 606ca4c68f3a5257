"""Where a run's time went: every second of it, and every worker-second, in exactly one part. Pure.

docs/record.md says what each part holds and how it is found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any, get_args

from orchestrator.record.groups import Group
from orchestrator.record.lives import Life, Stage, lives_of
from orchestrator.record.model import RunRecord
from orchestrator.record.peak import peak_flops
from orchestrator.record.pieces import Part, Rollbacks, pieces_of

__all__ = ["PARTS", "Goodput", "Part", "Restart", "Segment", "account"]

PARTS: tuple[Part, ...] = get_args(Part)
NUM_GRAINS = 2000
"""Steps shorter together than this fraction of the run share one set of segments, so that a run of months has few."""
HOUR_S = 3600.0
_STAGES: dict[str, Part] = {
    "base": "preparing",
    "prepare": "preparing",
    "train": "starting",
    "export": "exporting",
    "evaluate": "evaluating",
    "gate": "exporting",
    "release": "exporting",
}
_UNHELD: tuple[Part, ...] = ("queued", "idle")
_TRAINING: tuple[Part, ...] = ("computing", "waiting for data", "saving")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of time that went to one part. Times are seconds since 1970."""

    start_s: float
    end_s: float
    part: Part
    workers: int
    """That the run held: none while it was queued or idle."""
    attempt: int = 0
    """0 while there was none."""
    group: int = 0
    """Within the attempt; 0 where no group trained."""

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, kw_only=True)
class Restart:
    """A group of workers that trained on where another had been."""

    time_s: float
    """When it began to train."""
    attempt: int
    group: int
    reason: str
    """What ended the group before."""
    lost_steps: int
    """That the group before had done beyond the checkpoint that this one resumed."""
    lost_s: float
    """Wall time of what was lost with them: also of steps that were not finished, and of a hang until it was found."""


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """A run's account."""

    segments: tuple[Segment, ...]
    """One after the other, without a gap."""
    start_s: float
    """The first submission; where there is none, the first claim."""
    end_s: float
    """The end of the last attempt; where the run goes on, when its record was read."""
    wall_s: float
    seconds: dict[Part, float]
    worker_seconds: dict[Part, float]
    """While the run was queued or idle, of as many workers as it asks for at least, which it did not have."""
    goodput: float
    """Computing that counts, as a share of all worker-seconds."""
    gpu_hours: float
    cpu_hours: float
    """Of workers that were held; the head is not among them."""
    restarts: tuple[Restart, ...]
    tokens_per_s: float
    """Tokens of steps that count, over the time in which groups computed, waited for data or saved."""
    mfu: float | None
    """Model FLOPs utilization in the same time; None where the model's FLOPs or a device's peak are not known."""


def account(record: RunRecord) -> Goodput:
    """A run's account, from the first submission to its end, or to now where it goes on."""
    lives, resources = lives_of(record), _resources(record)
    planned = int(resources.get("workers", {}).get("min", 1))
    groups = [group for life in lives for group in life.groups]
    start_s, end_s = _bounds(record, lives)
    marks = _marks(record, lives, planned, grain_s=(end_s - start_s) / NUM_GRAINS)
    cut = list(_segments(marks, start_s, end_s))
    segments = tuple(_joined(segment for segment, _ in cut))
    seconds = {part: math.fsum(each.seconds for each in segments if each.part == part) for part in PARTS}
    worker_seconds = {
        part: math.fsum(
            each.seconds * (planned if part in _UNHELD else each.workers) for each in segments if each.part == part
        )
        for part in PARTS
    }
    held_hours = math.fsum(each.seconds * each.workers for each in segments) / HOUR_S
    all_worker_seconds = math.fsum(worker_seconds.values())
    tokens_per_s, mfu = _throughput(groups, segments)
    return Goodput(
        segments=segments,
        start_s=start_s,
        end_s=end_s,
        wall_s=math.fsum(seconds.values()),
        seconds=seconds,
        worker_seconds=worker_seconds,
        goodput=worker_seconds["computing"] / all_worker_seconds if all_worker_seconds else 0.0,
        gpu_hours=held_hours if resources.get("gpu") else 0.0,
        cpu_hours=held_hours * int(resources.get("cpus_per_worker", 1)),
        restarts=tuple(_restarts(lives, groups, cut)),
        tokens_per_s=tokens_per_s,
        mfu=mfu,
    )


def _resources(record: RunRecord) -> dict[str, Any]:
    found: dict[str, Any] = record.spec.get("spec", {}).get("resources", {})
    return found


def _bounds(record: RunRecord, lives: Sequence[Life]) -> tuple[float, float]:
    submitted_s = [each.submitted_s for each in record.submissions]
    begun_s = [*submitted_s[:1], *(life.start_s for life in lives[:1])]
    if not begun_s:
        return record.read_s, record.read_s
    is_waiting = record.outcome is None and bool(submitted_s) and (not lives or submitted_s[-1] > lives[-1].end_s)
    end_s = record.read_s if is_waiting else lives[-1].end_s if lives else begun_s[0]
    return min(begun_s), max(end_s, *begun_s)


# -- marks: from when on which part


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """From ``time_s`` on, until the next mark, the run's time goes to ``part``."""

    time_s: float
    part: Part
    workers: int = 0
    attempt: int = 0
    group: int = 0
    lost_to: int | None = None


def _marks(record: RunRecord, lives: Sequence[Life], planned: int, *, grain_s: float) -> Iterator[_Mark]:
    """In the order in which things came about; times of several clocks may run backward a little."""
    rollbacks, index = Rollbacks([group for life in lives for group in life.groups]), 0
    submitted_s = [each.submitted_s for each in record.submissions]
    yield _Mark(time_s=-math.inf, part="queued")
    for before, life in pairwise([None, *lives]):
        assert life is not None
        if before is not None:
            yield from _between(before, life, submitted_s)
        yield from _of_life(life, index, rollbacks, planned, grain_s)
        index += len(life.groups)
    if lives:
        yield _Mark(time_s=lives[-1].end_s, part="idle")
        yield from (_Mark(time_s=time_s, part="queued") for time_s in submitted_s if time_s > lives[-1].end_s)


def _between(before: Life, life: Life, submitted_s: Sequence[float]) -> Iterator[_Mark]:
    """From one attempt to the next: idle until somebody submits the run again; a job that is started again by what
    runs it, as KubeRay does, was never idle."""
    yield _Mark(time_s=before.end_s, part="queued" if life.job and life.job == before.job else "idle")
    again_s = next((time_s for time_s in submitted_s if before.end_s <= time_s <= life.start_s), None)
    if again_s is not None:
        yield _Mark(time_s=again_s, part="queued")


def _of_life(life: Life, index: int, rollbacks: Rollbacks, planned: int, grain_s: float) -> Iterator[_Mark]:
    """Marks of one attempt, whose first group is group ``index`` of the run."""
    held = life.groups[0].world_size if life.groups else planned
    yield _Mark(time_s=life.start_s, part="starting", workers=held, attempt=life.attempt)
    trains = [stage for stage in life.stages if stage.name == "train"]
    for stage in life.stages:
        part = _STAGES.get(stage.name, "exporting")
        yield _Mark(time_s=stage.start_s, part=part, workers=held, attempt=life.attempt)
        if stage.name != "train":
            continue
        for offset, group in enumerate(life.groups):
            if _stage_of(group, trains) is stage:
                held = group.world_size
                is_alive = life.goes_on and group is life.groups[-1] and not group.is_lost
                for mark in _of_group(group, index + offset, rollbacks, grain_s, is_alive=is_alive):
                    time_s = min(max(mark.time_s, stage.start_s), stage.end_s)
                    yield replace(mark, time_s=time_s, workers=held, attempt=life.attempt)


def _stage_of(group: Group, trains: Sequence[Stage]) -> Stage:
    """The stage that a group trained in: an attempt may train once more where its last checkpoint was damaged."""
    begun = [stage for stage in trains if stage.start_s <= group.trains_s]
    return begun[-1] if begun else trains[0]


def _of_group(group: Group, index: int, rollbacks: Rollbacks, grain_s: float, *, is_alive: bool) -> Iterator[_Mark]:
    yield _Mark(time_s=group.trains_s - group.load_s, part="resuming")
    for piece in pieces_of(group, index, rollbacks, grain_s=grain_s, is_alive=is_alive):
        yield _Mark(time_s=piece.start_s, part=piece.part, group=group.number, lost_to=piece.lost_to)
    if group.done_s is not None:
        yield _Mark(time_s=group.done_s, part="exporting")
    elif not is_alive:
        yield _Mark(time_s=group.died_s, part="resuming")


# -- segments


def _segments(marks: Iterable[_Mark], start_s: float, end_s: float) -> Iterator[tuple[Segment, int | None]]:
    """Marks as stretches of time, each with the group that it was lost to. No clock may turn time back."""
    now_s = start_s
    last = _Mark(time_s=math.inf, part="idle")
    for mark, following in pairwise(chain(marks, [last])):
        until_s = min(max(following.time_s, now_s), end_s)
        if until_s > now_s:
            segment = Segment(
                start_s=now_s,
                end_s=until_s,
                part=mark.part,
                workers=mark.workers,
                attempt=mark.attempt,
                group=mark.group,
            )
            yield segment, mark.lost_to
            now_s = until_s


def _joined(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The same, neighbours of one kind as one."""
    held: Segment | None = None
    for segment in segments:
        if held is not None and replace(held, start_s=segment.start_s, end_s=segment.end_s) == segment:
            held = replace(held, end_s=segment.end_s)
            continue
        if held is not None:
            yield held
        held = segment
    if held is not None:
        yield held


# -- what it came to


def _restarts(
    lives: Sequence[Life], groups: Sequence[Group], cut: Sequence[tuple[Segment, int | None]]
) -> Iterator[Restart]:
    ends = {life.attempt: life.end for life in lives}
    lost_s: dict[int, float] = {}
    for segment, lost_to in cut:
        if lost_to is not None:
            lost_s[lost_to] = lost_s.get(lost_to, 0.0) + segment.seconds
    for index, (before, group) in enumerate(pairwise(groups), start=1):
        same = before.attempt == group.attempt
        yield Restart(
            time_s=group.trains_s,
            attempt=group.attempt,
            group=group.number,
            reason=before.end or ("its workers died" if same else ends[before.attempt]),
            lost_steps=max(0, before.reached - group.first_step),
            lost_s=lost_s.get(index, 0.0),
        )


def _throughput(groups: Sequence[Group], segments: Sequence[Segment]) -> tuple[float, float | None]:
    """Tokens per second, and the model FLOPs utilization."""
    rollbacks = Rollbacks(groups)
    trained_s: dict[tuple[int, int], float] = {}
    for segment in segments:
        if segment.group and segment.part in _TRAINING:
            key = segment.attempt, segment.group
            trained_s[key] = trained_s.get(key, 0.0) + segment.seconds
    tokens, flops, possible = 0.0, 0.0, 0.0
    is_known = True
    for index, group in enumerate(groups):
        kept = [each.step for each in group.steps if rollbacks.lost_to(index, each.step) is None]
        its_tokens = (max([group.first_step, *kept]) - group.first_step) * group.tokens_per_step
        peak, tokens = peak_flops(group.device), tokens + its_tokens
        if group.flops_per_token is None or peak is None:
            is_known = False
            continue
        flops += its_tokens * group.flops_per_token
        possible += trained_s.get((group.attempt, group.number), 0.0) * group.world_size * peak
    whole_s = math.fsum(trained_s.values())
    return tokens / whole_s if whole_s else 0.0, flops / possible if is_known and possible else None

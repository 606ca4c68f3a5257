"""The attempts of a run and what went wrong on the way, side by side in time. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.record.goodput import Goodput, Segment
from orchestrator.record.model import Event, RunRecord
from orchestrator.record.report import words
from orchestrator.record.report.model import Incident, Row, Stretch

NUM_CELLS = 480
"""Of a bar: each shows what took the most of its time, so a bar of any length is small."""
MAX_ROWS = 20
MAX_INCIDENTS = 60


def rows(record: RunRecord, goodput: Goodput) -> tuple[Row, ...]:
    """A bar for each attempt, and one for when there was none; of many attempts the last ones."""
    by_attempt: dict[int, list[Segment]] = defaultdict(list)
    for segment in goodput.segments:
        by_attempt[segment.attempt or 0].append(segment)
    states = {attempt.number: attempt.state for attempt in record.attempts}
    found = [
        Row(
            label=f"Attempt {number}" if number else "No attempt",
            note=_note(by_attempt[number], states.get(number, "")),
            stretches=tuple(stretches(by_attempt[number], start_s=goodput.start_s, end_s=goodput.end_s)),
        )
        for number in sorted(by_attempt)
    ]
    return tuple(found[-MAX_ROWS:])


def stretches(segments: Iterable[Segment], *, start_s: float, end_s: float) -> Iterator[Stretch]:
    """Segments as pieces of a bar of :data:`NUM_CELLS` cells, neighbours of one part together."""
    cells = _cells(segments, start_s, (end_s - start_s) / NUM_CELLS or 1.0)
    filled = {index: max(parts, key=parts.__getitem__) for index, parts in cells.items()}
    first = 0
    while first < NUM_CELLS:
        part, last = filled.get(first), first
        while last < NUM_CELLS and filled.get(last) == part:
            last += 1
        if part is not None:
            yield Stretch(start=first / NUM_CELLS, length=(last - first) / NUM_CELLS, part=part)
        first = last


def _cells(segments: Iterable[Segment], start_s: float, cell_s: float) -> Mapping[int, Mapping[str, float]]:
    """Of each cell, the seconds of each part in it."""
    cells: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for segment in segments:
        begin, end = (segment.start_s - start_s) / cell_s, (segment.end_s - start_s) / cell_s
        for index in range(max(0, int(begin)), min(NUM_CELLS, int(end) + 1)):
            seconds = min(end, index + 1) - max(begin, index)
            if seconds > 0:
                cells[index][str(segment.part)] += seconds
    return cells


def _note(segments: Sequence[Segment], state: str) -> str:
    sizes: list[int] = []
    for segment in segments:
        if segment.workers and str(segment.part) == "computing" and sizes[-1:] != [segment.workers]:
            sizes.append(segment.workers)
    workers = ", then ".join(map(str, sizes[:4])) + (" …" if len(sizes) > 4 else "")
    plural = "worker" if sizes == [1] else "workers"
    return ", ".join(part for part in (f"{workers} {plural}" if sizes else "", state) if part)


def incidents(record: RunRecord, goodput: Goodput) -> tuple[Incident, ...]:
    """Restarts and whatever else was noted, in the order of time; of many the last ones."""
    found = [
        Incident(
            time_s=restart.time_s,
            title="Went on in a new attempt" if restart.group == 1 else "Workers started again",
            reason=restart.reason,
            cost=_cost(restart.lost_steps, restart.lost_s),
            attempt=restart.attempt,
            is_restart=True,
        )
        for restart in goodput.restarts
    ]
    found += [incident for event in record.events for incident in _noted(event)]
    return tuple(sorted(found, key=lambda each: each.time_s)[-MAX_INCIDENTS:])


def _cost(lost_steps: int, lost_s: float) -> str:
    steps = f"{words.times(lost_steps, 'step')} trained again" if lost_steps else "no step lost"
    return f"{steps}, {words.duration(lost_s)}" if lost_s else steps


def _noted(event: Event) -> Iterator[Incident]:
    """What an event tells of trouble, if anything. Hangs and deaths are told by the restart that follows."""
    fields: dict[str, Any] = {"time_s": event["time_s"], "attempt": event["attempt"]}
    kind = event["kind"]
    if kind == "preemption":
        yield Incident(title="Preemption announced", reason=f"nodes {', '.join(event.get('nodes', ()))}", **fields)
    elif kind == "checkpoint_failed":
        title = f"Checkpoint of step {event.get('step')} not saved"
        yield Incident(title=title, reason=str(event.get("error", "")), **fields)
    elif kind == "stopping":
        yield Incident(title="Asked to stop", reason=str(event.get("reason", "")), **fields)
    elif kind == "attempt_ended":
        yield Incident(title=f"Attempt {event['state']}", reason=str(event.get("reason", "")), **fields)

"""Loss and throughput of a run from its events. Pure.

A step that was lost and trained again counts as the last attempt trained it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.record.model import Event, RunRecord
from orchestrator.record.report.model import Curve
from orchestrator.record.report.series import MAX_BUCKETS, Line, Point, extremes, smoothed, smoothing_window

_MAX_LOOKS = 200
_LEAST_TO_ZOOM = 200
_ZOOM_FROM = 0.25


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def loss_curve(record: RunRecord) -> Curve:
    """Loss by step, with the looks at the held-out split."""
    kept: dict[int, Event] = {}
    for event in record.events_of("step"):
        standing = kept.get(event["step"])
        if standing is None or standing["attempt"] <= event["attempt"]:
            kept[event["step"]] = event
    points = [(float(step), loss) for step in sorted(kept) if (loss := number(kept[step].get("loss"))) is not None]
    seen = {event["step"]: loss for event in record.events_of("look") if (loss := number(event.get("eval_loss")))}
    looks = [(float(step), seen[step]) for step in sorted(seen)]
    resumed = [float(event["first_step"]) for event in list(record.events_of("training"))[1:]]
    return _curve([points], looks=looks, marks=resumed)


def throughput_curve(record: RunRecord, *, start_s: float) -> Curve:
    """Tokens per second over the seconds since ``start_s``; each group of workers has a line of its own."""
    lines: list[list[Point]] = [[]]
    marks: list[float] = []
    for event in record.events_of("training", "step"):
        if event["kind"] == "training":
            if lines[-1]:
                lines.append([])
            marks.append(event["time_s"] - start_s)
        elif (rate := number(event.get("tokens_per_s"))) is not None:
            lines[-1].append((event["time_s"] - start_s, rate))
    return _curve([line for line in lines if line], looks=(), marks=marks[1:])


def zoom_from(curve: Curve) -> int | None:
    """The step from which on a loss curve deserves a chart of its own; None where the whole shows as much."""
    if not curve.raw or curve.num_points < _LEAST_TO_ZOOM:
        return None
    first = int(curve.raw[-1][-1][0] * _ZOOM_FROM)
    rest = since(curve, first).raw
    return first if rest and _span(rest) < _span(curve.raw) / 3 else None


def since(curve: Curve, first: float) -> Curve:
    """What there is of a curve from ``first`` on."""

    def cut(lines: Iterable[Line]) -> tuple[Line, ...]:
        kept = (tuple(point for point in line if point[0] >= first) for line in lines)
        return tuple(line for line in kept if line)

    (looks,) = cut([curve.looks]) or ((),)
    marks = tuple(mark for mark in curve.marks if mark >= first)
    return replace(curve, raw=cut(curve.raw), smooth=cut(curve.smooth), looks=looks, marks=marks)


def _span(lines: Iterable[Line]) -> float:
    values = [y for line in lines for _, y in line]
    return max(values) - min(values)


def _curve(lines: Sequence[Sequence[Point]], *, looks: Sequence[Point], marks: Iterable[float]) -> Curve:
    num_points = sum(map(len, lines))
    window = smoothing_window(num_points)
    values = [y for line in lines for _, y in line]

    def thin(line: Sequence[Point]) -> Line:
        return extremes(line, max_buckets=max(8, round(MAX_BUCKETS * len(line) / max(1, num_points))))

    return Curve(
        raw=tuple(thin(line) for line in lines if line),
        smooth=tuple(smoothed(line, window=window) for line in lines if len(line) >= window),
        window=window,
        looks=extremes(looks, max_buckets=_MAX_LOOKS // 2),
        marks=tuple(marks)[-_MAX_LOOKS:],
        last=values[-1] if values else None,
        lowest=min(values, default=None),
        num_points=num_points,
    )

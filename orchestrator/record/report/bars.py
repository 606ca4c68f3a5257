"""Where the time went: one bar with its table, and the attempts side by side in time. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from orchestrator.record.goodput import Goodput, Part
from orchestrator.record.report import words
from orchestrator.record.report.chart import axis
from orchestrator.record.report.markup import Html, escaped, join, table, tag
from orchestrator.record.report.model import Incident, Report, Stretch
from orchestrator.record.report.series import time_ticks

PARTS: tuple[Part, ...] = (
    "computing",
    "evaluating",
    "exporting",
    "saving",
    "waiting for data",
    "preparing",
    "queued",
    "starting",
    "resuming",
    "lost to rollback",
    "idle",
)
"""In the order of the bar: what the run is for, what that needs, and what is lost."""
MEANING: dict[Part, str] = {
    "computing": "optimizer steps that count",
    "evaluating": "looks at the held-out split, and the evaluation of the exported model",
    "exporting": "the checkpoint becomes a servable model",
    "saving": "steps that wait for a checkpoint",
    "waiting for data": "steps that wait for samples",
    "preparing": "text becomes token shards",
    "queued": "no room on the cluster yet",
    "starting": "processes, the model, the first batch",
    "resuming": "reading the checkpoint to go on from",
    "lost to rollback": "steps that were trained again after a restart",
    "idle": "nobody worked on the run",
}
_LEAST_WITH_WORDS = 0.12
_LEAST_BETWEEN_FLAGS = 0.04


def part_class(part: str) -> str:
    return f"part p-{part.replace(' ', '-')}" if part in PARTS else "part p-idle"


def shares(goodput: Goodput) -> dict[Part, float]:
    """What each part took of the worker-seconds, in the order of :data:`PARTS`, without those that took no time."""
    whole = sum(goodput.worker_seconds.values()) or 1.0
    return {part: goodput.worker_seconds.get(part, 0.0) / whole for part in PARTS if goodput.seconds.get(part)}


def goodput_bar(report: Report) -> Html:
    """The parts of the worker time as one bar, and as a table with a small bar in each row."""
    goodput, found = report.goodput, shares(report.goodput)
    named = "; ".join(f"{part} {words.share(length)}" for part, length in found.items())
    bar = tag(
        "div",
        *(_piece(part, length) for part, length in found.items()),
        class_="bar tall",
        role="img",
        aria_label=f"Worker time by what it went to: {named}",
    )
    cost = report.cost
    rows = (
        (
            join([tag("i", class_=f"swatch {part_class(part)}"), tag("b", part), tag("small", MEANING[part])]),
            _meter(part, length),
            words.duration(goodput.seconds[part]),
            words.hours(goodput.worker_seconds[part] / words.HOUR_S),
            *([words.money(cost.by_part[part])] if cost is not None else []),
        )
        for part, length in found.items()
    )
    head = ("Went to", "Share", "Wall time", "Worker-hours", *([cost.currency] if cost is not None else []))
    return join([bar, table(head, rows, caption="Worker time by what it went to", class_="figures parts")])


def _meter(part: str, length: float) -> Html:
    filled = tag("i", class_=part_class(part), style=f"width:{100 * length:.2f}%")
    return tag("span", tag("span", filled), tag("b", words.share(length)), class_="meter")


def _piece(part: str, length: float) -> Html:
    text = tag("b", part) if length >= _LEAST_WITH_WORDS else None
    return tag("i", text, class_=part_class(part), style=f"width:{100 * length:.3f}%", title=part)


def time_line(report: Report) -> Html:
    """A row for each attempt, numbered flags where something happened, and the list of what that was."""
    start_s, wall_s = report.goodput.start_s, report.goodput.wall_s or 1.0
    flags = list(_flags([(each.time_s - start_s) / wall_s for each in report.incidents]))
    rows = (
        tag(
            "div",
            tag("span", tag("b", row.label), tag("small", row.note or None), class_="who"),
            _track(row.stretches, label=f"{row.label}: {_told(row.stretches, wall_s)}"),
            class_="row",
        )
        for row in report.rows
    )
    moments = axis([(tick.value / wall_s, tick.label) for tick in time_ticks(wall_s)], class_="x")
    return join(
        [
            tag(
                "div",
                tag("div", tag("div", *flags, class_="flags", aria_hidden="true"), class_="row") if flags else None,
                *rows,
                tag("div", moments, class_="row"),
                class_="timeline",
            ),
            _key(report),
            _incidents(report.incidents, start_s=start_s),
        ]
    )


def _flags(places: Sequence[float]) -> Iterator[Html]:
    """A number for each place in order of them; those that would lie on one another share a flag."""
    first = 0
    while first < len(places):
        last = first
        while last + 1 < len(places) and places[last + 1] - places[first] < _LEAST_BETWEEN_FLAGS:
            last += 1
        text = str(first + 1) if last == first else f"{first + 1}–{last + 1}"
        yield tag("span", text, style=f"left:{100 * min(1.0, max(0.0, places[first])):.2f}%")
        first = last + 1


def _track(stretches: Iterable[Stretch], *, label: str) -> Html:
    pieces = (
        tag(
            "i",
            class_=part_class(each.part),
            style=f"left:{100 * each.start:.2f}%;width:{100 * each.length:.2f}%",
            title=each.part,
        )
        for each in stretches
    )
    return tag("div", *pieces, class_="track", role="img", aria_label=label)


def _told(stretches: Iterable[Stretch], wall_s: float) -> str:
    """The longest pieces in words."""
    longest = sorted(stretches, key=lambda each: -each.length)[:6]
    return "; ".join(f"{each.part} for {words.duration(each.length * wall_s)}" for each in longest)


def _key(report: Report) -> Html:
    there = {each.part for row in report.rows for each in row.stretches}
    entries = (tag("span", tag("i", class_=f"swatch {part_class(part)}"), part) for part in PARTS if part in there)
    return tag("p", *entries, class_="key")


def _incidents(incidents: Iterable[Incident], *, start_s: float) -> Html:
    items = [
        tag(
            "li",
            tag("b", each.title),
            " ",
            tag("span", f"after {words.duration(max(0.0, each.time_s - start_s))}", class_="quiet"),
            tag("span", each.cost, class_="cost") if each.cost else None,
            tag("q", each.reason) if each.reason else None,
        )
        for each in incidents
    ]
    return tag("ol", *items, class_="incidents") if items else escaped("")

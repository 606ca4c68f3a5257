"""Line charts as inline SVG. Pure.

The SVG holds lines alone and stretches to any width; the labels are text beside it, so that they stay as large as the
rest of the page on a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.record.report.markup import Html, tag
from orchestrator.record.report.model import Curve
from orchestrator.record.report.series import Line, Tick, ticks

WIDTH, HEIGHT = 1000.0, 400.0
_AT_THE_END = 0.96  # a label there would stand out of the page


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a chart says in words."""

    key: str
    """An id on the page."""
    title: str
    description: str
    y_unit: str
    x_unit: str
    raw: str
    """What the thin line is."""
    mark: str
    """What a vertical line is."""


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Values to places in the SVG."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return WIDTH * (value - self.x_low) / (self.x_high - self.x_low or 1.0)

    def y(self, value: float) -> float:
        return HEIGHT * (1 - (value - self.y_low) / (self.y_high - self.y_low or 1.0))

    def path(self, line: Line) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in line)


def chart(
    curve: Curve,
    labels: Labels,
    *,
    x_ticks: Callable[[float, float], Sequence[Tick]],
    x_low: float = 0.0,
    x_high: float = 0.0,
    from_zero: bool,
) -> Html:
    """One chart with its legend.

    Args:
        x_ticks: the ticks of an x axis from and to its arguments.
        x_low: where the x axis begins.
        x_high: how far it goes at least.
        from_zero: whether the y axis begins there.
    """
    points = [point for line in (*curve.raw, curve.looks) for point in line]
    xs, values = [x for x, _ in points], [y for _, y in points]
    low, high = (0.0 if from_zero else min(values)), max(values)
    room = (high - low or abs(high) or 1.0) * 0.05
    scale = _Scale(
        x_low=x_low,
        x_high=max(x_high, *xs, 1e-9),
        y_low=low if from_zero else low - room,
        y_high=high + room,
    )
    y_ticks = ticks(scale.y_low, scale.y_high)
    return tag(
        "figure",
        tag(
            "div",
            tag("div", labels.y_unit, class_="unit"),
            _axis(y_ticks, place=lambda value: scale.y(value) / HEIGHT, class_="y"),
            _drawing(curve, labels, scale, y_ticks),
            _axis(x_ticks(scale.x_low, scale.x_high), place=lambda value: scale.x(value) / WIDTH, class_="x"),
            tag("div", labels.x_unit, class_="unit below"),
            class_="plot",
        ),
        _legend(curve, labels),
        class_="chart",
    )


def _drawing(curve: Curve, labels: Labels, scale: _Scale, y_ticks: Sequence[Tick]) -> Html:
    grid = "".join(f"M0 {scale.y(tick.value):.1f}H{WIDTH:g}" for tick in y_ticks)
    marks = "".join(f"M{scale.x(mark):.1f} 0V{HEIGHT:g}" for mark in curve.marks)
    raw_class = "raw" if curve.smooth else "line"
    title, description = f"{labels.key}-title", f"{labels.key}-desc"
    return tag(
        "svg",
        tag("title", labels.title, id=title),
        tag("desc", labels.description, id=description),
        tag("path", d=grid, class_="grid"),
        tag("path", d=marks, class_="mark") if marks else None,
        *(tag("path", d=scale.path(line), class_=raw_class) for line in curve.raw if len(line) > 1),
        *(tag("path", d=scale.path(line), class_="line") for line in curve.smooth),
        tag("path", d=scale.path(curve.looks), class_="look") if len(curve.looks) > 1 else None,
        # A line without length has round ends: a dot, which stays round however the SVG is stretched.
        *_dots([point for line in curve.raw if len(line) == 1 for point in line], scale, "dot"),
        *_dots(curve.looks, scale, "dot look"),
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        preserveAspectRatio="none",
        role="img",
        aria_labelledby=f"{title} {description}",
    )


def _dots(points: Sequence[tuple[float, float]], scale: _Scale, class_: str) -> list[Html]:
    if not points:
        return []
    return [tag("path", d="".join(f"M{scale.x(x):.1f} {scale.y(y):.1f}h0" for x, y in points), class_=class_)]


def _axis(found: Sequence[Tick], *, place: Callable[[float], float], class_: str) -> Html:
    return axis([(place(tick.value), tick.label) for tick in found], class_=class_)


def axis(labels: Sequence[tuple[float, str]], *, class_: str) -> Html:
    """Labels at places from 0 to 1, along the x axis or down the y axis."""
    side = "left" if class_ == "x" else "top"
    spans = []
    for index, (place, text) in enumerate(labels):
        edge = "first" if place < 1 - _AT_THE_END else "last" if place > _AT_THE_END else ""
        kind = " ".join(filter(None, (edge, "odd" if index % 2 else "")))
        spans.append(tag("span", text, style=f"{side}:{100 * place:.2f}%", class_=kind or None))
    return tag("div", *spans, class_=f"axis {class_}", aria_hidden="true")


def _legend(curve: Curve, labels: Labels) -> Html:
    smooth = f"mean of {curve.window} steps"
    entries = [
        ("raw" if curve.smooth else "line", labels.raw) if curve.raw else None,
        ("line", smooth) if curve.smooth else None,
        ("look", "held-out split") if curve.looks else None,
        ("mark", labels.mark) if curve.marks else None,
    ]
    swatch = {"raw": "M0 5L4 2L8 8L12 2L16 8L20 2L24 5", "line": "M0 5H24", "look": "M0 5H24", "mark": "M12 -2V12"}
    return tag(
        "figcaption",
        *(
            tag(
                "span",
                tag(
                    "svg",
                    tag("path", d=swatch[kind], class_=kind),
                    tag("path", d="M12 5h0", class_="dot look") if kind == "look" else None,
                    viewBox="0 0 24 10",
                    class_="swatch",
                    aria_hidden="true",
                ),
                text,
            )
            for kind, text in filter(None, entries)
        ),
    )

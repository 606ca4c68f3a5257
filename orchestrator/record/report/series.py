"""Curves of any length as lines of some hundred points, and the ticks of their axes. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Point = tuple[float, float]
Line = tuple[Point, ...]
Numbers = npt.NDArray[np.float64]

MAX_BUCKETS = 600
"""Of a line: each is drawn by its lowest and its highest point, so that no spike is lost."""
SMOOTH_SHARE = 0.02
"""Of a curve's points, over which each is averaged."""
_PREFIXES = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))
_TIME_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


@dataclass(frozen=True, kw_only=True)
class Tick:
    value: float
    label: str


def extremes(points: Sequence[Point], *, max_buckets: int = MAX_BUCKETS) -> Line:
    """At most ``2 * max_buckets`` of the points, among them the lowest and highest of each stretch."""
    if len(points) <= 2 * max_buckets:
        return tuple(points)
    values = np.asarray([y for _, y in points], dtype=np.float64)
    edges = np.linspace(0, len(points), max_buckets + 1).astype(np.int64)
    kept: set[int] = {0, len(points) - 1}
    for first, last in pairwise(edges):
        kept |= {int(first + values[first:last].argmin()), int(first + values[first:last].argmax())}
    return tuple(points[index] for index in sorted(kept))


def smoothed(points: Sequence[Point], *, window: int, max_points: int = MAX_BUCKETS // 2) -> Line:
    """A moving mean, which is centred, so that it does not lag. The window shrinks towards both ends."""
    if not points:
        return ()
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum([y for _, y in points])])
    where = np.unique(np.linspace(0, len(points) - 1, min(max_points, len(points))).astype(np.int64))
    reach = np.minimum(half, np.minimum(where, len(points) - 1 - where))
    means = (sums[where + reach + 1] - sums[where - reach]) / (2 * reach + 1)
    return tuple((points[at][0], float(mean)) for at, mean in zip(where, means, strict=True))


def smoothing_window(num_points: int) -> int:
    """An odd number of points, at least 5."""
    return max(5, 2 * int(num_points * SMOOTH_SHARE / 2) + 1)


def ticks(low: float, high: float, *, most: int = 6) -> list[Tick]:
    """At most ``most`` round numbers from ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten."""
    step = _round_step((high - low) / most)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    values = [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [Tick(value=value, label=_label(value, digits)) for value in values]


def time_ticks(seconds: float, *, most: int = 8) -> list[Tick]:
    """Round moments from 0 to ``seconds``."""
    steps = [step for step in _TIME_STEPS if seconds / step <= most]
    step = steps[0] if steps else 86400 * math.ceil(_round_step(seconds / 86400 / most))
    return [Tick(value=float(at), label=_moment(at)) for at in range(0, int(seconds) + 1, step)]


def _moment(seconds: int) -> str:
    """``40 s``, ``20 min``, ``1 h 30 min``, ``2 d 12 h``; 0 has no unit."""
    if seconds < 60:
        return f"{seconds} s" if seconds else "0"
    units = ((86400, "d"), (3600, "h"), (60, "min")) if seconds % 60 == 0 else ((60, "min"), (1, "s"))
    parts = []
    for size, name in units:
        if seconds >= size:
            parts.append(f"{seconds // size} {name}")
            seconds %= size
    return " ".join(parts)


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below ``least``."""
    if least <= 0 or not math.isfinite(least):
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= least * (1 - 1e-9))


def _label(value: float, digits: int) -> str:
    if abs(value) < 1e4:
        return f"{value:,.{digits}f}"
    size, prefix = next((size, prefix) for size, prefix in _PREFIXES if abs(value) >= size)
    return f"{value / size:g}{prefix}"

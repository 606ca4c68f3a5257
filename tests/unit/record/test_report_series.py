"""Curves as lines of some hundred points, ticks of axes, and numbers with their units."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.record.report import words
from orchestrator.record.report.curves import loss_curve, since, throughput_curve, zoom_from
from orchestrator.record.report.markup import escaped, join, tag
from orchestrator.record.report.series import extremes, smoothed, smoothing_window, ticks, time_ticks
from tests import record_examples as examples

numbers = st.floats(min_value=-1e6, max_value=1e6)


@given(st.lists(numbers, min_size=1, max_size=400), st.integers(8, 40))
def test_a_thinned_line_keeps_its_ends_and_extremes(values: list[float], max_buckets: int) -> None:
    points = [(float(index), value) for index, value in enumerate(values)]
    thin = extremes(points, max_buckets=max_buckets)
    assert len(thin) <= 2 * max_buckets + 2
    assert set(thin) <= set(points)
    assert list(thin) == sorted(thin)
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert {min(values), max(values)} <= {y for _, y in thin}


def test_a_single_spike_among_a_million_is_kept() -> None:
    points = [(float(index), 1.0) for index in range(1_000_000)]
    points[654_321] = (654_321.0, 9.0)
    assert (654_321.0, 9.0) in extremes(points)


@given(st.lists(numbers, min_size=5, max_size=200))
def test_a_smoothed_line_lies_within_and_at_the_mean_of_its_window(values: list[float]) -> None:
    points = [(float(index), value) for index, value in enumerate(values)]
    window = smoothing_window(len(points))
    line = smoothed(points, window=window)
    assert all(min(values) - 1e-3 <= y <= max(values) + 1e-3 for _, y in line)
    middle = len(points) // 2
    around = values[middle - window // 2 : middle + window // 2 + 1]
    assert dict(line)[float(middle)] == pytest.approx(sum(around) / len(around), abs=1e-6)


@given(numbers, st.floats(min_value=1e-6, max_value=1e6))
def test_ticks_lie_within_and_are_evenly_apart(low: float, span: float) -> None:
    found = [tick.value for tick in ticks(low, low + span)]
    assert 1 <= len(found) <= 7
    slack = 1e-6 * span + 4 * math.ulp(abs(low) + span)
    assert all(low - slack <= value <= low + span + slack for value in found)


@pytest.mark.parametrize(
    ("seconds", "labels"),
    [
        (0.4, ["0"]),
        (45.0, ["0", "10 s", "20 s", "30 s", "40 s"]),
        (5400.0, ["0", "20 min", "40 min", "1 h", "1 h 20 min"]),
        (20_000.0, ["0", "1 h", "2 h", "3 h", "4 h", "5 h"]),
        (864_000.0, ["0", "2 d", "4 d", "6 d", "8 d", "10 d"]),
    ],
)
def test_moments_are_round(seconds: float, labels: list[str]) -> None:
    assert [tick.label for tick in time_ticks(seconds)] == labels


def test_ticks_have_as_many_digits_as_they_need() -> None:
    assert [tick.label for tick in ticks(1.9, 3.1)] == ["2.0", "2.2", "2.4", "2.6", "2.8", "3.0"]
    assert [tick.label for tick in ticks(0, 31_000, most=4)] == ["0", "10 k", "20 k", "30 k"]


def test_steps_that_were_trained_again_count_once() -> None:
    record = examples.whole(total_steps=1000)
    curve = loss_curve(record)
    assert curve.num_points == 1000
    xs = [x for x, _ in curve.raw[0]]
    assert xs == sorted(set(xs))
    assert len(curve.marks) == 2
    assert len(throughput_curve(record, start_s=examples.START_S).raw) == 3, "a line for each group"


def test_a_loss_that_is_no_number_is_left_out() -> None:
    events = [{"time_s": 1.0 + n, "kind": "step", "attempt": 1, "step": n, "loss": x} for n, x in enumerate(LOSSES)]
    record = examples.begun()
    curve = loss_curve(type(record)(**{**vars(record), "events": tuple(events)}))
    assert curve.raw == (((0.0, 3.0), (3.0, 2.0)),)


LOSSES = [3.0, float("nan"), None, 2.0, float("inf")]


def test_the_end_of_a_curve_is_shown_larger_where_its_beginning_is_steep() -> None:
    curve = loss_curve(examples.whole())
    first = zoom_from(curve)
    assert first == 1500
    assert all(x >= first for line in since(curve, first).raw for x, _ in line)
    flat = random.Random(3)
    events = [
        {"time_s": float(n), "kind": "step", "attempt": 1, "step": n, "loss": 2 + flat.random()} for n in range(1000)
    ]
    record = examples.begun()
    assert zoom_from(loss_curve(type(record)(**{**vars(record), "events": tuple(events)}))) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"), (9.96, "10 s"), (59.7, "1 min 00 s"), (3599.6, "1 h 00 min"), (14_300, "3 h 58 min"),
        (300_000, "3 d 11 h"), (-3.0, "-3.0 s"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (9_999, "9,999"), (10_000, "10.0 k"), (31_234, "31.2 k"), (999_960, "1.00 M"), (3.93e8, "393 M")],
)
def test_counts(value: float, text: str) -> None:
    assert words.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.3127, "2.3127"), (59.128, "59.13"), (1_204_224, "1,204,224"), (3e-5, "3e-05"), (float("nan"), "nan")],
)
def test_figures(value: float, text: str) -> None:
    assert words.figure(value) == text


def test_shares_that_round_to_nothing_are_not_nothing() -> None:
    assert [words.share(value) for value in (0.0, 0.0001, 0.001, 0.858)] == ["0.0 %", "< 0.1 %", "0.1 %", "85.8 %"]


def test_signs_are_there() -> None:
    assert [words.signed(value) for value in (-0.0283, 0.5, 0.0)] == ["−0.0283", "+0.5000", "0"]


def test_markup_escapes_all_but_markup() -> None:
    inner = tag("b", "<i>", title='"x" & <y>', class_="a")
    assert inner == '<b title="&quot;x&quot; &amp; &lt;y&gt;" class="a">&lt;i&gt;</b>'
    assert join([inner, None, "&"]) == inner + "&amp;"
    assert escaped("a\x00\ud800\u202e") == "a��\u202e"

"""Who is hung, by states with made-up times; and a rank's pulse, which never holds up training."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from queue import SimpleQueue

import pytest

from workloads.pulse import Pulse, beating
from workloads.watchdog import (
    MAX_BEAT_S,
    MIN_BEAT_S,
    Beat,
    Phase,
    Place,
    Seen,
    Watchdog,
    beat_s,
    describe,
    judge,
    silent_after_s,
)

TIMEOUT_S = 100.0
NOW_S = 1000.0


def beat(
    rank: int = 0, *, step: int = 7, phase: Phase = "forward", progress: int = 50, in_place_s: float = 0.0
) -> Beat:
    return Beat(
        rank=rank,
        world_size=3,
        pid=100 + rank,
        node_id="abcdef0123456789",
        place=Place(step, phase, progress),
        in_place_s=in_place_s,
        warming_up=False,
    )


def judged(*beats: Beat, age_s: float = 1.0, timeout_s: float = TIMEOUT_S) -> list[tuple[int, str, float]]:
    seen = [Seen(beat=each, at_s=NOW_S - age_s) for each in beats]
    return [(each.beat.rank, each.reason, each.seconds) for each in judge(seen, NOW_S, timeout_s)]


# -- judge


def test_nobody_is_hung_where_nobody_trains() -> None:
    assert judge([], NOW_S, TIMEOUT_S) == ()


def test_ranks_that_go_on_are_let_alone() -> None:
    assert judged(beat(0, in_place_s=98.0), beat(1, progress=49, phase="agreeing", in_place_s=98.0)) == []


def test_a_rank_without_a_beat_for_half_the_timeout_is_silent() -> None:
    assert judged(beat(0), age_s=49.9) == []
    assert judged(beat(0), age_s=50.0) == [(0, "silent", 50.0)]


def test_silence_is_named_before_the_ranks_that_wait_for_it() -> None:
    seen = [
        Seen(beat=beat(0, phase="agreeing", in_place_s=200.0), at_s=NOW_S),
        Seen(beat=beat(1, progress=49), at_s=NOW_S - 60.0),
    ]
    assert [(each.beat.rank, each.reason) for each in judge(seen, NOW_S, TIMEOUT_S)] == [(1, "silent")]


def test_a_rank_that_is_silent_while_it_saves_is_named() -> None:
    assert judged(beat(0, phase="saving"), age_s=50.0) == [(0, "silent", 50.0)]


def test_of_ranks_that_stand_still_the_one_behind_is_stuck() -> None:
    waiting = [beat(rank, phase="agreeing", progress=50, in_place_s=150.0) for rank in (0, 2)]
    assert judged(*waiting, beat(1, phase="forward", progress=48, in_place_s=99.0)) == [(1, "stuck", 100.0)]


def test_the_ranks_ahead_are_never_named_however_long_they_wait() -> None:
    waiting = [beat(rank, phase="agreeing", in_place_s=5000.0) for rank in (0, 2)]
    assert judged(*waiting, beat(1, progress=48, in_place_s=98.0)) == []


def test_all_that_are_behind_are_named() -> None:
    behind = [beat(rank, progress=48, in_place_s=120.0) for rank in (2, 1)]
    assert [rank for rank, _, _ in judged(beat(0, in_place_s=120.0), *behind)] == [1, 2]


def test_a_save_may_take_its_time_and_so_may_those_who_wait_for_it() -> None:
    assert judged(beat(0, phase="saving", progress=51, in_place_s=900.0), beat(1, progress=52, in_place_s=899.0)) == []


def test_the_first_step_of_a_group_may_take_three_times_as_long() -> None:
    first = replace(beat(0, in_place_s=298.0), warming_up=True)
    assert judged(first) == []
    assert judged(replace(first, in_place_s=299.0)) == [(0, "stuck", 300.0)]
    assert judged(first, age_s=149.0) == [(0, "stuck", 447.0)]
    assert judged(replace(first, in_place_s=0.0), age_s=149.0) == []
    assert judged(replace(first, in_place_s=0.0), age_s=150.0) == [(0, "silent", 150.0)]


@pytest.mark.parametrize("timeout_s", [0.01, 1.0, 2.0, 10.0, 100.0, 600.0, 86_400.0])
def test_beats_are_frequent_enough_to_tell_silence_from_a_late_beat(timeout_s: float) -> None:
    assert MIN_BEAT_S <= beat_s(timeout_s) <= MAX_BEAT_S
    assert silent_after_s(timeout_s) >= 5 * beat_s(timeout_s)
    assert timeout_s < 2 or silent_after_s(timeout_s) == timeout_s / 2


# -- describe


def test_a_verdict_names_rank_process_node_step_and_phase() -> None:
    (hung,) = judge([Seen(beat=beat(1), at_s=NOW_S - 51.0)], NOW_S, TIMEOUT_S)
    assert describe((hung,)) == (
        "no sign of life from rank 1 (pid 101 on node abcdef01) of 3 for 51.0 s; last seen: forward, step 7"
    )


def test_a_verdict_on_all_says_that_they_wait_for_each_other() -> None:
    seen = [Seen(beat=beat(rank, phase="agreeing", in_place_s=100.0), at_s=NOW_S) for rank in range(3)]
    said = describe(judge(seen, NOW_S, TIMEOUT_S))
    assert said.startswith("no progress of ranks 0 (pid 100 on node abcdef01), 1 (pid 101")
    assert said.endswith("of 3 for 100.0 s: agreeing, step 7; all ranks wait there for each other")


# -- the watchdog, through states


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchdog(clock: Clock) -> Watchdog:
    """With ranks 0 and 1 of group ``a`` in it."""
    watchdog = Watchdog(TIMEOUT_S, clock=clock)
    for rank in (0, 1):
        watchdog.join("a", rank, f"worker {rank}")
        watchdog.beat("a", beat(rank))
    return watchdog


def pass_time(watchdog: Watchdog, clock: Clock, seconds: int, *beating_ranks: int) -> list[tuple[int, str]]:
    """Second by second: live ranks beat, and the driver looks and condemns. Returns who was found, in order."""
    found = []
    for _ in range(seconds):
        clock.now_s += 1.0
        for rank in beating_ranks:
            watchdog.beat("a", beat(rank, progress=50 + int(clock.now_s)))
        found += look_and_condemn(watchdog)
    return found


def look_and_condemn(watchdog: Watchdog) -> list[tuple[int, str]]:
    group, hung, *_ = watchdog.look()
    watchdog.condemn(group, {each.beat.rank: each.reason for each in hung})
    return [(each.beat.rank, each.reason) for each in hung]


def test_a_silent_rank_is_found_until_it_is_condemned(watchdog: Watchdog, clock: Clock) -> None:
    assert pass_time(watchdog, clock, 49, 0) == []
    clock.now_s += 1.0
    watchdog.beat("a", beat(0))
    for _ in range(2):
        group, hung, workers, _ = watchdog.look()
        assert (group, [each.beat.rank for each in hung], workers) == ("a", [1], ("worker 1",))
    assert look_and_condemn(watchdog) == [(1, "silent")]
    assert pass_time(watchdog, clock, 60, 0) == []


@pytest.mark.parametrize("timeout_s", [2.0, 10.0, 600.0])
def test_silence_is_found_within_the_timeout_at_the_drivers_own_pace(timeout_s: float, clock: Clock) -> None:
    watchdog = Watchdog(timeout_s, clock=clock)
    watchdog.join("a", 0, "worker 0")
    watchdog.beat("a", beat(0))
    while not watchdog.look().hung:
        clock.now_s += 1.1 * beat_s(timeout_s)
    assert silent_after_s(timeout_s) <= clock.now_s <= silent_after_s(timeout_s) + 2 * beat_s(timeout_s)


def test_a_stuck_rank_is_told_at_its_next_beat_and_the_others_are_not(watchdog: Watchdog, clock: Clock) -> None:
    waiting, stuck = beat(0, phase="agreeing", progress=52, in_place_s=99.0), beat(1, in_place_s=100.0)
    assert not watchdog.beat("a", waiting)
    assert not watchdog.beat("a", stuck)
    group, hung, *_ = watchdog.look()
    assert [each.beat.rank for each in hung] == [1]
    assert not watchdog.beat("a", stuck), "before the driver has told who hangs"
    watchdog.condemn(group, {1: "stuck"})
    assert not watchdog.beat("a", waiting)
    assert watchdog.beat("a", stuck)


def test_a_stuck_rank_that_does_not_end_itself_is_found_again_as_silent(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.beat("a", beat(1, progress=40, in_place_s=100.0))
    assert look_and_condemn(watchdog) == [(1, "stuck")]
    assert pass_time(watchdog, clock, 60, 0) == [(1, "silent")]


def test_a_new_group_is_not_taken_for_the_old_one(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.beat("a", beat(1, progress=40, in_place_s=100.0))
    assert look_and_condemn(watchdog) == [(1, "stuck")]
    watchdog.join("b", 1, "worker b1")
    watchdog.condemn("a", {1: "stuck"})
    assert not watchdog.beat("b", beat(1, progress=1))
    assert not watchdog.beat("a", beat(1, in_place_s=500.0)), "a beat from the old group"
    assert watchdog.look().hung == ()
    watchdog.join("a", 0, "worker 0")  # late, from the old group
    assert pass_time(watchdog, clock, 49) == []
    clock.now_s += 1.0
    group, hung, workers, _ = watchdog.look()
    assert (group, [(each.beat.rank, each.reason) for each in hung], workers) == ("b", [(1, "silent")], ("worker b1",))


def test_a_rank_that_has_left_is_not_missed(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.leave("a", 1, failed=False)
    assert pass_time(watchdog, clock, 200, 0) == []
    assert pass_time(watchdog, clock, 50) == [(0, "silent")], "the one that stayed is still watched"


def test_a_group_is_over_where_a_rank_failed_or_it_is_forgotten(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.leave("a", 1, failed=True)
    assert pass_time(watchdog, clock, 200) == []
    watchdog.join("b", 0, "worker b0")
    watchdog.beat("b", beat(0))
    watchdog.forget("b")
    assert pass_time(watchdog, clock, 200) == []


def test_a_lost_group_is_told_of_once_by_the_rank_that_fell_silent_first(watchdog: Watchdog, clock: Clock) -> None:
    clock.now_s = 13.0
    watchdog.beat("a", beat(0, step=8, phase="agreeing"))
    clock.now_s = 30.0
    watchdog.join("b", 0, "worker b0")
    clock.now_s = 32.0
    (lost,) = watchdog.look().lost
    assert (lost.group, lost.rank, lost.place[:2], lost.ago_s) == ("a", 1, (7, "forward"), 32.0)
    assert watchdog.look().lost == ()


def test_a_group_that_one_rank_takes_with_it_was_lost_when_the_others_failed(watchdog: Watchdog, clock: Clock) -> None:
    clock.now_s = 4.0
    watchdog.beat("a", beat(0, step=8, phase="agreeing", progress=60))
    clock.now_s = 6.0
    watchdog.leave("a", 0, failed=True)
    clock.now_s = 7.0
    (lost,) = watchdog.look().lost
    assert (lost.rank, lost.place[:2], lost.ago_s) == (None, (8, "agreeing"), 1.0)


@pytest.mark.parametrize("how", ["failed", "forgotten", "at the end"])
def test_a_group_may_be_lost_in_several_ways(watchdog: Watchdog, how: str) -> None:
    if how == "failed":
        watchdog.leave("a", 0, failed=True)
    if how == "forgotten":
        watchdog.forget("a")
    if how != "at the end":
        assert [each.group for each in watchdog.look().lost] == ["a"]
    assert [each.group for each in watchdog.end()] == (["a"] if how == "at the end" else [])


def test_a_group_that_left_in_peace_is_not_lost(watchdog: Watchdog) -> None:
    for rank in (0, 1):
        watchdog.leave("a", rank, failed=False)
    watchdog.join("b", 0, "worker b0")
    assert watchdog.look().lost == ()
    assert watchdog.end() == ()


def test_a_watchdog_that_was_frozen_itself_accuses_nobody(watchdog: Watchdog, clock: Clock) -> None:
    watchdog.look()
    clock.now_s += 300.0
    assert watchdog.look().hung == ()
    assert pass_time(watchdog, clock, 49, 0) == []
    assert pass_time(watchdog, clock, 2, 0) == [(1, "silent")]


# -- a rank's pulse


class Wire:
    """A link that keeps what came over it; ``told`` answers the beats."""

    node_id = "here"

    def __init__(self, *, told: bool = False, down: bool = False) -> None:
        self.told, self.down = told, down
        self.beats: SimpleQueue[Beat] = SimpleQueue()
        self.said: list[tuple[object, ...]] = []

    def join(self, group: str, rank: int) -> None:
        self.said.append(("join", group, rank))
        self._check()

    def beat(self, group: str, beat: Beat) -> bool:
        self.beats.put(beat)
        self._check()
        return self.told

    def leave(self, group: str, rank: int, *, failed: bool) -> None:
        self.said.append(("leave", group, rank, failed))
        self._check()

    def _check(self) -> None:
        if self.down:
            raise ConnectionError("no watchdog")

    def next(self, *, until: Phase) -> Beat:
        while True:
            found = self.beats.get(timeout=10.0)
            if found.place.phase == until:
                return found


def test_a_pulse_tells_where_the_loop_is() -> None:
    wire = Wire()
    with beating(wire, group="a", rank=1, world_size=2, first_step=5, step_timeout_s=1.0) as pulse:
        first = wire.next(until="starting")
        assert (first.rank, first.world_size, first.node_id) == (1, 2, "here")
        assert (first.place, first.warming_up) == (Place(5, "starting", 0), True)
        pulse.at(5, "forward")
        assert wire.next(until="forward").warming_up
        pulse.at(6, "agreeing")
        seen = wire.next(until="agreeing")
        assert (seen.place, seen.warming_up) == (Place(6, "agreeing", 2), False)
        assert wire.next(until="agreeing").in_place_s >= MIN_BEAT_S
    assert wire.said == [("join", "a", 1), ("leave", "a", 1, False)]


def test_a_phase_that_is_entered_again_is_progress() -> None:
    wire = Wire()
    with beating(wire, group="a", rank=0, world_size=1, first_step=1, step_timeout_s=1.0) as pulse:
        pulse.at(1, "forward")
        while wire.next(until="forward").in_place_s == 0.0:
            pass
        pulse.at(1, "forward")
        while (seen := wire.next(until="forward")).place.progress == 1:
            pass
        assert seen.in_place_s == pytest.approx(0.0, abs=MIN_BEAT_S / 2)


def test_a_loop_that_failed_says_so() -> None:
    wire = Wire()
    with (
        pytest.raises(ZeroDivisionError),
        beating(wire, group="a", rank=0, world_size=1, first_step=1, step_timeout_s=1.0),
    ):
        raise ZeroDivisionError
    assert wire.said[-1] == ("leave", "a", 0, True)


def test_a_rank_that_is_told_ends_itself() -> None:
    ended = threading.Event()
    pulse = Pulse(Wire(told=True), group="a", rank=0, world_size=1, first_step=1, step_timeout_s=1.0, die=ended.set)
    assert ended.wait(10.0)
    pulse.close(failed=False)


def test_a_watchdog_out_of_reach_is_one_warning_and_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    wire = Wire(down=True)
    with (
        caplog.at_level(logging.WARNING),
        beating(wire, group="a", rank=0, world_size=1, first_step=1, step_timeout_s=1.0) as pulse,
    ):
        pulse.at(1, "forward")
        for _ in range(3):
            wire.beats.get(timeout=10.0)
    assert [record.message for record in caplog.records] == [
        "The watchdog cannot be reached; training goes on, and a hang may go unseen: no watchdog"
    ]


def test_a_pulse_without_a_watchdog_costs_no_thread() -> None:
    before = threading.active_count()
    with beating(None, group="a", rank=0, world_size=1, first_step=1, step_timeout_s=1.0) as pulse:
        pulse.at(1, "forward")
        assert threading.active_count() == before

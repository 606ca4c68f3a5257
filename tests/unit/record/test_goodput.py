"""Where a run's time went: bad days by hand, second by second; and that any history adds up."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings

from orchestrator.record.goodput import PARTS, Goodput, Restart, account
from orchestrator.record.model import RunRecord
from tests.unit.record.histories import A100, attempt, event, histories, record, stages, step, training


def parts(found: Goodput) -> dict[str, float]:
    return {part: round(seconds, 6) for part, seconds in found.seconds.items() if seconds}


# -- a run through a bad day


def bad_day() -> RunRecord:
    """A worker is killed in step 11; the driver in step 13; both times training goes on from the step given."""
    first = [
        *stages(1, prepare=12.0, train=20.0),
        training(30.0),
        *(step(30.0 + number, number) for number in range(1, 11)),
        event(45.0, "group_lost", group=1, rank=1, step=11, phase="backward", heard_s=40.5),
        training(60.0, group=2, first_step=8, load_s=2.0),
        *(step(60.0 + number - 8, number) for number in range(9, 13)),
    ]
    second = [
        *stages(2, train=111.0, export=142.0, evaluate=150.0, gate=155.0, release=156.0),
        training(130.0, attempt=2, first_step=12, load_s=3.0),
        step(132.0, 13, attempt=2, data_wait_s=1.25),
        event(134.0, "look", 2, step=13, seconds=2.0),
        step(136.0, 14, attempt=2, data_wait_s=0.25, save_s=0.5),
        event(139.0, "training_done", 2, step=14, save_s=1.0, state="complete"),
    ]
    return record(
        events=first + second,
        attempts=[attempt(1, 10.0), attempt(2, 110.0, 160.0, "done")],
        submitted_s=(0.0, 100.0),
        ended_s=159.5,
    )


def test_every_second_of_a_bad_day() -> None:
    found = account(bad_day())
    assert parts(found) == {
        "queued": 10 + 10,
        "starting": (12 - 10) + (30 - 20) + (111 - 110) + (127 - 111),
        "preparing": 20 - 12,
        "resuming": (60 - 40.5) + 3,
        "computing": 8 + 4 + (2 - 1.25) + (4 - 2 - 0.5 - 0.25) + (3 - 1),
        "waiting for data": 1.25 + 0.25,
        "saving": 0.5 + 1.0,
        "evaluating": 2 + 5,
        "exporting": (150 - 139) + (160 - 155),
        "lost to rollback": 2 + 0.5,
        "idle": 100 - 64,
    }
    assert (found.start_s, found.end_s, found.wall_s) == (0.0, 160.0, 160.0)


def test_what_was_restarted_and_what_that_cost() -> None:
    assert account(bad_day()).restarts == (
        Restart(
            time_s=60.0, attempt=1, group=2, reason="rank 1 fell silent: backward, step 11", lost_steps=2, lost_s=2.5
        ),
        Restart(
            time_s=130.0,
            attempt=2,
            group=1,
            reason="the attempt before died without a word",
            lost_steps=0,
            lost_s=0.0,
        ),
    )


def test_worker_seconds_and_hours() -> None:
    found = account(bad_day())
    assert found.worker_seconds == {part: pytest.approx(2 * seconds) for part, seconds in found.seconds.items()}
    assert found.goodput == pytest.approx(found.seconds["computing"] / 160)
    held_s = 160 - found.seconds["queued"] - found.seconds["idle"]
    assert found.cpu_hours == pytest.approx(2 * held_s / 3600)
    assert found.gpu_hours == 0.0
    assert {each.workers for each in found.segments if each.part in ("queued", "idle")} == {0}


def test_the_time_before_an_attempt_belongs_to_none() -> None:
    found = account(bad_day())
    assert {each.attempt for each in found.segments if each.part in ("queued", "idle")} == {0}
    assert {(each.attempt, each.group) for each in found.segments if each.part == "computing"} == {
        (1, 1), (1, 2), (2, 1),
    }  # fmt: skip


def test_throughput_counts_what_was_kept() -> None:
    found = account(bad_day())
    trained_s = sum(found.seconds[part] for part in ("computing", "waiting for data", "saving"))
    assert found.tokens_per_s == pytest.approx(14 * 100 / trained_s)
    assert found.mfu is None


def test_mfu_of_known_devices() -> None:
    gpus: dict[str, Any] = {"device": A100, "flops_per_token": 312e12, "world_size": 4}
    events = [*stages(1, train=1.0), training(10.0, **gpus), *(step(10.0 + n, n) for n in range(1, 5))]
    done = event(14.0, "training_done", step=4, save_s=0.0, state="complete")
    found = account(record(events=[*events, done], attempts=[attempt(1, 0.0, 15.0, "done")], ended_s=15.0, gpu="A100"))
    assert found.mfu == pytest.approx(100 / 4)  # 100 tokens a second, each of which takes one GPU a second
    assert found.gpu_hours == pytest.approx(4 * 15 / 3600)


# -- what is known of runs that go on


def test_a_run_that_was_only_submitted_is_queued() -> None:
    found = account(record(events=[], attempts=[], submitted_s=(5.0,), read_s=65.0))
    assert (parts(found), found.worker_seconds["queued"]) == ({"queued": 60.0}, 120.0)


def test_nothing_at_all() -> None:
    found = account(record(events=[], attempts=[]))
    assert (found.segments, found.wall_s, found.goodput, found.tokens_per_s) == ((), 0.0, 0.0, 0.0)


def live(read_s: float) -> Goodput:
    events = [*stages(1, train=2.0), training(10.0), step(11.0, 1), step(12.0, 2)]
    return account(record(events=events, attempts=[attempt(1, 0.0)], read_s=read_s))


def test_a_run_that_was_just_heard_of_goes_on() -> None:
    assert parts(live(read_s=20.0)) == {"starting": 10.0, "computing": 10.0}


def test_a_run_that_fell_silent_long_ago_ended_then() -> None:
    assert parts(live(read_s=5000.0)) == {"starting": 10.0, "computing": 2.0}


def test_a_dead_group_whose_next_one_is_awaited_resumes() -> None:
    events = [*stages(1, train=2.0), training(10.0), step(11.0, 1)]
    lost = event(12.0, "group_lost", group=1, rank=0, step=2, phase="forward", heard_s=11.5)
    found = account(record(events=[*events, lost], attempts=[attempt(1, 0.0)], read_s=20.0))
    assert parts(found) == {"starting": 10.0, "computing": 1.0, "lost to rollback": 0.5, "resuming": 8.5}


def test_a_hang_that_nothing_follows_is_no_computing() -> None:
    events = [*stages(1, train=2.0), training(10.0), step(11.0, 1), step(12.0, 2)]
    lost = event(612.0, "group_lost", group=1, rank=0, step=3, phase="forward", heard_s=612.0)
    found = account(record(events=[*events, lost], attempts=[attempt(1, 0.0, 613.0, "failed")]))
    assert found.seconds["computing"] == pytest.approx(2.0)
    assert found.seconds["lost to rollback"] == pytest.approx(600.0)


def test_a_second_submission_waits_after_the_first_was_stopped() -> None:
    found = account(
        record(events=[], attempts=[attempt(1, 0.0, 10.0, "stopped")], submitted_s=(0.0, 30.0), read_s=50.0)
    )
    assert parts(found) == {"starting": 10.0, "idle": 20.0, "queued": 20.0}


def test_a_job_that_is_started_again_by_what_runs_it_is_queued_meanwhile() -> None:
    attempts = [attempt(1, 0.0, 10.0, "failed", job="a"), attempt(2, 25.0, 30.0, "failed", job="a")]
    assert parts(account(record(events=[], attempts=attempts))) == {"starting": 15.0, "queued": 15.0}


# -- what goes wrong with records


def test_a_rollback_over_several_groups_is_counted_once_for_each_that_lost() -> None:
    events = [
        *stages(1, train=0.0),
        training(10.0),
        *(step(10.0 + number, number) for number in range(1, 9)),
        training(30.0, group=2, first_step=8, load_s=1.0),
        step(31.0, 9),
        training(50.0, group=3, first_step=4, load_s=1.0),  # the checkpoint of step 8 is damaged
        step(51.0, 5),
    ]
    found = account(record(events=events, attempts=[attempt(1, 0.0, 52.0, "stopped")], read_s=60.0))
    assert [(each.lost_steps, each.lost_s) for each in found.restarts] == [(0, 0.0), (5, 5.0)]
    assert found.seconds["lost to rollback"] == 4 + 1


def test_steps_of_a_zombie_do_not_count() -> None:
    events = [*stages(1, train=0.0), training(10.0), step(11.0, 1), step(12.0, 2), step(12.5, 1), step(13.0, 3)]
    late = [step(25.0, 4), step(26.0, 5)]
    attempts = [attempt(1, 0.0), attempt(2, 20.0, 30.0, "stopped")]
    found = account(record(events=events + late, attempts=attempts))
    assert parts(found) == {"starting": 10.0 + 10.0, "computing": 3.0, "idle": 7.0}


@pytest.mark.parametrize("off_s", [-7.0, 7.0])
def test_workers_whose_clock_is_wrong_are_moved_as_a_whole(off_s: float) -> None:
    own = [training(10.0 + off_s), *(step(10.0 + off_s + number, number, data_wait_s=0.25) for number in range(1, 5))]
    own += [event(15.0 + off_s, "training_done", step=4, save_s=1.0, state="complete")]
    driver = [*stages(1, train=5.0, export=16.0), event(16.0, "stage_done", stage="train", seconds=11.0)]
    found = account(record(events=own + driver, attempts=[attempt(1, 0.0, 20.0, "done")], ended_s=20.0))
    assert found.seconds["computing"] == pytest.approx(3.0)
    assert found.seconds["waiting for data"] == pytest.approx(1.0)
    assert found.seconds["saving"] == pytest.approx(1.0)


def test_records_without_the_newer_fields_are_read() -> None:
    old = {"kind": "training", "attempt": 1, "time_s": 10.0, "first_step": 0, "total_steps": 9, "world_size": 2}
    plain = {"kind": "step", "attempt": 1, "time_s": 12.0, "step": 1, "tokens": 100, "step_s": 2.0}
    found = account(record(events=[*stages(1, train=5.0), old, plain], attempts=[attempt(1, 0.0)], read_s=13.0))
    assert parts(found) == {"starting": 10.0, "computing": 3.0}


def test_a_long_run_has_few_segments_and_exact_seconds() -> None:
    events = [*stages(1, train=0.0), training(10.0)]
    events += [step(10.0 + number, number, data_wait_s=0.125, save_s=0.0625) for number in range(1, 20_001)]
    found = account(record(events=events, attempts=[attempt(1, 0.0, 20_010.0, "stopped")]))
    assert found.seconds["waiting for data"] == pytest.approx(2500.0)
    assert found.seconds["saving"] == pytest.approx(1250.0)
    assert len(found.segments) < 8000


@settings(max_examples=400, deadline=None)
@given(history=histories())
def test_any_history_adds_up(history: RunRecord) -> None:
    found = account(history)
    assert tuple(found.seconds) == tuple(found.worker_seconds) == PARTS
    assert found.wall_s == pytest.approx(found.end_s - found.start_s, abs=1e-4)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)
    assert all(each.end_s > each.start_s for each in found.segments)
    assert all(before.end_s == after.start_s for before, after in pairwise(found.segments))
    if found.segments:
        assert (found.segments[0].start_s, found.segments[-1].end_s) == (found.start_s, found.end_s)
    assert 0.0 <= found.goodput <= 1.0
    assert all(restart.lost_s >= 0.0 and restart.lost_steps >= 0 for restart in found.restarts)
    lost_s = sum(restart.lost_s for restart in found.restarts)
    lost = [each for each in found.segments if each.part == "lost to rollback"]
    last = max(((each["attempt"], each["group"]) for each in history.events_of("training")), default=None)
    unfollowed_s = sum(each.seconds for each in lost if (each.attempt, each.group) == last)
    alone_s = found.seconds["lost to rollback"] - lost_s
    assert -1e-4 <= alone_s <= unfollowed_s + 1e-4, "what no restart made good was lost by the last group"

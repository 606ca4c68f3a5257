"""When a run's job tells its webhook: at the end, where nothing goes on by itself, and where no step is made."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from orchestrator.errors import AttemptFailed, AttemptsUsedUp, Displaced, Fenced, Interrupted, SpecError, StoreError
from orchestrator.release.outcome import Outcome
from orchestrator.spec import NotifySpec
from orchestrator.store import claim_attempt, layout
from orchestrator.store.attempts import Allowance, end_attempt
from tests.unit.fakes import MemoryStore
from tests.unit.workloads.test_watchdog import beat
from workloads.notices import Notices, is_the_last
from workloads.stalled import told_when_stalled
from workloads.watchdog import LastStep, Watchdog

RUN = "demo-1a2b3c4d"
UNSET = NotifySpec(webhook_env="HOOK")
"""Its variable is set nowhere, so that no test sends anything; what would be told is in the events."""


def notices(store: MemoryStore, noted: list[dict[str, Any]]) -> Notices:
    return Notices(
        settings=UNSET,
        store=store,
        run_id=RUN,
        note=lambda kind, **fields: noted.append({"kind": kind, **fields}),
        environ={},
    )


def allowance(*, most: int) -> Allowance:
    return Allowance(job_id="job", first=1, max_attempts=most)


def failed_attempt(store: MemoryStore) -> None:
    attempt = claim_attempt(store, RUN, facts={"job": "job"})
    end_attempt(store, attempt, state="failed", reason="it broke")


# -- whether another attempt follows


def test_a_job_that_is_not_started_again_ends_with_its_attempt(memory_store: MemoryStore) -> None:
    assert is_the_last(AttemptFailed("it broke"), memory_store, RUN, None)
    assert is_the_last(ValueError("it broke"), memory_store, RUN, None)


@pytest.mark.parametrize("error", [Interrupted("stop"), Displaced("pod"), Fenced("newer"), KeyboardInterrupt()])
def test_what_was_stopped_or_displaced_did_not_fail(memory_store: MemoryStore, error: BaseException) -> None:
    assert not is_the_last(error, memory_store, RUN, None)


def test_a_job_that_is_started_again_ends_with_its_last_attempt(memory_store: MemoryStore) -> None:
    failed_attempt(memory_store)
    assert not is_the_last(AttemptFailed("it broke"), memory_store, RUN, allowance(most=2))
    failed_attempt(memory_store)
    assert is_the_last(AttemptFailed("it broke"), memory_store, RUN, allowance(most=2))


def test_nothing_starts_a_persons_mistake_again(memory_store: MemoryStore) -> None:
    failed_attempt(memory_store)
    assert is_the_last(SpecError("it does not fit"), memory_store, RUN, allowance(most=5))


def test_another_jobs_attempt_goes_on(memory_store: MemoryStore) -> None:
    failed_attempt(memory_store)
    claim_attempt(memory_store, RUN, facts={"job": "another"})
    assert not is_the_last(AttemptFailed("it broke"), memory_store, RUN, allowance(most=1))


def test_a_store_that_is_down_says_nothing(memory_store: MemoryStore) -> None:
    memory_store.fail["list"] = StoreError("down")
    assert not is_the_last(StoreError("down"), memory_store, RUN, allowance(most=1))


# -- what is told


def test_an_end_is_noted_as_an_event(memory_store: MemoryStore) -> None:
    noted: list[dict[str, Any]] = []
    notices(memory_store, noted).ended(Outcome(run_id=RUN, state="done", attempt=1, ended_s=1.0))
    notices(memory_store, noted).attempt_failed(1, ValueError())
    notices(memory_store, noted).stalled(1, LastStep(4, 1800.0))
    assert [(each["kind"], each["what"], each["delivered"]) for each in noted] == [
        ("notice", "done", False),
        ("notice", "failed", False),
        ("notice", "stalled", False),
    ]
    assert json.dumps(noted)


def test_that_the_attempts_are_used_up_is_told_of_the_one_that_died(memory_store: MemoryStore) -> None:
    claim_attempt(memory_store, RUN, facts={"job": "job"})
    noted: list[dict[str, Any]] = []
    with pytest.raises(AttemptsUsedUp), notices(memory_store, noted).of_attempts_used_up():
        raise AttemptsUsedUp("3 attempts failed")
    assert [each["what"] for each in noted] == ["failed"]
    with notices(memory_store, noted).of_attempts_used_up():
        pass
    assert len(noted) == 1


def test_a_run_without_notify_notes_nothing(memory_store: MemoryStore) -> None:
    noted: list[Any] = []
    silent = Notices(settings=None, store=memory_store, run_id=RUN, note=lambda *_, **__: noted.append(1), environ={})
    silent.ended(Outcome(run_id=RUN, state="done", attempt=1, ended_s=1.0))
    assert (noted, memory_store.objects) == ([], {})
    assert layout.notice(RUN, "done") == f"runs/{RUN}/notices/done.json"


# -- standing still


def test_the_watchdog_knows_the_last_change_of_step() -> None:
    now = [0.0]
    watchdog = Watchdog(100.0, clock=lambda: now[0])
    now[0] = 5.0
    assert watchdog.last_step() == LastStep(0, 5.0)
    watchdog.join("1", 0, None)
    watchdog.join("1", 1, None)
    for at_s, rank, step in ((10.0, 0, 1), (10.0, 1, 1), (20.0, 0, 2), (30.0, 1, 1), (40.0, 0, 2)):
        now[0] = at_s
        watchdog.beat("1", beat(rank, step=step))
    assert watchdog.last_step() == LastStep(2, 20.0)  # ranks that differ by one make no step


def test_groups_that_come_no_further_make_no_step() -> None:
    now = [0.0]
    watchdog = Watchdog(100.0, clock=lambda: now[0])
    for group in ("1", "2", "3"):
        now[0] += 10.0
        watchdog.join(group, 0, None)
        watchdog.beat(group, beat(0, step=7))
        watchdog.beat(group, beat(0, step=7))
    assert watchdog.last_step() == LastStep(7, 30.0)


def test_a_stall_is_told_once() -> None:
    steps = iter([LastStep(3, 0.1), None, LastStep(3, 0.2), LastStep(3, 0.6), LastStep(3, 0.7)])
    told: list[LastStep] = []
    was_told = threading.Event()

    def tell(last: LastStep) -> None:
        told.append(last)
        was_told.set()

    with told_when_stalled(lambda: next(steps), after_s=0.4, tell=tell):
        assert was_told.wait(30.0)
    assert told == [LastStep(3, 0.6)]
    assert next(steps) == LastStep(3, 0.7)


def test_without_a_limit_nobody_looks() -> None:
    def look() -> LastStep:
        raise AssertionError("nobody should look")

    with told_when_stalled(look, after_s=None, tell=lambda _: None):
        assert "stalled" not in [thread.name for thread in threading.enumerate()]

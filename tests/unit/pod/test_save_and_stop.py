"""A head pod that is being ended has its attempt save, and waits no longer than it has to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from orchestrator.errors import StoreError
from orchestrator.pod.save_and_stop import save_and_stop
from orchestrator.release.outcome import Outcome, commit_outcome
from orchestrator.store import Attempt, claim_attempt, layout
from orchestrator.store.attempts import POD_ENDS, end_attempt, stop_reason
from tests.unit.fakes import MemoryStore

RUN, JOB = "demo-1a2b3c4d", "demo-1a2b3c4d-00001"
POD = f"{JOB}-x7k2p-head-9fj2k"


class Stopping:
    """Runs the program with a clock that moves only as it waits; ``at`` says what happens at which second."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.now = 0.0
        self.said: list[str] = []
        self.at: dict[float, Callable[[], object]] = {}

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for due in sorted(moment for moment in self.at if moment <= self.now):
            self.at.pop(due)()

    def run(self, timeout_s: float = 30.0, *, pod: str | None = POD) -> str:
        return save_and_stop(
            self.store,
            RUN,
            job=JOB,
            pod=pod,
            timeout_s=timeout_s,
            say=self.said.append,
            clock=lambda: self.now,
            wait=self.wait,
        )


@pytest.fixture
def stopping(memory_store: MemoryStore) -> Stopping:
    return Stopping(memory_store)


def claim(store: MemoryStore, job: str = JOB, *, host: str = POD) -> Attempt:
    return claim_attempt(store, RUN, facts={"job": job, "host": host})


def asked(store: MemoryStore, number: int) -> bool:
    return layout.stop_request(RUN, number) in store.objects


def test_it_asks_and_returns_once_the_attempt_has_ended(memory_store: MemoryStore, stopping: Stopping) -> None:
    attempt = claim(memory_store)
    reasons: list[str | None] = []
    stopping.at[3.0] = lambda: reasons.append(stop_reason(memory_store, attempt))
    stopping.at[7.0] = lambda: end_attempt(memory_store, attempt, state="stopped", reason="saved at step 7")
    assert stopping.run() == f"Attempt 1 of {RUN} ended (stopped): saved at step 7"
    assert reasons == [POD_ENDS]
    assert stopping.now == 7.0


def test_it_gives_up_when_the_time_is_over(memory_store: MemoryStore, stopping: Stopping) -> None:
    claim(memory_store)
    assert "did not end within 5 s" in stopping.run(timeout_s=5.0)
    assert stopping.now == 5.0
    assert asked(memory_store, 1)


def test_there_is_nothing_to_save(memory_store: MemoryStore, stopping: Stopping) -> None:
    def returns_at_once() -> None:
        assert "nothing to save" in stopping.run()
        assert stopping.now == 0.0

    returns_at_once()  # no attempt
    first = claim(memory_store)
    end_attempt(memory_store, first, state="failed", reason="")
    returns_at_once()  # it has ended
    claim(memory_store, job="another")
    returns_at_once()  # the newest is another pod's
    claim(memory_store)
    commit_outcome(memory_store, Outcome(run_id=RUN, state="done", attempt=3, ended_s=0.0))
    returns_at_once()  # the run is finished, although the attempt died before it said so
    assert not any(asked(memory_store, number) for number in (1, 2, 3))


def test_the_attempt_in_the_head_pod_that_replaced_this_one_goes_on(
    memory_store: MemoryStore, stopping: Stopping
) -> None:
    """A node that was away comes back: its pod ends late, and the job is the same."""
    claim(memory_store)
    claim(memory_store, host=f"{JOB}-m4c8d-head-2b7xq")
    assert "nothing to save" in stopping.run()
    assert stopping.now == 0.0
    assert not any(asked(memory_store, number) for number in (1, 2))


def test_without_a_pods_name_the_job_alone_decides(memory_store: MemoryStore, stopping: Stopping) -> None:
    claim(memory_store, host="anywhere")
    stopping.run(timeout_s=1.0, pod=None)
    assert asked(memory_store, 1)


def test_the_newest_of_several_attempts_of_one_job_is_asked(memory_store: MemoryStore, stopping: Stopping) -> None:
    claim(memory_store)
    second = claim(memory_store)
    stopping.at[1.0] = lambda: end_attempt(memory_store, second, state="stopped", reason="saved")
    assert stopping.run().startswith("Attempt 2")
    assert not asked(memory_store, 1)


def test_a_newer_attempt_ends_the_wait(memory_store: MemoryStore, stopping: Stopping) -> None:
    claim(memory_store)
    stopping.at[2.0] = lambda: claim(memory_store, job="another")
    assert stopping.run() == f"Attempt 2 of {RUN} has taken over from attempt 1."
    assert stopping.now == 2.0


def test_a_store_that_fails_is_asked_again_and_told_of_once(memory_store: MemoryStore, stopping: Stopping) -> None:
    attempt = claim(memory_store)
    memory_store.fail["list"] = StoreError("down")
    stopping.at[4.0] = lambda: memory_store.fail.clear()
    stopping.at[6.0] = lambda: end_attempt(memory_store, attempt, state="stopped", reason="saved")
    assert "ended (stopped)" in stopping.run()
    assert [line for line in stopping.said if "down" in line] == ["Asked again until the time is over: down"]


def test_a_store_that_stays_down_costs_the_time_and_no_error(memory_store: MemoryStore, stopping: Stopping) -> None:
    memory_store.fail["list"] = StoreError("down")
    assert "did not end within 2 s" in stopping.run(timeout_s=2.0)
    assert stopping.now == 2.0

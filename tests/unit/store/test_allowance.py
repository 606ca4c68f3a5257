"""How many attempts one job may make where it is started again and again, and when it gives way to another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import AttemptsUsedUp, Fenced
from orchestrator.store import claim_attempt
from orchestrator.store.attempts import POD_ENDS, Allowance, end_attempt, request_stop, require_turn
from tests.unit.fakes import MemoryStore

RUN, JOB = "run-1", "run-1-00001"


def attempt(store: MemoryStore, state: str | None, *, job: str = JOB, reason: str = "no memory") -> None:
    """One more attempt of a job, which ended so; None died without a word, "displaced" did while its pod ended."""
    claimed = claim_attempt(store, RUN, facts={"job": job})
    if state == "displaced":
        request_stop(store, RUN, claimed.number, reason=POD_ENDS)
    elif state is not None:
        end_attempt(store, claimed, state=state, reason=reason)


def allowed(store: MemoryStore, *, first: int = 1, max_attempts: int = 3, saved_by: int = 0) -> None:
    require_turn(store, RUN, Allowance(job_id=JOB, first=first, max_attempts=max_attempts), saved_by=saved_by)


def test_the_first_attempt_is_always_allowed(memory_store: MemoryStore) -> None:
    allowed(memory_store, max_attempts=1)


def test_so_many_may_fail_and_no_more(memory_store: MemoryStore) -> None:
    attempt(memory_store, "failed")
    attempt(memory_store, "failed")
    allowed(memory_store)
    attempt(memory_store, "failed", reason="rank 1 ran out of memory")
    with pytest.raises(
        AttemptsUsedUp, match=r"run-1: 3 attempts failed, the last one because: rank 1 ran out of memory"
    ) as caught:
        allowed(memory_store)
    assert "submit it again" in caught.value.next_step


def test_one_that_died_without_a_word_failed(memory_store: MemoryStore) -> None:
    attempt(memory_store, None)
    with pytest.raises(AttemptsUsedUp, match="it died without a word"):
        allowed(memory_store, max_attempts=1)


def test_one_that_was_stopped_costs_nothing(memory_store: MemoryStore) -> None:
    """As by a node that is drained: it saved, and goes on elsewhere."""
    for _ in range(10):
        attempt(memory_store, "stopped")
    allowed(memory_store, max_attempts=1)
    attempt(memory_store, "failed")
    with pytest.raises(AttemptsUsedUp, match="1 attempts failed"):
        allowed(memory_store, max_attempts=1)


def test_one_that_died_while_its_pod_ended_costs_nothing(memory_store: MemoryStore) -> None:
    """The time for its save was not enough to say so."""
    for _ in range(10):
        attempt(memory_store, "displaced")
    allowed(memory_store, max_attempts=1)


def test_one_that_died_after_a_persons_stop_failed(memory_store: MemoryStore) -> None:
    attempt(memory_store, None)
    request_stop(memory_store, RUN, 1, reason="headway stop")
    with pytest.raises(AttemptsUsedUp, match="it died without a word"):
        allowed(memory_store, max_attempts=1)


def test_one_that_failed_while_its_pod_ended_failed(memory_store: MemoryStore) -> None:
    attempt(memory_store, "failed")
    request_stop(memory_store, RUN, 1, reason=POD_ENDS)
    with pytest.raises(AttemptsUsedUp, match="no memory"):
        allowed(memory_store, max_attempts=1)


def test_failures_count_from_the_attempt_that_came_further(memory_store: MemoryStore) -> None:
    for _ in range(5):
        attempt(memory_store, "failed")
    with pytest.raises(AttemptsUsedUp, match="3 attempts failed"):
        allowed(memory_store, saved_by=3)
    allowed(memory_store, saved_by=4)


def test_a_job_gives_way_even_where_the_run_came_further_since(memory_store: MemoryStore) -> None:
    attempt(memory_store, "failed", job="run-1-00002")
    attempt(memory_store, "failed")
    with pytest.raises(Fenced):
        allowed(memory_store, saved_by=2)


def test_an_earlier_submissions_failures_do_not_count(memory_store: MemoryStore) -> None:
    for _ in range(5):
        attempt(memory_store, "failed", job="run-1-00001-earlier")
    allowed(memory_store, first=6, max_attempts=1)
    attempt(memory_store, "failed")
    with pytest.raises(AttemptsUsedUp):
        allowed(memory_store, first=6, max_attempts=1)


@pytest.mark.parametrize("state", [None, "failed", "stopped"])
def test_a_job_gives_way_to_one_that_was_submitted_later(memory_store: MemoryStore, state: str | None) -> None:
    attempt(memory_store, "failed")
    attempt(memory_store, state, job="run-1-00002")
    with pytest.raises(Fenced, match=r"run-1-00001 gives way: run-1-00002 works on run-1 by now, as attempt 2"):
        allowed(memory_store)


def test_one_that_came_first_and_took_the_number_is_given_way_to(memory_store: MemoryStore) -> None:
    attempt(memory_store, None, job="run-1-other")
    with pytest.raises(Fenced):
        allowed(memory_store)


@given(st.lists(st.sampled_from(["failed", "stopped", "displaced", None]), max_size=8), st.integers(1, 5))
def test_the_failures_since_the_submission_decide(ends: list[str | None], max_attempts: int) -> None:
    store = MemoryStore()
    for state in ends:
        attempt(store, state)
    if sum(state in ("failed", None) for state in ends) >= max_attempts:
        with pytest.raises(AttemptsUsedUp):
            allowed(store, max_attempts=max_attempts)
    else:
        allowed(store, max_attempts=max_attempts)

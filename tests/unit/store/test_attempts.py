"""Attempts: one number each, the newest fences the rest, and a stop is asked for once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator.errors import Fenced
from orchestrator.store import Attempt, WorkerGroup, claim_attempt, claim_group, layout
from orchestrator.store.attempts import (
    attempt_end,
    end_attempt,
    ensure_newest,
    ensure_newest_group,
    newest_attempt,
    read_attempt,
    request_stop,
    stop_reason,
)
from tests.unit.fakes import MemoryStore

NUM_RACERS = 16


def claim(store: MemoryStore) -> Attempt:
    return claim_attempt(store, "run-1", facts={"host": "here"})


def test_numbers_start_at_one_and_go_up(memory_store: MemoryStore) -> None:
    assert newest_attempt(memory_store, "run-1") == 0
    attempts = [claim(memory_store) for _ in range(3)]
    assert [attempt.number for attempt in attempts] == [1, 2, 3]
    assert newest_attempt(memory_store, "run-1") == 3
    assert newest_attempt(memory_store, "run-10") == 0
    assert attempts[1].prefix == f"00002-{attempts[1].nonce}"
    found = read_attempt(memory_store, "run-1", 2)
    assert (found["nonce"], found["number"], found["host"]) == (attempts[1].nonce, 2, "here")


def test_racers_get_a_number_each(memory_store: MemoryStore) -> None:
    barrier = threading.Barrier(NUM_RACERS)

    def race(_: int) -> Attempt:
        barrier.wait()
        return claim(memory_store)

    with ThreadPoolExecutor(NUM_RACERS) as pool:
        attempts = list(pool.map(race, range(NUM_RACERS)))
    assert sorted(attempt.number for attempt in attempts) == list(range(1, NUM_RACERS + 1))
    assert len({attempt.nonce for attempt in attempts}) == NUM_RACERS
    for attempt in attempts:
        assert read_attempt(memory_store, "run-1", attempt.number)["nonce"] == attempt.nonce


def test_numbers_beyond_five_digits_are_still_the_newest(memory_store: MemoryStore) -> None:
    memory_store.create_json(layout.attempt("run-1", 99_999), {})
    assert claim(memory_store).number == 100_000
    assert claim(memory_store).number == 100_001


def test_a_newer_attempt_fences_the_older(memory_store: MemoryStore) -> None:
    first = claim(memory_store)
    ensure_newest(memory_store, first)
    second = claim(memory_store)
    ensure_newest(memory_store, second)
    with pytest.raises(Fenced, match="Attempt 1 of run-1 is fenced: attempt 2 has taken over"):
        ensure_newest(memory_store, first)
    assert stop_reason(memory_store, first) == "attempt 2 has taken over"
    assert stop_reason(memory_store, second) is None


def test_a_stop_is_asked_for_once_and_of_one_attempt(memory_store: MemoryStore) -> None:
    first = claim(memory_store)
    request_stop(memory_store, "run-1", 1, reason="maintenance")
    request_stop(memory_store, "run-1", 1, reason="again")
    assert stop_reason(memory_store, first) == "maintenance"
    assert newest_attempt(memory_store, "run-1") == 1, "a request is no attempt"
    ensure_newest(memory_store, first)
    second = claim(memory_store)
    assert second.number == 2
    assert stop_reason(memory_store, second) is None


def test_a_request_for_an_attempt_to_come_is_no_attempt(memory_store: MemoryStore) -> None:
    request_stop(memory_store, "run-1", 7, reason="early")
    assert claim(memory_store).number == 1


def test_an_end_is_written_once(memory_store: MemoryStore) -> None:
    attempt = claim(memory_store)
    assert attempt_end(memory_store, "run-1", 1) is None
    end_attempt(memory_store, attempt, state="stopped", reason="Ctrl-C")
    end_attempt(memory_store, attempt, state="done", reason="")
    ended = attempt_end(memory_store, "run-1", 1)
    assert ended is not None
    assert (ended["state"], ended["reason"]) == ("stopped", "Ctrl-C")
    assert newest_attempt(memory_store, "run-1") == 1


# -- groups of workers


def test_groups_are_counted_within_their_attempt(memory_store: MemoryStore) -> None:
    first = claim(memory_store)
    groups = [claim_group(memory_store, first) for _ in range(3)]
    assert [group.number for group in groups] == [1, 2, 3]
    assert len({group.nonce for group in groups}) == 3
    assert newest_attempt(memory_store, "run-1") == 1, "a group is no attempt"
    second = claim(memory_store)
    assert (second.number, claim_group(memory_store, second).number) == (2, 1)
    assert memory_store.get_json(layout.worker_group("run-1", 1, 3))["nonce"] == groups[2].nonce


def test_racing_groups_get_a_number_each(memory_store: MemoryStore) -> None:
    attempt, barrier = claim(memory_store), threading.Barrier(NUM_RACERS)

    def race(_: int) -> WorkerGroup:
        barrier.wait()
        return claim_group(memory_store, attempt)

    with ThreadPoolExecutor(NUM_RACERS) as pool:
        groups = list(pool.map(race, range(NUM_RACERS)))
    assert sorted(group.number for group in groups) == list(range(1, NUM_RACERS + 1))


def test_a_newer_group_fences_the_older(memory_store: MemoryStore) -> None:
    attempt = claim(memory_store)
    first = claim_group(memory_store, attempt)
    ensure_newest_group(memory_store, first)
    second = claim_group(memory_store, attempt)
    ensure_newest_group(memory_store, second)
    with pytest.raises(Fenced, match=r"Attempt 1 \(group 1\) of run-1 is fenced: group 2 has taken over"):
        ensure_newest_group(memory_store, first)
    assert stop_reason(memory_store, attempt, first) == "group 2 has taken over"
    assert stop_reason(memory_store, attempt, second) is None
    assert stop_reason(memory_store, attempt) is None


def test_a_newer_attempt_fences_every_group_of_the_older(memory_store: MemoryStore) -> None:
    first = claim(memory_store)
    group = claim_group(memory_store, first)
    second = claim(memory_store)
    with pytest.raises(Fenced, match="Attempt 1 of run-1 is fenced: attempt 2 has taken over"):
        ensure_newest_group(memory_store, group)
    assert stop_reason(memory_store, first, group) == "attempt 2 has taken over"
    with pytest.raises(Fenced, match="Attempt 1 of run-1 is fenced"):
        claim_group(memory_store, first)
    ensure_newest_group(memory_store, claim_group(memory_store, second))


def test_a_request_to_stop_reaches_the_group(memory_store: MemoryStore) -> None:
    attempt = claim(memory_store)
    group = claim_group(memory_store, attempt)
    request_stop(memory_store, "run-1", 1, reason="maintenance")
    ensure_newest_group(memory_store, group)
    assert stop_reason(memory_store, attempt, group) == "maintenance"

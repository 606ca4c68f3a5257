"""Events arrive whole, in order and once, whatever the store does meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import StoreError
from orchestrator.record import EventLog, EventReader
from orchestrator.record.events import LOST_S, MIN_FLUSH_S, flush_interval_s
from orchestrator.store import Attempt, claim_attempt, layout
from tests.unit.fakes import MemoryStore


@pytest.fixture
def attempt(memory_store: MemoryStore) -> Attempt:
    return claim_attempt(memory_store, "run-1", facts={})


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [event["n"] for event in events]


def segments(store: MemoryStore) -> list[str]:
    return [key for key in store.objects if key.startswith(layout.events("run-1"))]


def test_events_come_back_in_order(memory_store: MemoryStore, attempt: Attempt) -> None:
    log, reader = EventLog(memory_store, attempt, "train"), EventReader(memory_store, "run-1")
    assert reader.poll() == []
    for n in range(30):
        log.append("step", n=n, text="ä\u2028\n", size=1.5)
        if n % 10 == 9:
            log.flush()
    events = reader.poll()
    assert numbers(events) == list(range(30))
    fields = {"n": 0, "text": "ä\u2028\n", "size": 1.5}
    assert events[0] == {"time_s": events[0]["time_s"], "kind": "step", "attempt": 1, **fields}
    assert len(segments(memory_store)) == 3
    assert reader.poll() == []
    log.append("step", n=30)
    log.close()
    assert numbers(reader.poll()) == [30]
    assert numbers(EventReader(memory_store, "run-1").poll()) == list(range(31))


def test_nothing_appended_writes_nothing(memory_store: MemoryStore, attempt: Attempt) -> None:
    log = EventLog(memory_store, attempt, "train")
    log.flush()
    log.close()
    assert segments(memory_store) == []


def test_several_writers_and_attempts_do_not_meet(memory_store: MemoryStore, attempt: Attempt) -> None:
    second = claim_attempt(memory_store, "run-1", facts={})
    logs = [EventLog(memory_store, a, writer) for a in (attempt, second) for writer in ("train", "train", "pipeline")]
    for n, log in enumerate(logs):
        log.append("step", n=n)
    for log in reversed(logs):
        log.close()
    assert sorted(numbers(EventReader(memory_store, "run-1").poll())) == [0, 1, 2, 3, 4, 5]
    assert sorted(numbers(EventReader(memory_store, "run-1", from_attempt=2).poll())) == [3, 4, 5]
    assert EventReader(memory_store, "run-2").poll() == []


def test_what_could_not_be_written_comes_later_and_once(memory_store: MemoryStore, attempt: Attempt) -> None:
    log = EventLog(memory_store, attempt, "train")
    memory_store.fail["create"] = StoreError("down")
    for n in range(3):
        log.append("step", n=n)
        with pytest.raises(StoreError, match="down"):
            log.flush()
    del memory_store.fail["create"]
    log.append("step", n=3)
    log.close()
    assert numbers(EventReader(memory_store, "run-1").poll()) == [0, 1, 2, 3]


class AnswerLost(MemoryStore):
    """Its next creates arrive, and their answers do not."""

    num_lost = 0

    def create(self, key: str, data: bytes) -> None:
        super().create(key, data)
        if self.num_lost:
            self.num_lost -= 1
            raise StoreError("no answer")


def test_a_lost_answer_neither_repeats_nor_blocks(attempt: Attempt) -> None:
    store = AnswerLost(prefix="headway")
    log = EventLog(store, attempt, "train")
    log.append("step", n=0)
    store.num_lost = 2
    for n in (1, 2):
        with pytest.raises(StoreError, match="no answer"):
            log.flush()
        log.append("step", n=n)
    log.close()
    assert numbers(EventReader(store, "run-1").poll()) == [0, 1, 2]


def test_close_gives_up_with_a_warning(
    memory_store: MemoryStore, attempt: Attempt, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventLog(memory_store, attempt, "train")
    memory_store.fail["create"] = StoreError("down")
    log.append("step", n=0)
    log.close()
    assert "The last events of run-1 are lost: down" in caplog.text


@pytest.mark.parametrize("read_before", [0, 150])
def test_many_segments_are_read_by_few_requests(memory_store: MemoryStore, attempt: Attempt, read_before: int) -> None:
    log, reader, seen = EventLog(memory_store, attempt, "train"), EventReader(memory_store, "run-1"), []
    for n in range(250):
        log.append("step", n=n)
        log.flush()
        if n + 1 == read_before:
            seen = numbers(reader.poll())
    log.close()
    assert len(segments(memory_store)) == 252
    counted = CountedGets(memory_store)
    reader._store = counted
    assert seen + numbers(reader.poll()) == list(range(250))
    assert counted.num_gets == (100 if read_before else 2 + 50)


class CountedGets(MemoryStore):
    num_gets = 0

    def __init__(self, of: MemoryStore) -> None:
        super().__init__(of.bucket, of.prefix, client=of._connection)

    def get(self, key: str) -> bytes:
        self.num_gets += 1
        return super().get(key)


class RefusesOnce(MemoryStore):
    """The first create of gathered segments fails."""

    num_refused = 0

    def create(self, key: str, data: bytes) -> None:
        if key.endswith("-00001-00100.jsonl") and not self.num_refused:
            self.num_refused += 1
            raise StoreError("down")
        super().create(key, data)


def test_what_cannot_be_gathered_is_gathered_later(attempt: Attempt, caplog: pytest.LogCaptureFixture) -> None:
    store = RefusesOnce(prefix="headway")
    log = EventLog(store, attempt, "train")
    for n in range(101):
        log.append("step", n=n)
        log.flush()
    log.close()
    assert "not gathered yet: down" in caplog.text
    assert [key.endswith("-00001-00101.jsonl") for key in segments(store)].count(True) == 1
    assert numbers(EventReader(store, "run-1").poll()) == list(range(101))


@given(age_s=st.floats(0, 1e8))
def test_a_cluster_that_vanishes_takes_ten_seconds_of_the_record_at_most(age_s: float) -> None:
    assert MIN_FLUSH_S <= flush_interval_s(age_s) <= LOST_S / 2
    assert flush_interval_s(0.0) == MIN_FLUSH_S


def test_foreign_objects_are_passed_over(memory_store: MemoryStore, attempt: Attempt) -> None:
    memory_store.create(layout.events("run-1") + "notes.txt", b"not json")
    memory_store.create(layout.events("run-1") + "00001-ab/train.partial", b"not json")
    assert EventReader(memory_store, "run-1").poll() == []
